"""How close a translation is to a gold one, by shared character sequences."""

from typing import Any, Literal

from grpo_lab.scoring import reward
from grpo_lab.text_metrics import chrf as metric
from grpo_lab.text_metrics import gold_texts
from grpo_lab.types import Completion


@reward(range=(0.0, 1.0))
def chrf(completion: Completion, *, answer: Any, word_order: Literal[0, 2] = 0) -> float:
    """Sentence chrF against the gold texts, from 0 to 1: sacrebleu's. `word_order: 2` is chrF++.

    The column `answer` is a text or a list of texts. White space does not count, and recall counts twice as much as
    precision: too long costs less than too short.
    """
    return metric(completion.text, gold_texts(answer), word_order=word_order)
