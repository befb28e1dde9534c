"""One recorded batch to put two computations side by side: uneven lengths, unequal rewards, a reference that is another policy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_lab.assemble import Plan
from grpo_lab.batching import pad
from grpo_lab.engines.readout import Rollouts
from grpo_lab.policy.forward import completion_logps, frozen_copy
from grpo_lab.policy.load import load_policy
from grpo_lab.recipe.schema import Algorithm, GrpoStage, Model, SftStage
from grpo_lab.sampling.decoding import Decoding
from grpo_lab.sampling.native import NativeSampler
from grpo_lab.scoring import RewardSet
from grpo_lab.seeds import derive_seed
from grpo_lab.types import Completion, Example, Group, Policy, Scores

REFERENCE_SPREAD = 0.2  # noise on every weight of the reference, as a share of the tensor's own std
OLD_SPREAD = 0.3  # noise on every old log-prob (or on a completion's sum), in nats: ratios from about 0.4 to 2.5
EDGE_MARGIN = 0.02  # nats that a token's ratio keeps from the edges of the clip: more than two SGD steps move it
LONGEST_PRODUCT = 12  # tokens, where their log-probs are summed: float32 sums of more are off by the gates' own size
ADAPTER_SPREAD = 0.05  # noise on every weight of a fresh adapter
REWARD_LEVELS = (0.0, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Recording:
    """Scored completions of a policy, and another policy as its reference. `invented_rewards`: see `scored`."""

    reference: Policy
    rollouts: Rollouts
    invented_rewards: bool


def record(
    policy: Policy, examples: Sequence[Example], rewards: RewardSet, stage: GrpoStage, *, seed: int, off_policy: bool
) -> Recording:
    """Sample completions and score them; the reference is another policy, so that its KL is not 0.

    `off_policy`: the old log-probs are drawn around the policy's own, so that ratios lie on both sides of any clip, and
    none on its edge.
    Where a ratio is the product over a completion, its tokens' are drawn closer, or plain SGD would diverge on it.
    """
    groups = uneven(policy, list(examples), stage, seed=seed)
    scores, invented = scored(groups, rewards, seed=seed)
    old_logps = None
    if off_policy:
        policy.model.eval()
        own = completion_logps(policy, pad(groups, policy), temperature=stage.sampling.temperature).cpu()
        generator = torch.Generator().manual_seed(derive_seed(seed, "old"))
        is_product = stage.algorithm.ratio_level == "sequence_sum"
        spread = OLD_SPREAD / own.shape[1] ** 0.5 if is_product else OLD_SPREAD
        noise = spread * torch.randn(own.shape, generator=generator)
        if stage.algorithm.ratio_level == "token":
            noise = -off_the_edges(-noise, clip_edges(stage.algorithm))
        old_logps = torch.where(own == 0, own, own + noise)
    weights = tuple(term.weight_at() for term in rewards.terms)
    reference = perturbed(policy, derive_seed(seed, "reference"))
    return Recording(reference, Rollouts(tuple(groups), scores, weights, old_logps), invented)


def clip_edges(algorithm: Algorithm) -> list[float]:
    """The ratios at which an algorithm's clip begins; none where it has no clip.

    >>> clip_edges(Algorithm(delta=3.0))
    [0.8, 1.2, 3.0]
    """
    edges = {
        "clipped": [1 - algorithm.epsilon_low, 1 + algorithm.epsilon_high],
        "cispo": [algorithm.epsilon_high],
    }.get(algorithm.surrogate, [])
    return edges if algorithm.delta is None else [*edges, algorithm.delta]


def off_the_edges(log_ratios: Tensor, edges: Sequence[float]) -> Tensor:
    """Log-ratios of tokens with those near an edge of the clip moved off it, each to the side that it is on.

    At an edge the gradient jumps, so that two right computations whose log-probs differ in the last bit may differ there
    by a whole token's gradient.

    >>> off_the_edges(torch.tensor([0.0, 0.18, 0.19, 0.5]), [1.2])  # log 1.2 = 0.1823
    tensor([0.0000, 0.1623, 0.2023, 0.5000])
    """
    for edge in edges:
        distance = log_ratios - math.log(edge)
        aside = math.log(edge) + torch.where(distance < 0, -EDGE_MARGIN, EDGE_MARGIN)
        log_ratios = torch.where(distance.abs() < EDGE_MARGIN, aside, log_ratios)
    return log_ratios


def perturbed(policy: Policy, seed: int) -> Policy:
    """Another policy near this one, frozen; beside an adapter only the adapter is another."""
    other = frozen_copy(policy)
    shared = {id(parameter) for parameter in policy.model.parameters()}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.model.parameters():
            if id(parameter) in shared:
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter += REFERENCE_SPREAD * parameter.std(correction=0) * noise
    return other


def exact_policy(plan: Plan, stage: SftStage | GrpoStage) -> tuple[Policy, Model]:
    """The stage's model as it is before any stage, in float32 and without what blurs a comparison; an adapter has learnt."""
    exact = {"dtype": "float32", "gradient_checkpointing": False, "quantization": None}
    model = plan.recipe.model_of(stage).model_copy(update=exact)
    policy = load_policy(model, plan.tokenizer, seed=plan.recipe.seed)
    if model.lora is not None:
        policy = with_learnt_adapter(policy, derive_seed(plan.recipe.seed, "adapter noise"))
    return policy, model


