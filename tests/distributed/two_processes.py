"""Run as two processes by test_two_processes.py: trains on recorded rollouts shared out and alone, and writes what differs.

Alone means: the same process, without the other. Everything is worked out on both processes; the first writes.
"""

import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo_lab.batching import pad, with_advantages, with_logps
from grpo_lab.data.tokenizer import build_tokenizer
from grpo_lab.distributed.ranks import ALONE, Ranks, joined
from grpo_lab.engines.learner import Learner
from grpo_lab.engines.sharding import whole
from grpo_lab.engines.update import GrpoLoss, update
from grpo_lab.engines.weights import Strategy
from grpo_lab.errors import SetupError
from grpo_lab.policy.forward import PolicyForward, frozen_copy, learn_without_dropout
from grpo_lab.policy.load import load_policy
from grpo_lab.policy.trainable import fingerprint
from grpo_lab.recipe.schema import GrpoStage, Model, RewardTerm
from grpo_lab.sampling import make_sampler
from grpo_lab.sampling.dealt import FirstSampler
from grpo_lab.sampling.decoding import Decoding
from grpo_lab.scoring import bind, discover
from grpo_lab.scoring.dealt import dealt
from grpo_lab.types import Batch, Completion, Example, Group, Policy, Scores

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
GPT2 = {  # computes in float64 throughout, where Llama's norms are float32 whatever its weights
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
}
LENGTHS = [(24, 20, 22, 24), (1, 2, 1, 3), (2, 9, 4, 1), (1, 1, 2, 2), (8, 8, 3, 1)]  # five groups, very unequal
REWARDS = [(1.0, 0.0, 0.5, 0.2), (0.0, 1.0, 1.0, 0.0), (0.7, 0.7, 0.7, 0.7), (1.0, 0.0, 0.0, 0.0), (0.3, 0.1, 0.9, 0.4)]


def stage(**changes: Any) -> GrpoStage:
    """Warm-up over two steps, four micro-batches in one process, plain SGD, a KL to a frozen reference."""
    settings: dict[str, Any] = {
        "kind": "grpo",
        "data": {"source": "task", "path": "addition", "prompt": "prompt"},
        "sampling": {"num_generations": 4, "max_completion_length": 24, "temperature": 0.9},
        "rewards": [{"name": "length"}],
        "algorithm": {"beta": 0.04},
        "prompts_per_step": 5,
        "micro_batch_size": 5,
        "steps": 3,
        "optimizer": {"name": "sgd", "learning_rate": 0.1, "warmup_steps": 2, "max_grad_norm": None},
    }
    return GrpoStage.model_validate(settings | changes)


def make_policy(tokenizer: Any, config: dict[str, Any] = CONFIG) -> Policy:
    policy = load_policy(Model(config=config, tokenizer="built"), tokenizer, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.25, generator=generator)
    return policy


def another(policy: Policy) -> Policy:
    """A frozen policy near this one, which has sampled and is kept close to."""
    other = frozen_copy(policy)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return other


def recorded(tokenizer: Any, groups: slice = slice(None)) -> tuple[list[Group], Scores]:
    """Rollouts that nobody sampled: the same for whoever learns from them."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index, lengths in enumerate(LENGTHS):
        prompt = f"{index}+{11 * index}=" * (1 + index)
        example = Example(f"p{index}", prompt, tuple(tokenizer(prompt)["input_ids"]), {})
        rows = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]
        made.append(Group(example, tuple(Completion("", tuple(row), True) for row in rows)))
    rewards = torch.tensor(REWARDS)[groups]
    status = tuple(("ok",) * 4 for _ in made[groups])
    return made[groups], Scores(total=rewards, terms={"length": rewards}, status={"length": status})


@dataclass
class Trained:
    """What three steps did: each step's loss and gradient, the weights and the optimiser's state at the end."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    learner: Learner
    policy: Policy


