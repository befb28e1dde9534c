"""What the commands do, between the command line and the parts; imported only when a command runs."""
