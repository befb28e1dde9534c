"""How good a policy is on held-out prompts: greedy and sampled, every reward, with 95 % intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grpo_lab.algorithm.intervals import bootstrap_interval, wilson_interval
from grpo_lab.algorithm.passk import pass_at_k
from grpo_lab.corpus_evaluation import corpus_values, resampled
from grpo_lab.corpus_metrics import CorpusMetric, corpus_metrics
from grpo_lab.sampling.decoding import Sampler
from grpo_lab.scoring import RewardSet, check_budget
from grpo_lab.seeds import derive_seed
from grpo_lab.types import Example, Group, Scores

CORRECT = "accuracy_strict"  # the term that pass@k counts


@dataclass(frozen=True)
class Evaluation:
    """`metrics` by name (`greedy/<term>/mean|low|high`, `sampled/...`, `pass@k`); `rows`: one per completion."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


def evaluate(
    examples: Sequence[Example],
    rewards: RewardSet,
    *,
    greedy: Sampler,
    sampled: Sampler | None,
    num_samples: int,
    seed: int,
    pass_at: Sequence[int] = (),
    max_failed: float = 1.0,
) -> Evaluation:
    """One greedy completion per prompt and, with `sampled`, `num_samples` at the stage's own temperature.

    Raises:
        RewardError: rewards failed on more than a share `max_failed` of an arm's completions.
    """
    examples = list(examples)
    metrics: dict[str, float] = {"num_prompts": float(len(examples))}
    rows: list[dict[str, Any]] = []
    of_corpus = corpus_metrics({term.reward.name: term.options or {} for term in rewards.terms})
    arms = [("greedy", greedy, 1)]
    if sampled is not None and num_samples > 0:
        arms.append(("sampled", sampled, num_samples))
    for arm, sampler, count in arms:
        groups = sampler.sample(examples, num_generations=count, seed=derive_seed(seed, "evaluation", arm))
        scores = rewards.score(groups)
        check_budget(scores, groups, max_failed=max_failed, folder=None)
        of_arm = measured(arm, groups, scores, of_corpus)
        metrics |= of_arm.metrics
        rows += of_arm.rows
        if arm == "sampled" and CORRECT in scores.terms:
            correct = scores.terms[CORRECT].nan_to_num(0.0) > 0
            metrics |= {f"pass@{k}": float(pass_at_k(correct, k).mean()) for k in pass_at}
    return Evaluation(metrics, rows)


def measured(arm: str, groups: Sequence[Group], scores: Scores, of_corpus: Mapping[str, CorpusMetric]) -> Evaluation:
    """One arm's metrics, those of the whole corpus among them, and its rows."""
    rows = arm_rows(arm, groups, scores)
    metrics = arm_metrics(groups, scores)
    for name, values in corpus_values(resampled(rows, of_corpus)).items():
        metrics |= {f"{name}/{key}": value for key, value in values.items()}
    return Evaluation({f"{arm}/{name}": value for name, value in metrics.items()}, rows)


def arm_metrics(groups: Sequence[Group], scores: Scores) -> dict[str, float]:
    """Mean and interval of every term and of the total; length and share of unfinished answers."""
    out: dict[str, float] = {}
    for name, values in {**scores.terms, "reward": scores.total}.items():
        if values.isnan().all():
            continue
        out[f"{name}/mean"], out[f"{name}/low"], out[f"{name}/high"] = mean_and_interval(values)
    completions = [completion for group in groups for completion in group.completions]
    out["mean_length"] = sum(len(completion.token_ids) for completion in completions) / len(completions)
    out["clipped_ratio"] = sum(not completion.finished for completion in completions) / len(completions)
    return out


def mean_and_interval(values: Float[Tensor, "P G"]) -> tuple[float, float, float]:
    """The mean over prompts and its 95 % interval: Wilson where each prompt is wholly 0 or 1, else bootstrap over prompts.

    A bootstrap of prompts that were all right, in every sample or seed, would have no width.
    """
    per_prompt = values[~values.isnan().all(1)].double().nanmean(1)
    mean = float(per_prompt.mean())
    if torch.isin(per_prompt, torch.tensor([0.0, 1.0], dtype=torch.float64)).all():
        return mean, *wilson_interval(int(per_prompt.sum()), len(per_prompt))
    return mean, *bootstrap_interval(per_prompt)


def arm_rows(arm: str, groups: Sequence[Group], scores: Scores) -> list[dict[str, Any]]:
    """One row per completion, for people and for paired comparisons."""
    return [
        {
            "arm": arm,
            "id": group.example.id,
            "unit": group.example.columns.get("question_id", group.example.id),
            "sample": g,
            "prompt": group.example.prompt,
            "completion": completion.text,
            "answer": group.example.columns.get("answer"),
            "num_tokens": len(completion.token_ids),
            "finished": completion.finished,
            "terms": {name: float(values[p, g]) for name, values in scores.terms.items()},
            "reward": float(scores.total[p, g]),
        }
        for p, group in enumerate(groups)
        for g, completion in enumerate(group.completions)
    ]
