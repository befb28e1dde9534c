import json
import os
from pathlib import Path

import pytest

from grpo_lab.scoring import discover
from grpo_lab.types import Completion

arithmetic = discover().get("arithmetic").function
adversarial = pytest.param
REAL_DATA = Path(os.environ.get("GRPO_LAB_DATA", Path(__file__).parents[3] / "shared" / "data"))


def score(text, expression="(3 + 4) * 2", **options):
    return arithmetic(Completion(text, (1,), True), expression=expression, **options)


@pytest.mark.parametrize(
    "text, expression, options, expected",
    [
        ("<answer>14</answer>", "(3 + 4) * 2", {}, 1.0),
        ("<answer>15</answer>", "(3 + 4) * 2", {}, 0.0),
        ("#### 1/3", "1 / 3", {}, 1.0),
        ("#### 0.33", "1 / 3", {"tolerance": 0.01}, 1.0),
        ("it is 14", "(3 + 4) * 2", {"strict": False}, 1.0),
        adversarial("#### 0.33", "1 / 3", {}, 0.0, id="rounded"),
        adversarial("#### (3 + 4) * 2", "(3 + 4) * 2", {}, 0.0, id="handed-back-unsolved"),
        adversarial("#### 7 * 2", "(3 + 4) * 2", {}, 0.0, id="half-solved"),
        adversarial("#### -4", "-2^2", {}, 1.0, id="power-before-sign"),
        adversarial("#### 512", "2^3^2", {}, 1.0, id="powers-from-the-right"),
        adversarial("#### 1", "8 - 4 - 3", {}, 1.0, id="differences-from-the-left"),
        adversarial("#### 0.3", "0.1 + 0.2", {}, 1.0, id="no-binary-fractions"),
        adversarial("#### 14 #### 14", "(3 + 4) * 2", {}, 0.0, id="repeated"),
        adversarial("#### 13, 14, 15", "(3 + 4) * 2", {}, 0.0, id="guesses"),
        adversarial("", "(3 + 4) * 2", {}, 0.0, id="empty"),
        adversarial("#### __import__('os')", "(3 + 4) * 2", {}, 0.0, id="python"),
        adversarial("14", "(3 + 4) * 2", {}, 0.0, id="no-place"),
    ],
)
def test_arithmetic(text, expression, options, expected):
    assert score(text, expression, **options) == expected


def test_a_row_without_expression_does_not_apply():
    assert score("#### 14", None) is None


@pytest.mark.parametrize("expression", ["x + 1", "1 / 0", "9^9^9^9", ""])
def test_an_expression_without_a_value_is_an_error_and_not_a_zero(expression):
    with pytest.raises(ValueError, match="arithmetic needs a calculation in the column expression"):
        score("#### 14", expression)


@pytest.mark.skipif(not (REAL_DATA / "svamp").is_dir(), reason=f"no real data in {REAL_DATA}; set GRPO_LAB_DATA")
def test_svamp_equations_have_the_value_of_their_answers():
    rows = json.loads((REAL_DATA / "svamp" / "SVAMP.json").read_text())
    scores = [score(f"#### {row['Answer']:.6f}", row["Equation"], tolerance=1e-6) for row in rows]
    assert len(scores) == 1000
    assert sum(scores) >= 998  # the data round their answers
