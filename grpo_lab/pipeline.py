"""A run from its recipe to its last stage: the folder, the stages in order, and how it ended."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from grpo_lab.assemble import Plan, assemble
from grpo_lab.distributed.ranks import ALONE, Ranks
from grpo_lab.engines.learner import is_out_of_memory
from grpo_lab.engines.trl_config import INEXACT
from grpo_lab.errors import GrpoLabError, SetupError, StopRequested
from grpo_lab.policy.load import load_policy, write_policy
from grpo_lab.publish import Publisher, ready
from grpo_lab.recipe import LoadedRecipe, resolved_yaml
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.sampling.vllm_needs import require_vllm
from grpo_lab.scoring import start_nursery
from grpo_lab.scoring.dealt import scores_here
from grpo_lab.stages.grpo import run_grpo
from grpo_lab.stages.plan import GrpoPlan, SftPlan
from grpo_lab.stages.running import Context, StopSignal
from grpo_lab.stages.sft import run_sft
from grpo_lab.tracking.console import ConsoleSink
from grpo_lab.tracking.environment import environment
from grpo_lab.tracking.folders import save_folder_atomic, verify_folder
from grpo_lab.tracking.jsonl import JsonlSink
from grpo_lab.tracking.run_folder import RunFolder, SharedRunFolder
from grpo_lab.tracking.sinks import SilentSink, Sink, Sinks
from grpo_lab.tracking.wandb import WandbSink

INEXACT_ON_GPU = "on a GPU the sums of a gradient are taken in no fixed order"


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and notes to each other off the terminal; ours shows what matters."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # transformers' new name for what peft still asks for by the old one
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a package that it does not need


def train_recipe(
    loaded: LoadedRecipe, recipe_text: str, *, go_on: bool, console: Console, quiet: bool, ranks: Ranks = ALONE
) -> Path:
    """Train every stage that is not finished and return the run's folder.

    Args:
        go_on: continue the run of this name, if there is one; otherwise a folder that exists is refused.
        ranks: this process's place, where several train together; only the first of them writes and speaks.
    """
    recipe = loaded.recipe
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    path = Path(recipe.output_dir) / recipe.name
    names = [term.name for stage in recipe.stages.values() if isinstance(stage, GrpoStage) for term in stage.rewards]
    if recipe.plugins or any("." in name for name in names):
        start_nursery()  # while everything else is read and loaded
    with StopSignal() as stop:
        going_on = ranks.from_first(lambda: go_on and path.exists())
        base = path / "base"
        folder = base if going_on and base.exists() else None
        plan = assemble(loaded, tokenizer_folder=folder, num_processes=ranks.world)
        ranks.refuse_differences("recipe or data", (resolved_yaml(recipe), plan.hashes))
        for each in plan.stages:
            if isinstance(each, GrpoPlan):
                require_vllm(each.stage, recipe.model_of(each.stage))
        others = _other_sinks(plan, path, console, quiet=quiet) if ranks.is_first else []
        push = recipe.tracking.push if ranks.is_first else None
        if push is not None:
            ready(push.repo, public=push.public)  # before anything is made: what is wrong now would be after hours too
        with _open(plan, path, recipe_text, going_on=going_on, ranks=ranks) as run:
            files = JsonlSink(run, rollouts=recipe.tracking.rollouts) if ranks.is_first else SilentSink()
            sinks = Sinks(files, others)
            try:
                hub = None if push is None else Publisher(recipe, path, push, sinks)
                _run_stages(plan, run, files, sinks, stop, hub, ranks)
                run.set_status("finished")
                if hub is not None:
                    hub.finish()
            except StopRequested:
                run.set_status("interrupted")
                raise
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                run.set_status("failed")
                if not is_out_of_memory(error):
                    raise
                raise SetupError(f"out of memory; lower micro_batch_size or sampling.max_rows. {error}") from error
            except BaseException:
                run.set_status("failed")
                raise
            finally:
                sinks.close()
    return path


def _run_stages(
    plan: Plan,
    run: RunFolder,
    files: JsonlSink | SilentSink,
    sinks: Sinks,
    stop: StopSignal,
    hub: Publisher | None,
    ranks: Ranks,
) -> None:
    """Each stage starts from what it names: the one before, an earlier one, or the recipe's model."""
    if run.info()["environment"]["hardware"]["accelerators"]:
        run.mark_inexact(INEXACT_ON_GPU)
    base = ranks.from_first(lambda: _base(plan, run))
    starts = {"base": base, "previous": base}
    for stage in plan.stages:
        start = starts[stage.stage.start_from]
        folder = run.stage(stage.name)
        if folder.result.exists():
            verify_folder(folder.final)
            sinks.event(stage.name, stage.stage.steps, "info", "finished before, skipped", {})
        else:
            if stage.stage.engine == "trl":
                run.mark_inexact(INEXACT)
            publish = None if hub is None else hub.checkpoint
            context = Context(
                plan.recipe, plan.tokenizer, folder, start, files, sinks, stop, run.mark_inexact, publish, ranks
            )
            if isinstance(stage, SftPlan):
                run_sft(context, stage)
            else:
                with stage.workers as workers:  # they start while the model loads
                    workers.log = folder.path / ("rewards.log" if ranks.is_first else f"rewards-{ranks.rank}.log")
                    if scores_here(stage.rewards, ranks):
                        workers.start(stage.rewards.terms)
                    run_grpo(context, stage)
        starts["previous"] = starts[stage.name] = folder.final


