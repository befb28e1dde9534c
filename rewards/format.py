"""Whether a completion has the form that the prompt asks for."""

import re
from typing import Literal

from grpo_lab.scoring import reward
from grpo_lab.text import boxed, hash_answer, parse_number
from grpo_lab.types import Completion


@reward(range=(0.0, 1.0))
def format(  # noqa: A001 - the file's name is the reward's name
    completion: Completion,
    *,
    style: Literal["tags", "hash", "boxed", "regex"] = "tags",
    tags: list[str] = ["think", "answer"],  # noqa: B006 - shown as the option's default, never changed
    pattern: str | None = None,
    strict: bool = True,
    prefilled: bool = False,
) -> float:
    r"""1.0 if the whole completion is well-formed, else 0.0.

    Styles: "tags" = each tag once, in order, with something in it; "hash" = one `####`, and a number after it on the
    last line; "boxed" = one closed \boxed{} with something in it; "regex" = the pattern, where a dot matches line
    breaks. White space around the completion never counts.

    With `strict: false` other text may stand around the tags, the `####` line or the pattern's match. `prefilled` says
    that the prompt already ends with the first tag, so the completion starts inside it.
    """
    text = completion.text.strip()
    if style == "tags":
        return float(_has_tags(f"<{tags[0]}>{text}" if prefilled else text, tags, strict=strict))
    if style == "hash":
        return float(_has_hash_line(text, strict=strict))
    if style == "boxed":
        return float(text.count(r"\boxed") == 1 and bool(boxed(text)))
    if pattern is None:
        raise ValueError("format: style regex needs a pattern")
    search = re.fullmatch if strict else re.search
    return float(search(pattern, text, re.DOTALL) is not None)


def _has_tags(text: str, names: list[str], *, strict: bool) -> bool:
    # Counting first keeps the pattern below from ever having two places to try: it takes linear time.
    if any(text.count(edge) != 1 for name in names for edge in (f"<{name}>", f"</{name}>")):
        return False
    gap = r"\s*" if strict else ".*"
    pairs = [rf"<{re.escape(name)}>(.*)</{re.escape(name)}>" for name in names]
    match = re.fullmatch(gap + gap.join(pairs) + gap, text, re.DOTALL)
    return match is not None and all(content.strip() for content in match.groups())


def _has_hash_line(text: str, *, strict: bool) -> bool:
    if text.count("####") != 1 or parse_number(hash_answer(text) or "") is None:
        return False
    return not strict or text.rpartition("\n")[2].startswith("####")
