import os
from itertools import islice
from pathlib import Path

import pytest

from grpo_lab.scoring import discover
from grpo_lab.types import Completion

language = discover().get("language").function
adversarial = pytest.param
REAL_DATA = Path(os.environ.get("GRPO_LAB_DATA", Path(__file__).parents[3] / "shared" / "data"))


def score(text, **options):
    return language(Completion(text, (1,), True), **options)


@pytest.mark.parametrize(
    "text, code, expected",
    [
        ("The sum is twelve.", "en", 0.0),
        ("Сумма равна двенадцати.", "en", -1.0),
        ("Сумма равна двенадцати.", "ru", 0.0),
        ("总和是十二", "zh", 0.0),
        ("合計は十二です", "ja", 0.0),
        ("합계는 열둘입니다", "ko", 0.0),
        ("Το άθροισμα είναι δώδεκα", "el", 0.0),
        ("المجموع هو اثنا عشر", "ar", 0.0),
        ("कुल बारह है", "hi", 0.0),
        adversarial("hello 你好", "en", -2 / 7, id="code-switching"),
        adversarial("hello你好", "en", -2 / 7, id="without-a-space"),
        adversarial("我 think", "en", -1 / 6, id="a-lone-ideograph-is-a-word"),
        adversarial("the angle is α and π × x", "en", 0.0, id="symbols-of-mathematics"),
        adversarial("let 𝑥 be ℝ", "en", 0.0, id="mathematical-letters"),
        adversarial("Привeт", "ru", -1 / 6, id="a-look-alike-letter"),
        adversarial("café naïve Straße", "en", 0.0, id="accents"),
        adversarial("12 + 13 = 25 !?", "en", 0.0, id="no-letters"),
        adversarial("", "en", 0.0, id="empty"),
        adversarial("ｈｅｌｌｏ", "en", 0.0, id="full-width"),
        adversarial("cafe\u0301 e\u0301te\u0301", "fr", 0.0, id="combining-accents"),
        adversarial("\ud800 hello", "en", 0.0, id="a-lone-surrogate"),
        adversarial("هل", "fa", 0.0, id="one-script-two-languages"),
    ],
)
def test_script(text, code, expected):
    assert score(text, language=code) == pytest.approx(expected)


def test_an_unknown_language_is_an_error():
    with pytest.raises(ValueError, match="unknown language 'english'"):
        score("hello", language="english")


class TestModel:
    @pytest.fixture(autouse=True)
    def needs_py3langid(self):
        pytest.importorskip("py3langid")

    @pytest.mark.parametrize(
        "text, expected",
        [
            ("First we add the tens and then the ones.", 0.0),
            ("D'abord nous ajoutons les dizaines et puis les unités.", -1.0),
            adversarial("Zuerst addieren wir die Zehner, dann die Einer", -1.0, id="german"),
            adversarial("d'accord", 0.0, id="too-short-to-tell"),
            adversarial("12 + 13 = 25", 0.0, id="no-letters"),
            adversarial("Сумма равна двенадцати, это легко.", -1.0, id="another-script"),
            adversarial("总和是十二", -1.0, id="another-script-however-short"),
            adversarial("", 0.0, id="empty"),
        ],
    )
    def test_english(self, text, expected):
        assert score(text, by="model") == expected

    def test_a_mixture_costs_its_share(self):
        mixed = "First we add the tens and then the ones. D'abord nous ajoutons les dizaines et puis les unités."
        assert -0.7 < score(mixed, by="model") < -0.4

    @pytest.mark.skipif(not (REAL_DATA / "tatoeba_en_fr").is_dir(), reason=f"no data in {REAL_DATA}; set GRPO_LAB_DATA")
    def test_real_sentences_are_told_apart(self):
        with (REAL_DATA / "tatoeba_en_fr" / "eng-fra.txt").open(encoding="utf-8") as file:
            pairs = [line.split("\t")[:2] for line in islice(file, 3000, 5000)]
        texts = [
            [" ".join(column) for column in zip(*pairs[start : start + 5], strict=True)] for start in range(0, 2000, 5)
        ]
        english = sum(score(left, by="model") for left, _ in texts) / len(texts)
        french = sum(score(right, by="model") for _, right in texts) / len(texts)
        print(f"English {english:.3f}, French {french:.3f}")  # noqa: T201 - shown when it fails, and with -s
        assert english > -0.1
        assert french < -0.8
