import signal
import threading
import time

import pytest

from grpo_lab.scoring import discover
from grpo_lab.types import Completion

accuracy = discover().get("accuracy").function
# An adversarial row is one that some published reward got wrong, in either direction.
adversarial = pytest.param


def score(text, answer, **options):
    return accuracy(Completion(text, (1, 2, 3), finished=True), answer=answer, **options)


@pytest.mark.parametrize(
    "text, answer, expected",
    [
        ("6 * 3 = 18\n#### 18", "18", 1.0),
        ("6 * 3 = 18\n#### 17", "18", 0.0),
        ("<think>hm</think>\n<answer>18</answer>", "18", 1.0),
        (r"so \boxed{18}.", "18", 1.0),
        ("#### 18", 18, 1.0),
        ("#### 18", 18.0, 1.0),
        ("#### 0.3", 0.1 + 0.2, 1.0),
        adversarial("it is 18", "18", 0.0, id="no-demanded-place"),
        adversarial("", "18", 0.0, id="empty"),
        adversarial("####", "18", 0.0, id="empty-place"),
        adversarial("<answer></answer>", "18", 0.0, id="empty-tag"),
        adversarial("#### 1,080", "1080", 1.0, id="thousands"),
        adversarial("#### 1080", "1,080", 1.0, id="thousands-in-gold"),
        adversarial("#### 1,08", "1080", 0.0, id="bad-grouping"),
        adversarial("#### 1,08", "108", 0.0, id="bad-grouping-without-comma"),
        adversarial("#### 18.", "18", 1.0, id="full-stop"),
        adversarial("#### $18", "18", 1.0, id="dollar"),
        adversarial("#### **18**", "18", 1.0, id="bold"),
        adversarial("#### 18.0", "18", 1.0, id="decimal"),
        adversarial("#### -5", "-5", 1.0, id="negative"),
        adversarial("#### \u22125", "-5", 1.0, id="typographic-minus"),
        adversarial("#### 5", "-5", 0.0, id="lost-sign"),
        adversarial("#### ²", "2", 0.0, id="superscript"),
        adversarial("#### 0.5", "1/2", 1.0, id="fraction"),
        adversarial("#### 50%", "50", 1.0, id="percent"),
        adversarial("#### 50%", "0.5", 1.0, id="percent-as-share"),
        adversarial("#### 50%", "5", 0.0, id="percent-of-something-else"),
        adversarial("#### 1 #### 2 #### 12", "12", 0.0, id="many-hashes"),
        adversarial(r"\boxed{1} or \boxed{12}", "12", 0.0, id="two-boxes"),
        adversarial("<answer>1</answer><answer>12</answer>", "12", 0.0, id="two-tags"),
        adversarial("<answer>1</answer> #### 12", "12", 0.0, id="two-kinds-of-place"),
        adversarial("#### 1 2 12", "12", 0.0, id="many-numbers"),
        adversarial("#### 12 13", "25", 0.0, id="neighbours-are-not-added"),
        adversarial(r"\boxed{12\,13}", "25", 0.0, id="latex-neighbours-are-not-added"),
        adversarial("#### 1, 2, 12", "12", 0.0, id="a-list"),
        adversarial("#### 1 or 12", "12", 0.0, id="alternatives"),
        adversarial(r"\boxed{\pm 12}", "12", 0.0, id="both-signs"),
        adversarial("#### 1 = 12", "12", 0.0, id="false-equation"),
        adversarial("<answer>1\n12</answer>", "12", 0.0, id="two-lines"),
        adversarial("#### 16-3-4", "9", 0.0, id="unevaluated"),
        adversarial(r"\boxed{3 \cdot 4}", "12", 0.0, id="unevaluated-latex"),
        adversarial("#### 12####.####.", "12", 0.0, id="degenerate-tail"),
        adversarial("<answer>12</answer", "12", 0.0, id="cut-off-tag"),
        adversarial("<answer>\n12\n</answer>", "12", 1.0, id="line-breaks-in-tag"),
        adversarial(r"<answer>\boxed{12}</answer>", "12", 1.0, id="box-in-tag"),
        adversarial("#### x = 12", "12", 1.0, id="named"),
        adversarial("#### 12\x1b[31m", "12", 0.0, id="control-characters"),
    ],
)
def test_numbers(text, answer, expected):
    assert score(text, answer) == expected


