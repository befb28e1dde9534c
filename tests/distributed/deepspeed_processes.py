"""Run as two processes by test_deepspeed.py, with accelerate's DeepSpeed switched on: trains in pieces and alone.

Alone means: the same process, without the other and without DeepSpeed.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from grpo_lab.batching import pad, with_advantages, with_logps
from grpo_lab.data.tokenizer import build_tokenizer
from grpo_lab.distributed.ranks import ALONE, Ranks, joined
from grpo_lab.engines.learner import Learner
from grpo_lab.engines.update import GrpoLoss
from grpo_lab.engines.weights import Strategy
from grpo_lab.policy.forward import PolicyForward, learn_without_dropout
from grpo_lab.policy.trainable import fingerprint
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.types import Policy

sys.path.insert(0, str(Path(__file__).parent))
from two_processes import Trained, another, differences, make_policy, recorded, relative, stage  # noqa: E402

SGD = {"name": "sgd", "learning_rate": 0.5, "momentum": 0.9, "warmup_steps": 2, "max_grad_norm": 0.5}
ADAMW = {"learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5}


@contextmanager
def accelerate_anew() -> Iterator[None]:
    """accelerate remembers the first way in which a process used it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Recorded:
    """A learner that keeps the gradient of every step."""

    def __init__(self, policy: Policy, setting: GrpoStage, strategy: Strategy, ranks: Ranks) -> None:
        self.policy, self.setting, self.ranks = policy, setting, ranks
        self.reference = another(policy)
        forward = PolicyForward(policy.model, temperature=setting.sampling.temperature)
        settings, size = setting.optimizer, setting.micro_batch_size
        self.learner = Learner(forward, settings, total_steps=6, micro_batch_size=size, ranks=ranks, strategy=strategy)
        self.found = Trained([], [], [], {}, {}, self.learner, policy)

    def steps(self, rollouts: Any, count: int, *, nan_at: int | None = None, silent: bool = False) -> Trained:
        groups, scores = rollouts
        loss = GrpoLoss(self.setting.algorithm)
        for index in range(count):
            learn_without_dropout(self.learner.forward.model)
            batch = with_logps(pad(groups, self.policy), self.policy, self.reference, self.setting, self.ranks)
            batch = replace(batch, old_logps=batch.ref_logps)
            batch = with_advantages(batch, scores, self.setting)
            if silent:
                assert batch.loss_weights is not None
                batch = replace(batch, loss_weights=torch.zeros_like(batch.loss_weights))

            def watched(out: Any, rows: Any, broken: bool = index == nan_at) -> Any:
                if broken and self.ranks.rank == 1:
                    out.logps.data.fill_(torch.nan)
                return loss(out, rows)

            clipped = self.learner.weights.clipped

            def keep(clipped: Any = clipped) -> float:
                norm: float = clipped()
                named = self.learner.forward.model.named_parameters()
                self.found.gradients.append({name: self._gradient(p) for name, p in named})
                return norm

            self.learner.weights.clipped = keep  # type: ignore[method-assign]
            stats = self.learner.step(batch, watched)
            self.learner.weights.clipped = clipped  # type: ignore[method-assign]
            self.found.losses.append(float(stats.loss))
            self.found.norms.append(float(stats.grad_norm))
        self.found.weights = {name: p.detach().clone() for name, p in self.policy.model.named_parameters()}
        self.found.optimizer = self.learner.optimizer_state()
        return self.found

    def _gradient(self, parameter: torch.Tensor) -> torch.Tensor:
        """Before clipping: DeepSpeed clips in its step."""
        if self.ranks.world > 1:
            from deepspeed.utils import safe_get_full_grad

            return safe_get_full_grad(parameter).clone()
        assert parameter.grad is not None
        norm = torch.stack([p.grad.norm() for p in self.policy.model.parameters() if p.grad is not None]).norm()
        return parameter.grad / norm  # clipped already: only its direction is left to compare


def directions(shared: Trained) -> Trained:
    """The same with gradients of norm 1."""
    made = []
    for step in shared.gradients:
        norm = torch.stack([gradient.norm() for gradient in step.values()]).norm()
        made.append({name: gradient / norm for name, gradient in step.items()})
    return replace(shared, gradients=made)


