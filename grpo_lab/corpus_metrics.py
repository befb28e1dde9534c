r"""Metrics of a whole corpus: what a field reports where that is not the mean of what single answers are worth.

F1 over classes or entities, BLEU and chrF divide sums by sums. So each is two functions here: `statistics` of one answer
and its gold, numbers that add up over a corpus, and `values` of their sums. A resampled corpus (for intervals) is then
another weighted sum. All values are from 0 to 1, as those of rewards; papers write most of them as percentages.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from grpo_lab.text import extract as extracted
from grpo_lab.text_metrics import (
    bio_spans,
    exact_match,
    gold_label,
    gold_texts,
    label_of,
    new_bleu,
    new_chrf,
    num_common,
    precision_recall_f1,
    read_entities,
    rouge,
    squad_normalised,
    token_f1,
    without_giving_up,
)

Statistics = Sequence[float]
Values = dict[str, float]


@dataclass(frozen=True)
class CorpusMetric:
    """`statistics(answer, gold)` add up over a corpus; `values(sums)` are the metrics, by name.

    `signature(answers, golds)` says how it was measured, in the words of the package that did.
    """

    statistics: Callable[[str, Any], Statistics]
    values: Callable[[Statistics], Values]
    signature: Callable[[Sequence[str], Sequence[Any]], str] | None = None


def corpus_metrics(terms: Mapping[str, Mapping[str, Any]]) -> dict[str, CorpusMetric]:
    """The corpus metrics that belong to rewards, given as {name: options}; each once, by the name of its kind.

    >>> list(corpus_metrics({"exact_match": {}, "token_f1": {}, "length": {}}))
    ['squad']
    """
    found: dict[str, CorpusMetric] = {}
    for name, options in terms.items():
        if name in KINDS:
            kind, make = KINDS[name]
            found.setdefault(kind, make(options))
    return found


def divided(part: float, whole: float) -> float:
    """`part / whole`, and 0 where there is nothing to divide by."""
    return part / whole if whole else 0.0


# Classification: rows, right ones, then (right, found, gold) for every label.


def _classification(options: Mapping[str, Any]) -> CorpusMetric:
    labels: Sequence[str] = tuple(options.get("labels", ()))
    strict, place = options.get("strict", True), options.get("extract", "none")

    def statistics(answer: str, gold: Any) -> Statistics:
        text = extracted(answer, place)
        found = None if text is None else label_of(text, labels, strict=strict)
        true = gold_label(gold, labels)
        counts = [(float(found == true == label), float(found == label), float(true == label)) for label in labels]
        return [1.0, float(found == true), *(number for each in counts for number in each)]

    return CorpusMetric(statistics, partial(_classification_values, labels))


def _classification_values(labels: Sequence[str], sums: Statistics) -> Values:
    each = {
        label: precision_recall_f1(*sums[2 + 3 * place : 5 + 3 * place])["f1"] for place, label in enumerate(labels)
    }
    values = {"accuracy": divided(sums[1], sums[0]), "macro_f1": divided(sum(each.values()), float(len(labels)))}
    return values | {f"f1_{label}": value for label, value in each.items()}


# Entities: right, found, gold. An answer that cannot be read names no entity, and misses all there are.


def _entities(options: Mapping[str, Any]) -> CorpusMetric:
    form, place = options.get("form", "lines"), options.get("extract", "none")

    def statistics(answer: str, gold: Any) -> Statistics:
        text = extracted(answer, place)
        if form == "tags":
            true: Sequence[Any] = bio_spans(gold.split() if isinstance(gold, str) else gold)
            found: Sequence[Any] = _spans(text)
        else:
            true = read_entities(gold, form) or ()
            found = (None if text is None else read_entities(text, form)) or ()
        return [float(num_common(found, true)), float(len(found)), float(len(true))]

    return CorpusMetric(statistics, entity_values)


def _spans(text: str | None) -> Sequence[Any]:
    try:
        return () if text is None else bio_spans(text.split())
    except ValueError:  # no tags
        return ()


def entity_values(sums: Statistics) -> Values:
    """Precision, recall and F1 of all entities.

    >>> entity_values([1.0, 4.0, 2.0])
    {'entity_precision': 0.25, 'entity_recall': 0.5, 'entity_f1': 0.3333333333333333}
    """
    return {f"entity_{name}": value for name, value in precision_recall_f1(*sums).items()}


# SQuAD: (questions, exact, F1) with and without an answer.


def _squad(options: Mapping[str, Any]) -> CorpusMetric:
    word, place = options.get("unanswerable", "unanswerable"), options.get("extract", "none")

    def statistics(answer: str, gold: Any) -> Statistics:
        text = extracted(answer, place)
        golds = gold_texts(gold)
        scores = [1.0, 0.0, 0.0]
        if text is not None:
            said = without_giving_up(text, word)
            scores = [1.0, exact_match(said, golds), token_f1(said, golds)]
        return [*scores, 0.0, 0.0, 0.0] if golds else [0.0, 0.0, 0.0, *scores]

    return CorpusMetric(statistics, _squad_values)


def _squad_values(sums: Statistics) -> Values:
    answered, exact, overlap, unanswerable, exact_none, overlap_none = sums
    return {
        "squad_exact": divided(exact + exact_none, answered + unanswerable),
        "squad_f1": divided(overlap + overlap_none, answered + unanswerable),
        "squad_has_answer_exact": divided(exact, answered),
        "squad_has_answer_f1": divided(overlap, answered),
        "squad_no_answer": divided(exact_none, unanswerable),
    }


def joined(answers: Sequence[str], *, unanswerable: str = "unanswerable") -> str:
    """A question's answer out of those to its windows: the first of the most frequent ones that say something.

    >>> joined(["unanswerable", "Bob", "the Bob"])
    'Bob'
    """
    said = [each for each in map(squad_normalised, answers) if each not in ("", squad_normalised(unanswerable))]
    if not said:
        return answers[0]
    return answers[[squad_normalised(each) for each in answers].index(max(said, key=said.count))]


# Summaries: (texts, F1) for each kind of ROUGE; a gold without words for it does not count.


def _rouge(options: Mapping[str, Any]) -> CorpusMetric:
    stemmer = options.get("stemmer", False)

    def statistics(answer: str, gold: Any) -> Statistics:
        scores = [
            rouge(answer, gold_texts(gold), kind=kind, stemmer=stemmer) for kind in ("rouge1", "rouge2", "rougeL")
        ]
        return [number for score in scores for number in ((0.0, 0.0) if score is None else (1.0, score))]

    return CorpusMetric(statistics, _rouge_values, lambda *_: f"rouge-score, F1, stemmer: {stemmer}")


def _rouge_values(sums: Statistics) -> Values:
    return {name: divided(sums[2 * at + 1], sums[2 * at]) for at, name in enumerate(("rouge1", "rouge2", "rougeL"))}


# Translations: sacreBLEU's own statistics, and its own score of their sums.


def _bleu(options: Mapping[str, Any]) -> CorpusMetric:
    return _of_sacrebleu("corpus_bleu", new_bleu(options.get("tokens", "13a"), effective_order=False))


def _chrf(options: Mapping[str, Any]) -> CorpusMetric:
    return _of_sacrebleu("corpus_chrf", new_chrf(options.get("word_order", 0)))


def _of_sacrebleu(name: str, metric: Any) -> CorpusMetric:
    def statistics(answer: str, gold: Any) -> Statistics:
        found = metric._extract_corpus_statistics([answer], [[text] for text in gold_texts(gold)])
        return [float(number) for number in found[0]]

    def values(sums: Statistics) -> Values:
        return {name: metric._compute_score_from_stats(list(sums)).score / 100}

    def signature(answers: Sequence[str], golds: Sequence[Any]) -> str:
        texts = [gold_texts(gold) for gold in golds]
        # sacreBLEU wants the first references of all texts, then the second ones; None where a text has fewer
        references = [[each[at] if at < len(each) else None for each in texts] for at in range(max(map(len, texts)))]
        metric.corpus_score(list(answers), references)
        return str(metric.get_signature())

    return CorpusMetric(statistics, values, signature)


KINDS: dict[str, tuple[str, Callable[[Mapping[str, Any]], CorpusMetric]]] = {
    "label": ("classification", _classification),
    "entities": ("entities", _entities),
    "exact_match": ("squad", _squad),
    "token_f1": ("squad", _squad),
    "rouge": ("rouge", _rouge),
    "bleu": ("bleu", _bleu),
    "chrf": ("chrf", _chrf),
}
"""By the reward's name: what its corpus metric is called, and how it is made from the reward's options."""
