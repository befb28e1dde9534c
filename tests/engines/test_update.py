"""One update of the policy: against a slow implementation of its own, and what must hold of it."""

import copy
import dataclasses
import math

import pytest
import torch

from grpo_lab.batching import pad, with_advantages, with_logps
from grpo_lab.engines.learner import Learner
from grpo_lab.engines.update import GrpoLoss, update
from grpo_lab.policy.forward import PolicyForward, frozen_copy, learn_without_dropout
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.types import Batch, Completion, Example, Group, Scores

NAN = math.nan
MAX_LENGTH = 8
PROMPTS = [(20, 21, 22, 23, 24), (30,), (40, 41, 42), (45, 46)]
COMPLETIONS = [  # three to a prompt
    [(50, 51, 2), (52, 53, 54, 55, 56, 57), (2,)],
    [(58, 59, 60, 2), (61, 2), (62, 63, 64, 65)],
    [(66, 67, 2), (68,), (69, 70, 71, 2)],
    [(72, 73, 74, 75, 2), (76, 2), (77, 78)],
]
REWARDS = [[1.0, 0.0, 0.5], [0.0, NAN, 2.0], [0.0, 1.0, 1.0], [0.7, 0.7, 0.7]]
GROUPS = [
    Group(Example(f"e{p}", "", PROMPTS[p], {}), tuple(Completion("", ids, ids[-1] == 2) for ids in rows))
    for p, rows in enumerate(COMPLETIONS)
]


def stage(*, temperature=0.7, micro_batch_size=None, optimizer=None, **algorithm):
    return GrpoStage(
        kind="grpo",
        data={"source": "task", "path": "addition", "prompt": "prompt"},
        steps=10,
        optimizer={"name": "sgd", "learning_rate": 0.5, "max_grad_norm": None, **(optimizer or {})},
        sampling={"num_generations": 3, "max_completion_length": MAX_LENGTH, "temperature": temperature},
        rewards=[{"name": "length"}],
        algorithm={"beta": 0.0, **algorithm},
        prompts_per_step=4,
        micro_batch_size=micro_batch_size,
    )


def scores(rewards=REWARDS):
    total = torch.tensor(rewards)
    return Scores(total=total, terms={"r": total}, status={"r": tuple(("ok",) * len(row) for row in rewards)})


def learner_of(policy, setting) -> Learner:
    learn_without_dropout(policy.model)
    forward = PolicyForward(policy.model, temperature=setting.sampling.temperature)
    return Learner(forward, setting.optimizer, total_steps=10, micro_batch_size=setting.micro_batch_size)


def batch_of(policy, setting, reference=None, groups=GROUPS, rewards=REWARDS) -> Batch:
    policy.model.eval()
    batch = with_logps(pad(groups, policy), policy, reference, setting)
    return with_advantages(batch, scores(rewards), setting)


def record_gradients(learner):
    """The gradients of every optimiser step that is really taken."""
    seen = []

    def keep(*_):
        parameters = learner.forward.model.named_parameters()
        seen.append({name: parameter.grad.clone() for name, parameter in parameters if parameter.grad is not None})

    learner.optimizer.optimizer.register_step_pre_hook(keep)
    return seen


def weights(policy):
    return {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}


def distance(one, other):
    """Between two sets of tensors, relative to the size of the second."""
    assert one.keys() == other.keys()
    difference = math.sqrt(sum(float((one[name] - other[name]).double().square().sum()) for name in one))
    return difference / math.sqrt(sum(float(other[name].double().square().sum()) for name in other))


# A slow GRPO, from the paper's formulas: python loops over rows and tokens, one unpadded forward pass a row.


def slow_logps(model, prompt, completion, temperature):
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0] / temperature
    return [logits[len(prompt) - 1 + t].log_softmax(0)[token] for t, token in enumerate(completion)]


def slow_advantages(rewards, scale):
    known = [reward for reward in rewards if not math.isnan(reward)]
    if len(set(known)) < 2:
        return [0.0] * len(rewards)
    mean = sum(known) / len(known)
    std = math.sqrt(sum((reward - mean) ** 2 for reward in known) / (len(known) - 1))
    divisor = {"group": std + 1e-4, "none": 1.0}[scale]
    return [0.0 if math.isnan(reward) else (reward - mean) / divisor for reward in rewards]