def copy_of(policy: Policy) -> Policy:
    return replace(policy, model=deepcopy(policy.model))


def compared(ranks: Ranks, policy: Policy, tokenizer: Any) -> Iterator[tuple[str, Any]]:
    rollouts, one_group = recorded(tokenizer), recorded(tokenizer, slice(1))
    for name, optimizer, rows, sizes in [
        ("sgd", SGD, rollouts, {}),
        ("adamw", ADAMW, rollouts, {}),
        ("one group", SGD, one_group, {"prompts_per_step": 1, "micro_batch_size": None}),
    ]:
        setting = stage(optimizer=optimizer, **sizes)
        with accelerate_anew():
            alone = Recorded(copy_of(policy), setting, "ddp", ALONE).steps(rows, 3)
        shared = Recorded(copy_of(policy), setting, "deepspeed", ranks).steps(rows, 3)
        found = differences(directions(shared), alone)
        if ranks.is_first:
            theirs, mine = alone.optimizer["state"], shared.optimizer["state"]
            found["tensors"] = [len(mine), len(theirs)]
            found["state"] = max(
                float((mine[index][key].float() - theirs[index][key].float()).abs().max())
                / max(float(theirs[index][key].abs().max()), 1e-12)
                for index in theirs
                for key in theirs[index]
            )
        yield name, found
        ranks.refuse_differences("policy", fingerprint(shared.policy.model))


def resumed(ranks: Ranks, policy: Policy, tokenizer: Any) -> Iterator[tuple[str, Any]]:
    """Three steps in one go, and two, and one by a new learner that loads the state."""
    rollouts, setting = recorded(tokenizer), stage(optimizer=ADAMW)
    whole = Recorded(copy_of(policy), setting, "deepspeed", ranks).steps(rollouts, 3)
    first = Recorded(copy_of(policy), setting, "deepspeed", ranks).steps(rollouts, 2)
    state = ranks.from_first(lambda: first.optimizer)
    again = Recorded(copy_of(policy), setting, "deepspeed", ranks)
    again.policy.model.load_state_dict(first.policy.model.state_dict())
    again.learner.resume(state, steps_done=2, skipped_in_a_row=0)
    third = again.steps(rollouts, 1)
    yield "resumed", {"weights": max(float((third.weights[name] - whole.weights[name]).abs().max()) for name in whole.weights), "norm": relative(third.norms[0], whole.norms[2])}  # fmt: skip


def faults(ranks: Ranks, policy: Policy, tokenizer: Any) -> Iterator[tuple[str, Any]]:
    rollouts, setting = recorded(tokenizer), stage(optimizer=ADAMW)
    before = fingerprint(policy.model)
    hit = Recorded(copy_of(policy), setting, "deepspeed", ranks)
    hit.steps(rollouts, 1, nan_at=0)
    untouched = fingerprint(hit.policy.model) == before
    hit.steps(rollouts, 1)
    with accelerate_anew():
        clean = Recorded(copy_of(policy), setting, "ddp", ALONE)
        clean.learner.steps_done = 1
        clean.steps(rollouts, 1)
    off = max(float((hit.found.weights[name] - p).abs().max()) for name, p in clean.found.weights.items())
    yield "nan", {"untouched": ranks.gather(untouched), "after": off}
    quiet = Recorded(copy_of(policy), setting, "deepspeed", ranks)
    quiet.steps(rollouts, 1)
    moved = fingerprint(quiet.policy.model)
    quiet.steps(rollouts, 1, silent=True)
    yield "silent", [moved != before, fingerprint(quiet.policy.model) == moved, quiet.found.norms[1]]


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with joined("deepspeed") as ranks:
        tokenizer = build_tokenizer(
            ["12+34=", "<think>2+4=6 c0;1+3=4 c0</think>\n<answer>46</answer>"] * 20, vocab_size=300, split_digits=True
        )
        policy = make_policy(tokenizer)
        for check in (compared, resumed, faults):
            found |= dict(check(ranks, policy, tokenizer))
        if ranks.is_first:
            with open(sys.argv[1], "w", encoding="utf-8") as file:
                json.dump(found, file)


if __name__ == "__main__":
    main()
