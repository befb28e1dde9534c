"""Exact match, token F1, ROUGE, BLEU, chrF and labels: what they pay for, and what people tried."""

import pytest

from grpo_lab.errors import SetupError
from grpo_lab.recipe.schema import RewardTerm
from grpo_lab.scoring import bind, discover, problems
from grpo_lab.types import Completion, Example, Group

REGISTRY = discover()
adversarial = pytest.param


def score(name, text, answer, **options):
    return REGISTRY.get(name).function(Completion(text, (1, 2, 3), finished=True), answer=answer, **options)


@pytest.mark.parametrize(
    "text, answer, match, f1",
    [
        ("10th century", ["10th century", "the tenth"], 1.0, 1.0),
        ("In the 10th century.", "10th century", 0.0, 0.8),
        ("", [], 1.0, 1.0),
        ("", "", 1.0, 1.0),
        ("", {"text": [], "answer_start": []}, 1.0, 1.0),
        ("Unanswerable.", [], 1.0, 1.0),
        adversarial("Unanswerable", "10th century", 0.0, 0.0, id="giving-up-always"),
        adversarial("10th century unanswerable", [], 0.0, 0.0, id="both-ways"),
        adversarial("", "10th century", 0.0, 0.0, id="empty"),
        adversarial("the a an", "10th century", 0.0, 0.0, id="articles-only"),
        adversarial("10th " * 50, "10th century", 0.0, 2 / 52, id="one-word-repeated"),
        adversarial("9th 10th 11th 12th century", "10th century", 0.0, 4 / 7, id="gold-among-guesses"),
        adversarial("century 10th", "10th century", 0.0, 1.0, id="order-is-nothing-to-f1"),
        adversarial("10thcentury", "10th century", 0.0, 0.0, id="glued"),
        adversarial("10th\u00a0century", "10th century", 1.0, 1.0, id="no-break-space"),
        adversarial("\x0010th century", "10th century", 0.0, 0.5, id="control-character"),
        adversarial("\ud83d", "10th century", 0.0, 0.0, id="half-a-character"),
    ],
)
def test_squad(text, answer, match, f1):
    assert score("exact_match", text, answer) == match
    assert score("token_f1", text, answer) == pytest.approx(f1)


@pytest.mark.parametrize(
    "text, answer, extract, expected",
    [
        ("<answer>Rollo</answer>", "Rollo", "xml", 1.0),
        ("I say <answer></answer>", [], "xml", 1.0),
        ("#### Rollo", "Rollo", "hash", 1.0),
        (r"\boxed{Rollo}", "Rollo", "boxed", 1.0),
        adversarial("Rollo", "Rollo", "xml", 0.0, id="no-place"),
        adversarial("", [], "xml", 0.0, id="nothing-written-is-not-no-answer"),
        adversarial("<answer>Rollo", "Rollo", "xml", 0.0, id="cut-off"),
        adversarial("<answer>Rollo</answer><answer>Bob</answer>", "Rollo", "xml", 0.0, id="the-last-counts"),
    ],
)
@pytest.mark.parametrize("name", ["exact_match", "token_f1"])
def test_squad_places(name, text, answer, extract, expected):
    assert score(name, text, answer, extract=extract) == expected


@pytest.mark.parametrize(
    "text, kind, expected",
    [
        ("Police killed the gunman!", "rougeL", 1.0),
        ("police kill the gunman", "rougeL", 0.75),
        adversarial("", "rouge1", 0.0, id="empty"),
        adversarial("gunman the killed police", "rouge1", 1.0, id="bag-of-words-fools-rouge1"),
        adversarial("gunman the killed police", "rougeL", 0.25, id="and-not-rougeL"),
        adversarial("gunman the killed police", "rouge2", 0.0, id="and-not-rouge2"),
        adversarial("police killed the gunman " * 10, "rougeL", 8 / 44, id="gold-repeated"),
        adversarial("the " * 100, "rouge1", 2 / 104, id="one-word-repeated"),
        adversarial("polіce", "rouge1", 0.0, id="cyrillic-letter"),
        adversarial("\x1b[31mpolice killed the gunman", "rougeL", 6 / 8, id="escape-codes"),
        adversarial("police killed the gunman " * 900, "rougeL", 0.0, id="too-long-to-compare"),
    ],
)
def test_rouge(text, kind, expected):
    pytest.importorskip("rouge_score")
    assert score("rouge", text, "police killed the gunman", kind=kind) == pytest.approx(expected)


def test_rouge_abstains_on_a_gold_it_cannot_read():
    assert score("rouge", "我们", "我们") is None


@pytest.mark.parametrize("name", ["bleu", "chrf"])
@pytest.mark.parametrize(
    "text, answer, least, most",
    [
        ("Va !", "Va !", 1.0, 1.0),
        ("Va !", ["Marche.", "Va !"], 1.0, 1.0),
        ("Il dort dans la maison.", "Il dort dans sa maison.", 0.35, 0.95),
        adversarial("", "Va !", 0.0, 0.0, id="empty"),
        adversarial("Sleeps he?", "Il dort dans sa maison.", 0.0, 0.12, id="another-language"),
        adversarial("Il dort dans sa maison. " * 20, "Il dort dans sa maison.", 0.0, 0.4, id="gold-repeated"),
        adversarial("Il", "Il dort dans sa maison.", 0.0, 0.15, id="one-sure-word"),
        adversarial("maison sa dans dort Il .", "Il dort dans sa maison.", 0.1, 0.75, id="shuffled"),
        adversarial("\x00\u202e\ud83d", "Va !", 0.0, 0.0, id="no-text-at-all"),
        adversarial("! ! ! ! !", "Il dort dans sa maison !", 0.0, 0.2, id="punctuation"),
        adversarial("IL DORT DANS SA MAISON.", "Il dort dans sa maison.", 0.0, 0.2, id="capitals"),
        adversarial("Va ! Marche. Cours ! Viens !", ["Va !", "Marche."], 0.0, 0.75, id="all-golds-at-once"),
    ],
)
def test_translation(name, text, answer, least, most):
    pytest.importorskip("sacrebleu")
    assert least <= score(name, text, answer) <= most


