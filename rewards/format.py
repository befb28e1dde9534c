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
    credit: Literal["all", "graded", "count"] = "all",
    prefilled: bool = False,
) -> float:
    r"""1.0 if the whole completion is well-formed, else 0.0.

    Styles: "tags" = each tag once, in order, with something in it; "hash" = one `####`, and a number after it on the
    last line; "boxed" = one closed \boxed{} with something in it; "regex" = the pattern, where a dot matches line
    breaks. White space around the completion never counts.

    With `strict: false` other text may stand around the tags, the `####` line or the pattern's match. `prefilled` says
    that the prompt already ends with the first tag, so the completion starts inside it.

    `credit` says what a part of it is worth: "all" nothing; "graded" 0.5 for a completion that is well-formed but for
    text around it; "count" (tags only) the share of opening and closing tags that stand there exactly once, with
    nothing taken off for text elsewhere: a way up for a model that has none of them, but easily had, so keep it small.

    Args:
        style: "tags", "hash", "boxed" or "regex", as above.
        tags: the tags' names in their order, with style tags: [reasoning, answer] for the other usual pair.
        pattern: a Python regular expression, with style regex.
        credit: "all" pays for the whole form only, "graded" half for one with text around it, "count" for single tags.
    """
    text = completion.text.strip()
    if style == "tags":
        text = f"<{tags[0]}>{text}" if prefilled else text
        if credit == "count":
            return _share_of_edges(text, tags, prefilled=prefilled)
    elif credit == "count" or prefilled:
        raise ValueError(f"format: {'credit: count' if credit == 'count' else 'prefilled'} goes with style: tags only")
    if credit == "graded":
        levels = (_well_formed(text, style, tags, pattern, strict=each) for each in (True, False))
        return sum(levels) / 2
    return float(_well_formed(text, style, tags, pattern, strict=strict))


def _well_formed(text: str, style: str, tags: list[str], pattern: str | None, *, strict: bool) -> bool:
    if style == "tags":
        return _has_tags(text, tags, strict=strict)
    if style == "hash":
        return _has_hash_line(text, strict=strict)
    if style == "boxed":
        return text.count(r"\boxed") == 1 and bool(boxed(text))
    if pattern is None:
        raise ValueError("format: style regex needs a pattern")
    search = re.fullmatch if strict else re.search
    return search(pattern, text, re.DOTALL) is not None


def _share_of_edges(text: str, names: list[str], *, prefilled: bool) -> float:
    edges = [edge for name in names for edge in (f"<{name}>", f"</{name}>")]
    wanted = edges[1:] if prefilled else edges  # the one that the prompt wrote earns nothing
    return sum(text.count(edge) == 1 for edge in wanted) / len(wanted)


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
