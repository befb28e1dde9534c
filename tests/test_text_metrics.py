import random

import pytest

from grpo_lab.text_metrics import (
    bio_spans,
    bleu,
    chrf,
    corpus_entity_f1,
    entity_f1,
    exact_match,
    gold_texts,
    label_of,
    rouge,
    squad_normalised,
    token_f1,
)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The  Eiffel-Tower, (Paris)!", "eiffeltower paris"),
        ("an apple a day", "apple day"),
        ("theatre", "theatre"),  # articles are whole words
        ("$1,080.50", "108050"),
        ("C++", "c"),
        ("«café»", "«café»"),  # ASCII punctuation only
        ("The the A!", ""),
        ("", ""),
    ],
)
def test_squad_normalisation(text, expected):
    assert squad_normalised(text) == expected


@pytest.mark.parametrize(
    "prediction, golds, match, f1",
    [
        ("Denver Broncos", ["Denver Broncos"], 1.0, 1.0),
        ("the Denver broncos.", ["Carolina", "Denver Broncos"], 1.0, 1.0),  # the best gold counts
        ("10th century", ["10th and 11th centuries"], 0.0, 2 / 6),  # 1 shared, 2 and 4 words: 2/6
        ("a b c", ["b c d"], 0.0, 0.8),  # "a" is an article: [b c] against [b c d]: 2*2/5
        ("x x x", ["x"], 0.0, 0.5),  # repetition costs precision: 2*1/4
        ("y", ["x"], 0.0, 0.0),
        ("", [], 1.0, 1.0),
        ("x", [], 0.0, 0.0),
        ("", ["x"], 0.0, 0.0),
        ("the", [], 1.0, 1.0),  # nothing is left of it
        ("", [".", "x"], 0.0, 0.0),  # nor of this gold, which three answerable questions of SQuAD 2.0 have
        ("", ["."], 1.0, 1.0),
    ],
)
def test_exact_match_and_token_f1_by_hand(prediction, golds, match, f1):
    assert exact_match(prediction, golds) == match
    assert token_f1(prediction, golds) == pytest.approx(f1)


def test_one_text_for_a_list_of_golds_is_refused_and_not_read_letter_by_letter():
    with pytest.raises(TypeError, match="golds should be a list"):
        exact_match("a", "abc")


@pytest.mark.parametrize("answer", [None, 3, [1], {"texts": ["x"]}])
def test_a_column_without_gold_texts_is_refused(answer):
    with pytest.raises(TypeError, match="gold answers should be"):
        gold_texts(answer)


def test_spans_and_scores_equal_seqeval_on_random_tags():
    seqeval = pytest.importorskip("seqeval.metrics")
    from seqeval.metrics.sequence_labeling import get_entities

    rng = random.Random(0)
    tags = ["O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    found = [[rng.choice(tags) for _ in range(rng.randint(1, 9))] for _ in range(400)]
    gold = [[rng.choice(tags) for _ in sentence] for sentence in found]
    for sentence in found:
        assert [(kind, start, stop - 1) for kind, start, stop in bio_spans(sentence)] == get_entities(sentence)
    scores = corpus_entity_f1((bio_spans(a), bio_spans(b)) for a, b in zip(found, gold, strict=True))
    assert scores["f1"] == pytest.approx(seqeval.f1_score(gold, found), abs=1e-12)
    assert scores["precision"] == pytest.approx(seqeval.precision_score(gold, found), abs=1e-12)
    assert scores["recall"] == pytest.approx(seqeval.recall_score(gold, found), abs=1e-12)


def test_entities_count_as_often_as_they_stand():
    ann = ("PER", "Ann")
    assert entity_f1([ann, ann], [ann]) == pytest.approx(2 / 3)
    assert entity_f1([ann], [ann, ann]) == pytest.approx(2 / 3)
    assert entity_f1([], []) == 1.0
    assert entity_f1([ann], []) == 0.0


@pytest.mark.parametrize("tag", ["PER", "B-", "X-PER", "", "S-PER"])
def test_what_is_no_tag_is_an_error(tag):
    with pytest.raises(ValueError, match="is no tag"):
        bio_spans(["O", tag])


def test_rouge_by_hand():
    pytest.importorskip("rouge_score")
    # Lin 2004, section 3: S1 against S2 and S3; LCS 3 and 2 of 4 words each, so F1 3/4 and 2/4.
    gold = "police killed the gunman"
    assert rouge("police kill the gunman", [gold]) == pytest.approx(3 / 4)
    assert rouge("the gunman kill police", [gold]) == pytest.approx(2 / 4)
    assert rouge("the gunman kill police", [gold], kind="rouge1") == pytest.approx(3 / 4)
    assert rouge("the gunman kill police", [gold], kind="rouge2") == pytest.approx(1 / 3)
    assert rouge("police kills the gunman", [gold], stemmer=True) == 1.0
    assert rouge("police", ["gunman", "police"]) == 1.0


@pytest.mark.parametrize(
    "golds, kind", [(["我们"], "rouge1"), (["Salut"], "rouge2"), ([], "rougeL"), (["..."], "rougeL")]
)
def test_rouge_does_not_apply_where_the_gold_has_nothing_to_compare(golds, kind):
    pytest.importorskip("rouge_score")
    assert rouge("anything", golds, kind=kind) is None


def test_bleu_by_hand():
    pytest.importorskip("sacrebleu")
    # 5 words, 4 in place: precisions 4/5, 3/4, 2/3, 1/2, no brevity penalty; their product is 1/5.
    assert bleu("the cat sat down here", ["the cat sat down there"]) == pytest.approx((1 / 5) ** 0.25)
    assert bleu("the", ["the cat"]) == pytest.approx(0.36788, abs=1e-5)  # precision 1, brevity exp(1 - 2/1)
    # Papineni 2002's "the the the the the the the": clipped to 2 of 7, so far from 1
    assert bleu("the the the the the the the", ["The cat is on the mat.", "the dog and the cat"]) < 0.15


def test_chrf_by_hand():
    pytest.importorskip("sacrebleu")
    # "ab" against "abc": order 1: P 2/2, R 2/3; order 2: P 1/1, R 1/2; averages P 1, R 7/12; F2 = 5PR/(4P+R)
    assert chrf("ab", ["abc"]) == pytest.approx(5 * (7 / 12) / (4 + 7 / 12), abs=1e-9)
    assert chrf("我们", ["我们"]) == 1.0


@pytest.mark.parametrize("metric", [bleu, chrf])
def test_translation_metrics_need_a_gold(metric):
    with pytest.raises(ValueError, match="no gold text"):
        metric("x", [" "])


@pytest.mark.parametrize(
    "text, strict, expected",
    [
        ("positive", True, "positive"),
        (" Positive.\n", True, "positive"),
        ("It is positive", True, None),
        ("It is positive", False, "positive"),
        ("very positive", False, "very positive"),
        ("very positive, not positive", False, None),
        ("nonpositive", False, None),
        ("positive positive", False, "positive"),
        ("positive negative", False, None),
        ("", False, None),
        ("", True, None),
    ],
)
def test_labels(text, strict, expected):
    assert label_of(text, ["positive", "negative", "very positive"], strict=strict) == expected


def test_labels_that_differ_by_case_only_are_refused():
    with pytest.raises(ValueError, match="the same but for case"):
        label_of("x", ["LOC", "loc"])
