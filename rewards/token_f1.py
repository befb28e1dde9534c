"""How many words the answer shares with a gold answer."""

from typing import Any, Literal

from grpo_lab.scoring import reward
from grpo_lab.text import extract as extracted
from grpo_lab.text_metrics import gold_texts, without_giving_up
from grpo_lab.text_metrics import token_f1 as metric
from grpo_lab.types import Completion


@reward(range=(0.0, 1.0))
def token_f1(
    completion: Completion,
    *,
    answer: Any,
    extract: Literal["none", "xml", "hash", "boxed"] = "none",
    unanswerable: str = "unanswerable",
) -> float:
    r"""F1 between the words of the answer and those of the best gold answer, after SQuAD's normalisation; from 0 to 1.

    The column `answer` is a text, a list of texts (any of them is right), or SQuAD's `{text: [...]}`. An empty list or
    text is a question without answer: right are an empty answer and the word that `unanswerable` names.

    The answer is the whole completion, or what stands in <answer> tags ("xml"), after `####` ("hash") or in \boxed{}
    ("boxed"): the last such place. A completion without that place scores 0, also where no answer is right.

    Args:
        extract: "none" the whole completion, "xml" in <answer> tags, "hash" after `####`, "boxed" in \boxed{}; the last such place.
    """
    found = extracted(completion.text, extract)
    if found is None:
        return 0.0
    return metric(without_giving_up(found, unanswerable), gold_texts(answer))
