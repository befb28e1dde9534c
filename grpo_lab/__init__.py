"""grpo-lab: GRPO (Group Relative Policy Optimization) whose numbers can be checked. Start with README.md."""

__version__ = "0.1.0"