@pytest.mark.parametrize(
    "text, answer, expected",
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", 1.0),
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", 1.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        (r"\boxed{(x+1)^2}", "x^2+2x+2", 0.0),
        (r"\boxed{12\text{ cm}}", "12", 1.0),
        (r"\boxed{(1, 2)}", "(1,2)", 1.0),
        adversarial(r"\boxed{(2, 1)}", "(1,2)", 0.0, id="ordered-pair"),
        adversarial(r"\boxed{2, 1}", "1,2", 1.0, id="roots-in-any-order"),
        adversarial("#### Paris", "Paris", 1.0, id="words"),
        adversarial("#### paris.", "Paris", 1.0, id="words-dressed-up"),
        adversarial("#### Pairs", "Paris", 0.0, id="anagram"),
        adversarial(r"\boxed{Evelny}", r"\text{Evelyn}", 0.0, id="anagram-in-latex"),
        adversarial(r"\boxed{\text{Evelyn}}", "Evelyn", 1.0, id="latex-text"),
        adversarial(r"\boxed{(B)}", "B", 1.0, id="choice"),
        adversarial(r"\boxed{C}", "B", 0.0, id="wrong-choice"),
        adversarial(r"\boxed{y=2x+3}", "y=2x+3", 1.0, id="equation"),
        adversarial(r"\boxed{y=2x+4}", "y=2x+3", 0.0, id="wrong-equation"),
        adversarial(r"\boxed{10,\!080}", "10080", 1.0, id="latex-thousands"),
        adversarial(r"\boxed{\frac{1}{}}", r"\frac{1}{2}", 0.0, id="malformed"),
        adversarial("#### ?!", "?!", 1.0, id="gold-that-does-not-parse"),
        adversarial("#### !?", "?!", 0.0, id="gold-that-does-not-parse-differs"),
    ],
)
def test_mathematics_and_words(text, answer, expected):
    assert score(text, answer) == expected


@pytest.mark.parametrize(
    "text, answer, expected",
    [
        # wrong answers that were paid
        adversarial(r"<answer>\boxed{1} \boxed{12}</answer>", "12", 0.0, id="two-boxes-in-one-tag"),
        adversarial(r"\boxed{2^3}", "8", 0.0, id="a-power-not-worked-out"),
        adversarial(r"\boxed{\sqrt{144}}", "12", 0.0, id="a-root-not-worked-out"),
        adversarial(r"\boxed{\binom{4}{2}}", "6", 0.0, id="a-binomial-not-worked-out"),
        adversarial(r"\boxed{\gcd(12, 24)}", "12", 0.0, id="a-divisor-not-worked-out"),
        adversarial(r"\boxed{\max(1, 2, 3)}", "3", 0.0, id="the-largest-of-many-guesses"),
        adversarial(r"\boxed{\lfloor 12.5 \rfloor}", "12", 0.0, id="not-rounded"),
        adversarial(r"\boxed{2}", "2ab", 0.0, id="a-product-of-letters-is-no-unit"),
        adversarial(r"\boxed{x + 3}", "x+3h", 0.0, id="nor-is-a-letter-behind-a-sum"),
        adversarial(r"\boxed{2ab}", "2", 0.0, id="nor-are-letters-added-to-a-number"),
        adversarial(r"\boxed{2\sqrt{3}\text{ cm}}", r"2\sqrt{3}\text{ m}", 0.0, id="units-exchanged-behind-a-root"),
        adversarial(r"\boxed{2 \log x}", "2", 0.0, id="a-function-is-no-unit"),
        adversarial(r"\boxed{(1,2)}", r"\{1,2\}", 0.0, id="an-interval-is-no-set"),
        adversarial("#### 12 plus one", "12", 0.0, id="a-sum-in-words"),
        adversarial("#### 12 over five", "12", 0.0, id="a-fraction-in-words"),
        adversarial("#### 12 hundredths", "12", 0.0, id="a-share-in-words"),
        adversarial("#### 12 maybe", "12", 0.0, id="not-sure"),
        adversarial("#### 12 is wrong", "12", 0.0, id="taken-back"),
        adversarial("#### 1–2", "-2", 0.0, id="a-range-with-a-dash"),
        adversarial("#### ½2", "1/22", 0.0, id="a-fraction-sign-in-a-number"),
        # right answers that were refused
        adversarial(r"\boxed{25\text{ m/s}}", "25", 1.0, id="metres-a-second"),
        adversarial("#### 60 miles/hour", "60", 1.0, id="miles-an-hour"),
        adversarial("#### $12/hour", "12", 1.0, id="dollars-an-hour"),
        adversarial("#### 25 km/h", "25 km per h", 1.0, id="per-is-a-stroke"),
        adversarial(r"\boxed{1\,234\,567}", "1234567", 1.0, id="thin-spaces-between-thousands"),
        adversarial("#### 12\u202f345", "12345", 1.0, id="narrow-spaces-between-thousands"),
        adversarial(r"\boxed{{12}}", "12", 1.0, id="braces-in-the-box"),
        adversarial("#### –3", "-3", 1.0, id="a-dash-for-a-minus"),
        adversarial("#### 2½", "2.5", 1.0, id="a-fraction-sign"),
        adversarial(r"\boxed{\varnothing}", r"\emptyset", 1.0, id="the-other-empty-set"),
        adversarial(r"\boxed{2ba}", "2ab", 1.0, id="letters-in-another-order"),
        adversarial(r"\boxed{6\pi\text{ cm}^2}", r"6\pi", 1.0, id="a-unit-behind-pi"),
        adversarial(r"\boxed{2\sqrt{3}}", r"2\sqrt{3}\text{ cm}", 1.0, id="a-unit-left-out-behind-a-root"),
        adversarial(r"\boxed{10^6}", "1000000", 1.0, id="a-power-of-ten-is-a-number"),
        adversarial(r"\boxed{\displaystyle\frac{-1}{2}}", "-0.5", 1.0, id="dressed-up-fraction"),
    ],
)
def test_what_a_hostile_reader_tried(text, answer, expected):
    assert score(text, answer) == expected


