"""DeepSpeed's ZeRO (stages 1 to 3), set up by accelerate's own configuration.

As under FSDP2 the policy itself stays whole in every process, and a copy of it is trained in pieces. DeepSpeed scales,
clips and steps in one go, so a step that must not move the weights is made with a learning rate of 0.
"""

import copy
import importlib.util
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.integrations import unset_hf_deepspeed_config

from grpo_lab.attention.probe import why_plain
from grpo_lab.distributed.ranks import Ranks
from grpo_lab.engines.weights import accelerator, make_optimizer
from grpo_lab.errors import SetupError
from grpo_lab.policy.forward import PolicyForward
from grpo_lab.recipe.schema import Optimizer
from grpo_lab.types import Batch, LogpsAndEntropy

# What the recipe and this engine decide; accelerate's configuration may leave it open ("auto") or say the same.
_OURS = "the recipe decides it; leave it out of accelerate's DeepSpeed configuration, or write auto"


class ZeroShards:
    """The trained copy of a policy's forward pass in DeepSpeed's hands."""

    in_lockstep = True

    def __init__(self, whole: PolicyForward, settings: Optimizer, ranks: Ranks) -> None:
        require_deepspeed()
        self.whole, self.settings, self.ranks = whole, settings, ranks
        self._to_load: dict[str, Any] | None = None
        self._prepare()

    def _prepare(self) -> None:
        self.forward = copy.deepcopy(self.whole)
        why_plain(self.forward.model)  # tried now: it calls the model from outside of what is wrapped
        by_accelerate = accelerator(deepspeed=True)
        plugin = by_accelerate.state.deepspeed_plugin
        if plugin is None:
            raise SetupError(
                "accelerate leaves DeepSpeed out, as it was told to use the CPU; set use_cpu: false in its configuration"
            )
        config = plugin.deepspeed_config
        self._stage = config.get("zero_optimization", {}).get("stage")
        # accelerate fills in what is left open, and another stage may fill in other things
        as_given = copy.deepcopy(config)
        dtype = next(self.forward.parameters()).dtype
        configure(config, world=self.ranks.world, dtype=dtype, max_grad_norm=self.settings.max_grad_norm)
        made = make_optimizer(self.forward, self.settings)
        self._groups = made.state_dict()["param_groups"]
        self._learnt = [parameter for group in made.param_groups for parameter in group["params"]]
        self._engine, self.optimizer = by_accelerate.prepare(self.forward, made)
        config.clear()
        config.update(as_given)
        unset_hf_deepspeed_config()  # or transformers would tear apart every model that is loaded from now on

    def begin(self, batch: Batch, learning_rate: float) -> None:
        """Begin an optimiser step without gradient."""
        if self._to_load is not None:
            self._load_state(batch, self._to_load)
            self._to_load = None
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def passed(self, rows: Batch) -> LogpsAndEntropy:
        """A forward pass, in which all processes need each other's pieces."""
        return self._engine(rows)  # type: ignore[no-any-return]

    def backward(self, share: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradient; after the last one it is added up over all processes."""
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        self._engine.backward(share * self.ranks.world)  # DeepSpeed takes the mean over processes

    def add_up(self) -> None:
        """Nothing: the last backward pass has."""

    def clipped(self) -> float:
        """The norm of the whole gradient. DeepSpeed clips it in its step."""
        from deepspeed.utils import safe_get_full_grad

        return math.sqrt(sum(float(safe_get_full_grad(parameter).square().sum()) for parameter in self._learnt))

    @torch.no_grad()
    def step(self, *, moves: bool) -> None:
        """An optimiser step, whose weights the whole model gets. Where the gradient is not finite DeepSpeed makes none."""
        from deepspeed.utils import safe_get_full_fp32_param

        if not moves:
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0
        self._engine.step()
        if moves:
            for mine, theirs in zip(self.whole.model.parameters(), self.forward.model.parameters(), strict=True):
                if theirs.requires_grad:
                    mine.copy_(safe_get_full_fp32_param(theirs))

    def state(self) -> dict[str, Any]:
        """The optimiser's state with every tensor whole; only the first process gets it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self._inner_states()
        keys = [key for key, value in inner[0].items() if isinstance(value, Tensor) and value.ndim] if inner else []
        state: dict[int, dict[str, Any]] = {}
        for index, parameter in enumerate(self._learnt if inner else []):
            found = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
            if self.ranks.is_first:
                steps = {"step": inner[0]["step"].clone()} if "step" in inner[0] else {}
                state[index] = {**steps, **found}
        return {"state": state, "param_groups": self._groups}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from the whole model's weights, with a whole state."""
        self._engine.destroy()
        self._prepare()
        self._to_load = state if state["state"] else None

    def _load_state(self, batch: Batch, loaded: Mapping[str, Any]) -> None:
        """DeepSpeed makes the optimiser's state in its first step, so one is made that moves nothing."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.backward(0.0 * self.passed(batch.rows(0, 1)).logps.sum(), last=True)
        self.step(moves=False)
        inner = self._inner_states()
        for index, entries in loaded["state"].items():
            for key, value in entries.items():
                if key == "step":
                    for state in inner:
                        state["step"].fill_(float(value))
                else:
                    safe_set_full_optimizer_state(self._learnt[index], value.float(), key)

    def _inner_states(self) -> list[dict[str, Any]]:
        """The states of DeepSpeed's flat parameters; afterwards each parameter finds its part of them."""
        zero = self._engine.optimizer
        if zero.optimizer.state and self._stage < 3:
            # stages 1 and 2 look for them after the first group's first step, when other groups have none yet
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
        return list(zero.optimizer.state.values())


def require_deepspeed() -> None:
    """Raises SetupError: DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise SetupError('distributed.strategy: deepspeed needs DeepSpeed; pip install "grpo-lab[deepspeed]"')
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def configure(config: dict[str, Any], *, world: int, dtype: torch.dtype, max_grad_norm: float | None) -> None:
    """Write what the recipe and this engine decide into accelerate's DeepSpeed configuration.

    Raises:
        SetupError: it says something else, or asks for what is not offered here.
    """
    zero = config.get("zero_optimization", {})
    offload = [zero.get(f"offload_{what}", {}).get("device", "none") for what in ("optimizer", "param")]
    half = next((name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled") is True), str(dtype))
    refused = {
        "zero_optimization.stage": (
            zero.get("stage") not in (1, 2, 3),
            "0 shares nothing; use stage 1, 2 or 3, or strategy: ddp",
        ),
        "zero_optimization.offload": (offload != ["none", "none"], "it was never tried here; set its devices to none"),
        "optimizer": ("optimizer" in config, _OURS),
        "scheduler": ("scheduler" in config, _OURS),
        half: (
            half != "torch.float32",
            "only float32 was tried here, and DeepSpeed's own float32 weights would be lost with every resume; set "
            "model.dtype: float32, or strategy: fsdp2",
        ),
    }
    ours = {
        "train_micro_batch_size_per_gpu": 1,  # of "samples", which are micro-batches of any size
        "gradient_accumulation_steps": 1,  # a step's last micro-batch is announced
        "train_batch_size": world,
        "gradient_clipping": max_grad_norm or 0.0,
    }
    for key, value in ours.items():
        refused[key] = (config.get(key, "auto") not in ("auto", value), f"here it is {value}: {_OURS}")
    for key, (is_refused, reason) in refused.items():
        if is_refused:
            raise SetupError(f"accelerate's DeepSpeed configuration, {key}: {reason}")
    config.update({**ours, "steps_per_print": 10**9})
