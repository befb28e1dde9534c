"""Sums that a model wrote, worked out exactly and without ever being run as Python.

A parser of our own for + - * / ^ and brackets: the text is cut in length, depth and size of numbers before anything is
computed, so no input takes long, and nothing but numbers can come out.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

LONGEST = 1000  # characters
DEEPEST = 50  # brackets and signs around one number
LARGEST_BITS = 2048  # of a numerator or denominator, also in between

_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])|[0-9]+(?:\.[0-9]+)?)|(?P<sign>\*\*|[-+*/^()]))"
)
_SPELLINGS = {"\u2212": "-", "\u2013": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "[": "(", "]": ")"}
_LATEX = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\left": "", r"\right": "", "{,}": ","}
_BINDS = {"+": 1, "-": 1, "*": 2, "/": 2, "^": 4}
_UNARY_BINDS = 3  # -2^2 is -4


class Calculation(NamedTuple):
    """What an expression comes to, and the numbers that are written in it, from left to right (without signs)."""

    value: Fraction
    numbers: tuple[Fraction, ...]
    has_signs: bool  # whether it holds a minus or plus that is not between two numbers


class _NotCalculable(Exception):
    pass


def calculate(text: str, *, powers: bool = False) -> Calculation | None:
    r"""The value of a written sum such as `(3 + 4) * 2`; None for anything else.

    Understands + - * / and round or square brackets, also × · ÷ and LaTeX's \times, \cdot, \div; with `powers` ^ and
    ** with whole exponents. Decimals and fractions stay exact. None as well for a division by zero, more than 1000
    characters, 50 levels of brackets, or a number of more than 2048 bits anywhere on the way. There are no names, no
    function calls and no implicit products: `2(3)` is None.

    >>> str(calculate("(3 + 4) * 2 / 4").value), [int(n) for n in calculate("3 × (7 - 2)").numbers]
    ('7/2', [3, 7, 2])
    >>> [calculate(text) for text in ["__import__('os')", "2(3)", "1/0", "3 +", "9**9**9**9", ""]]
    [None, None, None, None, None, None]
    >>> calculate("9^9^9^9", powers=True) is None, str(calculate("2^-2", powers=True).value)
    (True, '1/4')
    """
    if len(text) > LONGEST:
        return None
    for written, meant in (*_LATEX.items(), *_SPELLINGS.items()):
        text = text.replace(written, meant)
    try:
        parser = _Parser(list(_tokens(text.strip(), powers=powers)))
        value = parser.expression(0, 0)
    except _NotCalculable:
        return None
    if parser.position != len(parser.tokens):
        return None
    return Calculation(value, tuple(token for token in parser.tokens if isinstance(token, Fraction)), parser.has_signs)


def _tokens(text: str, *, powers: bool) -> Iterator[Fraction | str]:
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _NotCalculable
        position = match.end()
        if match["number"] is not None:
            yield _bounded(Fraction(match["number"].replace(",", "")))
            continue
        sign = "^" if match["sign"] == "**" else match["sign"]
        if sign == "^" and not powers:
            raise _NotCalculable
        yield sign


class _Parser:
    """Precedence climbing; `depth` bounds the recursion."""

    def __init__(self, tokens: list[Fraction | str]) -> None:
        self.tokens = tokens
        self.position = 0
        self.has_signs = False

    def expression(self, binds: int, depth: int) -> Fraction:
        value = self._operand(depth)
        while self.position < len(self.tokens):
            sign = self.tokens[self.position]
            if not isinstance(sign, str) or _BINDS.get(sign, 0) <= binds:
                break
            self.position += 1
            # ^ groups to the right, so its right side may hold another ^
            right = self.expression(_BINDS[sign] - (sign == "^"), depth + 1)
            value = _combined(value, sign, right)
        return value

    def _operand(self, depth: int) -> Fraction:
        if depth > DEEPEST or self.position == len(self.tokens):
            raise _NotCalculable
        token = self.tokens[self.position]
        self.position += 1
        if isinstance(token, Fraction):
            return token
        if token in "+-":
            self.has_signs = True
            value = self.expression(_UNARY_BINDS, depth + 1)
            return -value if token == "-" else value
        if token != "(":
            raise _NotCalculable
        value = self.expression(0, depth + 1)
        if self.position == len(self.tokens) or self.tokens[self.position] != ")":
            raise _NotCalculable
        self.position += 1
        return value


def _combined(left: Fraction, sign: str, right: Fraction) -> Fraction:
    if sign == "+":
        return _bounded(left + right)
    if sign == "-":
        return _bounded(left - right)
    if sign == "*":
        return _bounded(left * right)
    if sign == "/":
        if right == 0:
            raise _NotCalculable
        return _bounded(left / right)
    return _power(left, right)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or (base == 0 and exponent < 0):
        raise _NotCalculable
    if abs(exponent) > LARGEST_BITS or (bits - 1) * abs(int(exponent)) > LARGEST_BITS:  # before it is computed
        raise _NotCalculable
    return _bounded(base ** int(exponent))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > LARGEST_BITS:
        raise _NotCalculable
    return value
