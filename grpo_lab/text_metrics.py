r"""Text metrics as pure functions: of one prediction and its gold answers, from 0 to 1. Rewards and evaluations share them.

What several gold answers mean is always the same: the best match counts. Texts in, numbers out, nothing is downloaded.
ROUGE, BLEU and chrF are computed by `rouge-score` and `sacrebleu`, which come with `pip install "grpo-lab[metrics]"`.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from grpo_lab.errors import SetupError

Rouge = Literal["rouge1", "rouge2", "rougeL"]
BleuTokens = Literal["13a", "intl", "char", "zh", "none"]

NO_ENTITIES = "none"  # how an answer says so, a line each

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DRESSING = " \t\n\r.,;:!\"'`*_“”‘’"


def squad_normalised(text: str) -> str:
    """How SQuAD compares answers: lower case, without ASCII punctuation, English articles and extra white space.

    Rajpurkar et al. 2016 (arXiv:1606.05250), section 6.1. "C++" and "C" become equal, and so do "The The" and "": that
    is the definition. Text without words for it (only articles and punctuation) becomes empty.

    >>> squad_normalised("The  Eiffel-Tower, (Paris)!")
    'eiffeltower paris'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the golds after `squad_normalised`, else 0.0.

    Golds of which nothing is left ("." stands in the data) do not count, as in SQuAD's own script. No gold that counts
    means a question without answer: then only an empty prediction is right (SQuAD 2.0).

    >>> exact_match("the cat.", ["A cat", "dog"]), exact_match("", []), exact_match("cat", [])
    (1.0, 1.0, 0.0)
    """
    found = squad_normalised(prediction)
    return float(found in _usable(golds))


def token_f1(prediction: str, golds: Sequence[str]) -> float:
    """F1 between the words of the prediction and those of the best gold, as bags; SQuAD's second number.

    2 PR / (P + R), where P is the share of the predicted words that the gold has, R that of the gold's words that were
    predicted. If either is empty after `squad_normalised`, it is 1.0 if both are, else 0.0.

    >>> round(token_f1("in the tall building", ["the very tall building"]), 4)  # 2 of 3 words, both ways
    0.6667
    """
    words = squad_normalised(prediction).split()
    return max(_bag_f1(words, gold.split()) for gold in _usable(golds))


def without_giving_up(text: str, unanswerable: str) -> str:
    """The text, or "" where it is the word that says that there is no answer.

    >>> without_giving_up("Unanswerable.", "unanswerable"), without_giving_up("Rome", "unanswerable")
    ('', 'Rome')
    """
    return "" if squad_normalised(text) == squad_normalised(unanswerable) else text


def _usable(golds: Sequence[str]) -> list[str]:
    """The golds, normalised, of which something is left; without any, the empty answer."""
    if isinstance(golds, str):
        raise TypeError("golds should be a list of texts, not one text")
    return [gold for gold in map(squad_normalised, golds) if gold] or [""]


def _bag_f1(found: Sequence[Hashable], gold: Sequence[Hashable]) -> float:
    """F1 of two bags; 1.0 if both are empty."""
    if not found or not gold:
        return float(not found and not gold)
    return precision_recall_f1(num_common(found, gold), len(found), len(gold))["f1"]


def num_common(found: Iterable[Hashable], gold: Iterable[Hashable]) -> int:
    """How many of `found` are in `gold`, each as often as it is in both."""
    return (Counter(found) & Counter(gold)).total()


def precision_recall_f1(right: float | int, found: float | int, gold: float | int) -> dict[str, float]:
    """Precision is the share of the *found* that is right, recall the share of the *gold* that was found, F1 their harmonic
    mean, 2 right / (found + gold). What has nothing to divide by is 0.

    >>> precision_recall_f1(1, 4, 2)
    {'precision': 0.25, 'recall': 0.5, 'f1': 0.3333333333333333}
    """
    return {
        "precision": right / found if found else 0.0,
        "recall": right / gold if gold else 0.0,
        "f1": 2 * right / (found + gold) if found + gold else 0.0,
    }


def gold_texts(answer: Any) -> list[str]:
    """The gold answers that a column holds: a text, a list of texts, or SQuAD's `{"text": [...]}`; no empty ones.

    >>> gold_texts("Paris"), gold_texts(["Paris", "Lutetia"]), gold_texts({"text": [], "answer_start": []}), gold_texts("")
    (['Paris'], ['Paris', 'Lutetia'], [], [])

    Raises:
        TypeError: it is none of these.
    """
    texts = answer.get("text") if isinstance(answer, Mapping) else answer
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"gold answers should be a text, a list of texts or {{text: [...]}}, found {answer!r:.80}")
    return [text for text in texts if text.strip()]


class Span(NamedTuple):
    """One entity: its type, and the words `start` to `stop` (not included) that it covers."""

    type: str
    start: int
    stop: int


def bio_spans(tags: Sequence[str]) -> list[Span]:
    """The entities that a sentence's tags mark, as CoNLL-2003's `conlleval` reads them (BIO and IOB1 alike).

    B-X begins an entity of type X. I-X continues one, and begins one where none of type X goes on before it.

    >>> bio_spans(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"])
    [Span(type='PER', start=0, stop=2), Span(type='LOC', start=3, stop=4), Span(type='LOC', start=4, stop=5)]

    Raises:
        ValueError: a tag is neither O nor starts with B- or I-.
    """
    spans: list[Span] = []
    before = ""
    for index, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if tag != "O" and (prefix not in ("B", "I") or not kind):
            raise ValueError(f'"{tag}" is no tag: O, B-<type> or I-<type>')
        if tag != "O":
            goes_on = prefix == "I" and before == kind
            spans.append(Span(kind, spans.pop().start if goes_on else index, index + 1))
        before = kind
    return spans


def entity_f1(found: Iterable[Hashable], gold: Iterable[Hashable]) -> float:
    """F1 over entities: one counts if all of it is right, and each as often as the gold has it; 1.0 if there are none.

    Entities are `Span`s or (type, text) pairs. CoNLL-2003's score (arXiv:cs/0306050) sums over a corpus:
    `corpus_entity_f1`.

    >>> entity_f1([("PER", "Ann"), ("LOC", "Rome")], [("PER", "Ann"), ("ORG", "Rome")])
    0.5
    """
    return _bag_f1(list(found), list(gold))


def corpus_entity_f1(pairs: Iterable[tuple[Sequence[Hashable], Sequence[Hashable]]]) -> Mapping[str, float]:
    """Precision, recall and F1 over all sentences' (found, gold) entities, as `conlleval` and seqeval count them.

    What has nothing to divide by is 0.

    >>> corpus_entity_f1([([("PER", "Ann")], [("PER", "Ann")]), ([], [("LOC", "Rome")])])
    {'precision': 1.0, 'recall': 0.5, 'f1': 0.6666666666666666}
    """
    right = num_found = num_gold = 0
    for found, gold in pairs:
        right, num_found, num_gold = right + num_common(found, gold), num_found + len(found), num_gold + len(gold)
    return precision_recall_f1(right, num_found, num_gold)


def read_entities(written: Any, form: Literal["lines", "json"]) -> list[tuple[str, str]] | None:
    """The (type, text) pairs that a text, or a list of such pairs or of {type, text}, holds; None if it is not so.

    "lines" are `type: text`, or `none` alone; "json" is a list. Types lose their case, texts keep it.

    >>> read_entities("PER: Ann\\nLOC: New  York", "lines"), read_entities("none", "lines"), read_entities("Ann", "lines")
    ([('per', 'Ann'), ('loc', 'New York')], [], None)
    """
    if not isinstance(written, str):
        return _pairs(written)
    if form == "json":
        try:
            return _pairs(json.loads(written))
        except (ValueError, RecursionError):
            return None
    lines = [line.strip() for line in written.splitlines() if line.strip()]
    if [line.casefold() for line in lines] == [NO_ENTITIES]:
        return []
    return _pairs([line.split(":", 1) for line in lines]) if lines else None


def _pairs(items: Any) -> list[tuple[str, str]] | None:
    """Pairs with the type in lower case; None if an item is neither {type, text} nor [type, text]."""
    if not isinstance(items, list | tuple):
        return None
    pairs: list[Any] = [(item.get("type"), item.get("text")) if isinstance(item, dict) else item for item in items]
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(each, str) for each in pair):
            return None
    found = [(kind.strip().casefold(), " ".join(text.split())) for kind, text in pairs]
    return found if all(kind and text for kind, text in found) else None


def rouge(prediction: str, golds: Sequence[str], *, kind: Rouge = "rougeL", stemmer: bool = False) -> float | None:
    """ROUGE F1 against the best gold: shared words (rouge1), word pairs (rouge2) or the longest common subsequence.

    Lin 2004, as the package `rouge-score` computes it. Its words are runs of a-z and 0-9, and nothing else: accents and
    other scripts do not exist for it. None if no gold has anything to compare (rouge2 needs two words).
    """
    scorer = _rouge_scorer(kind, stemmer)
    needed = 2 if kind == "rouge2" else 1
    usable = [gold for gold in golds if len(re.findall(r"[a-z0-9]+", gold.lower())) >= needed]
    scores = [scorer.score(gold, prediction)[kind].fmeasure for gold in usable]
    return max(map(float, scores), default=None)


@lru_cache
def _rouge_scorer(kind: Rouge, stemmer: bool) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise missing_package("rouge_score", "metrics", error) from error
    return RougeScorer([kind], use_stemmer=stemmer)


def bleu(prediction: str, golds: Sequence[str], *, tokens: BleuTokens = "13a") -> float:
    """BLEU of one sentence: the geometric mean of n-gram precisions up to n = 4, times the brevity penalty.

    Papineni et al. 2002, as `sacrebleu` computes it for sentences: exponential smoothing, and only the orders that the
    prediction has (effective order), so that a right answer of one word is 1. Corpus BLEU is not its mean.
    """
    return _bounded(_bleu(tokens).sentence_score(prediction, _given(golds)).score)


@lru_cache
def _bleu(tokens: BleuTokens) -> Any:
    return new_bleu(tokens, effective_order=True)


def new_bleu(tokens: BleuTokens, *, effective_order: bool) -> Any:
    """sacrebleu's own BLEU."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise missing_package("sacrebleu", "metrics", error) from error
    return BLEU(effective_order=effective_order, tokenize=tokens)


def chrf(prediction: str, golds: Sequence[str], *, word_order: int = 0) -> float:
    """chrF: the F2 score of character n-grams up to n = 6; with `word_order: 2` chrF++, which counts words, too.

    Popović 2015, 2017, as `sacrebleu` computes it for sentences. It needs no word boundaries.
    """
    return _bounded(_chrf(word_order).sentence_score(prediction, _given(golds)).score)


@lru_cache
def _chrf(word_order: int) -> Any:
    return new_chrf(word_order)


def new_chrf(word_order: int) -> Any:
    """sacrebleu's own chrF."""
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise missing_package("sacrebleu", "metrics", error) from error
    return CHRF(word_order=word_order)


def _bounded(percent: float) -> float:
    """sacrebleu's percentages, whose best is 100 and a rounding error."""
    return min(1.0, max(0.0, percent / 100))


def _given(golds: Sequence[str]) -> list[str]:
    given = [gold for gold in golds if gold.strip()]
    if not given:
        raise ValueError("there is no gold text to compare with")
    return given


def label_of(text: str, labels: Sequence[str], *, strict: bool = True) -> str | None:
    """The label that a text gives, None if it gives none, or more than one. Case does not matter.

    Strict: the text is the label, but for quotes, stars and a full stop around it. Otherwise the one label that stands
    in it as a whole word; a label inside a longer one that stands there ("positive" in "very positive") is not counted.

    >>> label_of("**Positive**.", ["positive", "negative"])
    'positive'
    >>> label_of("It is positive, I think", ["positive", "negative"], strict=False)
    'positive'
    >>> label_of("positive or negative", ["positive", "negative"], strict=False) is None
    True
    """
    known = {_folded(label): label for label in labels}
    if len(known) < len(labels):
        raise ValueError(f"two labels are the same but for case and white space: {', '.join(labels)}")
    if strict:
        return known.get(_folded(text.strip(_DRESSING)), known.get(_folded(text)))
    # the longest first, so that a match takes all of a label
    any_label = "|".join(re.escape(each) for each in sorted(known, key=len, reverse=True))
    found = set(re.findall(rf"(?<!\w)(?:{any_label})(?!\w)", _folded(text)))
    return known[found.pop()] if len(found) == 1 else None


def gold_label(answer: str | int, labels: Sequence[str]) -> str:
    """The label that a column holds, by its name or by its number in `labels`, from 0.

    Raises:
        ValueError: it is neither.
    """
    found = label_of(str(answer), labels)
    if found is not None:
        return found
    if str(answer).strip().isdecimal() and int(answer) < len(labels):
        return labels[int(answer)]
    raise ValueError(f"the column answer holds {answer!r}, which is none of the labels {', '.join(labels)}")


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def missing_package(package: str, extra: str, cause: ImportError) -> SetupError:
    """The error for an optional package that cannot be imported: says which extra of ours brings it."""
    return SetupError(f'{package} cannot be imported ({cause}); pip install "grpo-lab[{extra}]"')