def train(
    start: Policy,
    rollouts: tuple[list[Group], Scores],
    setting: GrpoStage,
    ranks: Ranks = ALONE,
    *,
    strategy: Strategy = "ddp",
    steps: int = 3,
    breaking: Callable[[Any, Batch], None] | None = None,
) -> Trained:
    """The native loop's steps on recorded rollouts. `breaking` is called in every forward pass of the loss."""
    policy = replace(start, model=copy.deepcopy(start.model))
    reference = another(policy)
    forward = PolicyForward(policy.model, temperature=setting.sampling.temperature)
    per_step = setting.algorithm.num_iterations * setting.algorithm.num_minibatches
    learner = Learner(
        forward,
        setting.optimizer,
        total_steps=steps * per_step,
        micro_batch_size=setting.micro_batch_size,
        ranks=ranks,
        strategy=strategy,
    )
    found = Trained([], [], [], {}, {}, learner, policy)

    def remember(*_: Any) -> None:
        named = learner.forward.model.named_parameters()
        found.gradients.append({name: whole(p.grad).detach().clone() for name, p in named if p.grad is not None})

    learner.optimizer.optimizer.register_step_pre_hook(remember)
    groups, scores = rollouts
    loss = GrpoLoss(setting.algorithm)
    for _ in range(steps):
        learn_without_dropout(learner.forward.model)
        batch = with_logps(pad(groups, policy), policy, reference, setting, ranks)
        batch = replace(batch, old_logps=batch.ref_logps)  # off-policy, or the loss would be nothing but rounding
        batch = with_advantages(batch, scores, setting)
        if breaking is None:
            stats = update(learner, batch, setting.algorithm)
        else:

            def broken(out: Any, rows: Batch) -> Any:
                breaking(out, rows)
                return loss(out, rows)

            stats = learner.step(batch, broken)
        found.losses.append(float(stats.loss))
        found.norms.append(float(stats.grad_norm))
    found.weights = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    found.optimizer = learner.optimizer_state()
    return found


def relative(one: float, other: float) -> float:
    return abs(one - other) / max(abs(other), 1e-12)


def differences(shared: Trained, alone: Trained) -> dict[str, float]:
    """The largest relative differences of losses and gradients, and the largest difference of a weight."""
    gradients = [
        float((mine[name] - theirs[name]).norm() / torch.stack([g.norm() for g in theirs.values()]).norm())
        for mine, theirs in zip(shared.gradients, alone.gradients, strict=True)
        for name in theirs
    ]
    weights = [float((shared.weights[name] - alone.weights[name]).abs().max()) for name in alone.weights]
    return {
        "loss": max(map(relative, shared.losses, alone.losses)),
        "norm": max(map(relative, shared.norms, alone.norms)),
        "gradient": max(gradients),
        "weights": max(weights),
        "steps": len(alone.gradients),
    }


def compared(ranks: Ranks, policy: Policy, tokenizer: Any) -> Iterator[tuple[str, Any]]:
    """Two processes against one, for both strategies."""
    rollouts, first = recorded(tokenizer), recorded(tokenizer, slice(1))
    twice = {"beta": 0.04, "num_iterations": 2, "num_minibatches": 2}
    clipped = {"name": "sgd", "learning_rate": 0.5, "warmup_steps": 2, "max_grad_norm": 0.5}
    exact = make_policy(tokenizer, GPT2)
    exact.model.double()
    for name, start, setting, rows in [
        ("float32", policy, stage(optimizer=clipped), rollouts),
        ("float64", exact, stage(), rollouts),
        (
            "two iterations",
            exact,
            stage(algorithm=twice, prompts_per_step=4, optimizer=clipped),
            recorded(tokenizer, slice(4)),
        ),
        ("one group", exact, stage(prompts_per_step=1, micro_batch_size=None), first),
    ]:
        alone = train(start, rows, setting)
        for strategy in ("ddp", "fsdp2"):
            shared = train(start, rows, setting, ranks, strategy=strategy)
            yield f"{name}: {strategy}", differences(shared, alone)
            ranks.refuse_differences("policy", fingerprint(shared.policy.model))


def adam(ranks: Ranks, policy: Policy, tokenizer: Any) -> Iterator[tuple[str, Any]]:
    """The optimiser's state of weights in pieces is what one process has, and can be gone on with by either."""
    setting = stage(optimizer={"learning_rate": 1e-3}, algorithm={"beta": 0.0})
    rollouts = recorded(tokenizer)
    alone = train(policy, rollouts, setting, steps=1)
    shared = train(policy, rollouts, setting, ranks, strategy="fsdp2", steps=1)
    if ranks.is_first:
        theirs, mine = alone.optimizer["state"], shared.optimizer["state"]
        yield (
            "adam",
            {
                "tensors": [len(theirs), len(mine)],
                "largest": max(
                    float((mine[index][key] - theirs[index][key]).abs().max() / theirs[index][key].abs().max())
                    for index in theirs
                    for key in ("exp_avg", "exp_avg_sq")
                ),
            },
        )
    state = ranks.from_first(lambda: shared.optimizer)
    again = train(policy, rollouts, setting, ranks, strategy="fsdp2", steps=0)
    again.policy.model.load_state_dict(shared.policy.model.state_dict())
    again.learner.resume(state, steps_done=1, skipped_in_a_row=0)
    taken = again.learner.optimizer_state()
    again.learner.weights.weights_to_whole()
    if ranks.is_first:
        yield (
            "resumed",
            {
                "state": all(
                    torch.equal(taken["state"][index][key], state["state"][index][key])
                    for index in state["state"]
                    for key in state["state"][index]
                ),
                "weights": fingerprint(again.policy.model) == fingerprint(shared.policy.model),
            },
        )


