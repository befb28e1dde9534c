"""A model card: what a stage's model is and what is known of it, from the run's folder alone."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_lab.recipe import Recipe, load_recipe
from grpo_lab.recipe.schema import Data, GrpoStage, RewardTerm, SftStage, WeightSchedule
from grpo_lab.summary import stage_outcome
from grpo_lab.tracking.files import read_json
from grpo_lab.tracking.run_folder import RESOLVED, RUN

# Of an absolute path its last part stays: a card is public, and the rest says how someone's machine is laid out.
_FOLDERS = re.compile(r"(?<![\w/:.])/(?:[^\s/\"'{}\[\],]+/)+")


def model_card(run: Path, stage: str, *, kind: str) -> str:
    """README.md for the model that a stage left; `kind` is whole, adapter or merged."""
    recipe, info = load_recipe(run / RESOLVED), read_json(run / RUN)
    names = list(recipe.stages)
    earlier = names[: names.index(stage) + 1]
    base = recipe.model.path
    named = base is not None and not Path(base).is_absolute()
    front = ["library_name: " + ("peft" if kind == "adapter" else "transformers"), "pipeline_tag: text-generation"]
    front += [f"base_model: {json.dumps(base)}"] if named else []
    front += ["tags: [grpo-lab, reinforcement-learning]"]
    lines = ["---", *front, "---", f"# {recipe.name}", "", opening(recipe, stage, kind), ""]
    for name in earlier:
        lines += about_stage(run, recipe, name, info["hashes"]["data"])
    lines += ["## What this does not say", "", *(f"- {limit}" for limit in limits(recipe, info, stage)), ""]
    environment = info["environment"]
    lines += ["## Made with", "", f"- hardware: {flat(environment['hardware'])}, {environment['num_threads']} threads"]
    lines += [f"- versions: {flat(environment['versions'])}", f"- seed: {recipe.seed}", ""]
    resolved = (run / RESOLVED).read_text(encoding="utf-8").rstrip("\n")
    fence = "`" * max(3, 1 + max((len(run_) for run_ in re.findall("`+", resolved)), default=0))
    lines += [
        "## The whole recipe",
        "",
        "`grpo-lab train` on this trains it again.",
        "",
        f"{fence}yaml",
        resolved,
        fence,
    ]
    return "\n".join(_FOLDERS.sub("", line) for line in lines) + "\n"


def opening(recipe: Recipe, stage: str, kind: str) -> str:
    """What it is and what it comes from."""
    what = {"adapter": "A LoRA adapter", "merged": "A model with its LoRA adapter merged in", "whole": "A model"}[kind]
    if recipe.model.path is None:
        assert recipe.model.config is not None
        origin = f"a new {recipe.model.config['model_type']} with random weights"
    else:
        origin = f"`{recipe.model.path}`" + (f" at `{recipe.model.revision}`" if recipe.model.revision else "")
    return f"{what}: stage `{stage}` of a grpo-lab run that began with {origin}."


def about_stage(run: Path, recipe: Recipe, name: str, hashes: Mapping[str, str]) -> list[str]:
    """What a stage learnt from, what for, and what came of it."""
    stage = recipe.stages[name]
    model = recipe.model_of(stage)
    how = "all weights" if model.lora is None else f"LoRA (r {model.lora.r}, alpha {model.lora.alpha})"
    how += "" if model.quantization is None else f" beside weights in 4 bits ({model.quantization.type})"
    lines = [
        f"## Stage {name}: {'supervised' if isinstance(stage, SftStage) else 'GRPO'}, {stage.steps} steps, {how}",
        "",
    ]
    lines.append(f"- data: {source(stage.data)}, sha256 `{hashes[f'stages.{name}']}`")
    if stage.evaluation is not None:
        lines.append(f"- held out: {source(stage.evaluation.data)}, sha256 `{hashes[f'stages.{name}.evaluation']}`")
    if isinstance(stage, GrpoStage):
        lines += [f"- reward: {weighted(term)}" for term in stage.reward_terms]
        if stage.reward_control is not None:
            lines.append(f"- **a control**: it learnt from {stage.reward_control} rewards, not from these")
    outcome = stage_outcome(run, name, stage)
    if "held_out" in outcome:
        lines += ["", "| held out, mean with 95 % interval | n | before | after | change |", "|---|---|---|---|---|"]
        for quantity, values in outcome["held_out"].items():
            cells = " | ".join(interval(values[key]) for key in ("before", "after", "change"))
            lines.append(f"| {quantity} | {values['num_prompts']} | {cells} |")
    if "eval_loss" in outcome:
        losses = outcome["eval_loss"]
        lines.append(f"- held-out loss (nats per token): {losses['before']:.3f} before, {losses['after']:.3f} after")
    return [*lines, ""]


def source(data: Data) -> str:
    """Where rows come from, in words."""
    parts = [f"{data.source} `{data.path}`"]
    parts += [f"{key} {value}" for key, value in (("name", data.name), ("revision", data.revision)) if value]
    parts += [f"split {data.split}"] if data.source in ("hub", "task") else []
    return ", ".join(parts)


def weighted(term: RewardTerm) -> str:
    """A reward with its weight.

    >>> weighted(RewardTerm(name="length", weight=0.1, options={"target": 8}))
    '`length` x 0.1 (target: 8)'
    """
    weight = term.weight
    moving = isinstance(weight, WeightSchedule)
    said = f"{weight.start} to {weight.end} over {weight.steps} steps" if moving else f"{weight}"  # type: ignore[union-attr]
    about = [f"{key}: {value}" for key, value in term.options.items()]
    about += [f"only if {term.only_if} is above 0"] if term.only_if is not None else []
    return f"`{term.name}` x {said}" + (f" ({', '.join(about)})" if about else "")


def limits(recipe: Recipe, info: Mapping[str, Any], stage: str) -> list[str]:
    """What a reader may not conclude."""
    found = ["One run with one seed: the intervals are over prompts, and say nothing of other seeds."]
    if recipe.stages[stage].evaluation is None:
        found.append("The last stage was not measured on held-out data.")
    else:
        found.append("Measured on held-out rows of the data above and nothing else; not on safety, nor on other tasks.")
    found.append("It was paid for what its rewards measure, which may not be what their names promise.")
    found += [f"Not exactly repeatable: {reason}." for reason in info["inexact_because"]]
    return found + ([] if info["status"] == "finished" else [f"The run is not finished: {info['status']}."])


def interval(values: Mapping[str, float]) -> str:
    """A mean with its bounds."""
    return f"{values['mean']:.3f} [{values['low']:.3f}, {values['high']:.3f}]"


def flat(values: Mapping[str, Any]) -> str:
    """A mapping in one line, without what is not there."""
    return ", ".join(f"{key} {value}" for key, value in values.items() if value not in (None, []))
