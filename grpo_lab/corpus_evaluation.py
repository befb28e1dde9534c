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
Resampled = dict[str, Tensor]
"""By a metric's name [1 + R]: its value for the whole corpus, followed by those of R resampled ones."""


def resampled(rows: Rows, metrics: Mapping[str, CorpusMetric]) -> Resampled:
    """The metrics of one arm's rows, and of prompts drawn from them anew: the work of it, done once for all that follows.

    Rows of the same prompts are drawn alike, so that two policies can be compared in pairs.
    """
    found: Resampled = {}
    for metric in metrics.values():
        found |= _values(metric, unit_statistics(rows, metric))
    return found


def corpus_values(of: Resampled) -> Measured:
    """{name: {mean, low, high}}; intervals by bootstrap over prompts.

    "mean" is the metric of the whole corpus, so called to stand beside the means of rewards.
    """
    return {name: _interval(values) for name, values in of.items()}


def corpus_differences(before: Resampled, after: Resampled) -> Measured:
    """after - before on the same prompts, {name: {mean, low, high}}: each resample has drawn the same prompts of both."""
    return {name: _interval(after[name] - before[name]) for name in before}


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
