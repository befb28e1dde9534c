import time
from fractions import Fraction

import pytest

from grpo_lab.expressions import DEEPEST, LONGEST, calculate


@pytest.mark.parametrize(
    "text, value",
    [
        ("7", 7),
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("8 - 3 - 2", 3),
        ("16 / 4 / 2", 2),
        ("16 / (4 / 2)", 8),
        ("-3 + 5", 2),
        ("2 - -3", 5),
        ("- (2 + 3)", -5),
        ("1/3 + 1/6", Fraction(1, 2)),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("1,000 * 2", 2000),
        ("3 × 4 ÷ 2 − 1", 5),
        (r"3 \times 4 \div 2 \cdot 5", 30),
        (r"\left(1 + 2\right) * 3", 9),
        ("[1 + 2] * (3)", 9),
        ("007", 7),
        ("( 76.0 - 25.0 )", 51),
    ],
)
def test_value(text, value):
    assert calculate(text).value == value


@pytest.mark.parametrize(
    "text, value",
    [("2^3^2", 512), ("2**3", 8), ("-2^2", -4), ("(-2)^2", 4), ("2^-2", Fraction(1, 4)), ("0^0", 1), ("2*3^2", 18)],
)
def test_powers(text, value):
    assert calculate(text, powers=True).value == value
    assert calculate(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "1 +",
        "* 2",
        "1 2",
        "2(3)",
        "(1 + 2",
        "1 + 2)",
        "()",
        "1 // 2",
        "1 % 2",
        "1_000",
        "0x10",
        "1e5",
        "1j",
        "²",
        "٣",
        "x",
        "1 if 1 else 2",
        "__import__('os').system('true')",
        "().__class__",
        "1; 2",
        "1\x002",
        "1 / 0",
        "1 / (2 - 2)",
        "1,00 + 1",
        "1.2.3",
        "1 = 1",
        "abs(1)",
    ],
)
def test_anything_else_has_no_value(text):
    assert calculate(text) is None
    assert calculate(text, powers=True) is None


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9**9",
        "9^9^9^9",
        "2^999999999",
        "2^-999999999",
        "1^999999999",
        "0^-1",
        "2^(1/2)",
        "(9^600)^600",
        "*".join(["9" * 90] * 10),
        "9" * LONGEST,
        "9" * 10 * LONGEST,
        "(" * (DEEPEST + 1) + "1" + ")" * (DEEPEST + 1),
        "(" * LONGEST,
        "-" * (LONGEST - 1) + "1",
        "2^" * (LONGEST // 2 - 1) + "2",
        "1" + "/3" * (LONGEST // 2 - 1) + "/" * 2,
    ],
)
def test_what_would_take_for_ever_has_no_value_at_once(text):
    start = time.monotonic()
    assert calculate(text, powers=True) is None
    assert time.monotonic() - start < 1


def test_long_and_deep_sums_within_the_limits_are_calculated():
    assert calculate("+".join(["1"] * (LONGEST // 2))).value == LONGEST // 2
    assert calculate("(" * (DEEPEST - 1) + "1" + ")" * (DEEPEST - 1)).value == 1


def test_numbers_are_those_written_and_signs_are_told():
    found = calculate("3 * (7 - 2) / 2")
    assert (found.numbers, found.has_signs) == ((3, 7, 2, 2), False)
    assert calculate("3 * -(7)").has_signs
    assert calculate("+3").has_signs
