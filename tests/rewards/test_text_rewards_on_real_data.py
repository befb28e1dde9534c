"""Gold answers of real data sets reach the maximum: the false-negative rate of each reward, which the README quotes."""

import json
import os
from pathlib import Path

import pytest

from grpo_lab.scoring import discover
from grpo_lab.text_metrics import bio_spans, corpus_entity_f1
from grpo_lab.types import Completion

DATA = Path(os.environ.get("GRPO_LAB_DATA", "../shared/data"))
REGISTRY = discover()


def needs(name):
    return pytest.mark.skipif(not (DATA / name).is_dir(), reason=f"needs the {name} data ({DATA / name})")


def score(name, text, answer, **options):
    return REGISTRY.get(name).function(Completion(text, (1, 2, 3), finished=True), answer=answer, **options)


def misses(name, pairs, **options):
    """How many gold (text, answer) pairs there are, and those that do not reach 1."""
    pairs = list(pairs)
    wrong = [pair for pair in pairs if score(name, *pair, **options) != 1.0]
    return len(pairs), wrong


def squad():
    [file] = (DATA / "squad2").glob("*.json")
    for article in json.loads(file.read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield paragraph["context"], [answer["text"] for answer in question["answers"]]


def sentences(path, separator):
    """Words and tags of a CoNLL file's sentences."""
    words, tags = [], []
    for line in [*path.read_text().split("\n"), ""]:
        if line.strip():
            word, tag = line.strip().rsplit(separator, 1)
            words.append(word)
            tags.append(tag)
        elif words:
            yield words, tags
            words, tags = [], []


def entities(words, tags):
    return [{"type": kind, "text": " ".join(words[start:stop])} for kind, start, stop in bio_spans(tags)]


def lines(found):
    return "\n".join(f"{each['type']}: {each['text']}" for each in found) or "none"


@needs("squad2")
@pytest.mark.parametrize("name", ["exact_match", "token_f1"])
def test_every_squad_answer_is_right_and_no_other(name):
    rows = list(squad())
    answers = [(answer, golds) for _, golds in rows for answer in golds or [""]]
    count, wrong = misses(name, answers)
    assert count == 13_220
    assert [answer for answer, _ in wrong] == [".", ".", "."]  # three annotators' "no answer", where others saw one
    assert len(rows) == 6078
    assert sum(not golds for _, golds in rows) == 3168
    unanswerable = [golds for _, golds in rows if not golds]
    assert misses(name, (("unanswerable", golds) for golds in unanswerable))[1] == []
    answerable = [(context, golds) for context, golds in rows if golds]
    assert max(score(name, "", golds) for _, golds in answerable) == 0.0
    assert max(score(name, "unanswerable", golds) for _, golds in answerable) == 0.0
    assert max(score(name, context, golds) for context, golds in answerable[::10]) < 0.5  # all of the paragraph


@needs("wnut17")
@pytest.mark.parametrize("split, count", [("train", 3394), ("dev", 1009), ("test", 1287)])
def test_every_gold_entity_list_is_right_in_every_form(split, count):
    rows = list(sentences(DATA / "wnut17" / f"{split}.conll", "\t"))
    assert len(rows) == count
    found = [entities(words, tags) for words, tags in rows]
    assert misses("entities", ((lines(each), each) for each in found))[1] == []
    assert misses("entities", ((lines(each), lines(each)) for each in found))[1] == []
    assert misses("entities", ((json.dumps(each), each) for each in found), form="json")[1] == []
    assert misses("entities", ((" ".join(tags), tags) for _, tags in rows), form="tags")[1] == []
    some = [each for each in found if each]
    assert max(score("entities", "none", each) for each in some) == 0.0
    assert max(score("entities", "O " * len(tags), tags, form="tags") for _, tags in rows if {*tags} != {"O"}) == 0.0


@needs("wnut17")
@needs("wikigold")
def test_corpus_f1_equals_seqeval_on_real_tags():
    seqeval = pytest.importorskip("seqeval.metrics")
    for path, separator in ((DATA / "wnut17" / "dev.conll", "\t"), (DATA / "wikigold" / "wikigold.conll.txt", " ")):
        gold = [tags for _, tags in sentences(path, separator)]
        found = [["O", *tags[:-1]] if index % 3 else tags for index, tags in enumerate(gold)]  # two thirds shifted
        ours = corpus_entity_f1((bio_spans(a), bio_spans(b)) for a, b in zip(found, gold, strict=True))
        assert 0.1 < ours["f1"] < 0.9
        assert ours["f1"] == pytest.approx(seqeval.f1_score(gold, found), abs=1e-12)


def translations():
    rows = [line.split("\t") for line in (DATA / "tatoeba_en_fr" / "eng-fra.txt").read_text().split("\n") if line]
    return [(english, french) for english, french, _ in rows]


@needs("tatoeba_en_fr")
@pytest.mark.parametrize(
    "name, options", [("bleu", {}), ("bleu", {"tokens": "intl"}), ("chrf", {}), ("chrf", {"word_order": 2})]
)
def test_every_gold_translation_is_right_and_copying_the_english_is_not(name, options):
    pytest.importorskip("sacrebleu")
    rows = translations()
    assert len(rows) == 5000
    assert misses(name, ((french, french) for _, french in rows), **options)[1] == []
    copied = [score(name, english, french, **options) for english, french in rows]
    assert sum(copied) / len(copied) < 0.2


@needs("tatoeba_en_fr")
def test_every_gold_text_reaches_rouge_or_is_left_out():
    pytest.importorskip("rouge_score")
    golds = [english for english, _ in translations()]
    for kind in ("rouge1", "rouge2", "rougeL"):
        found = [score("rouge", gold, gold, kind=kind) for gold in golds]
        assert {*found} <= {1.0, None}
        assert sum(each is None for each in found) == (116 if kind == "rouge2" else 0)


@needs("uci_sentiment")
@pytest.mark.parametrize("name", ["imdb", "yelp", "amazon_cells"])
def test_every_gold_label_is_right_and_the_other_is_not(name):
    content = (DATA / "uci_sentiment" / f"{name}_labelled.txt").read_text()
    golds = [line.rsplit("\t", 1)[1].strip() for line in content.split("\n") if line.strip()]
    labels = ("negative", "positive")
    assert len(golds) == 1000
    for strict in (True, False):
        assert misses("label", ((labels[int(gold)], gold) for gold in golds), labels=labels, strict=strict)[1] == []
        others = [score("label", labels[1 - int(gold)], gold, labels=labels, strict=strict) for gold in golds]
        assert max(others) == 0.0