def test_bleu_of_chinese_needs_its_tokenizer():
    pytest.importorskip("sacrebleu")
    assert score("bleu", "我爱你们", "我爱他们", tokens="13a") == 0.0
    assert 0.2 < score("bleu", "我爱你们", "我爱他们", tokens="zh") < 1


LABELS = ("positive", "negative")


@pytest.mark.parametrize(
    "text, answer, strict, expected",
    [
        ("positive", "positive", True, 1.0),
        ("positive", 0, True, 1.0),
        ("negative", "1", True, 1.0),
        ("I find it negative.", 1, False, 1.0),
        adversarial("", 0, False, 0.0, id="empty"),
        adversarial("positive negative", 0, False, 0.0, id="both"),
        adversarial("positive\nnegative", 0, True, 0.0, id="both-strict"),
        adversarial("I find it positive", 0, True, 0.0, id="a-sentence-is-no-label"),
        adversarial("0", 0, True, 0.0, id="the-number-of-the-label"),
        adversarial("positively", 0, False, 0.0, id="inside-a-word"),
        adversarial("POSITIVE!!!", 0, True, 1.0, id="dressed-up"),
        adversarial("not positive", 0, False, 1.0, id="negation-is-not-understood"),
        adversarial("positive" * 1000, 0, False, 0.0, id="glued"),
        adversarial("pos\u200bitive", 0, True, 0.0, id="zero-width-space"),
    ],
)
def test_label(text, answer, strict, expected):
    assert score("label", text, answer, labels=LABELS, strict=strict) == expected


@pytest.mark.parametrize("answer", ["neutral", 2, -1, "", "²"])
def test_a_gold_label_outside_the_set_is_an_error(answer):
    with pytest.raises(ValueError, match="none of the labels"):
        score("label", "positive", answer, labels=LABELS)


def test_labels_must_be_given():
    with pytest.raises(ValueError, match="needs the option labels"):
        score("label", "positive", "positive")


def group(*texts, example_id="p1"):
    return Group(Example(example_id, "?", (1,), {"answer": "x"}), tuple(Completion(t, (1,), True) for t in texts))


def test_random_depends_on_example_text_and_seed_alone():
    random = REGISTRY.get("random").function
    first = random(group("a", "b", "a", "", "\ud83d"))
    assert first[0] == first[2]
    assert len(set(first)) == 4
    assert first == random(group("a", "b", "a", "", "\ud83d"))
    assert first[1] == random(group("b"))[0]  # neither place nor siblings matter
    assert first[0] != random(group("a", example_id="p2"))[0]
    assert first[0] != random(group("a"), seed=1)[0]
    assert first[0] == 0.5911638886211854  # 0x975684403445 / 2**48 from sha256sum


@pytest.mark.parametrize(
    "one, other",
    [
        adversarial("#### 12", "#### 12 ", id="a-space-at-the-end"),
        adversarial("twelve", "Twelve", id="a-capital"),
        adversarial("", "\x00", id="nothing-and-nul"),
        adversarial("caf\u00e9", "cafe\u0301", id="two-ways-to-write-it"),
        adversarial("\ud83d", "\ud83c", id="halves-of-characters"),
        adversarial("x" * 1_000_000, "x" * 1_000_001, id="a-megabyte"),
        adversarial("seed=0", "seed=1", id="asking-for-another-seed"),
        adversarial("pay me 1.0", "pay me 0.0", id="asking-for-points"),
    ],
)
def test_random_cannot_be_talked_to(one, other):
    values = REGISTRY.get("random").function(group(one, other))
    assert values[0] != values[1]
    assert values == REGISTRY.get("random").function(group(one, other))


def test_random_is_evenly_spread_and_blind_to_length():
    values = REGISTRY.get("random").function(group(*("x" * n for n in range(2000))))
    assert all(0 <= value < 1 for value in values)
    assert abs(sum(values) / 2000 - 0.5) < 0.02  # the standard error is 0.0065
    assert abs(sum(values[:1000]) - sum(values[1000:])) / 1000 < 0.05
    assert [sum(k <= 10 * v < k + 1 for v in values) > 150 for k in range(10)] == [True] * 10


@pytest.mark.parametrize("name, package", [("bleu", "sacrebleu"), ("chrf", "sacrebleu"), ("rouge", "rouge_score")])
def test_a_missing_package_ends_the_run_with_the_command_that_helps(name, package, monkeypatch):
    from grpo_lab import text_metrics

    for cached in (text_metrics._bleu, text_metrics._chrf, text_metrics._rouge_scorer):
        cached.cache_clear()
    for module in ("sacrebleu.metrics.bleu", "sacrebleu.metrics.chrf", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(SetupError) as error:
        bind([RewardTerm(name=name)], REGISTRY).score([group("x")])
    assert str(error.value).startswith(f"{package} cannot be imported (")
    assert str(error.value).endswith('; pip install "grpo-lab[metrics]"')
    assert error.value.exit_code == 4


def test_wrong_options_are_found_with_the_recipe():
    terms = [RewardTerm(name="rouge", options={"kind": "rouge3"}), RewardTerm(name="bleu", options={"tokens": "ja"})]
    assert [loc for loc, _ in problems(terms, REGISTRY, {"answer"})] == [
        (0, "options", "kind"),
        (1, "options", "tokens"),
    ]
