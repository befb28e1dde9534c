"""The GRPO stage: builds the loop's parts, hangs evaluation, advice and saving on it, and runs it."""

from dataclasses import replace

from grpo_lab.distributed.ranks import ALONE, Ranks
from grpo_lab.engines.learner import Learner
from grpo_lab.engines.native import Parts, train
from grpo_lab.evaluate import Evaluation, evaluate
from grpo_lab.policy.forward import PolicyForward, frozen_copy, refresh_reference
from grpo_lab.policy.load import load_policy
from grpo_lab.recipe.schema import GrpoStage, ReferenceRefresh
from grpo_lab.sampling import make_sampler
from grpo_lab.sampling.decoding import Decoding
from grpo_lab.scoring.dealt import dealt
from grpo_lab.seeds import derive_seed
from grpo_lab.stages.advice import Advice
from grpo_lab.stages.plan import GrpoPlan
from grpo_lab.stages.running import (
    Context,
    admitting,
    checkpointing,
    evaluating,
    finish,
    reporting,
    resume,
    say_notes,
    say_what_learns,
    saying_halved,
    saying_plain,
)
from grpo_lab.stages.sampler import refusing_stale, stage_sampler
from grpo_lab.types import Callback, Policy, StepEnd


def run_grpo(context: Context, plan: GrpoPlan) -> None:
    """Train the stage from where it stands to its end, and leave its final model."""
    if plan.stage.engine == "trl":
        from grpo_lab.stages.grpo_trl import run_grpo_trl  # seconds of import, needed only here

        run_grpo_trl(context, plan)
        return
    stage, recipe, ranks = plan.stage, context.recipe, context.ranks
    plan = shared_out(plan, ranks)
    policy = load_policy(recipe.model_of(stage), context.tokenizer, seed=recipe.seed, folder=context.start)
    reference = frozen_copy(policy) if stage.algorithm.beta > 0 else None  # before resume: as the stage began
    learner = make_learner(context, stage, policy)
    moving = reference if stage.algorithm.reference_refresh is not None else None
    start = resume(context, plan.name, policy, learner, moving_reference=moving, rewards=plan.rewards)
    say_notes(context, plan.name, start, plan.rewards)
    if stage.score_while_sampling:
        early = ", ".join(term.label for term in plan.rewards.early_terms)
        context.sinks.event(
            plan.name, start, "info", f"called while sampling goes on: {early}; other rewards after it", {}
        )

    if start == 0:
        say_what_learns(context, plan.name, policy)

    def measure(step: int) -> None:
        result = measure_policy(policy, plan, seed=recipe.seed, ranks=ranks)
        context.sinks.evaluation(plan.name, step, result.metrics, result.rows)

    if start == 0 and stage.evaluation is not None:
        measure(0)
    report = reporting(
        context.sinks.step,
        refusing_stale(stage.sampling),
        Advice(context.sinks),
        saying_plain(context, learner.forward),
        saying_halved(context, learner),
        refreshing(stage.algorithm.reference_refresh, policy, reference),
        evaluating(stage.evaluation, measure),
        admitting(context, plan.rewards),
        checkpointing(context, policy, learner, stage.checkpoint, moving_reference=moving, rewards=plan.rewards),
    )
    with stage_sampler(context, plan, policy, version=start) as sampler:
        parts = Parts(
            name=plan.name,
            stage=stage,
            seed=recipe.seed,
            policy=policy,
            reference=reference,
            prompts=plan.prompts,
            sampler=sampler,
            rewards=plan.rewards,
            learner=learner,
            folder=context.folder.path,
            ranks=ranks,
        )
        train(parts, start=start, report=report)
    finish(context, plan.name, policy, recipe.model_of(stage), steps=stage.steps)


def make_learner(context: Context, stage: GrpoStage, policy: Policy) -> Learner:
    """The policy's forward pass as the stage trains with it, and its optimiser."""
    return Learner(
        PolicyForward(
            policy.model,
            temperature=stage.sampling.temperature,
            entropy_gradient=stage.algorithm.entropy_bonus > 0,
        ),
        stage.optimizer,
        total_steps=stage.steps * stage.algorithm.num_iterations * stage.algorithm.num_minibatches,
        micro_batch_size=stage.micro_batch_size,
        ranks=context.ranks,
        strategy=context.strategy,
    )


def shared_out(plan: GrpoPlan, ranks: Ranks) -> GrpoPlan:
    """The plan with rewards that all processes call together."""
    rewards, held_out = dealt(plan.rewards, ranks), dealt(plan.held_out_rewards, ranks)
    return replace(plan, rewards=rewards, held_out_rewards=held_out)


def refreshing(settings: ReferenceRefresh | None, policy: Policy, reference: Policy | None) -> Callback:
    """Let the reference follow the policy every `every` steps; what is saved after the step has it already."""

    def refresh(end: StepEnd) -> None:
        if settings is not None and reference is not None and end.step % settings.every == 0:
            refresh_reference(reference, policy, alpha=settings.alpha)

    return refresh


def measure_policy(
    policy: Policy,
    plan: GrpoPlan,
    *,
    seed: int,
    num_samples: int | None = None,
    pass_at: tuple[int, ...] = (),
    ranks: Ranks = ALONE,
) -> Evaluation:
    """The policy on the stage's held-out prompts: greedy, and sampled as the stage samples. The same noise each time.

    Always from the policy's own weights: where the stage samples with vLLM, the native sampler measures.
    """
    stage: GrpoStage = plan.stage
    backend = "native" if stage.sampling.has_own_weights else stage.sampling.backend
    assert stage.evaluation is not None
    count = stage.evaluation.num_samples if num_samples is None else num_samples
    decoding = Decoding.of(stage.sampling)
    return evaluate(
        plan.held_out,
        plan.held_out_rewards,
        greedy=make_sampler(backend, policy, decoding.greedy(), ranks),
        sampled=make_sampler(backend, policy, decoding, ranks) if count else None,
        num_samples=count,
        seed=derive_seed(seed, plan.name),
        pass_at=pass_at,
        max_failed=stage.max_failed_rewards,
    )
