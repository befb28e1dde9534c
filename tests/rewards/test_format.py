import time

import pytest

from grpo_lab.scoring import discover
from grpo_lab.types import Completion

well_formed = discover().get("format").function
adversarial = pytest.param


def score(text, **options):
    return well_formed(Completion(text, (1, 2, 3), finished=True), **options)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>a</think><answer>1</answer>", 1.0),
        ("<think>a</think>\n<answer>1</answer>", 1.0),
        adversarial("<think>\nfirst\nsecond\n</think>\n\n<answer>\n1\n</answer>\n", 1.0, id="many-lines"),
        adversarial("\n <think>a</think><answer>1</answer> \n", 1.0, id="white-space-around"),
        adversarial("<think>a</think><answer>1</answer>.", 0.0, id="text-after"),
        adversarial("Sure! <think>a</think><answer>1</answer>", 0.0, id="text-before"),
        adversarial("<think>a</think> so <answer>1</answer>", 0.0, id="text-between"),
        adversarial("<answer>1</answer><think>a</think>", 0.0, id="wrong-order"),
        adversarial("<think>a</think><answer></answer>", 0.0, id="nothing-inside"),
        adversarial("<think> \n </think><answer>1</answer>", 0.0, id="only-white-space-inside"),
        adversarial("<think>a</think><answer>1</answer><answer>2</answer>", 0.0, id="tag-twice"),
        adversarial("<think>a<think>b</think><answer>1</answer>", 0.0, id="opened-twice"),
        adversarial("<think>a<answer>1</answer></think>", 0.0, id="nested"),
        adversarial("<think>a</think><answer>1", 0.0, id="cut-off"),
        adversarial("<Think>a</Think><Answer>1</Answer>", 0.0, id="capitals"),
        adversarial("", 0.0, id="empty"),
    ],
)
def test_tags(text, expected):
    assert score(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Sure! <think>a</think> so <answer>1</answer>.", 1.0),
        adversarial("<answer>1</answer><think>a</think>", 0.0, id="wrong-order"),
        adversarial("<think>a</think><answer>1</answer><answer>2</answer>", 0.0, id="tag-twice"),
        adversarial("<think>a</think><answer> </answer>", 0.0, id="nothing-inside"),
    ],
)
def test_lenient_tags_allow_text_around(text, expected):
    assert score(text, strict=False) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a</think><answer>1</answer>", 1.0),
        adversarial("<think>a</think><answer>1</answer>", 0.0, id="opened-again"),
        adversarial("</think><answer>1</answer>", 0.0, id="nothing-inside"),
        adversarial("a<answer>1</answer>", 0.0, id="never-closed"),
    ],
)
def test_a_prompt_that_opens_the_first_tag(text, expected):
    assert score(text, prefilled=True) == expected


def test_other_tags():
    assert score("<a.b>x</a.b><c>y</c>", tags=["a.b", "c"]) == 1.0
    assert score("<a.b>x</aab><c>y</c>", tags=["a.b", "c"]) == 0.0


@pytest.mark.parametrize(
    "text, strict, expected",
    [
        ("9 + 9 = 18\n#### 18", True, 1.0),
        ("#### -1,080\n", True, 1.0),
        adversarial("9 + 9 = 18\n#### 18\nDone.", True, 0.0, id="text-after"),
        adversarial("9 + 9 = 18\n#### 18\nDone.", False, 1.0, id="text-after-lenient"),
        adversarial("so #### 18", True, 0.0, id="not-on-its-own-line"),
        adversarial("#### 1\n#### 18", True, 0.0, id="two-lines"),
        adversarial("#### 1\n#### 18", False, 0.0, id="two-lines-lenient"),
        adversarial("#### 12####.####.", True, 0.0, id="degenerate-tail"),
        adversarial("#### 1,08", True, 0.0, id="no-number"),
        adversarial("####", True, 0.0, id="nothing-after"),
        adversarial("18", True, 0.0, id="none"),
    ],
)
def test_hash(text, strict, expected):
    assert score(text, style="hash", strict=strict) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"so \boxed{\frac{1}{2}}.", 1.0),
        adversarial(r"\boxed{1} \boxed{2}", 0.0, id="two"),
        adversarial(r"\boxed{1", 0.0, id="not-closed"),
        adversarial(r"\boxed{}", 0.0, id="empty-box"),
        adversarial("1", 0.0, id="none"),
    ],
)
def test_boxed(text, expected):
    assert score(text, style="boxed") == expected


