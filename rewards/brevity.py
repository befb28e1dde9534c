"""Among the right answers to one prompt, the short ones are worth more."""

from typing import Literal

from grpo_lab.answers import Gold, final_answers, gold_answers, same_answer
from grpo_lab.scoring import reward
from grpo_lab.types import Group


@reward(range=(0.0, 1.0))
def brevity(
    group: Group,
    *,
    answer: Gold | None,
    unit: Literal["tokens", "characters"] = "tokens",
    extract: Literal["auto", "hash", "boxed", "xml", "last"] = "auto",
    strict: bool = True,
) -> list[float | None]:
    """1.0 for the shortest right answer among the siblings, 0.0 for the longest, in a line between; wrong ones get 0.0.

    Being short is worth something only to an answer that is right, and only against answers that are right: however
    short a wrong one is, it neither gains nor moves the others. Right answers of one length (or a single one) get 1.0.
    None for all where the column `answer` is null; `answer`, `extract` and `strict` are those of the reward accuracy.

    Args:
        unit: what is counted; tokens are all sampled ids.
    """
    if answer is None:
        return [None] * len(group.completions)
    golds = gold_answers(answer)
    is_right = [
        any(same_answer(gold, each) for gold in golds for each in final_answers(one.text, place=extract, strict=strict))
        for one in group.completions
    ]
    sizes = [len(one.token_ids if unit == "tokens" else one.text) for one in group.completions]
    right_sizes = [size for size, right in zip(sizes, is_right, strict=True) if right]
    if not right_sizes:
        return [0.0] * len(sizes)
    shortest, longest = min(right_sizes), max(right_sizes)
    spread = longest - shortest
    return [
        (1.0 if spread == 0 else (longest - size) / spread) if right else 0.0
        for size, right in zip(sizes, is_right, strict=True)
    ]
