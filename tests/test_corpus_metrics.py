import random

import pytest
import torch

from grpo_lab.algorithm.intervals import bootstrap_interval, bootstrap_sums
from grpo_lab.corpus_evaluation import corpus_differences, corpus_signatures, corpus_values, resampled
from grpo_lab.corpus_metrics import corpus_metrics, joined

LABELS = ["negative", "neutral", "positive"]
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "O"]
# sacreBLEU's own example (its README): two hypotheses, two references each
HYPOTHESES = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


def rows(answers, golds, units=None):
    units = units or range(len(answers))
    return [
        {"unit": f"u{unit}", "sample": 0, "completion": answer, "answer": gold}
        for unit, answer, gold in zip(units, answers, golds, strict=True)
    ]


def means(answers, golds, units=None, **terms):
    found = corpus_values(resampled(rows(answers, golds, units), corpus_metrics(terms)))
    return {name: values["mean"] for name, values in found.items()}


# classification


def test_accuracy_and_macro_f1_by_hand():
    # negative: 1 right of 2 said and 1 there, F1 2/3; positive: 1 of 1 said and 2 there, F1 2/3; neutral: never said, F1 0
    found = means(
        ["negative", "negative", "positive", "?"],
        ["negative", "positive", "positive", "neutral"],
        label={"labels": LABELS},
    )
    assert found == pytest.approx(
        {
            "accuracy": 0.5,
            "macro_f1": (2 / 3 + 0 + 2 / 3) / 3,
            "f1_negative": 2 / 3,
            "f1_neutral": 0,
            "f1_positive": 2 / 3,
        }
    )


def test_accuracy_and_macro_f1_equal_scikit_learn_s():
    sklearn = pytest.importorskip("sklearn.metrics")
    draws = random.Random(0)
    gold, said = ([draws.choice(LABELS) for _ in range(300)] for _ in range(2))
    found = means(said, gold, label={"labels": LABELS})
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(gold, said))
    assert found["macro_f1"] == pytest.approx(sklearn.f1_score(gold, said, average="macro", labels=LABELS))


# entities


def test_entity_f1_equals_seqeval_s_on_random_tags():
    seqeval = pytest.importorskip("seqeval.metrics")
    draws = random.Random(1)
    gold, said = ([[draws.choice(TAGS) for _ in range(draws.randint(1, 9))] for _ in range(200)] for _ in range(2))
    said = [(tags * 9)[: len(true)] for tags, true in zip(said, gold, strict=True)]
    found = means([" ".join(tags) for tags in said], gold, entities={"form": "tags"})
    assert found == pytest.approx(
        {
            "entity_precision": seqeval.precision_score(gold, said),
            "entity_recall": seqeval.recall_score(gold, said),
            "entity_f1": seqeval.f1_score(gold, said),
        }
    )


def test_precision_is_of_what_was_said_and_recall_of_what_is_there():
    found = means(["PER: Ann\nLOC: Rome\nLOC: Oslo", "Ann!"], ["PER: Ann", "PER: Bob"], entities={})
    assert found == pytest.approx({"entity_precision": 1 / 3, "entity_recall": 1 / 2, "entity_f1": 2 / 5})


# SQuAD


def test_squad_by_hand_with_and_without_an_answer():
    # answered: "the cat" is exact, "big dog" half right; unanswerable: one is seen, one is not
    found = means(
        ["the cat", "big dog", "unanswerable", "Rollo"], [["cat"], ["dog", "dogs"], [], []], token_f1={}, exact_match={}
    )
    assert found == pytest.approx(
        {
            "squad_exact": 2 / 4,
            "squad_f1": (1 + 2 / 3 + 1 + 0) / 4,
            "squad_has_answer_exact": 1 / 2,
            "squad_has_answer_f1": (1 + 2 / 3) / 2,
            "squad_no_answer": 1 / 2,
        }
    )


def test_the_windows_of_a_question_are_one_question():
    answers = ["unanswerable", "Rollo", "unanswerable"]
    found = means(answers, [[], ["Rollo"], []], units=[0, 0, 1], token_f1={})
    assert (found["squad_exact"], found["squad_has_answer_exact"], found["squad_no_answer"]) == (1, 1, 1)


