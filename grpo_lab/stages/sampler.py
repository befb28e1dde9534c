"""The stage's sampler: one that uses the trained weights, or one that follows them, and the watch over the latter."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from grpo_lab.errors import StaleWeightsError
from grpo_lab.policy.load import has_adapter
from grpo_lab.policy.served import base_network, whole_weights, write_config, write_served
from grpo_lab.recipe.schema import Model, Sampling
from grpo_lab.sampling import make_sampler
from grpo_lab.sampling.ahead import AheadSampler, Draw
from grpo_lab.sampling.dealt import FirstSampler
from grpo_lab.sampling.decoding import Decoding, Sampler
from grpo_lab.sampling.transfer import INEXACT, Transfer
from grpo_lab.sampling.vllm_server import VllmServerSampler
from grpo_lab.seeds import sampling_seed
from grpo_lab.stages.plan import GrpoPlan
from grpo_lab.stages.running import Context
from grpo_lab.tracking.folders import save_folder_atomic
from grpo_lab.types import Callback, Policy, StepEnd

FOLDER = "sampler"  # in the stage's folder: what is sent to a sampler with weights of its own


@contextmanager
def stage_sampler(context: Context, plan: GrpoPlan, policy: Policy, *, version: int) -> Iterator[Sampler]:
    """The sampler of a stage whose policy has learnt `version` steps; what it started is stopped in the end."""
    stage = plan.stage
    settings, decoding = stage.sampling, Decoding.of(stage.sampling)
    if not settings.has_own_weights:
        yield make_sampler(settings.backend, policy, decoding, context.ranks)
        return
    if not context.ranks.is_first:
        yield FirstSampler(None, context.ranks)
        return
    assert settings.vllm is not None
    context.mark_inexact(INEXACT)
    folder = context.folder.path / FOLDER
    if settings.vllm.exchange is not None:
        folder = Path(settings.vllm.exchange) / f"{context.recipe.name}-{context.folder.path.name}"
    transfer = transfer_of(context.recipe.model_of(stage), policy, folder.absolute())
    sampler: Any  # of vLLM, in one of two ways
    if settings.backend == "vllm-server":
        sampler = VllmServerSampler(policy, decoding, settings.vllm, transfer, version=version)
    else:
        from grpo_lab.sampling.vllm import VllmSampler  # a second of import, needed only here

        sampler = VllmSampler(policy, decoding, settings.vllm, transfer, version=version)
    with ExitStack() as ends:
        ends.callback(shutil.rmtree, transfer.folder, ignore_errors=True)
        ends.callback(sampler.close)
        if settings.one_step_off:
            sampler = AheadSampler(sampler, partial(draw_of, plan, context.recipe.seed), step=version)
            ends.callback(sampler.close)
        yield sampler if context.ranks.world == 1 else FirstSampler(sampler, context.ranks)


def draw_of(plan: GrpoPlan, seed: int, step: int) -> Draw | None:
    """What the native loop asks of its sampler first in a step; None past the last step."""
    if step >= plan.stage.steps:
        return None
    return Draw(plan.prompts.at(step), plan.stage.sampling.num_generations, sampling_seed(seed, plan.name, step))


def transfer_of(model: Model, policy: Policy, folder: Path) -> Transfer:
    """How this stage's weights reach its sampler, through a folder that is made anew."""
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run has left
    folder.mkdir(parents=True)
    base = base_network(policy).name_or_path
    return Transfer(
        folder=folder,
        base=base,
        revision=model.revision if base == model.path else None,
        lora_rank=model.lora.r if model.lora is not None and has_adapter(policy.model) else None,
        dtype=model.dtype,
        trust_remote_code=model.trust_remote_code,
        tensors=whole_weights,
        write=lambda policy, folder: save_folder_atomic(folder, lambda inner: write_served(policy, inner)),
        drop=lambda folder: shutil.rmtree(folder),
        write_config=write_config,
    )


def refusing_stale(sampling: Sampling) -> Callback:
    """Stop the run where a step learnt from completions that are not the policy's.

    A sampler with weights of its own may have missed an update: its version then is another step's, or, where it only
    believes to be up to date, its log-probs are not the trainer's. Called after the step is logged and before it is saved.
    One step off, the policy of the step before is right as well, and log-probs differ by what one update changes.
    """

    def check(end: StepEnd) -> None:
        expected = [end.step - 2, end.step - 1] if sampling.one_step_off and end.step > 1 else [end.step - 1]
        for group in end.groups:
            if group.policy_version not in (None, *expected):
                raise StaleWeightsError(
                    f"step {end.step} of {end.stage}: {group.example.id} was sampled by the policy of step "
                    f"{group.policy_version}, expected {' or '.join(map(str, expected))}: the sampler has missed an update"
                )
        gap, limit = end.metrics.get("lab/sampler_gap"), sampling.max_logps_gap
        if gap is not None and limit is not None and not gap <= limit:
            raise StaleWeightsError(
                f"step {end.step} of {end.stage}: trainer and sampler differ by {gap:.2g} nats per token, more than "
                f"sampling.max_logps_gap ({limit:g}): the sampler's weights are not the policy's, or its temperature, "
                "dtype or template is another. Nothing of this step was saved"
            )

    return check