def slow_weight(setting, rows, length):
    """Of one token of a completion, in an optimiser step that has these rows."""
    scored = [row for row in rows if row["scored"]]
    if setting.algorithm.reduction == "sequence":
        return 1 / length / len(scored)
    if setting.algorithm.reduction == "token":
        return 1 / sum(len(row["completion"]) for row in scored)
    return 1 / (len(scored) * MAX_LENGTH)


def slow_surrogate(ratio, advantage, algorithm):
    low, high = 1 - algorithm.epsilon_low, 1 + algorithm.epsilon_high
    clipped = min(max(ratio.item(), low), high)
    capped = ratio if algorithm.delta is None or ratio.item() < algorithm.delta else torch.tensor(algorithm.delta)
    if capped.item() * advantage <= clipped * advantage:
        return capped * advantage
    return torch.tensor(clipped * advantage)  # no gradient


def slow_update(model, reference, setting):
    """Updates the model in place; gradients and losses of every optimiser step, and how many tokens were clipped."""
    algorithm, temperature = setting.algorithm, setting.sampling.temperature
    rows = []
    for prompt, completions, rewards in zip(PROMPTS, COMPLETIONS, REWARDS, strict=True):
        advantages = slow_advantages(rewards, algorithm.advantage_scale)
        for completion, reward, advantage in zip(completions, rewards, advantages, strict=True):
            with torch.no_grad():
                old = [float(logp) for logp in slow_logps(model, prompt, completion, temperature)]
                ref = [float(logp) for logp in slow_logps(reference, prompt, completion, temperature)]
            rows.append(
                {
                    "prompt": prompt,
                    "completion": completion,
                    "advantage": advantage,
                    "scored": not math.isnan(reward),
                    "old": old,
                    "ref": ref,
                }
            )
    parameters = dict(model.named_parameters())
    gradients, losses, clipped = [], [], {"low": 0, "high": 0}
    per_step = len(rows) // algorithm.num_minibatches
    for _ in range(algorithm.num_iterations):
        for start in range(0, len(rows), per_step):
            step = rows[start : start + per_step]
            loss = torch.tensor(0.0)
            for row in step:
                if not row["scored"]:
                    continue
                logps = slow_logps(model, row["prompt"], row["completion"], temperature)
                weight = slow_weight(setting, step, len(logps))
                changes = [logp - old for logp, old in zip(logps, row["old"], strict=True)]
                for t, logp in enumerate(logps):
                    log_ratio = changes[t] if algorithm.ratio_level == "token" else sum(changes) / len(changes)
                    gap = row["ref"][t] - logp
                    kl = torch.exp(gap) - gap - 1 if algorithm.kl_estimator == "k3" else gap**2 / 2
                    ratio = torch.exp(log_ratio)
                    objective = slow_surrogate(ratio, row["advantage"], algorithm)
                    clipped["low"] += row["advantage"] < 0 and ratio.item() < 1 - algorithm.epsilon_low
                    clipped["high"] += row["advantage"] > 0 and ratio.item() > 1 + algorithm.epsilon_high
                    loss = loss + weight * (algorithm.beta * kl - objective)
            gradient = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter -= setting.optimizer.learning_rate * gradient[name]
            gradients.append(gradient)
            losses.append(loss.item())
    return gradients, losses, clipped


