"""The GRPO stage through TRL: the same frame as `grpo.py` around another engine."""

from pathlib import Path

from grpo_lab.engines.trl import REFERENCE, train
from grpo_lab.engines.trl_config import sizes
from grpo_lab.engines.trl_rollouts import TrlParts
from grpo_lab.policy.load import load_policy
from grpo_lab.recipe.schema.sampling import OWN_WEIGHTS
from grpo_lab.sampling import make_sampler
from grpo_lab.sampling.decoding import Decoding
from grpo_lab.stages.advice import Advice
from grpo_lab.stages.grpo import measure_policy
from grpo_lab.stages.plan import GrpoPlan
from grpo_lab.stages.running import Context, admitting, evaluating, finish, reporting, say_notes, say_what_learns
from grpo_lab.stages.sampler import refusing_stale
from grpo_lab.stages.trl_checkpoints import Found, Saving, resume
from grpo_lab.tracking.files import read_json, write_json

SERVED_IN_BFLOAT16 = (
    "TRL gives vLLM no dtype, which then serves this float32 model in bfloat16 (or float16): the policy that samples is not "
    "quite the one that learns; algorithm.sampler_correction weights for it, engine: native has no such gap"
)
REWARDS = "rewards.json"  # in a checkpoint: the states of stateful rewards


def run_grpo_trl(context: Context, plan: GrpoPlan) -> None:
    """Train the stage from where it stands to its end, and leave its final model."""
    stage, recipe = plan.stage, context.recipe
    policy = load_policy(recipe.model_of(stage), context.tokenizer, seed=recipe.seed, folder=context.start)
    updates = sizes(stage).updates
    resumed = resume(context, plan.name, updates=updates)
    if resumed is not None:
        plan.rewards.load_state_dict(read_json(resumed.path / REWARDS))
    say_notes(context, plan.name, resumed.step if resumed else 0, plan.rewards)

    def measure(step: int) -> None:
        result = measure_policy(policy, plan, seed=recipe.seed)
        context.sinks.evaluation(plan.name, step, result.metrics, result.rows)

    if resumed is None:
        say_what_learns(context, plan.name, policy)
    if stage.sampling.has_own_weights and recipe.model.dtype == "float32":
        context.sinks.event(plan.name, resumed.step if resumed else 0, "warning", SERVED_IN_BFLOAT16, {})
    if resumed is None and stage.evaluation is not None:
        measure(0)

    def write(path: Path) -> None:
        write_json(path / REWARDS, plan.rewards.state_dict())

    backend = stage.sampling.backend
    parts = TrlParts(
        name=plan.name,
        stage=stage,
        seed=recipe.seed,
        policy=policy,
        reference=reference(context, plan, resumed),
        prompts=plan.prompts,
        sampler=None
        if backend in ("auto", *OWN_WEIGHTS)
        else make_sampler(backend, policy, Decoding.of(stage.sampling)),
        rewards=plan.rewards,
        folder=context.folder.path,
    )
    train(
        parts,
        recipe.model_of(stage),
        output=context.folder.checkpoints,
        resume_from=resumed.path if resumed else None,
        report=reporting(
            context.sinks.step,
            refusing_stale(stage.sampling),
            Advice(context.sinks),
            evaluating(stage.evaluation, measure),
            admitting(context, plan.rewards),
        ),
        callbacks=[Saving(context, plan.name, stage, policy, updates=updates, write=write)],
    )
    finish(context, plan.name, policy, recipe.model_of(stage), steps=stage.steps)


def reference(context: Context, plan: GrpoPlan, resumed: Found | None) -> str | None:
    """Where TRL reads the reference from: what the stage starts from, or a moved one that a checkpoint kept."""
    if plan.stage.algorithm.beta == 0:
        return None
    if resumed is not None and plan.stage.algorithm.reference_refresh is not None:
        return str(resumed.path / REFERENCE)
    return str(context.start or context.recipe.model.path)