@torch.no_grad()
def with_learnt_adapter(policy: Policy, seed: int) -> Policy:
    """The policy as if its adapter had learnt something: a fresh one is 0, and so would be half of its gradients."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter += ADAPTER_SPREAD * torch.randn(parameter.shape, generator=generator).to(parameter)
    return policy


def uneven(policy: Policy, examples: list[Example], stage: GrpoStage, *, seed: int) -> list[Group]:
    """G completions for each example, of lengths from 1 token to the limit, every second one ended by EOS.

    They are sampled without an end and then cut to a planned length; every group has the same lengths in another order.
    TRL divides a token-level loss by the mean token count of its mini-batches, we by each one's own: so they are equal.
    """
    endless = NativeSampler(replace(policy, eos_ids=()), Decoding.of(stage.sampling))
    count, limit = stage.sampling.num_generations, stage.sampling.max_completion_length
    if stage.algorithm.ratio_level == "sequence_sum":
        limit = min(limit, LONGEST_PRODUCT)
    lengths = torch.linspace(1, limit, count).round().long()
    groups = endless.sample(examples, num_generations=count, seed=derive_seed(seed, "parity"))
    return [
        Group(
            group.example,
            tuple(
                cut(completion, int(lengths[(row + shift) % count]), policy, ended=bool(row % 2))
                for row, completion in enumerate(group.completions)
            ),
        )
        for shift, group in enumerate(groups)
    ]


def cut(completion: Completion, length: int, policy: Policy, *, ended: bool) -> Completion:
    """The first `length` tokens; the last of them is EOS if `ended`."""
    ids = completion.token_ids[:length]
    ids = (*ids[:-1], policy.eos_ids[0]) if ended else ids
    return Completion(policy.tokenizer.decode(list(ids), skip_special_tokens=True), ids, ended)


def scored(groups: list[Group], rewards: RewardSet, *, seed: int) -> tuple[Scores, bool]:
    """The rewards of the recipe, or invented ones where those fail or are alike in every group (and True)."""
    scores = rewards.score(groups)
    spread = scores.total.amax(1) - scores.total.amin(1)
    if bool((spread > 0).all()) and not any(term.isnan().any() for term in scores.terms.values()):
        return scores, False
    generator = torch.Generator().manual_seed(derive_seed(seed, "rewards"))
    levels = torch.tensor(REWARD_LEVELS)
    terms = {name: levels[torch.randint(len(levels), scores.total.shape, generator=generator)] for name in scores.terms}
    total = sum((scores.weights[name] * values for name, values in terms.items()), torch.zeros_like(scores.total))
    ok = tuple(("ok",) * scores.total.shape[1] for _ in groups)
    return replace(scores, total=total, terms=terms, status=dict.fromkeys(terms, ok)), True