def faults(ranks: Ranks, policy: Policy, tokenizer: Any) -> Iterator[tuple[str, Any]]:
    """What goes wrong in one process only is answered by both alike."""
    rollouts = recorded(tokenizer)
    before = fingerprint(policy.model)

    def nan(out: Any, rows: Batch) -> None:
        if ranks.rank == 1:
            out.logps.data.fill_(torch.nan)

    for strategy in ("ddp", "fsdp2"):
        hit = train(policy, rollouts, stage(), ranks, strategy=strategy, steps=2, breaking=nan)
        everyone = ranks.gather((fingerprint(hit.policy.model) == before, hit.learner.skipped_in_a_row))
        yield f"nan: {strategy}", everyone

    def short(out: Any, rows: Batch) -> None:
        if ranks.rank == 1 and rows.num_rows > 3:
            raise torch.OutOfMemoryError("nothing left")

    whole_memory = train(policy, rollouts, stage(), ranks)
    halved = train(policy, rollouts, stage(), ranks, breaking=short)
    everyone = ranks.gather((halved.learner.halved_to, halved.learner.micro_batch_size))
    yield "halved", {"rows": everyone, **differences(halved, whole_memory)}
    try:
        ranks.refuse_differences("thing", ranks.rank)
    except SetupError as error:
        yield "refused", str(error)


def parts(ranks: Ranks, policy: Policy, tokenizer: Any) -> Iterator[tuple[str, Any]]:
    """Sampler and rewards, dealt, against one process; texts of very unequal lengths."""
    prompts = ["1+2=", "33+44=", "5+6=", "7+7=", "2+2="]
    examples = [
        Example(f"p{i}", text, tuple(tokenizer(text)["input_ids"]), {"answer": "3"}) for i, text in enumerate(prompts)
    ]
    decoding = Decoding(40, max_rows=7)
    eager = replace(policy, eos_ids=tuple(range(0, 300, 12)))  # an answer ends at each token with about the same chance
    for backend in ("native", "hf"):
        alone = make_sampler(backend, eager, decoding).sample(examples, num_generations=3, seed=5)
        shared = make_sampler(backend, eager, decoding, ranks).sample(examples, num_generations=3, seed=5)
        lengths = [len(each.token_ids) for group in alone for each in group.completions]
        yield f"sampled: {backend}", {
            "tokens": [[c.token_ids for c in g.completions] for g in alone] == [[c.token_ids for c in g.completions] for g in shared],
            "examples": [g.example.id for g in shared] == [example.id for example in examples],
            "lengths": [min(lengths), max(lengths)],
        }  # fmt: skip
        if backend == "native":
            groups = alone
    asked = FirstSampler(make_sampler("native", eager, decoding) if ranks.is_first else None, ranks)
    asked.sync(eager)
    answers = asked.sample(examples, num_generations=3, seed=5)
    yield "asked", answers == groups
    few = make_sampler("native", eager, decoding, ranks).sample(examples[:1], num_generations=2, seed=5)
    yield "one prompt", len(few[0].completions)
    registry = discover([sys.argv[2]])
    for names in (["length", "accuracy", "siblings"], ["length", "remembers"], ["length", "whole_batch"]):
        own = bind([RewardTerm(name=name) for name in names], registry)
        of_one, of_two = own.score(groups), None
        if names[1] == "remembers":  # it has counted: begin again
            own.load_state_dict({"remembers": 0})
        rewards = dealt(own, ranks)
        of_two = rewards.score(groups)
        yield (
            f"scored: {names[1]}",
            {
                "total": torch.equal(of_one.total.nan_to_num(-9), of_two.total.nan_to_num(-9)),
                "status": of_one.status == of_two.status,
                "reasons": of_one.reasons == of_two.reasons,
                "logged": of_one.logged == of_two.logged,
                "state": rewards.state_dict(),
                "calls": ranks.gather(own.terms[-1].reward.function.__dict__.get("calls", 0)),
            },
        )


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with joined() as ranks:
        tokenizer = build_tokenizer(
            ["12+34=", "<think>2+4=6 c0;1+3=4 c0</think>\n<answer>46</answer>"] * 20, vocab_size=300, split_digits=True
        )
        policy = make_policy(tokenizer)
        for check in (compared, adam, faults, parts):
            found |= dict(check(ranks, policy, tokenizer))
        found["numbers"] = {"gathered": ranks.gather(ranks.rank), "share": ranks.gather(str(ranks.share(5)))}
        mixed = [torch.ones(3), torch.full((2,), 2, dtype=torch.long), torch.ones(1, 2)]
        ranks.add(mixed)
        found["numbers"]["added"] = [tensor.flatten().tolist() for tensor in mixed]
        if ranks.is_first:
            with open(sys.argv[1], "w", encoding="utf-8") as file:
                json.dump(found, file)


if __name__ == "__main__":
    main()
