"""The supervised stage through TRL: the same frame as `sft.py` around another engine."""

from pathlib import Path

from grpo_lab.engines.trl_sft import SftParts, train_sft
from grpo_lab.policy.load import load_policy
from grpo_lab.stages.plan import SftPlan
from grpo_lab.stages.running import Context, evaluating, reporting, say_what_learns
from grpo_lab.stages.selection import Best
from grpo_lab.stages.sft import end, measure_held_out
from grpo_lab.stages.trl_checkpoints import Saving, resume
from grpo_lab.tracking.checkpoints import read_tensors, write_tensors
from grpo_lab.tracking.files import read_json, write_json
from grpo_lab.types import StepEnd

BEST, BEST_STATE = "best.safetensors", "best.json"  # in a checkpoint: the best model so far


def run_sft_trl(context: Context, plan: SftPlan) -> None:
    """Train the stage from where it stands to its end, and leave its final model."""
    stage, recipe = plan.stage, context.recipe
    model = recipe.model_of(stage)
    policy = load_policy(model, context.tokenizer, seed=recipe.seed, folder=context.start)
    best = None if stage.selection is None else Best(stage.selection, policy)
    resumed = resume(context, plan.name, updates=1)
    if resumed is not None and best is not None:
        saved = read_json(resumed.path / BEST_STATE)
        best.load(saved["state"], read_tensors(resumed.path / BEST, saved["aliases"]))
    if resumed is None:
        say_what_learns(context, plan.name, policy)
    done = 0 if resumed is None else resumed.step

    def measure(step: int) -> None:
        measure_held_out(context, plan, policy, best, step)

    def remember(step_end: StepEnd) -> None:
        nonlocal done
        done = step_end.step

    def is_over() -> bool:
        return best is not None and best.is_final

    def write(path: Path) -> None:
        if best is not None:
            aliases = write_tensors(path / BEST, best.tensors)
            write_json(path / BEST_STATE, {"state": best.state_dict(), "aliases": aliases})

    if resumed is None and stage.evaluation is not None:
        measure(0)
    if not is_over():
        train_sft(
            SftParts(plan.name, stage, recipe.seed, policy, plan.rows, is_over),
            model,
            output=context.folder.checkpoints,
            resume_from=resumed.path if resumed else None,
            report=reporting(context.sinks.step, remember, evaluating(stage.evaluation, measure)),
            callbacks=[Saving(context, plan.name, stage, policy, updates=1, write=write)],
        )
    end(context, plan, policy, best, done)