@pytest.mark.parametrize(
    "answers, taken",
    [
        (["unanswerable", "Unanswerable.", ""], "unanswerable"),
        (["a cat", "dog", "The cat"], "a cat"),
        (["dog", "cat"], "dog"),
    ],
)
def test_of_several_windows_the_most_frequent_answer_is_taken(answers, taken):
    assert joined(answers) == taken


# sacreBLEU and rouge-score


def test_corpus_bleu_and_chrf_equal_sacrebleu_s_and_say_its_signature():
    sacrebleu = pytest.importorskip("sacrebleu")
    found = means(HYPOTHESES, REFERENCES, bleu={}, chrf={})
    transposed = [list(each) for each in zip(*REFERENCES, strict=True)]
    assert found["corpus_bleu"] == pytest.approx(sacrebleu.corpus_bleu(HYPOTHESES, transposed).score / 100)
    assert found["corpus_chrf"] == pytest.approx(sacrebleu.corpus_chrf(HYPOTHESES, transposed).score / 100)
    # the number that sacreBLEU's README prints for these sentences
    assert round(100 * found["corpus_bleu"], 2) == 48.53
    assert corpus_signatures(rows(HYPOTHESES, REFERENCES), corpus_metrics({"bleu": {}, "chrf": {}})) == {
        "bleu": f"nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}",
        "chrf": f"nrefs:2|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{sacrebleu.__version__}",
    }


def test_corpus_bleu_is_not_the_mean_of_sentences_and_takes_different_numbers_of_golds():
    sacrebleu = pytest.importorskip("sacrebleu")
    golds = [REFERENCES[0], REFERENCES[1][:1], REFERENCES[2]]
    found = means(HYPOTHESES, golds, bleu={})["corpus_bleu"]
    second = [REFERENCES[0][1], None, REFERENCES[2][1]]
    expected = sacrebleu.corpus_bleu(HYPOTHESES, [[each[0] for each in golds], second]).score / 100
    sentences = [sacrebleu.sentence_bleu(h, g).score / 100 for h, g in zip(HYPOTHESES, golds, strict=True)]
    assert found == pytest.approx(expected)
    assert abs(found - sum(sentences) / 3) > 0.001


def test_rouge_by_hand():
    pytest.importorskip("rouge_score")
    # 2 of 3 and 2 of 3 words; 1 of 2 and 1 of 2 pairs; "the cat" in order
    found = means(["the cat sat", "x"], ["the cat ran", "x"], rouge={})
    assert found == pytest.approx({"rouge1": (2 / 3 + 1) / 2, "rouge2": 1 / 2, "rougeL": (2 / 3 + 1) / 2})


# intervals


def test_the_interval_of_a_mean_is_the_bootstrap_of_the_mean():
    hits = [float(number % 3 == 0) for number in range(60)]
    answers = ["positive" if hit else "negative" for hit in hits]
    drawn = resampled(rows(answers, ["positive"] * 60), corpus_metrics({"label": {"labels": LABELS}}))
    found = corpus_values(drawn)["accuracy"]
    assert (found["low"], found["high"]) == pytest.approx(bootstrap_interval(torch.tensor(hits)))


def test_differences_are_paired():
    metrics = corpus_metrics({"entities": {}})
    golds = [f"PER: p{number}" for number in range(40)]
    some = rows([gold if number % 2 else "none" for number, gold in enumerate(golds)], golds)
    more = rows([gold if number % 2 or number < 8 else "none" for number, gold in enumerate(golds)], golds)
    before, after = resampled(some, metrics), resampled(more, metrics)
    assert corpus_differences(before, before)["entity_recall"] == {"mean": 0, "low": 0, "high": 0}
    found = corpus_differences(before, after)["entity_recall"]
    assert found["mean"] == pytest.approx(4 / 40)
    assert 0 < found["low"] < 4 / 40 < found["high"] < 0.25  # apart, the two recalls vary by 0.3


def test_resampled_sums_are_sums_of_as_many_prompts():
    found = bootstrap_sums(torch.tensor([[1.0, 5.0], [1.0, 7.0]]), num_resamples=50)
    assert found[:, 0].tolist() == [2.0] * 50
    assert set(found[:, 1].tolist()) == {10.0, 12.0, 14.0}


def test_rewards_without_a_corpus_metric_have_none():
    assert corpus_metrics({"accuracy": {}, "length": {}}) == {}
