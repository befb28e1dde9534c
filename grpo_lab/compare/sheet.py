"""REINFORCE++ a second time, by loops over rows with weights in float64: what TRL lacks is compared with this sheet.

It shares no formula with the native engine: prompts are not padded, every row is a forward pass of its own, advantages
are Python numbers, and the weights are moved by hand. Sources: REINFORCE++ and its baseline form (arXiv:2501.03262).
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grpo_lab.engines.readout import Readout, Rollouts, StepReadout, copied
from grpo_lab.policy.forward import learn_without_dropout
from grpo_lab.recipe.schema import Algorithm, GrpoStage
from grpo_lab.types import Completion, Group, Policy

EPS = 1e-4  # added to every std, in reward units
WRITTEN_OUT = {  # what the sheet computes; each key must have one of these values
    "reward_aggregation": ("sum",),
    "surrogate": ("clipped",),
    "ratio_level": ("token",),
    "reduction": ("token",),
    "delta": (None,),
    "kl_bias_correction": (False,),
    "entropy_bonus": (0.0,),
    "top_entropy_quantile": (1.0,),
    "mask_truncated_completions": (False,),
    "sampler_correction": ("none",),
}
FORMS = {
    ("batch", "batch", "reward", "k1"),
    ("group", "centred", "loss", "k2"),
}  # baseline, scale, KL's place, estimator


class Row(NamedTuple):
    """One completion with its fixed quantities: log-probs are those of pi_old and of the reference, in nats."""

    group: Group
    completion: Completion
    old: Tensor
    ref: Tensor | None
    advantage: float


def covers(algorithm: Algorithm) -> bool:
    """Whether the sheet writes this algorithm out."""
    values = algorithm.model_dump()
    form = tuple(values[key] for key in ("advantage_baseline", "advantage_scale", "kl_placement", "kl_estimator"))
    return form in FORMS and all(values[key] in allowed for key, allowed in WRITTEN_OUT.items())


def read_out(policy: Policy, reference: Policy | None, rollouts: Rollouts, stage: GrpoStage, *, rounds: int) -> Readout:
    """Train a float64 copy of the policy on the recorded batch `rounds` times by hand, and read out everything."""
    model = double(policy)
    ref_model = None if reference is None else double(reference)
    steps: list[StepReadout] = []
    rows = first = prepared(model, ref_model, rollouts, stage)
    for done in range(rounds):
        rows = first if done == 0 else prepared(model, ref_model, rollouts, stage)
        part = len(rows) // stage.algorithm.num_minibatches
        for _ in range(stage.algorithm.num_iterations):
            steps += [step(model, rows[at : at + part], stage) for at in range(0, len(rows), part)]
    return Readout(
        texts=tuple(row.completion.text for row in first),
        rewards=rollouts.scores.total.flatten(),
        advantages=torch.tensor([row.advantage for row in first], dtype=torch.float64),
        old_logps=torch.cat([row.old for row in first]),
        ref_logps=None if ref_model is None else torch.cat([row.ref for row in first if row.ref is not None]),
        steps=steps,
        weights=copied(dict(model.named_parameters())),
    )


def double(policy: Policy) -> nn.Module:
    """A float64 copy, what learns in it as in the policy (transformers still takes norms and rotary angles in float32)."""
    model: nn.Module = copy.deepcopy(policy.model).double()
    learn_without_dropout(model)
    return model


def row_logps(model: Any, group: Group, completion: Completion, temperature: float) -> Tensor:
    """log pi of every token of one completion, from the row alone."""
    prompt, answer = group.example.prompt_ids, completion.token_ids
    device = next(model.parameters()).device
    logits = model(input_ids=torch.tensor([[*prompt, *answer]], device=device)).logits[0].double() / temperature
    everything = logits.log_softmax(-1)
    picked = [everything[len(prompt) + t - 1, token] for t, token in enumerate(answer)]
    return torch.stack(picked).cpu()


@torch.no_grad()
def prepared(model: nn.Module, ref_model: nn.Module | None, rollouts: Rollouts, stage: GrpoStage) -> list[Row]:
    """Every completion with log pi_old, log pi_ref and its advantage."""
    temperature, algorithm = stage.sampling.temperature, stage.algorithm
    pairs = [(group, completion) for group in rollouts.groups for completion in group.completions]
    old, ref = [], []
    for number, (group, completion) in enumerate(pairs):
        if rollouts.old_logps is None:
            old.append(row_logps(model, group, completion, temperature))
        else:
            old.append(rollouts.old_logps[number, : len(completion.token_ids)].double())
        ref.append(None if ref_model is None else row_logps(ref_model, group, completion, temperature))
    rewards = [float(value) for value in rollouts.scores.total.flatten()]
    if algorithm.kl_placement == "reward":
        for number, reference in enumerate(ref):
            if reference is not None:
                rewards[number] -= algorithm.beta * float((old[number] - reference).sum())
    size = stage.sampling.num_generations
    found = advantages(rewards, size, per_group=algorithm.advantage_baseline == "group")
    return [Row(*pair, o, r, a) for pair, o, r, a in zip(pairs, old, ref, found, strict=True)]


def advantages(rewards: list[float], size: int, *, per_group: bool) -> list[float]:
    """(r - mean) / (std + EPS): the mean of a row's group of `size` or of all, the std (n - 1) of all those differences.

    >>> [round(a, 4) for a in advantages([1.0, 0.0, 3.0, 2.0], 2, per_group=True)]
    [0.8659, -0.8659, 0.8659, -0.8659]
    """
    count = size if per_group else len(rewards)
    centred = []
    for start in range(0, len(rewards), count):
        members = rewards[start : start + count]
        centred += [value - sum(members) / len(members) for value in members]
    middle = sum(centred) / len(centred)
    std = (sum((value - middle) ** 2 for value in centred) / (len(centred) - 1)) ** 0.5
    return [value / (std + EPS) for value in centred]


def step(model: nn.Module, rows: list[Row], stage: GrpoStage) -> StepReadout:
    """One optimiser step: every token of these rows counts the same; then w <- w - rate * gradient."""
    algorithm = stage.algorithm
    num_tokens = sum(len(row.old) for row in rows)
    all_logps, kl = [], 0.0
    loss = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logps = row_logps(model, row.group, row.completion, stage.sampling.temperature)
        ratio = (logps - row.old).exp()
        bounded = ratio.clamp(1 - algorithm.epsilon_low, 1 + algorithm.epsilon_high)
        loss = loss - torch.minimum(ratio * row.advantage, bounded * row.advantage).sum() / num_tokens
        if row.ref is not None and algorithm.kl_placement == "loss":
            penalty = ((logps - row.ref) ** 2 / 2).sum() / num_tokens
            loss, kl = loss + algorithm.beta * penalty, kl + float(penalty.detach())
        all_logps.append(logps.detach())
    learning = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    names, weights = zip(*learning, strict=True)
    gradients = torch.autograd.grad(loss, weights)
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight -= stage.optimizer.learning_rate * gradient
    has_kl = algorithm.kl_placement == "loss" and rows[0].ref is not None
    return StepReadout(
        torch.cat(all_logps), kl if has_kl else None, float(loss.detach()), dict(zip(names, gradients, strict=True))
    )