def _base(plan: Plan, run: RunFolder) -> Path | None:
    """A model that the recipe makes from nothing is kept, with its tokenizer, so that every resume starts from it."""
    if plan.recipe.model.config is None:
        return None
    base = run.path / "base"
    if base.exists():
        verify_folder(base)
    else:
        whole = plan.recipe.model.model_copy(update={"lora": None, "quantization": None})
        policy = load_policy(whole, plan.tokenizer, seed=plan.recipe.seed)
        save_folder_atomic(base, lambda folder: write_policy(policy, folder))
    return base


def _open(plan: Plan, path: Path, recipe_text: str, *, going_on: bool, ranks: Ranks) -> RunFolder:
    """The run's folder; the first process makes or takes it before any other looks into it."""
    run = _own(plan, path, recipe_text, going_on=going_on, ranks=ranks) if ranks.is_first else SharedRunFolder(path)
    ranks.wait()
    return run


def _own(plan: Plan, path: Path, recipe_text: str, *, going_on: bool, ranks: Ranks) -> RunFolder:
    recipe = plan.recipe
    plugins = [Path(plugin) for plugin in recipe.plugins]
    # the run keeps copies of its plugins, so its resolved recipe works without the originals
    copies = [f"./plugins/{plugin.name}" for plugin in plugins]
    resolved = resolved_yaml(recipe.model_copy(update={"plugins": copies}))
    if not going_on:
        return RunFolder.create(
            path,
            recipe_text=recipe_text,
            resolved_text=resolved,
            plugins=plugins,
            facts={"hashes": plan.hashes, "labels": plan.labels, "environment": environment(ranks.world)},
        )
    run = RunFolder.open(path)
    try:
        run.refuse_changes(resolved_text=resolved, plugins=plugins, hashes=plan.hashes)
        run.compare_environment(ranks.world)
        run.set_status("running")
    except GrpoLabError:
        run.close()
        raise
    return run


def _other_sinks(plan: Plan, path: Path, console: Console, *, quiet: bool) -> Sequence[Sink]:
    sinks: list[Sink] = [ConsoleSink(console, quiet=quiet)]
    options = plan.recipe.tracking.wandb
    if options is not None:
        config = plan.recipe.model_dump(mode="json")
        sinks.append(WandbSink(path, name=plan.recipe.name, options=options, config=config))
    return sinks
