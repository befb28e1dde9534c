"""Whether a classification is right."""

from typing import Literal

from grpo_lab.scoring import reward
from grpo_lab.text import extract as extracted
from grpo_lab.text_metrics import gold_label, label_of
from grpo_lab.types import Completion


@reward(range=(0.0, 1.0))
def label(
    completion: Completion,
    *,
    answer: str | int,
    labels: tuple[str, ...] = (),
    strict: bool = True,
    extract: Literal["none", "xml", "hash", "boxed"] = "none",
) -> float:
    r"""1.0 if the label in the completion is that in the column `answer`, else 0.0.

    `labels` are all there are (at least two); the column holds one of them, or its number in that list, from 0. Case,
    quotes and a full stop do not matter. Strict: the answer is the label and nothing else. `strict: false` takes the
    one label that stands in it as a whole word; two different ones score 0, but "not positive" is read as positive.
    The answer is the whole completion, or what stands in <answer> tags ("xml"), after `####` ("hash") or in \boxed{}.

    Args:
        extract: "none" the whole completion, "xml" in <answer> tags, "hash" after `####`, "boxed" in \boxed{}; the last such place.
    """
    if len(labels) < 2:
        raise ValueError("label needs the option labels: all labels there are, at least two")
    text = extracted(completion.text, extract)
    return float(text is not None and label_of(text, labels, strict=strict) == gold_label(answer, labels))
