"""A look before the run: one prompt token by token, rewards on gold and empty answers, and all sizes."""

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from grpo_lab.assemble import Plan
from grpo_lab.data.stream import Stream
from grpo_lab.errors import RewardError
from grpo_lab.stages.plan import GrpoPlan, SftPlan
from grpo_lab.text_metrics import gold_texts
from grpo_lab.tracking.console import safe
from grpo_lab.types import Completion, Example, Group

NUM_PROBED = 8
FORMS = {"bare": "{}", "in tags": "<answer>{}</answer>", "boxed": "\\boxed{{{}}}", "after ####": "#### {}"}


def describe_plan(plan: Plan) -> dict[str, Any]:
    """What `--dry-run` shows, as plain values."""
    return {
        "name": plan.recipe.name,
        "vocabulary": len(plan.tokenizer),
        "stages": {stage.name: describe_stage(plan, stage) for stage in plan.stages},
    }


def describe_stage(plan: Plan, stage: SftPlan | GrpoPlan) -> dict[str, Any]:
    """One stage: its first row as tokens, its sizes, and for GRPO what the rewards say."""
    if isinstance(stage, SftPlan):
        row = stage.rows.at(0)[0]
        learned = [token for token, learn in zip(row.completion_ids, row.learn, strict=True) if learn]
        return {
            "kind": "sft",
            "sizes": sft_sizes(stage),
            "prompt": tokens(plan, row.prompt_ids),
            "learned": tokens(plan, learned),
        }
    example = stage.prompts.at(0)[0]
    return {
        "kind": "grpo",
        "sizes": grpo_sizes(stage),
        "prompt": tokens(plan, example.prompt_ids),
        "rewards": probe_rewards(plan, stage),
    }


def tokens(plan: Plan, ids: tuple[int, ...] | list[int]) -> list[list[Any]]:
    """Each token's id with its text, exactly as the model sees them."""
    return [[token, plan.tokenizer.decode([token], skip_special_tokens=False)] for token in ids]


def sft_sizes(plan: SftPlan) -> dict[str, Any]:
    """Rows, micro-batches and optimiser steps of a supervised stage."""
    stage = plan.stage
    rows = None if isinstance(plan.rows.items, Stream) else len(plan.rows.items)
    return {
        "rows": rows,
        "rows_per_step": stage.batch_size,
        "micro_batches_per_step": math.ceil(stage.batch_size / (stage.micro_batch_size or stage.batch_size)),
        "optimizer_steps": stage.steps,
        "epochs": None if rows is None else round(stage.steps * stage.batch_size / rows, 3),
        "held_out_rows": len(plan.held_out),
    }


def grpo_sizes(plan: GrpoPlan) -> dict[str, Any]:
    """Prompts, completions, micro-batches and optimiser steps of a GRPO stage."""
    stage = plan.stage
    prompts = None if isinstance(plan.prompts.items, Stream) else len(plan.prompts.items)
    completions = stage.prompts_per_step * stage.sampling.num_generations
    rows = completions // stage.algorithm.num_minibatches
    return {
        "prompts": prompts,
        "prompts_per_step": stage.prompts_per_step,
        "completions_per_step": completions,
        "completions_per_optimizer_step": rows,
        "micro_batches_per_optimizer_step": math.ceil(rows / (stage.micro_batch_size or rows)),
        "optimizer_steps": stage.steps * stage.algorithm.num_iterations * stage.algorithm.num_minibatches,
        "completions_in_all": stage.steps * completions,
        "epochs": None if prompts is None else round(stage.steps * stage.prompts_per_step / prompts, 3),
        "held_out_prompts": len(plan.held_out),
    }


def probe_rewards(plan: Plan, stage: GrpoPlan) -> dict[str, dict[str, float | None]]:
    """Mean rewards of answers to the first prompts: empty ones, gold ones in each common form, the data's own."""
    examples = [stage.prompts.items[index] for index in range(NUM_PROBED) if _has(stage.prompts.items, index)]
    answers = {"empty": ["" for _ in examples]}
    columns = [example.columns for example in examples]
    if all("answer" in each for each in columns):
        for name, form in FORMS.items():
            answers[f"gold {name}"] = [form.format(_written(each["answer"])) for each in columns]
    for column in ("completion", "solution"):
        if all(isinstance(each.get(column), str) for each in columns):
            answers[f"column {column}"] = [each[column] for each in columns]
    return {name: _mean_rewards(plan, stage, name, examples, texts) for name, texts in answers.items()}


def _written(gold: Any) -> str:
    """What a gold answer is written as: the first of several texts, nothing where there is no answer."""
    try:
        return next(iter(gold_texts(gold)), "")
    except TypeError:  # a number, say
        return str(gold)


def _mean_rewards(
    plan: Plan, stage: GrpoPlan, name: str, examples: list[Example], texts: list[str]
) -> dict[str, float | None]:
    ids = [tuple(plan.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    groups = [
        Group(example, (Completion(text, (*each, plan.tokenizer.eos_token_id), True),))
        for example, text, each in zip(examples, texts, ids, strict=True)
    ]
    scores = stage.rewards.score(groups)
    if scores.reasons:
        raise RewardError(f"stage {stage.name}, answers: {name}: " + "; ".join(scores.reasons.values()))
    means = {term: float(value.nanmean()) for term, value in {**scores.terms, "total": scores.total}.items()}
    return {term: mean if math.isfinite(mean) else None for term, mean in means.items()}


def _has(items: Any, index: int) -> bool:
    try:
        items[index]
    except IndexError:
        return False
    return True


def show_plan(found: Mapping[str, Any], console: Console) -> None:
    """The same for people."""
    for name, stage in found["stages"].items():
        table = Table(title=f"{name} ({stage['kind']})", title_justify="left", show_header=False)
        for size, value in stage["sizes"].items():
            table.add_row(size.replace("_", " "), "unknown (streamed)" if value is None else f"{value}")
        console.print(table)
        for part in ("prompt", "learned"):
            if part in stage:
                text = " ".join(f"{token}:{text!r}" for token, text in stage[part])
                console.print(f"first {part}: {safe(text)}", markup=False, highlight=False, soft_wrap=True)
        for probe, values in stage.get("rewards", {}).items():
            shown = ", ".join(f"{term} {'none' if value is None else f'{value:.3g}'}" for term, value in values.items())
            console.print(f"rewards of answers, {probe}: {shown}", markup=False, highlight=False, soft_wrap=True)
        console.print()
