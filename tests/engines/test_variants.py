"""Every variant and every option: the loss by hand, and what must hold of all of them whatever their numbers."""

import dataclasses
import math

import pytest
import torch

from grpo_lab.batching import pad, with_advantages, with_logps
from grpo_lab.engines.learner import Learner
from grpo_lab.engines.update import GrpoLoss, update
from grpo_lab.policy.forward import PolicyForward, frozen_copy, learn_without_dropout, refresh_reference
from grpo_lab.recipe.presets import PRESETS
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.types import Batch, Completion, Example, Group, LogpsAndEntropy, Scores

NAN = math.nan
A = 0.5 / (0.5**0.5 + 1e-4)  # the advantage of reward 1 beside reward 0, scaled by the group
MAX_LENGTH = 4

OPTIONS = {
    "KL in the reward": {"kl_placement": "reward"},
    "KL with bias correction": {"kl_bias_correction": True},
    "k1 in the reward, scaled over the step": {
        "kl_placement": "reward",
        "kl_estimator": "k1",
        "advantage_baseline": "batch",
        "advantage_scale": "batch",
    },
    "two-sided clip": {"delta": 1.5},
    "entropy bonus": {"entropy_bonus": 0.1},
    "undecided tokens": {"top_entropy_quantile": 0.3},
    "entropy bonus on undecided tokens": {"top_entropy_quantile": 0.3, "entropy_bonus": 0.1, "reduction": "token"},
    "truncated masked": {"mask_truncated_completions": True},
    "truncated masked, token": {"mask_truncated_completions": True, "reduction": "token"},
    "sampler truncated": {"sampler_correction": "truncate"},
    "sampler masked": {"sampler_correction": "mask", "sampler_correction_cap": 1.05},
    "sampler truncated, sequence": {"sampler_correction": "truncate", "sampler_correction_level": "sequence"},
    "sampler masked, sequence": {
        "sampler_correction": "mask",
        "sampler_correction_level": "sequence",
        "sampler_correction_cap": 1.05,
    },
}
VARIANTS = {**{name: {"preset": name} for name in PRESETS}, **OPTIONS}


def stage(*, max_length=MAX_LENGTH, generations=2, prompts=1, micro_batch_size=None, rewards=("length",), **algorithm):
    return GrpoStage(
        kind="grpo",
        data={"source": "task", "path": "addition", "prompt": "prompt"},
        steps=10,
        optimizer={"name": "sgd", "learning_rate": 0.05, "max_grad_norm": None},
        sampling={"num_generations": generations, "max_completion_length": max_length},
        rewards=[{"name": name} for name in rewards],
        algorithm=algorithm,
        prompts_per_step=prompts,
        micro_batch_size=micro_batch_size,
    )


def scores(rewards, name="length"):
    total = torch.tensor(rewards)
    return Scores(total=total, terms={name: total}, status={name: tuple(("ok",) * len(row) for row in rewards)})


# Two completions to one prompt, of two tokens and one, rewarded 1 and 0. Probabilities under the old policy .5, .5 and
# .1, under the policy .75, .25 and .8: ratios 1.5, .5 and 8. Entropies 1, 2 and 3 nats.
OLD = torch.tensor([[0.5, 0.5], [0.1, 1.0]]).log()
NEW = torch.tensor([[0.75, 0.25], [0.8, 1.0]]).log()
REF = torch.tensor([[0.25, 0.5], [0.1, 1.0]]).log()
ENTROPY = torch.tensor([[1.0, 2.0], [3.0, 0.0]])


def hand_batch(setting, *, finished=(True, True), **fields) -> Batch:
    mask = torch.tensor([[True, True], [True, False]])
    ids = torch.zeros(2, 2, dtype=torch.long)
    prompt = torch.zeros(1, 1, dtype=torch.long)
    batch = Batch(
        prompt, torch.ones_like(prompt).bool(), torch.tensor([0, 0]), ids, mask, old_logps=OLD, old_entropy=ENTROPY,
        finished=torch.tensor(finished), **fields,
    )  # fmt: skip
    return with_advantages(batch, scores([[1.0, 0.0]]), setting)


def hand_loss(*, finished=(True, True), fields=None, **algorithm):
    setting = stage(**algorithm)
    batch = hand_batch(setting, finished=finished, **(fields or {}))
    loss, sums = GrpoLoss(setting.algorithm)(LogpsAndEntropy(NEW, ENTROPY), batch)
    return float(loss), {name: float(value) for name, value in sums.items()}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