VARIANTS = {
    "sequence": {"reduction": "sequence"},
    "token": {"reduction": "token"},
    "constant": {"reduction": "constant"},
    "dr_grpo": {"preset": "dr_grpo"},
    "clip higher, k2": {"epsilon_high": 0.5, "kl_estimator": "k2"},
    "two-sided clipping": {"delta": 1.25},
    "sequence ratio": {"ratio_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.15},
}


@pytest.mark.parametrize("passes", [(1, 1), (2, 2)])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_equals_a_slow_one_row_by_row_and_token_by_token(make_policy, variant, beta, passes):
    policy, reference = make_policy(seed=0), frozen_copy(make_policy(seed=1))
    iterations, minibatches = passes
    setting = stage(
        micro_batch_size=5,
        optimizer={"learning_rate": 0.01},
        **{"num_iterations": iterations, "num_minibatches": minibatches, **VARIANTS[variant], "beta": beta},
    )
    slow_model = copy.deepcopy(policy.model).eval()
    expected, losses, clipped = slow_update(slow_model, reference.model, setting)

    learner = learner_of(policy, setting)
    seen = record_gradients(learner)
    stats = update(learner, batch_of(policy, setting, reference), setting.algorithm)

    assert len(expected) == iterations * minibatches
    expected = [step for step in expected if any(bool(gradient.any()) for gradient in step.values())]
    assert len(seen) == len(expected) >= minibatches  # where all is clipped no step is taken
    for one, other in zip(seen, expected, strict=True):
        assert distance(one, other) < 1e-5
    assert stats.loss == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    assert distance(weights(policy), slow_model.state_dict()) < 1e-7
    tokens = iterations * sum(len(completion) for rows in COMPLETIONS for completion in rows)
    assert stats.clip_low * tokens == pytest.approx(clipped["low"])
    assert stats.clip_high * tokens == pytest.approx(clipped["high"])
    assert (clipped["low"] + clipped["high"] > 0) == (iterations > 1)


@pytest.mark.parametrize("passes", [(1, 1), (2, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("size", [1, 3, 5, None])
def test_micro_batches_change_neither_gradients_nor_statistics(make_policy, size, passes):
    runs = []
    for micro_batch_size in (size, 4):
        policy = make_policy()
        setting = stage(
            micro_batch_size=micro_batch_size, beta=0.04, num_iterations=passes[0], num_minibatches=passes[1],
            optimizer={"learning_rate": 0.05},
        )  # fmt: skip
        learner = learner_of(policy, setting)
        seen = record_gradients(learner)
        stats = update(learner, batch_of(policy, setting, frozen_copy(make_policy(seed=1))), setting.algorithm)
        runs.append((seen, stats))
    (seen, stats), (other_seen, other_stats) = runs
    assert len(seen) == len(other_seen) >= passes[0]
    assert max(distance(one, other) for one, other in zip(seen, other_seen, strict=True)) < 1e-5
    numbers = [{k: v for k, v in dataclasses.asdict(each).items() if v is not None} for each in (stats, other_stats)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5, abs=1e-6)


def test_at_step_0_the_ratio_is_1_nothing_is_clipped_and_the_kl_is_0(make_policy):
    policy = make_policy()
    setting = stage(beta=0.04, num_iterations=2, micro_batch_size=5)
    batch = batch_of(policy, setting, frozen_copy(policy))
    assert batch.old_logps is not None
    learner = learner_of(policy, stage(micro_batch_size=2))
    out = learner.step(batch, GrpoLoss(setting.algorithm))  # cut otherwise than the old log-probs were
    tokens = out.sums["tokens"]
    assert tokens == int(batch.completion_mask.sum())
    assert out.sums["ratio"] / tokens == pytest.approx(1, abs=1e-6)
    assert out.sums["clip_low"] == out.sums["clip_high"] == 0
    assert out.sums["kl"] / tokens == pytest.approx(0, abs=1e-6)
    assert out.loss == pytest.approx(0, abs=1e-6)
    assert out.grad_norm > 0.01


def test_several_iterations_move_the_ratio_and_the_kl_away(make_policy):
    policy = make_policy()
    setting = stage(beta=0.04, num_iterations=4, optimizer={"learning_rate": 0.02})
    stats = update(learner_of(policy, setting), batch_of(policy, setting, frozen_copy(policy)), setting.algorithm)
    assert abs(stats.ratio_mean - 1) > 1e-3
    assert stats.kl > 1e-4
    fresh = update(learner_of(policy, setting), batch_of(policy, stage()), stage().algorithm)
    assert fresh.ratio_mean == 1
    assert fresh.kl is None


def test_on_fresh_samples_the_loss_is_beta_times_the_weighted_kl(make_policy):
    policy, reference = make_policy(seed=0), frozen_copy(make_policy(seed=1))
    setting = stage(beta=0.3)
    batch = batch_of(policy, setting, reference)
    gap = batch.ref_logps - with_logps(pad(GROUPS, policy), policy, None, stage(num_iterations=2)).old_logps
    kl = gap.exp() - gap - 1
    stats = update(learner_of(policy, setting), batch, setting.algorithm)
    assert stats.loss == pytest.approx(0.3 * float((kl * batch.loss_weights).sum()), rel=1e-5)
    assert stats.kl == pytest.approx(float(kl[batch.completion_mask].mean()), rel=1e-5)
    assert stats.loss > 0.1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_update_makes_the_better_answers_likelier(make_policy, optimizer):
    policy = make_policy()
    setting = stage(num_iterations=2, optimizer={"name": optimizer, "learning_rate": 1e-3})
    batch = batch_of(policy, setting)
    update(learner_of(policy, setting), batch, setting.algorithm)
    policy.model.eval()
    after = with_logps(pad(GROUPS, policy), policy, None, setting).old_logps
    gain = (after - batch.old_logps).sum(1)
    assert (gain * batch.advantages).sum() > 0
    assert gain[0] > gain[1]  # rewards 1 and 0
    assert gain[5] > gain[3]  # rewards 2 and 0


def test_an_update_takes_one_optimiser_step_for_each_iteration_and_mini_batch(make_policy):
    policy = make_policy()
    setting = stage(num_iterations=3, num_minibatches=2, optimizer={"schedule": "linear"})
    learner = learner_of(policy, setting)
    stats = update(learner, batch_of(policy, setting), setting.algorithm)
    assert learner.steps_done == 6
    assert stats.learning_rate == pytest.approx(0.5 * (1 - 5 / 10))
    assert stats.skipped == 0


def test_a_row_that_was_not_scored_teaches_nothing(make_policy):
    grads = []
    for text in ((61, 2), (90, 91, 92, 93, 94, 2)):  # the row with reward nan
        first, second = GROUPS[1].completions[0], GROUPS[1].completions[2]
        middle = Group(GROUPS[1].example, (first, Completion("", text, True), second))
        policy, setting = make_policy(), stage(beta=0.04)
        learner = learner_of(policy, setting)
        seen = record_gradients(learner)
        groups = [GROUPS[0], middle, *GROUPS[2:]]
        update(learner, batch_of(policy, setting, frozen_copy(make_policy(seed=1)), groups), setting.algorithm)
        grads.append(seen[0])
    assert distance(*grads) < 1e-5


@pytest.mark.parametrize("rewards", [[[1.2] * 3] * 4, [[NAN] * 3] * 4, [[NAN, NAN, 1.0]] * 4])
def test_a_step_without_signal_leaves_the_weights_bit_for_bit(make_policy, rewards):
    policy = make_policy()
    setting = stage(num_minibatches=2, optimizer={"name": "adamw", "weight_decay": 0.1})
    learner = learner_of(policy, setting)
    update(learner, batch_of(policy, setting), setting.algorithm)  # so that there is momentum
    before = weights(policy)
    stats = update(learner, batch_of(policy, setting, rewards=rewards), setting.algorithm)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.model.state_dict().items())
    assert (stats.loss, stats.grad_norm, stats.skipped) == (0, 0, 0)


@pytest.mark.parametrize("factor, cap, scale", [(1.5, 2.0, 1.5), (3.0, 2.0, 2.0), (0.5, 2.0, 0.5)])
def test_sampler_correction_weighs_every_token_by_its_capped_ratio(make_policy, factor, cap, scale):
    """Where the sampler was `factor` times less likely to write a token, its gradient counts that much more."""
    grads = {}
    for correction in ("none", "truncate"):
        policy = make_policy()
        setting = stage(sampler_correction=correction, sampler_correction_cap=cap)
        batch = batch_of(policy, setting)
        old = with_logps(batch, policy, None, stage(num_iterations=2)).old_logps
        batch = dataclasses.replace(batch, sampler_logps=old - math.log(factor))
        learner = learner_of(policy, setting)
        seen = record_gradients(learner)
        stats = update(learner, batch, setting.algorithm)
        grads[correction] = seen[0]
        assert stats.sampler_gap == pytest.approx(abs(math.log(factor)), abs=1e-5)
    scaled = {name: scale * gradient for name, gradient in grads["none"].items()}
    assert distance(grads["truncate"], scaled) < 1e-5


def test_with_several_iterations_the_correction_stays_that_of_the_policy_that_sampled(make_policy):
    runs = []
    for correction, factor in (("truncate", 1.0), ("none", 1.5)):
        policy = make_policy()
        setting = stage(num_iterations=3, sampler_correction=correction, optimizer={"learning_rate": 0.005})
        batch = batch_of(policy, setting)
        batch = dataclasses.replace(
            batch, sampler_logps=batch.old_logps - math.log(1.5), advantages=batch.advantages * factor
        )
        learner = learner_of(policy, setting)
        seen = record_gradients(learner)
        stats = update(learner, batch, setting.algorithm)
        assert stats.sampler_gap == pytest.approx(math.log(1.5), abs=1e-6)
        assert abs(stats.ratio_mean - 1) > 1e-3
        runs.append(seen)
    assert len(runs[0]) == 3
    assert max(distance(one, other) for one, other in zip(*runs, strict=True)) < 1e-5


def test_an_update_writes_into_no_tensor_of_its_batch(make_policy):
    policy = make_policy()
    setting = stage(beta=0.04, num_iterations=2, num_minibatches=2, micro_batch_size=2, sampler_correction="truncate")
    batch = batch_of(policy, setting, frozen_copy(policy))
    batch = dataclasses.replace(batch, sampler_logps=batch.old_logps - 0.1)
    fields = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    fields = [tensor for tensor in fields if tensor is not None]
    before = [(tensor._version, tensor.clone()) for tensor in fields]
    update(learner_of(policy, setting), batch, setting.algorithm)
    assert len(before) == 11
    for (version, copied), tensor in zip(before, fields, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, copied)


def test_only_trainable_parameters_change(make_policy):
    policy = make_policy()
    policy.model.model.embed_tokens.requires_grad_(False)
    before, setting = weights(policy), stage()
    update(learner_of(policy, setting), batch_of(policy, setting), setting.algorithm)
    changed = {name for name, tensor in policy.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == before.keys() - {"model.embed_tokens.weight"}


def test_statistics_are_means_over_steps_and_over_tokens(make_policy):
    policy, reference = make_policy(seed=0), frozen_copy(make_policy(seed=1))
    setting = stage(beta=0.04, num_minibatches=4, optimizer={"learning_rate": 1e-9})
    batch = batch_of(policy, setting, reference)
    learner = learner_of(policy, setting)
    parts = [learner.step(batch.rows(start, start + 3), GrpoLoss(setting.algorithm)) for start in (0, 3, 6, 9)]
    stats = update(learner, batch, setting.algorithm)
    tokens = sum(part.sums["tokens"] for part in parts)
    assert stats.loss == pytest.approx(sum(part.loss for part in parts) / 4, rel=1e-4)
    assert stats.grad_norm == pytest.approx(sum(part.grad_norm for part in parts) / 4, rel=1e-4)
    assert stats.kl == pytest.approx(sum(part.sums["kl"] for part in parts) / tokens, rel=1e-4)
    assert stats.entropy == pytest.approx(sum(part.sums["entropy"] for part in parts) / tokens, rel=1e-4)
    assert 0 < stats.entropy < math.log(283)


def test_a_bad_batch_is_skipped_counted_and_leaves_the_weights(make_policy):
    policy = make_policy()
    setting = stage(num_iterations=2)
    batch = batch_of(policy, setting)
    batch = dataclasses.replace(batch, advantages=batch.advantages * math.inf)
    before = weights(policy)
    stats = update(learner_of(policy, setting), batch, setting.algorithm)
    assert stats.skipped == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.model.state_dict().items())
