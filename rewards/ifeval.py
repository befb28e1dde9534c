"""Whether checkable instructions are followed: the kinds of IFEval."""

import inspect
import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from grpo_lab.scoring import reward
from grpo_lab.text_metrics import missing_package
from grpo_lab.types import Completion

Check = Callable[..., bool]
CHECKS: dict[str, Check] = {}
ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|No|[A-Z])\.)$")
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？।]+")
_HIGHLIGHT = re.compile(r"(?<!\*)\*{1,3}(?=[^\s*])[^\n*]+(?<=\S)\*{1,3}")


@reward(range=(0.0, 1.0))
def ifeval(
    completion: Completion,
    *,
    instruction_id_list: list[str],
    kwargs: list[dict[str, Any]],
    loose: bool = False,
    all_of: bool = False,
) -> float:
    """The share of the instructions that the completion follows; with `all_of` 1.0 if it follows all, else 0.0.

    The columns are IFEval's (arXiv:2311.07911): `instruction_id_list`, and `kwargs` with the values of each. All 25
    kinds are known; how each is read stands at its function in this file. An empty completion follows none.

    `loose` also accepts a text that follows an instruction without its first line, its last line or its stars: for
    measuring models that introduce their answers. These are surface checks that a text of nonsense can pass: combine
    them with a reward for what is said. Numbers differ from IFEval's own code, whose words, sentences and languages
    are cut and guessed by other libraries.
    """
    if len(instruction_id_list) != len(kwargs) or not kwargs:
        raise ValueError(f"{len(instruction_id_list)} instructions with {len(kwargs)} kwargs: both need one of each")
    pairs = zip(instruction_id_list, kwargs, strict=True)
    checks = [_bound(name, given) for name, given in pairs]  # a wrong row is an error also where the text is empty
    texts = [text for text in (_variants(completion.text) if loose else [completion.text]) if text.strip()]
    followed = [any(check(text, **given) for text in texts) for check, given in checks]
    return float(all(followed)) if all_of else sum(followed) / len(followed)


def _bound(name: str, given: dict[str, Any]) -> tuple[Check, dict[str, Any]]:
    """The check with its values; those that are null belong to other instructions of the data set."""
    if name not in CHECKS:
        raise ValueError(f'unknown instruction "{name}"; known: {", ".join(sorted(CHECKS))}')
    needed = list(inspect.signature(CHECKS[name]).parameters)[1:]
    values = {key: value for key, value in (given or {}).items() if value is not None}
    if set(values) != set(needed):
        raise ValueError(f'"{name}" needs the kwargs {needed}, found {sorted(values)}')
    return CHECKS[name], values