C = A / (A * 2**0.5 + 1e-4)  # gdpo: +A and -A, scaled once more by their std A * sqrt(2)
BY_HAND = {
    # row 1: min(1.5, 1.2) A and min(.5, .8) A, mean .85 A; row 2: min(-8, -1.2) A
    "grpo": -(0.85 * A - 8 * A) / 2,
    "dr_grpo": -(1.7 * 0.5 - 8 * 0.5) / (2 * MAX_LENGTH),
    "dapo": -(1.28 + 0.5 - 8) * A / 3,
    "gspo": -(math.sqrt(0.75) - 8) * A / 2,  # below 1 with a positive advantage: not clipped
    "cispo": -(1.5 * math.log(0.75) + 0.5 * math.log(0.25) - 5 * math.log(0.8)) * A / 3,
    "sapo": -(4 * (sigmoid(0.5) + sigmoid(-0.5)) / 2 - 4 / 1.05 * sigmoid(1.05 * 7)) * A / 2,
    "rloo": -(0.75 - 8) / 2,  # advantages 1 and -1
    "reinforce_pp": -(1.2 + 0.5 - 8) * A / 3,
    "reinforce_pp_baseline": -(1.2 + 0.5 - 8) * A / 3,  # one group: the step's differences are the group's
    "gdpo": -(0.85 * C - 8 * C) / 2,
    "trl_default": -(1.2 + 0.5 - 8) * A / 3,
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_loss_of_every_variant_by_hand(name):
    loss, _ = hand_loss(preset=name, beta=0.0)
    assert loss == pytest.approx(BY_HAND[name], rel=1e-5)


@pytest.mark.parametrize("kl", ["loss", "reward"])
@pytest.mark.parametrize("name", PRESETS)
def test_the_kl_of_every_variant_is_where_it_says(name, kl):
    """k1 to the reference: ln(.75/.25), ln(.25/.5), ln(.8/.1) in the loss; ln 2 + 0 and 0 under the old policy."""
    beta = 0.1
    base = {"preset": name, "kl_estimator": "k1", "kl_bias_correction": False, "kl_placement": kl, "beta": beta}
    loss, sums = hand_loss(**base, fields={"ref_logps": REF})
    values = [math.log(3), math.log(0.5), math.log(8)]
    assert sums["kl"] == pytest.approx(sum(values), rel=1e-5)
    if kl == "loss":
        reduction = stage(**base).algorithm.reduction
        penalty = {
            "sequence": (values[0] / 2 + values[1] / 2 + values[2]) / 2,
            "token": sum(values) / 3,
            "constant": sum(values) / (2 * MAX_LENGTH),
        }[reduction]
        assert loss == pytest.approx(BY_HAND[name] + beta * penalty, rel=1e-5)
    else:  # the rewards are 1 - .1 ln 2 and 0: every advantage is scaled by that, or normalised to what it was
        gap = 1 - beta * math.log(2)
        scale = {"dr_grpo": gap, "rloo": gap}.get(name, gap * (0.5**0.5 + 1e-4) / (gap * 0.5**0.5 + 1e-4))
        if name == "gdpo":  # the sums were normalised before: A - beta ln 2 and -A
            half = A - beta * math.log(2) / 2
            scale = half / (half * 2**0.5 + 1e-4) / C
        assert loss == pytest.approx(BY_HAND[name] * scale, rel=1e-5)


def test_kl_bias_correction_weighs_the_kl_by_the_ratio_by_hand():
    plain, _ = hand_loss(beta=0.0)
    loss, _ = hand_loss(beta=0.1, kl_estimator="k1", kl_bias_correction=True, fields={"ref_logps": REF})
    kl = (1.5 * math.log(3) + 0.5 * math.log(0.5)) / 2 + 8 * math.log(8)
    assert loss == pytest.approx(plain + 0.1 * kl / 2, rel=1e-5)


def test_a_two_sided_clip_caps_the_push_on_a_bad_token_by_hand():
    assert hand_loss(beta=0.0, delta=3.0)[0] == pytest.approx(-(0.85 - 3) * A / 2, rel=1e-5)


def test_undecided_tokens_alone_count_by_hand():
    """The third of highest entropy of 1, 2 and 3: the threshold is at place 1.98, between 2 and 3; the lone 3 stays."""
    assert hand_loss(beta=0.0, top_entropy_quantile=0.3)[0] == pytest.approx(8 * A / 2, rel=1e-5)
    both, _ = hand_loss(beta=0.0, top_entropy_quantile=0.5)  # the median, 2, is kept; weights stay as they were
    assert both == pytest.approx(-(0.5 / 2 - 8) * A / 2, rel=1e-5)


def test_the_entropy_bonus_is_the_mean_over_tokens_by_hand():
    plain, _ = hand_loss(beta=0.0)
    assert hand_loss(beta=0.0, entropy_bonus=0.1)[0] == pytest.approx(plain - 0.1 * 2, rel=1e-5)
    undecided, _ = hand_loss(beta=0.0, entropy_bonus=0.1, top_entropy_quantile=0.3)
    assert undecided == pytest.approx(8 * A / 2 - 0.1 * 3, rel=1e-5)


@pytest.mark.parametrize(
    "reduction, expected",  # the second completion was cut off: it stays in the baseline and among the completions
    [("sequence", -0.85 * A / 2), ("token", -1.7 * A / 2), ("constant", -1.7 * A / (2 * MAX_LENGTH))],
)
def test_a_truncated_completion_can_be_left_out_of_the_loss_by_hand(reduction, expected):
    settings = {"beta": 0.0, "reduction": reduction, "mask_truncated_completions": True}
    loss, _ = hand_loss(**settings, finished=(True, False))
    assert loss == pytest.approx(expected, rel=1e-5)
    whole, _ = hand_loss(**settings)
    assert whole == pytest.approx(hand_loss(beta=0.0, reduction=reduction)[0], rel=1e-6)


@pytest.mark.parametrize(
    "mode, level, cap, weights",  # old / sampler is 1.25, 1 and 4
    [
        ("truncate", "token", 2.0, (1.25, 1, 2)),
        ("mask", "token", 2.0, (1.25, 1, 0)),
        ("truncate", "sequence", 2.0, (1.25, 1.25, 2)),
        ("mask", "sequence", 1.2, (0, 0, 0)),
    ],
)
def test_the_sampler_is_corrected_by_hand(mode, level, cap, weights):
    settings = {"sampler_correction": mode, "sampler_correction_level": level, "sampler_correction_cap": cap}
    sampler = torch.tensor([[0.4, 0.5], [0.025, 1.0]]).log()
    loss, sums = hand_loss(beta=0.0, **settings, fields={"sampler_logps": sampler})
    expected = -((1.2 * weights[0] + 0.5 * weights[1]) / 2 - 8 * weights[2]) * A / 2
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert sums["sampler_gap"] == pytest.approx(math.log(1.25) + math.log(4), rel=1e-5)


def test_clipped_tokens_are_counted_where_there_is_a_clip():
    assert {k: v for k, v in hand_loss(beta=0.0)[1].items() if "clip" in k} == {"clip_low": 0, "clip_high": 1}
    assert hand_loss(preset="cispo", beta=0.0)[1]["clip_high"] == 0  # 8 is over the cap, with a negative advantage
    assert hand_loss(preset="cispo", epsilon_high=1.4)[1]["clip_high"] == 1
    for name in ("sapo", "rloo"):
        assert "clip_low" not in hand_loss(preset=name, beta=0.0)[1]


@pytest.mark.parametrize(
    "minibatches, kept, weight",  # entropies 1 to 8; a half of them, of the whole step or of each mini-batch
    [
        (1, [[False, False], [False, False], [True, True], [True, True]], 1 / 4),
        (2, [[False, False], [True, True], [False, False], [True, True]], 1 / 2),
    ],
)
def test_the_quantile_and_the_mean_are_those_of_an_optimiser_step(minibatches, kept, weight):
    setting = stage(
        prompts=2,
        beta=0.0,
        top_entropy_quantile=0.5,
        entropy_bonus=0.1,
        num_minibatches=minibatches,
        micro_batch_size=1,
    )
    ids, prompt = torch.zeros(4, 2, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long)
    mask = torch.ones(4, 2, dtype=torch.bool)
    batch = Batch(prompt, mask[:2, :1], torch.tensor([0, 0, 1, 1]), ids, mask)
    batch = dataclasses.replace(batch, old_entropy=torch.arange(1.0, 9.0).reshape(4, 2))
    out = with_advantages(batch, scores([[1.0, 0.0], [1.0, 0.0]]), setting)
    assert out.policy_mask.tolist() == kept
    assert out.entropy_weights[out.policy_mask].unique().tolist() == [weight]
    assert out.entropy_weights.sum() == minibatches
    assert torch.equal(out.rows(1, 3).policy_mask, out.policy_mask[1:3])
    assert torch.equal(out.rows(1, 3).entropy_weights, out.entropy_weights[1:3])


def test_an_entropy_bonus_without_the_entropys_gradient_is_an_error():
    setting = stage(beta=0.0, entropy_bonus=0.1)
    out = LogpsAndEntropy(NEW.clone().requires_grad_(), ENTROPY)
    with pytest.raises(ValueError, match="entropy_gradient=True"):
        GrpoLoss(setting.algorithm)(out, hand_batch(setting))


# On a model: four prompts with three completions each, of lengths that differ, some cut off, one not scored.
PROMPTS = [(20, 21, 22, 23, 24), (30,), (40, 41, 42), (45, 46)]
COMPLETIONS = [
    [(50, 51, 2), (52, 53, 54, 55, 56, 57), (2,)],
    [(58, 59, 60, 2), (61, 2), (62, 63, 64, 65)],
    [(66, 67, 2), (68,), (69, 70, 71, 2)],
    [(72, 73, 74, 75, 2), (76, 2), (77, 78)],
]
REWARDS = [[1.0, 0.0, 0.5], [0.0, NAN, 2.0], [0.0, 1.0, 1.0], [0.7, 0.7, 0.7]]


def groups():
    noise = torch.Generator().manual_seed(0)

    def completion(ids):
        return Completion("", ids, ids[-1] == 2, tuple((-3 * torch.rand(len(ids), generator=noise)).tolist()))

    return [
        Group(Example(f"e{p}", "", PROMPTS[p], {}), tuple(completion(ids) for ids in rows))
        for p, rows in enumerate(COMPLETIONS)
    ]


def measure(make_policy, size, **algorithm):
    """Gradients of every optimiser step of two iterations over two mini-batches, and the statistics."""
    setting = stage(
        generations=3, prompts=4, max_length=8, micro_batch_size=size, num_iterations=2, num_minibatches=2, **algorithm
    )
    policy, reference = make_policy(seed=0), frozen_copy(make_policy(seed=1))
    policy.model.eval()
    batch = with_logps(pad(groups(), policy), policy, reference, setting)
    # a sampler that is up to 20 % off
    off = torch.linspace(-0.2, 0.2, batch.num_rows)[:, None]
    batch = with_advantages(dataclasses.replace(batch, sampler_logps=batch.old_logps + off), scores(REWARDS), setting)
    learn_without_dropout(policy.model)
    forward = PolicyForward(policy.model, temperature=1.0, entropy_gradient=setting.algorithm.entropy_bonus > 0)
    learner = Learner(forward, setting.optimizer, total_steps=10, micro_batch_size=size)
    seen = []
    learner.optimizer.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]))
    )
    stats = update(learner, batch, setting.algorithm)
    return seen, {k: v for k, v in dataclasses.asdict(stats).items() if v is not None}


