r"""Finding answers and numbers in text: small pure functions for reward authors and for reading data sets.

Every function returns None when there is nothing to find, and takes time linear in the text: what a model wrote is
never trusted to be short or well-formed.
"""

import re
from fractions import Fraction
from typing import Literal

from grpo_lab.errors import RecipeError

Extract = Literal["none", "hash", "boxed", "xml", "regex"]

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_GROUPED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_GROUPED}(?:\.[0-9]*)?|\.[0-9]+)"
_MONEY = "[$€£¥]?"
_NUMBER = re.compile(
    rf"{_MONEY} ?(?P<sign>[-+]?){_MONEY} ?(?:(?P<whole>[0-9]+) +(?=[0-9]+/))?"
    rf"(?P<top>{_DECIMAL})(?:/(?P<bottom>{_DECIMAL}))?(?P<percent> ?%?)(?: ?[€£¥])?\.?"
)
_LATEX_NUMBER = re.compile(
    r"(?P<sign>[-+]?) ?(?P<whole>[0-9]*) ?\\[dt]?frac ?(?:\{ ?(?P<top>[0-9]+) ?\}|(?P<top1>[0-9])) ?"
    r"(?:\{ ?(?P<bottom>[0-9]+) ?\}|(?P<bottom1>[0-9]))\.?"
)
_SCIENTIFIC = re.compile(
    r"(?P<sign>[-+]?)(?P<top>[1-9](?:\.[0-9]+)?) ?(?:\\times|\\cdot|×) ?10 ?\^ ?(?:\{ ?(?P<power>[-+]?[0-9]{1,2}) ?\}|(?P<power1>[0-9]))"
)
_NUMBER_IN_TEXT = re.compile(
    r"[-\u2212]?(?:(?<![\w.])[0-9]+ ?)?\\[dt]?frac ?(?:\{[0-9]+\}|[0-9]) ?(?:\{[0-9]+\}|[0-9])|"
    r"(?<![\w.])[-\u2212]?\\?\$?(?:[0-9]|\.[0-9])[0-9,]*(?:\.[0-9]+)?(?:/[0-9]+| ?[½⅓⅔¼¾])?(?:\\?%)?|[½⅓⅔¼¾]"
)
_LONGEST_NUMBER = 100
_FRACTION_SIGNS = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4"}
_FRACTION_SIGN = re.compile(r"[½⅓⅔¼¾](?![0-9])")


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} that is closed; braces may be nested.

    >>> boxed(r"so \boxed{1}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    >>> boxed(r"cut off \boxed{12") is None
    True
    """
    open_braces: list[int | None] = []  # where a box's content starts, None for other braces
    last = (-1, "")
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                last = max(last, (start, text[start : match.start()]))
        elif token.endswith("{") and token != r"\{":
            open_braces.append(match.end() if token.startswith("\\") else None)
    return last[1].strip() if last[0] >= 0 else None


def tag(text: str, name: str) -> str | None:
    """What stands between the last complete pair of <name> and </name>, without the white space around it.

    >>> tag("<answer>1</answer> wait: <answer> 12 </answer>", "answer")
    '12'
    """
    pieces = text.split(f"<{name}>")[1:]
    for piece in reversed(pieces):
        content, closing, _ = piece.partition(f"</{name}>")
        if closing:
            return content.strip()
    return None


def hash_answer(text: str) -> str | None:
    """What stands after the last `####`, to the end of its line: how GSM8K marks its answers.

    >>> hash_answer("16 - 3 - 4 = 9\\n#### 1,080")
    '1,080'
    """
    _, mark, rest = text.rpartition("####")
    line = rest.split("\n", 1)[0].strip()
    return line if mark and line else None


def parse_number(text: str) -> Fraction | None:
    r"""The number that the whole text writes, exactly; None if it is anything but one number.

    Understands signs (also the typographic minus and, in front, a dash), decimals, thousands separators, fractions and
    mixed numbers (plain, LaTeX, or with ½ and its like), powers of ten behind one digit, a currency sign and a full stop
    after the number. A percent sign counts as 1/100. Separators that do not group by three are no number.

    >>> [str(parse_number(text)) for text in ["-5", "$1,080", "18.", "3.5", "1/2", "50%", r"1\frac{1}{2}"]]
    ['-5', '1080', '18', '7/2', '1/2', '1/2', '3/2']
    >>> [parse_number(text) for text in ["1,08", "²", "1 2", "12 apples", "1/0", ""]]
    [None, None, None, None, None, None]
    """
    if len(text) > _LONGEST_NUMBER:
        return None
    plain = text.strip().replace("{,}", ",").replace(r"\$", "$").replace(r"\%", "%")
    if not plain.isascii():
        plain = _FRACTION_SIGN.sub(lambda sign: " " + _FRACTION_SIGNS[sign[0]], re.sub("^\u2013", "\u2212", plain))
        plain = plain.replace("\u2212", "-").strip()
    match = _NUMBER.fullmatch(plain)
    if match is not None:
        value = _ratio(match["top"], match["bottom"] or "1", match["whole"])
        if value is not None and match["percent"].strip():
            value /= 100
    elif (match := _LATEX_NUMBER.fullmatch(plain)) is not None:
        value = _ratio(match["top"] or match["top1"], match["bottom"] or match["bottom1"], match["whole"])
    elif (match := _SCIENTIFIC.fullmatch(plain)) is not None:
        value = _fraction(match["top"]) * Fraction(10) ** int(match["power"] or match["power1"])
    else:
        return None
    return -value if value is not None and match["sign"] == "-" else value


def _ratio(top: str, bottom: str, whole: str | None) -> Fraction | None:
    below = _fraction(bottom)
    if below == 0:
        return None
    return (_fraction(whole) if whole else 0) + _fraction(top) / below


def _fraction(digits: str) -> Fraction:
    plain = digits.replace(",", "")
    return Fraction(plain) if "." in plain else Fraction(int(plain))  # int first: a third of the time


def last_number(text: str) -> str | None:
    """The last number that stands anywhere in the text, as it is written there.

    >>> last_number("9 eggs * $2 = $18.")
    '$18'
    """
    numbers = [match.rstrip(",") for match in _NUMBER_IN_TEXT.findall(text)]
    return next((number for number in reversed(numbers) if parse_number(number) is not None), None)


def extract(text: str, how: Extract, pattern: str | None = None) -> str | None:
    """The answer in a text: all of it, after `####`, in a box, in <answer> tags, or a pattern's first group.

    `pattern` goes with "regex"; a dot matches line breaks, too. A pattern without groups gives its whole match.

    >>> extract("Answer: B.", "regex", "Answer: ([A-E])")
    'B'
    """
    if how == "hash":
        return hash_answer(text)
    if how == "boxed":
        return boxed(text)
    if how == "xml":
        return tag(text, "answer")
    if how == "none":
        return text
    if pattern is None:
        raise RecipeError("extract: regex needs a pattern")
    try:
        match = re.search(pattern, text, re.DOTALL)
    except re.error as error:
        raise RecipeError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    if match is None:
        return None
    content: str | None = match.group(1 if match.re.groups else 0)
    return content
