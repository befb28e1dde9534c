"""The maths of GRPO: pure functions on tensors, torch only. Axes as in `grpo_lab.types`, log-probabilities in nats."""