@pytest.fixture(scope="module")
def seen_before():
    return {}


@pytest.mark.parametrize("name", VARIANTS)
def test_micro_batches_change_neither_gradients_nor_statistics(make_policy, seen_before, name):
    whole, stats = measure(make_policy, None, **VARIANTS[name])
    assert len(whole) >= 3  # gspo's tight clip may leave a step without a gradient
    for size in (1, 4):
        parts, other_stats = measure(make_policy, size, **VARIANTS[name])
        assert len(parts) == len(whole)
        for one, other in zip(parts, whole, strict=True):
            assert float((one - other).norm() / other.norm()) < 1e-4
        assert other_stats == pytest.approx(stats, rel=1e-4, abs=1e-5)
    seen_before[name] = whole[0]


def test_every_option_changes_the_gradient(make_policy, seen_before):
    """Already of the first optimiser step, where the ratio is 1; the two-sided clip only of later ones."""
    plain = measure(make_policy, None)[0][0]
    for name in OPTIONS.keys() - {"two-sided clip"}:
        gradient = seen_before[name] if name in seen_before else measure(make_policy, None, **OPTIONS[name])[0][0]
        assert float((gradient - plain).norm() / plain.norm()) > 1e-3, name


def test_the_reference_moves_by_its_share_of_the_way(make_policy):
    policy, reference = make_policy(seed=0), frozen_copy(make_policy(seed=1))
    pairs = list(zip(reference.model.parameters(), policy.model.parameters(), strict=True))
    expected = [0.25 * theirs.detach().clone() + 0.75 * mine.detach().clone() for mine, theirs in pairs]
    kept = [theirs.detach().clone() for _, theirs in pairs]
    refresh_reference(reference, policy, alpha=0.25)
    for (mine, theirs), value, old in zip(pairs, expected, kept, strict=True):
        torch.testing.assert_close(mine.detach(), value)
        assert not mine.requires_grad
        assert torch.equal(theirs.detach(), old)
    refresh_reference(reference, policy, alpha=1.0)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
