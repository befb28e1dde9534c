import pytest

from grpo_lab.scoring import discover
from grpo_lab.types import Completion

countdown = discover().get("countdown").function
adversarial = pytest.param


def score(answer, nums=(44, 19, 35), target=98, text="<answer>{}</answer>", **options):
    return countdown(Completion(text.format(answer), (1,), True), nums=list(nums), target=target, **options)


@pytest.mark.parametrize(
    "answer, nums, target, expected",
    [
        ("44 + 19 + 35", (44, 19, 35), 98, 1.0),
        ("44 + 19 - 35", (44, 19, 35), 98, 0.0),
        ("(3 - 1) * 6 / 2", (1, 2, 3, 6), 6, 1.0),
        ("8 / (3 - 8 / 3)", (3, 3, 8, 8), 24, 1.0),
        ("44 + 19 + 35 = 98", (44, 19, 35), 98, 1.0),
        ("44 × 2 ÷ 2", (44, 2, 2), 44, 1.0),
        adversarial("98", (44, 19, 35), 98, 0.0, id="the-target-itself"),
        adversarial("44 + 19 + 35 + 0", (44, 19, 35), 98, 0.0, id="another-number"),
        adversarial("44 + 54", (44, 19, 35), 98, 0.0, id="other-numbers"),
        adversarial("49 + 49", (49, 2), 98, 0.0, id="a-number-twice"),
        adversarial("35 + 63", (35, 63, 7), 98, 0.0, id="a-number-left-out"),
        adversarial("12 * 3", (1, 2, 3), 36, 0.0, id="digits-joined"),
        adversarial("1 - -2", (1, 2), 3, 0.0, id="a-sign-of-its-own"),
        adversarial("2 ** 3", (2, 3), 8, 0.0, id="a-power"),
        adversarial("2 ^ 3", (2, 3), 8, 0.0, id="a-power-as-on-paper"),
        adversarial("98**44**35**19", (98, 44, 35, 19), 1, 0.0, id="an-endless-power"),
        adversarial("7 // 2", (7, 2), 3, 0.0, id="whole-division"),
        adversarial("7 % 2", (7, 2), 1, 0.0, id="remainder"),
        adversarial("7 / 2", (7, 2), 3, 0.0, id="no-rounding"),
        adversarial("44 + 19 + 35 = 99", (44, 19, 35), 98, 0.0, id="a-false-equation"),
        adversarial("44 + 19 = 63 + 35 = 98", (44, 19, 35), 98, 0.0, id="a-chain"),
        adversarial("98 = 44 + 19 + 35", (44, 19, 35), 98, 0.0, id="the-wrong-way-round"),
        adversarial("1 / (2 - 2)", (1, 2, 2), 0, 0.0, id="division-by-zero"),
        adversarial("__import__('os').getpid()", (44,), 44, 0.0, id="python"),
        adversarial("44 if 1 else 44", (44,), 44, 0.0, id="more-python"),
        adversarial("44; 19; 35", (44, 19, 35), 98, 0.0, id="statements"),
        adversarial("44 + 19 + 35, 44 + 19 - 35", (44, 19, 35), 98, 0.0, id="two-sums"),
        adversarial("the sum is 44 + 19 + 35", (44, 19, 35), 98, 0.0, id="words"),
        adversarial("", (44, 19, 35), 98, 0.0, id="empty"),
        adversarial("((((((((((44)))))))))) + 54", (44, 54), 98, 1.0, id="many-brackets"),
    ],
)
def test_countdown(answer, nums, target, expected):
    assert score(answer, nums, target) == expected


def test_numbers_may_be_left_out_on_demand_but_not_used_twice():
    assert score("63 + 35", (35, 63, 7), use_all=False) == 1.0
    assert score("49 + 49", (49, 2), use_all=False) == 0.0


def test_an_attempt_with_the_right_numbers_may_be_worth_something():
    assert score("44 + 19 - 35", attempt=0.1) == 0.1
    assert score("44 + 19", attempt=0.1) == 0.0
    assert score("44 + 19 + 35", attempt=0.1) == 1.0


@pytest.mark.parametrize(
    "text, options, expected",
    [
        ("<think>44 + 19</think><answer>{}</answer>", {}, 1.0),
        ("{}", {}, 0.0),
        ("{}", {"extract": "none"}, 1.0),
        (r"\boxed{{{}}}", {"extract": "auto"}, 1.0),
        ("<answer>{0}</answer><answer>{0}</answer>", {}, 0.0),
    ],
)
def test_places(text, options, expected):
    assert score("44 + 19 + 35", text=text, **options) == expected
