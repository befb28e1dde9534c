"""Whether the answer equals a gold answer as SQuAD compares them."""

from typing import Any, Literal

from grpo_lab.scoring import reward
from grpo_lab.text import extract as extracted
from grpo_lab.text_metrics import exact_match as metric
from grpo_lab.text_metrics import gold_texts, without_giving_up
from grpo_lab.types import Completion


@reward(range=(0.0, 1.0))
def exact_match(
    completion: Completion,
    *,
    answer: Any,
    extract: Literal["none", "xml", "hash", "boxed"] = "none",
    unanswerable: str = "unanswerable",
) -> float:
    r"""1.0 if the answer equals a gold answer after SQuAD's normalisation (case, punctuation, articles), else 0.0.

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
