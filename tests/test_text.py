import time
from fractions import Fraction

import pytest

from grpo_lab.errors import RecipeError
from grpo_lab.text import boxed, extract, hash_answer, last_number, parse_number, tag


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"\boxed{12}", "12"),
        (r"\boxed{ 12 }", "12"),
        (r"\boxed {12}", "12"),
        (r"\boxed{\frac{1}{\sqrt{2}}} done", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"let { x } } \boxed{5}", "5"),
        ("\\boxed{1\n2}", "1\n2"),
        (r"\fbox{12}", None),
        (r"\boxed 5", None),
        ("12", None),
        ("", None),
    ],
)
def test_boxed(text, expected):
    assert boxed(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<answer>12</answer>", "12"),
        ("<answer>\n1\n2\n</answer>", "1\n2"),
        ("<answer>1</answer><answer>2</answer>", "2"),
        ("<answer>1</answer><answer>2", "1"),
        ("<answer><answer>5</answer></answer>", "5"),
        ("<answer></answer>", ""),
        ("</answer>1<answer>", None),
        ("<answers>1</answers>", None),
    ],
)
def test_tag(text, expected):
    assert tag(text, "answer") == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("so\n#### 12", "12"),
        ("#### 12\nmore", "12"),
        ("####12", "12"),
        ("#### 1 #### 2", "2"),
        ("#### 12####", None),
        ("####   \n12", None),
        ("### 12", None),
    ],
)
def test_hash_answer(text, expected):
    assert hash_answer(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("18", Fraction(18)),
        ("18.", Fraction(18)),
        (" 18 ", Fraction(18)),
        ("007", Fraction(7)),
        ("-5", Fraction(-5)),
        ("\u22125", Fraction(-5)),
        ("+5", Fraction(5)),
        ("3.5", Fraction(7, 2)),
        (".5", Fraction(1, 2)),
        ("1,080", Fraction(1080)),
        ("1{,}080", Fraction(1080)),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("$18", Fraction(18)),
        (r"\$18", Fraction(18)),
        ("-$18", Fraction(-18)),
        ("$-18", Fraction(-18)),
        ("50%", Fraction(1, 2)),
        (r"50\%", Fraction(1, 2)),
        ("1/2", Fraction(1, 2)),
        ("-1/2", Fraction(-1, 2)),
        ("1/0", None),
        ("1,08", None),
        ("1,0800", None),
        ("1080,5", None),
        ("1,08.5", None),
        ("²", None),
        ("5²", None),
        ("٣", None),
        ("--5", None),
        ("1.2.3", None),
        ("1 2", None),
        ("1e5", None),
        ("0x10", None),
        ("nan", None),
        ("inf", None),
        (".", None),
        ("$", None),
        ("-", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_parse_number(text, expected):
    assert parse_number(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("9 * $2 = $18.", "$18"),
        ("it is 1,080, right", "1,080"),
        ("it is -5", "-5"),
        ("10-3", "3"),
        ("5kg", "5"),
        ("50%", "50%"),
        ("half is 1/2!", "1/2"),
        ("#### 12####.####.", "12"),
        ("no digits", None),
        ("", None),
    ],
)
def test_last_number(text, expected):
    assert last_number(text) == expected


@pytest.mark.parametrize(
    "how, pattern, expected",
    [
        ("none", None, "<answer>1</answer> \\boxed{2} x=3\n#### 4"),
        ("xml", None, "1"),
        ("boxed", None, "2"),
        ("regex", r"x=(\d)", "3"),
        ("regex", r"x=\d.####", "x=3\n####"),
        ("regex", r"y=(\d)", None),
        ("hash", None, "4"),
    ],
)
def test_extract(how, pattern, expected):
    assert extract("<answer>1</answer> \\boxed{2} x=3\n#### 4", how, pattern) == expected


def test_broken_pattern_is_a_recipe_error():
    with pytest.raises(RecipeError) as error:
        extract("x", "regex", "(")
    assert (
        str(error.value) == "pattern '(' is not a regular expression: missing ), unterminated subpattern at position 0"
    )


def test_regex_without_pattern_is_a_recipe_error():
    with pytest.raises(RecipeError) as error:
        extract("x", "regex")
    assert str(error.value) == "extract: regex needs a pattern"


@pytest.mark.parametrize("piece", [r"\boxed{", "<answer>", "####", "1,", "1.", "{", "}", "-", "1/", "\\"])
def test_a_megabyte_of_anything_is_read_in_linear_time(piece):
    text = piece * (300_000 // len(piece))
    start = time.monotonic()
    boxed(text), tag(text, "answer"), hash_answer(text), parse_number(text), last_number(text)
    assert time.monotonic() - start < 5
