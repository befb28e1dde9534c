"""What a run leaves behind: its folder, logs, checkpoints, and the names of its metrics."""
