"""Corpus metrics of held-out rows: their values with 95 % intervals, and the difference of two policies, in pairs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grpo_lab.algorithm.intervals import bootstrap_sums, percentiles
from grpo_lab.corpus_metrics import CorpusMetric, joined
from grpo_lab.text_metrics import gold_texts

Rows = Sequence[Mapping[str, Any]]
Measured = dict[str, dict[str, float]]


def corpus_values(rows: Rows, metrics: Mapping[str, CorpusMetric]) -> Measured:
    """{name: {mean, low, high}} of one arm's rows; intervals by bootstrap over prompts.

    "mean" is the metric of the whole corpus, so called to stand beside the means of rewards.
    """
    found: Measured = {}
    for metric in metrics.values():
        values = _values(metric, unit_statistics(rows, metric))
        found |= {name: _interval(of) for name, of in values.items()}
    return found


def corpus_differences(before: Rows, after: Rows, metrics: Mapping[str, CorpusMetric]) -> Measured:
    """after - before on the same prompts, {name: {mean, low, high}}: each resample draws the same prompts of both."""
    found: Measured = {}
    for metric in metrics.values():
        old, new = (_values(metric, unit_statistics(rows, metric)) for rows in (before, after))
        found |= {name: _interval(new[name] - old[name]) for name in old}
    return found


def corpus_signatures(rows: Rows, metrics: Mapping[str, CorpusMetric]) -> dict[str, str]:
    """How each metric was computed, as its package says it."""
    pairs = [(answer, gold) for samples in units(rows) for answer, gold in samples]
    answers, golds = [answer for answer, _ in pairs], [gold for _, gold in pairs]
    return {name: m.signature(answers, golds) for name, m in metrics.items() if m.signature is not None}


def unit_statistics(rows: Rows, metric: CorpusMetric) -> Float[Tensor, "P S"]:
    """The statistics of each prompt, summed over its samples."""
    of_samples = [[metric.statistics(answer, gold) for answer, gold in samples] for samples in units(rows)]
    return torch.tensor([[sum(each) for each in zip(*of, strict=True)] for of in of_samples], dtype=torch.float64)


def units(rows: Rows) -> list[list[tuple[str, Any]]]:
    """(answer, gold) of every sample of every prompt. Rows of one question (`unit`) are windows of its context: the
    answer is what most windows say, the golds are those of all windows."""
    grouped: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for row in rows:
        grouped.setdefault(row["unit"], {}).setdefault(row["sample"], []).append(row)
    return [[_answer_and_gold(windows) for windows in samples.values()] for samples in grouped.values()]


def _answer_and_gold(windows: Rows) -> tuple[str, Any]:
    if len(windows) == 1:
        return windows[0]["completion"], windows[0]["answer"]
    golds = [gold for window in windows for gold in gold_texts(window["answer"])]
    return joined([window["completion"] for window in windows]), list(dict.fromkeys(golds))


def _values(metric: CorpusMetric, statistics: Float[Tensor, "P S"]) -> dict[str, Float[Tensor, "R"]]:
    """The metric of the whole corpus, followed by those of resampled ones."""
    sums = torch.cat([statistics.sum(0, keepdim=True), bootstrap_sums(statistics)]).tolist()
    each = [metric.values(of) for of in sums]
    return {name: torch.tensor([values[name] for values in each], dtype=torch.float64) for name in each[0]}


def _interval(values: Float[Tensor, "R"]) -> dict[str, float]:
    low, high = percentiles(values[1:])
    return {"mean": float(values[0]), "low": low, "high": high}