@pytest.mark.parametrize("answer", [r"9^{9^{9^9}}", "(10^8)!", "(x+y+z)^{99}", "(" * 30 + "1" + ")" * 30, "9" * 10_000])
def test_answers_that_take_for_ever_are_wrong_at_once(answer):
    def too_slow(*_):
        raise AssertionError("took more than 2 seconds")

    previous = signal.signal(signal.SIGALRM, too_slow)
    signal.setitimer(signal.ITIMER_REAL, 2)
    try:
        assert score(rf"\boxed{{{answer}}}", "12") == 0.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize(
    "text, extract, strict, expected",
    [
        ("#### 12", "hash", True, 1.0),
        (r"\boxed{12}", "hash", True, 0.0),
        (r"#### 3 \boxed{12}", "boxed", True, 1.0),
        (r"<answer>12</answer> \boxed{3}", "xml", True, 1.0),
        ("perhaps 3, no, 12.", "last", True, 1.0),
        ("12, no, 3", "last", True, 0.0),
        ("it is 12", "auto", False, 1.0),
        ("<answer>it is 12 eggs</answer>", "auto", False, 1.0),
        ("#### 12####.####.", "auto", False, 1.0),
        ("#### 1 #### 12", "hash", False, 1.0),
        ("#### 12 #### 1", "hash", False, 0.0),
        ("<answer>1</answer> 12", "auto", False, 0.0),
        ("no number", "auto", False, 0.0),
    ],
)
def test_places(text, extract, strict, expected):
    assert score(text, "12", extract=extract, strict=strict) == expected


@pytest.mark.parametrize(
    "text, answer, expected",
    [
        ("#### 2", ["2", "-2"], 1.0),
        ("#### -2", ["2", "-2"], 1.0),
        ("#### NYC", ["New York", "NYC"], 1.0),
        ("#### 0.5", ["1/3", 0.5], 1.0),
        adversarial("#### 3", ["2", "-2"], 0.0, id="none-of-them"),
        adversarial("#### 2, -2", ["2", "-2"], 0.0, id="all-of-them-are-guesses"),
        adversarial("#### 2 #### -2", ["2", "-2"], 0.0, id="each-in-a-place-of-its-own"),
        adversarial("#### ['2', '-2']", ["2", "-2"], 0.0, id="the-list-itself"),
    ],
)
def test_any_of_several_golds_will_do(text, answer, expected):
    assert score(text, answer) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"<think>\boxed{3}? \boxed{4}?</think> It is \boxed{12}.", 1.0),
        ("3? 4? 12?</think>#### 12", 1.0),
        adversarial(r"<think>It is \boxed{12}.</think>", 0.0, id="only-thought-of"),
        adversarial(r"<think>12</think> \boxed{1} \boxed{12}", 0.0, id="two-guesses-after-thinking"),
        adversarial(r"<think>a</think> \boxed{1} <think>b</think> \boxed{12}", 0.0, id="a-guess-before-more-thinking"),
        adversarial(r"\boxed{12}</think> \boxed{3}", 0.0, id="the-last-word-is-wrong"),
    ],
)
def test_thinking_is_not_an_answer(text, expected):
    assert score(text, "12") == expected


def test_what_takes_longer_than_the_time_limit_is_wrong():
    started = time.monotonic()
    assert score(r"\boxed{(((x+y+z)^9)^9)^9}", "(x+1)(x+2)(x+3)", timeout_seconds=1) == 0.0
    assert 0.9 < time.monotonic() - started < 4.5  # without the limit it takes minutes; with the default, 5 seconds


def test_no_time_limit_is_refused():
    with pytest.raises(ValueError, match="timeout_seconds of at least 1"):
        score("#### 12", "12", timeout_seconds=0)


def test_a_row_without_answer_does_not_apply():
    assert score("#### 12", None) is None


@pytest.mark.parametrize(
    "answer, message",
    [
        ("6 + 6 = 12\n#### 12", "the column answer holds a whole solution; set data.answer.extract: hash"),
        (r"so $\boxed{12}$", "the column answer holds a whole solution; set data.answer.extract: boxed"),
        (" ", "the column answer holds no answer, but ' '"),
        (float("nan"), "the column answer holds no answer, but nan"),
    ],
)
def test_an_unusable_gold_answer_is_an_error_and_not_a_zero(answer, message):
    with pytest.raises(ValueError) as error:
        score("#### 12", answer)
    assert str(error.value) == message


def test_mathematics_off_the_main_thread_is_an_error_and_not_a_hang():
    found = []

    def run():
        try:
            score(r"\boxed{\sqrt{12}}", r"2\sqrt{3}")
        except RuntimeError as error:
            found.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert found == ["accuracy runs on the main thread only: math-verify keeps its time limit by signal.alarm"]
