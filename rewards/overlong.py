"""A penalty for completions that come close to the length limit."""

from grpo_lab.scoring import reward
from grpo_lab.types import Completion


@reward(range=(-1.0, 0.0))
def overlong(completion: Completion, *, max_length: int | None = None, buffer: int | None = None) -> float:
    """Soft overlong penalty: 0 up to max_length - buffer tokens, then falling in a line to -1 at max_length.

    DAPO (arXiv:2503.14476), eq. 13: ((max_length - buffer) - n) / buffer in between, -1 beyond. n counts all sampled
    ids, the end-of-sequence token included. The preset `dapo` adds this reward by itself (`overlong_buffer`).

    Args:
        max_length: the sampling's max_completion_length, in tokens; it must be given.
        buffer: over how many tokens before it the penalty falls; it must be given.
    """
    if max_length is None or buffer is None or not 0 < buffer <= max_length:
        raise ValueError(
            "overlong needs options max_length (the sampling's max_completion_length) and buffer (1 to max_length), "
            f"in tokens; got {max_length} and {buffer}"
        )
    return max(-1.0, min(0.0, (max_length - buffer - len(completion.token_ids)) / buffer))
