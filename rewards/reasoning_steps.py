"""Whether the reasoning goes in visible steps."""

import re
from typing import Literal

from grpo_lab.scoring import reward
from grpo_lab.text import tag
from grpo_lab.types import Completion

# "Step 3:", "3.", "3)", "- ", "* ", "First,", "Finally," at the start of a line, and what the line says after it.
_STEP = re.compile(
    r"^[ \t]*(?:\*\*)?(?:step\s+[0-9]+\b[:.)]?|[0-9]+[.)](?=\s)|[-*\u2022](?=\s)|"
    r"(?:first|second|third|fourth|fifth|next|then|after that|finally|lastly)(?:ly)?,)(?P<step>.*)$",
    re.IGNORECASE | re.MULTILINE,
)

_LABEL = re.compile(r"\bstep\s+[0-9]+")


@reward(range=(0.0, 1.0))
def reasoning_steps(
    completion: Completion,
    *,
    target: int = 3,
    min_words: int = 3,
    within: Literal["completion", "think", "reasoning"] = "completion",
) -> float:
    """Steps found / `target`, at most 1.0: lines that begin as `Step 1:`, `1.`, `-`, `First,` or `Finally,` do.

    A step must say something (`min_words` words) that no other step says. It measures looks, not thought, and is soon
    gamed: use it to get a model to show steps at all, with a small weight. `within` names the tag whose content is
    looked at; without that tag there are no steps.
    """
    if target < 1:
        raise ValueError(f"reasoning_steps needs a target of at least 1, got {target}")
    text = completion.text if within == "completion" else tag(completion.text, within) or ""
    said = (_LABEL.sub(" ", match["step"].casefold()) for match in _STEP.finditer(text))
    words = [re.findall(r"\w+", each) for each in said]
    distinct = {tuple(step) for step in words if len(step) >= min_words}
    return min(1.0, len(distinct) / target)
