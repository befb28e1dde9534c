"""Real gold answers reach the maximum in every dressing, real wrong answers get nothing, and it does not take long.

`scripts/reward_rates.py` measures the same over all rows and prints the table of the README.
"""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "reward_rates.py"
spec = importlib.util.spec_from_file_location("reward_rates", SCRIPT)
rates = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rates)

pytestmark = pytest.mark.skipif(
    not (rates.DATA / "gsm8k").is_dir(), reason=f"no real data in {rates.DATA}; set GRPO_LAB_DATA"
)
ROWS = {"gsm8k": 1319, "svamp": 1000, "math500": 500, "aqua": 508}


@pytest.mark.parametrize("name", rates.SETS)
def test_every_gold_answer_reaches_the_maximum(name):
    rows = rates.rows(name)
    assert len(rows) == ROWS[name]
    assert [row.gold for row in rows if rates.score(name, rates.PLACES["tags"](str(row.gold)), row.gold) != 1.0] == []


@pytest.mark.parametrize("name, every", [("gsm8k", 5), ("svamp", 5), ("math500", 1), ("aqua", 2)])
def test_right_answers_reach_the_maximum_in_every_dressing(name, every):
    found = list(rates.refused(name, every=every))
    assert len(found) > 20
    # Eight solutions box more than one thing, which strict reading takes for guessing.
    boxed_twice = ["2", "49", "350", r"\frac{2}{3}", r"\frac{11}{2}", r"\frac{639}{40}", "143", "20"]
    expected = {("the data's own solution", "strict"): boxed_twice} if name == "math500" else {}
    assert {(dressing, place): wrong for dressing, place, _, wrong in found if wrong} == expected


@pytest.mark.parametrize("name, every", [("gsm8k", 10), ("svamp", 10), ("math500", 4), ("aqua", 2)])
def test_wrong_answers_get_nothing(name, every):
    found = list(rates.paid(name, shifts=3, every=every))
    assert all(tried > 80 for _, tried, _ in found)
    assert {kind: wrong for kind, _, wrong in found if wrong} == {}


def test_plain_numbers_take_microseconds():
    pairs = [(str(number), f"{number:,}.0") for number in range(50_000, 55_000)]
    assert rates.speed(pairs) > 5000  # about 60,000 on an idle core; 256 completions are then 1 % of a step of 5 s
