"""Reads out, number by number, what TRL's SFTTrainer makes of recorded rows: log-probs, losses, gradients, weights."""

import copy
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback

from grpo_lab.data.examples import TrainingRow
from grpo_lab.engines.readout import SftReadout, StepReadout, copied, gradients_of
from grpo_lab.engines.trl import switch_dropout_off  # before trl: it switches telemetry off
from grpo_lab.engines.trl_config import require_trl
from grpo_lab.engines.trl_dataset import LazyRows
from grpo_lab.engines.trl_sft import labelled
from grpo_lab.engines.trl_sft_config import sft_arguments, unsupported_sft
from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import Model, SftStage
from grpo_lab.types import Policy

from trl import SFTConfig, SFTTrainer  # isort: skip
from trl.trainer.utils import disable_dropout_in_model  # isort: skip


class SftProbe(SFTTrainer):
    """The trainer itself, which remembers the log-probs of learnt tokens and the share of the loss of every micro-batch."""

    def __init__(self, model: Any, **settings: Any) -> None:
        self.logps: list[Tensor] = []
        self.losses: list[float] = []
        super().__init__(model=model, **settings)
        model.register_forward_hook(self._remember)

    def _remember(self, model: Any, args: Any, output: Any) -> None:
        self.logps.append(output.log_probs.detach()[output.label_mask].cpu())

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.losses.append(float(loss.detach()))
        return loss


def read_out(policy: Policy, batches: Sequence[Sequence[TrainingRow]], stage: SftStage, model: Model) -> SftReadout:
    """Train a copy of the policy with SGD through TRL, a step for each batch, without dropout and clipping.

    Raises:
        RecipeError: the stage has something that TRL lacks.
        SetupError: another TRL is installed than the one that is known here.
    """
    require_trl()
    problems = unsupported_sft(stage, model)
    if problems:
        raise RecipeError([f"{'.'.join(place)}: {message}" for place, message in problems])
    network: Any = copy.deepcopy(policy.model)
    switch_dropout_off(network)
    disable_dropout_in_model(network)
    rows = [row for batch in batches for row in batch]
    optimizer = torch.optim.SGD(
        [parameter for parameter in network.parameters() if parameter.requires_grad], lr=stage.optimizer.learning_rate
    )
    gradients: list[dict[str, Tensor]] = []
    optimizer.register_step_pre_hook(lambda *_: gradients.append(gradients_of(network)))
    # libraries warn each other of what they will rename
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        settings = {**sft_arguments(stage, model, seed=0), "max_steps": len(batches), "max_grad_norm": 0.0}
        probe = SftProbe(
            network,
            args=SFTConfig(output_dir=folder, use_cpu=not torch.cuda.is_available(), **settings),
            train_dataset=LazyRows.of(len(rows), lambda position: labelled(rows[position])),
            processing_class=copy.deepcopy(policy.tokenizer),
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        )
        probe.remove_callback(PrinterCallback)
        probe.train()
    each = probe.args.gradient_accumulation_steps
    steps = []
    for index, gradient in enumerate(gradients):
        parts = slice(index * each, (index + 1) * each)
        steps.append(StepReadout(torch.cat(probe.logps[parts]), None, sum(probe.losses[parts]), gradient))
    return SftReadout(steps, copied(dict(network.named_parameters())))