def _variants(text: str) -> list[str]:
    """As it is, without the first line, the last, or both; each with and without stars."""
    lines = text.strip().split("\n")
    cuts = [text, *("\n".join(cut).strip() for cut in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cuts, *(cut.replace("*", "") for cut in cuts)]


def _instruction(name: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS[name] = check
        return check

    return register


def _relates(number: int, relation: str, bound: int) -> bool:
    if relation not in ("at least", "less than"):
        raise ValueError(f'unknown relation "{relation}": at least, or less than')
    return number >= bound if relation == "at least" else number < bound


def _occurrences(word: str, text: str) -> int:
    """How often a word or phrase stands in the text, whole, in any case."""
    return len(re.findall(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", text.casefold()))


def _num_with_words(parts: list[str]) -> int:
    return sum(any(char.isalnum() for char in part) for part in parts)


def _paragraphs(text: str, divider: str) -> list[str]:
    """The parts between dividers, of which none may be empty but for one before the first and after the last."""
    parts = [part.strip() for part in re.split(divider, text)]
    return parts[not parts[0] : len(parts) - (len(parts) > 1 and not parts[-1])]


@_instruction("keywords:existence")
def _existence(text: str, keywords: list[str]) -> bool:
    """Every keyword stands there as a whole word."""
    return all(_occurrences(word, text) for word in keywords)


@_instruction("keywords:frequency")
def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _relates(_occurrences(keyword, text), relation, frequency)


@_instruction("keywords:forbidden_words")
def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(_occurrences(word, text) for word in forbidden_words)


@_instruction("keywords:letter_frequency")
def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """A character, in either case."""
    return _relates(text.casefold().count(letter.casefold()), let_relation, let_frequency)


@_instruction("language:response_language")
def _language(text: str, language: str) -> bool:
    return _language_of(text) == language


@cache
def _identifier() -> Any:
    try:
        import py3langid
    except ImportError as error:
        raise missing_package("py3langid", "metrics", error) from error
    return py3langid


def _language_of(text: str) -> str | None:
    """The likeliest language of a text, None if it has no letters. Case is taken off, which would mislead it."""
    plain = text.lower()
    return str(_identifier().classify(plain)[0]) if any(char.isalpha() for char in plain) else None


@_instruction("length_constraints:number_sentences")
def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    """A sentence ends with . ! or ? before white space, and says something; abbreviations and initials do not end it."""
    count, start, last = 0, 0, len(text.rstrip())
    for end in _SENTENCE_END.finditer(text):
        if not _ABBREVIATION.search(text[max(start, end.end() - 8) : end.end()]) or end.end() >= last:
            count += any(char.isalnum() for char in text[start : end.end()])
            start = end.end()
    count += any(char.isalnum() for char in text[start:])
    return _relates(count, relation, num_sentences)


@_instruction("length_constraints:number_words")
def _words(text: str, num_words: int, relation: str) -> bool:
    return _relates(len(re.findall(r"\w+", text)), relation, num_words)


@_instruction("length_constraints:number_paragraphs")
def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Exactly so many, with *** between them."""
    found = _paragraphs(text, r"(?<!\*)\*\*\*(?!\*)")
    return len(found) == num_paragraphs and all(found)


@_instruction("length_constraints:nth_paragraph_first_word")
def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly so many paragraphs, with empty lines between them; the n-th (from 1) begins with the word."""
    found = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    if len(found) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    word = re.match(r"[\W_]*([^\W_]+(?:['’-]\w+)*)", found[nth_paragraph - 1].casefold())
    return word is not None and word[1] == first_word.casefold()


@_instruction("detectable_content:number_placeholders")
def _placeholders(text: str, num_placeholders: int) -> bool:
    """At least so many, as in [name]."""
    return _num_with_words(re.findall(r"\[([^\[\]\n]*)\]", text)) >= num_placeholders


@_instruction("detectable_content:postscript")
def _postscript(text: str, postscript_marker: str) -> bool:
    """A line begins with the marker (spaces and a last full stop are free), and something follows it."""
    letters = r"\.\s?".join(re.escape(each) for each in re.findall(r"\w", postscript_marker))
    return re.search(rf"^[^\w\n]*{letters}\b\W*\w", text, re.IGNORECASE | re.MULTILINE) is not None


@_instruction("detectable_format:number_bullet_lists")
def _bullets(text: str, num_bullets: int) -> bool:
    """Exactly so many lines that begin with * or - and say something."""
    return _num_with_words(re.findall(r"^[ \t]*[*-](?![*-])(.*)$", text, re.MULTILINE)) == num_bullets


@_instruction("detectable_format:number_highlighted_sections")
def _highlights(text: str, num_highlights: int) -> bool:
    """At least so many parts between stars: *one* or **two**; a bullet's star is none of them."""
    return len(_HIGHLIGHT.findall(text)) >= num_highlights


@_instruction("detectable_format:title")
def _title(text: str) -> bool:
    return _num_with_words(re.findall(r"<<([^<>\n]*)>>", text)) > 0


@_instruction("detectable_format:multiple_sections")
def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many different numbers (1 or I) after the word, written as demanded, and something after each."""
    found = re.findall(rf"(?<!\w){re.escape(section_spliter)}\s?(\d+|[IVX]+)\b\W*(?=\w)", text)
    return len(set(found)) >= num_sections


@_instruction("detectable_format:json_format")
def _json(text: str) -> bool:
    """All of it is JSON, in a Markdown fence or not: an object or a list."""
    plain = re.sub(r"^```(?:json)?\s*\n|\n?```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        return isinstance(json.loads(plain), dict | list)
    except (ValueError, RecursionError):
        return False


@_instruction("detectable_format:constrained_response")
def _constrained(text: str) -> bool:
    """Exactly one of the three answers that the instruction allows stands in it."""
    return sum(answer.casefold() in text.casefold() for answer in ANSWERS) == 1


@_instruction("combination:two_responses")
def _two_responses(text: str) -> bool:
    """Two different texts with ****** between them."""
    found = _paragraphs(text, r"(?<!\*)\*{6}(?!\*)")
    return len(found) == 2 and all(found) and found[0] != found[1]


@_instruction("combination:repeat_prompt")
def _repeat(text: str, prompt_to_repeat: str) -> bool:
    """It begins with the request, word for word, and goes on."""
    request, whole = prompt_to_repeat.strip().casefold(), text.strip().casefold()
    return whole.startswith(request) and any(char.isalnum() for char in whole[len(request) :])


@_instruction("startend:end_checker")
def _end(text: str, end_phrase: str) -> bool:
    """Nothing but quotes and stars follows the phrase."""
    return text.strip().rstrip("\"”'* \n").casefold().endswith(end_phrase.strip().rstrip("\"'*").casefold())


@_instruction("startend:quotation")
def _quotation(text: str) -> bool:
    plain = text.strip()
    return len(plain) > 2 and plain[0] + plain[-1] in ('""', "“”") and any(char.isalnum() for char in plain)


@_instruction("change_case:english_capital")
def _capital(text: str) -> bool:
    """No small letters, and English."""
    return text.isupper() and _language_of(text) == "en"


@_instruction("change_case:english_lowercase")
def _lowercase(text: str) -> bool:
    """No capital letters, and English."""
    return text.islower() and _language_of(text) == "en"


@_instruction("change_case:capital_word_frequency")
def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    """Words all of whose letters are capitals, "I" and "A" among them."""
    words = re.findall(r"\w+(?:['’-]\w+)*", text)
    return _relates(sum(word.isupper() for word in words), capital_relation, capital_frequency)


@_instruction("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    """Nor the commas of other scripts."""
    return not set(text) & set(",，、،")
