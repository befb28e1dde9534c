"""Whether a completion came to an end by itself."""

from grpo_lab.scoring import reward
from grpo_lab.types import Completion


@reward
def finished(completion: Completion) -> float:
    """1.0 if the completion ended with an end-of-sequence token, 0.0 if the length limit cut it off.

    With `only_if: finished` another reward pays only for answers that end.
    """
    return float(completion.finished)
