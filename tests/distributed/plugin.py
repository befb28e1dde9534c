"""Rewards for runs by two processes."""

import os

from grpo_lab.scoring import reward


class Remembers:
    """The number of completions scored so far: its state must survive, and see every one."""

    def __init__(self):
        self.calls = 0

    def __call__(self, completion) -> float:
        self.calls += 1
        return float(self.calls)

    def state_dict(self):
        return self.calls

    def load_state_dict(self, state):
        self.calls = state


remembers = reward(Remembers())


@reward
def variety(group) -> list[float]:
    """Different tokens of an answer."""
    return [len(set(completion.token_ids)) / 8 for completion in group.completions]


@reward
def broken(group) -> list[float]:
    """Breaks its contract in the second process only."""
    return [0.0] * (7 if os.environ.get("RANK") == "1" else len(group.completions))


@reward
def siblings(group) -> list[float]:
    """How many siblings are longer; fails where an answer has one token only."""
    lengths = [len(completion.token_ids) for completion in group.completions]
    return [float(sum(own < other for other in lengths)) if own > 1 else 1 / 0 for own in lengths]


@reward
def whole_batch(completions, log_metric, **kwargs):
    """How long an answer is beside the mean of the step."""
    mean = sum(map(len, completions)) / len(completions)
    log_metric("mean", mean)
    return [len(completion) - mean for completion in completions]