@pytest.mark.parametrize(
    "text, strict, expected",
    [
        ("a: 1\nb: 2", True, 1.0),
        adversarial("\na: 1\nb: 2\n", True, 1.0, id="white-space-around"),
        adversarial("so a: 1\nb: 2", True, 0.0, id="text-before"),
        adversarial("so a: 1\nb: 2", False, 1.0, id="text-before-lenient"),
    ],
)
def test_regex(text, strict, expected):
    assert score(text, style="regex", pattern=r"a:.*b: \d", strict=strict) == expected


def test_regex_without_pattern_is_an_error():
    with pytest.raises(ValueError) as error:
        score("a", style="regex")
    assert str(error.value) == "format: style regex needs a pattern"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>a</think>\n<answer>1</answer>", 1.0),
        ("Sure! <think>a</think> so <answer>1</answer>.", 0.5),
        ("1", 0.0),
        adversarial("<think>a</think>\n<answer>1\n</answer>\n\n", 1.0, id="line-breaks-cost-nothing"),
        adversarial("<answer>1</answer><think>a</think>", 0.0, id="wrong-order"),
        adversarial("<think></think><answer></answer> sure", 0.0, id="nothing-inside"),
        adversarial("<think>a</think><answer>1</answer><answer>2</answer>", 0.0, id="tag-twice"),
        adversarial("<think>a</think><answer>1", 0.0, id="cut-off"),
    ],
)
def test_graded(text, expected):
    assert score(text, credit="graded") == expected
    assert score(text, credit="graded", strict=False) == expected


@pytest.mark.parametrize(
    "text, options, expected",
    [
        ("<think>a</think><answer>1</answer>", {}, 1.0),
        ("<think>a</think><answer>1", {}, 0.75),
        ("<answer>1</answer>", {}, 0.5),
        ("1", {}, 0.0),
        adversarial("<think>a</think><answer>1</answer>", {}, 1.0, id="no-last-line-break-costs-nothing"),
        adversarial("<think>a</think><answer>1</answer>" + "x" * 999, {}, 1.0, id="nor-does-text-after"),
        adversarial("<think>" * 9, {}, 0.0, id="one-tag-many-times"),
        adversarial("<think>a</think><answer>1</answer><answer>2</answer>", {}, 0.5, id="a-second-answer"),
        adversarial("a</think><answer>1</answer>", {"prefilled": True}, 1.0, id="the-prompt-opened-it"),
        adversarial("", {"prefilled": True}, 0.0, id="what-the-prompt-wrote-earns-nothing"),
        adversarial("<think>a</think><answer>1</answer>", {"prefilled": True}, 1.0, id="opening-again-earns-nothing"),
        adversarial("<reasoning>a</reasoning>", {"tags": ["reasoning", "answer"]}, 0.5, id="other-names"),
    ],
)
def test_count(text, options, expected):
    assert score(text, credit="count", **options) == expected


def test_graded_goes_with_every_style():
    assert score("so #### 18\nDone", style="hash", credit="graded") == 0.5
    assert score("so a1", style="regex", pattern="a.", credit="graded") == 0.5
    assert score(r"so \boxed{1}", style="boxed", credit="graded") == 1.0


def test_reasoning_and_answer():
    text = "<reasoning>\na\n</reasoning>\n<answer>\n1\n</answer>\n"
    assert score(text, tags=["reasoning", "answer"]) == 1.0
    assert score(text) == 0.0


@pytest.mark.parametrize("options", [{"credit": "count"}, {"prefilled": True}])
def test_options_of_tags_are_refused_elsewhere(options):
    with pytest.raises(ValueError, match="goes with style: tags only"):
        score("#### 1", style="hash", **options)


@pytest.mark.parametrize("piece", ["<think>", "</think>", " ", "<think></think>", "####", "\n"])
def test_a_megabyte_of_anything_is_read_in_linear_time(piece):
    start = time.monotonic()
    for style in ("tags", "hash", "boxed"):
        for strict in (True, False):
            score("<think>a</think><answer>" + piece * (300_000 // len(piece)) + "x", style=style, strict=strict)
            score(
                "<think>" + piece * (300_000 // len(piece)) + "</think><answer>1</answer>x", style=style, strict=strict
            )
    assert time.monotonic() - start < 5
