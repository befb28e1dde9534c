"""How many words, word pairs or word sequences the text shares with a gold text."""

from typing import Any, Literal

from grpo_lab.scoring import reward
from grpo_lab.text_metrics import gold_texts
from grpo_lab.text_metrics import rouge as metric
from grpo_lab.types import Completion


@reward(range=(0.0, 1.0))
def rouge(
    completion: Completion,
    *,
    answer: Any,
    kind: Literal["rouge1", "rouge2", "rougeL"] = "rougeL",
    stemmer: bool = False,
    max_characters: int = 20_000,
) -> float | None:
    """ROUGE F1 against the best gold text, from 0 to 1; None where the gold texts have no words that ROUGE can read.

    The column `answer` is a text or a list of texts. `kind`: rouge1 counts shared words, rouge2 shared word pairs,
    rougeL the longest common subsequence; `stemmer` takes off English endings first. ROUGE reads the letters a to z and
    digits only. The order of words is nothing to rouge1, so a bag of keywords scores high there. A completion longer
    than `max_characters` scores 0: the subsequence takes time in its length times the gold's.
    """
    if len(completion.text) > max_characters:
        return 0.0
    return metric(completion.text, gold_texts(answer), kind=kind, stemmer=stemmer)
