"""Supervised fine-tuning: maximise the log-probability of the data's completions, token by token."""

import torch

from grpo_lab.engines.learner import Learner, StepSums
from grpo_lab.engines.sft import measure_rows, negative_log_likelihood, training_batch
from grpo_lab.policy.forward import PolicyForward
from grpo_lab.policy.load import load_policy
from grpo_lab.seeds import derive_seed
from grpo_lab.stages.plan import SftPlan
from grpo_lab.stages.running import (
    Context,
    checkpointing,
    evaluating,
    finish,
    reporting,
    resume,
    say_what_learns,
    saying_halved,
    saying_plain,
)
from grpo_lab.stages.selection import Best
from grpo_lab.tracking.metrics import sft_metrics
from grpo_lab.tracking.stopwatch import Stopwatch
from grpo_lab.types import Policy, StepEnd

EVALUATION_ROWS = 64  # rows of one forward pass when nothing smaller is asked for


def run_sft(context: Context, plan: SftPlan) -> None:
    """Train the stage from where it stands to its end, and leave its final model."""
    if plan.stage.engine == "trl":
        from grpo_lab.stages.sft_trl import run_sft_trl  # seconds of import, needed only here

        run_sft_trl(context, plan)
        return
    stage, ranks = plan.stage, context.ranks
    model, seed = context.recipe.model_of(stage), context.recipe.seed
    policy = load_policy(model, context.tokenizer, seed=seed, folder=context.start)
    forward = PolicyForward(policy.model, temperature=1.0, packed=stage.packing, first_choices=True)
    learner = Learner(
        forward,
        stage.optimizer,
        total_steps=stage.steps,
        micro_batch_size=stage.micro_batch_size,
        ranks=ranks,
        strategy=context.strategy,
    )
    best = None if stage.selection is None else Best(stage.selection, policy)
    start = step = resume(context, plan.name, policy, learner, best=best)

    if start == 0:
        say_what_learns(context, plan.name, policy)

    def measure(step: int) -> None:
        measure_held_out(context, plan, policy, best, step)

    if start == 0 and stage.evaluation is not None:
        measure(0)
    report = reporting(
        context.sinks.step,
        saying_plain(context, learner.forward),
        saying_halved(context, learner),
        evaluating(stage.evaluation, measure),
        checkpointing(context, policy, learner, stage.checkpoint, best=best),
    )
    while step < stage.steps and not (best is not None and best.is_final):
        clock = Stopwatch()
        learner.forward.model.train()
        torch.manual_seed(derive_seed(seed, plan.name, "dropout", step) + ranks.rank)
        batch = training_batch(plan.rows.at(step), policy)
        result = learner.step(batch, negative_log_likelihood)
        clock.lap("learn")
        step += 1
        timing = clock.report(completions=batch.num_rows, tokens=int(batch.completion_mask.sum()))
        report(StepEnd(plan.name, step, stage.steps, metrics_of(result), timing))
    end(context, plan, policy, best, step)


def metrics_of(result: StepSums) -> dict[str, float]:
    """One step's metrics; sums become means over learnt tokens."""
    tokens, right = result.sums["tokens"], result.sums.get("first_choices")
    return sft_metrics(
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=result.learning_rate,
        entropy=result.sums["entropy"] / tokens,
        accuracy=None if right is None else right / tokens,
    )


def measure_held_out(context: Context, plan: SftPlan, policy: Policy, best: Best | None, step: int) -> None:
    """Measure the policy on the stage's held-out rows, log it, and remember the policy if it is the best."""
    stage = plan.stage
    size = stage.micro_batch_size or EVALUATION_ROWS
    metrics = measure_rows(policy, plan.held_out, size, packed=stage.packing, ranks=context.ranks)
    context.sinks.evaluation(plan.name, step, metrics, [])
    if best is not None:
        best.measured(step, metrics)


def end(context: Context, plan: SftPlan, policy: Policy, best: Best | None, step: int) -> None:
    """Leave the final model: the last one, or the best where the recipe asks for it."""
    selected = None
    if best is not None:
        if step < plan.stage.steps:
            message = f"stopped after step {step}: {best.since} evaluations in a row without a better one"
            context.sinks.event(plan.name, step, "info", message, {})
        best.put_back()
        context.sinks.event(plan.name, step, "info", best.report(), {})
        selected = best.step
    finish(context, plan.name, policy, context.recipe.model_of(plan.stage), steps=step, selected=selected)
