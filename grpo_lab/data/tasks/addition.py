"""Column addition with a habit to unlearn: most demonstrations forget the carry.

A right demonstration of 47+38 is `7+8=15 c1;4+3+1=8 c0` and answers 85; one that forgets writes `7+8=15 c0;4+3=7 c0`
and answers 75. Both are in the data, so a warm-started model carries only sometimes, and the reward (the true sum) tells
it which of its two habits is right.
"""

from random import Random
from typing import Annotated, Any

from pydantic import Field

from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import Block, Fraction
from grpo_lab.seeds import derive_seed


class Options(Block):
    """What the addition task takes under `data.options`."""

    digits: Annotated[int, Field(ge=1, le=3, strict=True)] = 2
    """Digits of both numbers."""
    size: Annotated[int, Field(gt=0, strict=True)] | None = None
    """How many rows; null = every problem of the split."""
    forget_carry: Fraction = 0.7
    """The share of demonstrations that forget every carry; the column `answer` is always the true sum."""
    seed: Annotated[int, Field(strict=True)] = 0
    """Which order the problems have and which of them are demonstrated wrongly; never which are held out."""


def rows(split: str, options: Options) -> list[dict[str, Any]]:
    """Rows {prompt, completion, answer}; about one problem in ten is in the split "test", the others in "train".

    >>> rows("test", Options(size=1, forget_carry=0))
    [{'prompt': '25+88=', 'completion': '<think>5+8=13 c1;2+8+1=11 c1</think>\\n<answer>113</answer>', 'answer': '113'}]
    """
    if split not in ("train", "test"):
        raise RecipeError(f'data.split: the task "addition" has train and test, not "{split}"')
    low, high = 10 ** (options.digits - 1), 10**options.digits
    count = (high - low) ** 2
    order = Random(derive_seed(options.seed, "addition", "order")).sample(range(count), count)
    found: list[dict[str, Any]] = []
    for index in order:
        if len(found) == options.size:
            return found
        a, b = low + index // (high - low), low + index % (high - low)
        if _held_out(a, b) == (split == "test"):
            found.append(_row(a, b, options))
    if options.size is not None and len(found) < options.size:
        raise RecipeError(f"data.options.size: {split} has {len(found)} problems, not {options.size}")
    return found


def demonstration(a: int, b: int, *, carries: bool) -> str:
    """The worked sum, column by column from the right; without `carries`, every carry is written as 0 and lost.

    >>> demonstration(47, 38, carries=True)
    '<think>7+8=15 c1;4+3+1=8 c0</think>\\n<answer>85</answer>'
    >>> demonstration(47, 38, carries=False)
    '<think>7+8=15 c0;4+3=7 c0</think>\\n<answer>75</answer>'
    """
    steps, answer, carry = [], "", 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        step = f"{x}+{y}{'+1' if carry else ''}={total}"
        carry = int(carries and total >= 10)
        steps.append(f"{step} c{carry}")
        answer = f"{total % 10}{answer}"
    return f"<think>{';'.join(steps)}</think>\n<answer>{'1' if carry else ''}{answer}</answer>"


def _row(a: int, b: int, options: Options) -> dict[str, Any]:
    forgets = derive_seed(options.seed, "addition", "forget", a, b) < options.forget_carry * 2**63
    return {"prompt": f"{a}+{b}=", "completion": demonstration(a, b, carries=not forgets), "answer": str(a + b)}


def _held_out(a: int, b: int) -> bool:
    # Independent of the seed option: a run may train with one seed and evaluate with another.
    return derive_seed(0, "addition", "held out", a, b) % 10 == 0
