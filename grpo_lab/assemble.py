"""From a recipe to its built parts, with every check that needs no model: data, templates, lengths, rewards, sizes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from grpo_lab.checks import Loc, Problems, check_order, check_processes
from grpo_lab.corpus_metrics import KINDS
from grpo_lab.data.chat import prefills_thinking, template_problems
from grpo_lab.data.examples import (
    TrainingRow,
    check_prompts,
    check_training_rows,
    corpus,
    prompt_examples,
    short_prompts,
    training_rows,
)
from grpo_lab.data.shapes import label_map
from grpo_lab.data.sources import Rows, load_rows
from grpo_lab.data.stream import Mapped, PromptStream, Stream
from grpo_lab.data.templates import TEMPLATES, with_template
from grpo_lab.data.tokenizer import build_tokenizer
from grpo_lab.engines.trl_config import require_trl, unsupported
from grpo_lab.engines.trl_sft_config import unsupported_sft
from grpo_lab.errors import RecipeError
from grpo_lab.policy.load import context_length, eos_ids, generation_config, load_tokenizer, model_config
from grpo_lab.recipe import LoadedRecipe, Recipe
from grpo_lab.recipe.schema import Data, GrpoStage, RewardTerm, SftStage, TokenizerBuild
from grpo_lab.scoring import Registry, Settings, Workers, bind, discover, problems
from grpo_lab.scoring.early import NONE_EARLY
from grpo_lab.seeds import derive_seed
from grpo_lab.stages.plan import GrpoPlan, SftPlan
from grpo_lab.types import Example

T = TypeVar("T")
MAX_HASHED_ROWS = 10_000

# Every evaluation with gold answers reports both, unless the rewards name the task's own metric: a policy may learn to
# please one reading of its answers only. They weigh nothing, so the reward stays the stage's own.
ACCURACIES = (
    RewardTerm(name="accuracy", label="accuracy_strict", weight=0.0, options={"strict": True}),
    RewardTerm(name="accuracy", label="accuracy_lenient", weight=0.0, options={"strict": False}),
)


@dataclass(frozen=True)
class Plan:
    """A checked recipe, ready to train. `hashes` are of data and reward sources, for refusing a changed resume.

    `labels` holds, for every stage whose data has classes or entity types, their sorted map from name to number.
    """

    recipe: Recipe
    registry: Registry
    tokenizer: Any
    stages: tuple[SftPlan | GrpoPlan, ...]
    hashes: dict[str, Any]
    labels: dict[str, dict[str, int]]


def assemble(loaded: LoadedRecipe, *, tokenizer_folder: Path | None = None, num_processes: int = 1) -> Plan:
    """Build everything but the model. `tokenizer_folder` holds the tokenizer that an earlier start of the run made,
    `num_processes` is how many will train.

    Raises:
        RecipeError: every problem found, one line each, at its place in the recipe.
    """
    recipe = loaded.recipe
    found = Problems(loaded.sources)
    check_order(recipe, found)
    check_processes(recipe, num_processes, found)
    registry = found.attempt(("plugins",), lambda: discover(recipe.plugins))
    rows = {
        loc: found.attempt(loc, lambda data=data: load_rows(data, root=Path(recipe.data_root or "."), seed=recipe.seed))
        for loc, data in _data_blocks(recipe)
    }
    if registry is not None:
        for name, stage in recipe.stages.items():
            if isinstance(stage, GrpoStage):
                columns = _columns(stage.data, rows["stages", name])
                for loc, problem in problems(stage.rewards, registry, columns):
                    found.add(("stages", name, "rewards", *loc), problem)
    found.stop_if_any()
    assert registry is not None
    known = {loc: each for loc, each in rows.items() if each is not None}
    labels = _label_maps(recipe, known, found)
    found.stop_if_any()

    first: Loc = ("stages", next(iter(recipe.stages)))  # whose texts a new tokenizer is trained on
    built = tokenizer_folder is None and isinstance(recipe.model.tokenizer, TokenizerBuild)
    tokenizer = found.attempt(first if built else ("model",), lambda: make_tokenizer(recipe, known, tokenizer_folder))
    found.stop_if_any()
    config = found.attempt(("model",), lambda: model_config(recipe.model, tokenizer))
    context = found.attempt(("model",), lambda: context_length(config))
    found.stop_if_any()
    assert context is not None
    if any(data.chat and data.text is None for _, data in _data_blocks(recipe)):
        wrong = found.attempt(
            ("model",),
            lambda: template_problems(tokenizer, eos_ids(tokenizer, config, generation_config(recipe.model))),
        )
        if wrong is None:  # a template that cannot be used at all would be every row's problem again
            found.stop_if_any()
        for problem in wrong or ():
            found.add(("model",), problem)
    builder = Builder(recipe, registry, tokenizer, context, known, found)
    stages = [builder.stage(name) for name in recipe.stages]
    found.stop_if_any()
    hashes = {
        "data": {".".join(map(str, loc)): fingerprint(each) for loc, each in known.items()},
        "rewards": {
            f"{stage.name}.{term.label}": term.reward.sha256
            for stage in stages
            if isinstance(stage, GrpoPlan)
            for term in stage.rewards.terms
        },
    }
    return Plan(recipe, registry, tokenizer, tuple(stage for stage in stages if stage is not None), hashes, labels)


def _label_maps(recipe: Recipe, rows: dict[Loc, Rows], found: Problems) -> dict[str, dict[str, int]]:
    """The label map of every stage, from what it learns from; held-out rows must have no other labels."""
    maps = {}
    for name, stage in recipe.stages.items():
        learnt = label_map(rows["stages", name], stage.data.shape)
        if learnt is None:
            continue
        maps[name] = learnt
        if stage.evaluation is not None:
            at = ("stages", name, "evaluation")
            new = sorted((label_map(rows[at], stage.evaluation.data.shape) or {}).keys() - learnt.keys())
            if new:
                found.add(at, f"data.shape: labels that the training rows do not have: {', '.join(new)}")
    return maps


@dataclass(frozen=True)
class Builder:
    """Builds stages from loaded rows; whatever is wrong goes to `found`."""

    recipe: Recipe
    registry: Registry
    tokenizer: Any
    context_length: int
    rows: dict[Loc, Rows]
    found: Problems

    def stage(self, name: str) -> SftPlan | GrpoPlan | None:
        """One stage of the recipe, or None with its problems noted."""
        stage, loc = self.recipe.stages[name], ("stages", name)
        build = self._sft if isinstance(stage, SftStage) else self._grpo
        return self.found.attempt(loc, lambda: build(name, stage, loc))

    def _sft(self, name: str, stage: SftStage, loc: Loc) -> SftPlan | None:
        if stage.engine == "trl":
            require_trl()
            for key, problem in unsupported_sft(stage, self.recipe.model_of(stage)):
                self.found.add((*loc, *key), problem)
        rows = self._training_rows(stage, stage.data, loc)
        held_out: Sequence[TrainingRow] = ()
        if stage.evaluation is not None:
            data, at = stage.evaluation.data, (*loc, "evaluation")
            held_out = self.found.attempt(at, lambda: _finite(self._training_rows(stage, data, at))) or ()
        if self.found.found:
            return None
        lengths = [row.num_tokens for row in rows] if stage.group_by_length else None  # type: ignore[union-attr]
        seed = derive_seed(self.recipe.seed, name, "order")
        return SftPlan(name, stage, PromptStream(rows, stage.batch_size, seed=seed, lengths=lengths), held_out)

    def _training_rows(self, stage: SftStage, data: Data, loc: Loc) -> Mapped[TrainingRow] | Stream[TrainingRow]:
        rows = training_rows(
            data,
            self.rows[loc],
            self.tokenizer,
            loss_on=stage.loss_on,
            max_length=min(stage.max_length or self.context_length, self.context_length),
            learn_turns=stage.learn_turns,
            key_tokens=stage.key_tokens if data is stage.data else None,  # held-out tokens count once
        )
        for problem in check_training_rows(rows):
            self.found.add(loc, problem)
        return rows

    def _grpo(self, name: str, stage: GrpoStage, loc: Loc) -> GrpoPlan | None:
        if stage.engine == "trl":
            require_trl()
            for key, problem in unsupported(stage, self.recipe.model_of(stage)):
                self.found.add((*loc, *key), problem)
        examples = self._examples(stage, stage.data, loc)
        held_out: Sequence[Example] = ()
        terms = [*stage.reward_terms]
        if stage.evaluation is not None:
            data, at = stage.evaluation.data, (*loc, "evaluation")
            held_out = self.found.attempt(at, lambda: _finite(self._examples(stage, data, at))) or ()
            columns = _columns(data, self.rows[at])
            if "answer" in (columns or ()) and not any(term.name in KINDS for term in terms):
                terms += ACCURACIES
            for _, problem in problems(terms, self.registry, columns):
                self.found.add(at, problem)
        if stage.data.chat and prefills_thinking(self.tokenizer):
            for index, term in enumerate(stage.rewards):
                if term.name == "format" and not term.options.get("prefilled", False):
                    message = "the chat template already writes <think> in the prompt; set options: {prefilled: true}"
                    self.found.add((*loc, "rewards", index), message)
        stream = PromptStream(examples, stage.prompts_per_step, seed=derive_seed(self.recipe.seed, name, "order"))
        if self.found.found:
            return None
        workers = Workers(Settings(stage.reward_workers, stage.reward_timeout_seconds, stage.reward_memory_gib))
        rewards = bind(stage.reward_terms, self.registry, workers)
        if stage.score_while_sampling and not rewards.early_terms:
            self.found.add((*loc, "score_while_sampling"), NONE_EARLY)
            return None
        return GrpoPlan(name, stage, stream, rewards, held_out, bind(terms, self.registry, workers), workers)

    def _examples(self, stage: GrpoStage, data: Data, loc: Loc) -> Mapped[Example] | Stream[Example]:
        examples = prompt_examples(data, self.rows[loc], self.tokenizer)
        if data.max_prompt_tokens is not None and isinstance(examples, Mapped):
            examples = short_prompts(examples, data.max_prompt_tokens)
        for problem in check_prompts(examples, self.context_length, stage.sampling.max_completion_length):
            self.found.add(loc, problem)
        return examples


def make_tokenizer(recipe: Recipe, rows: dict[Loc, Rows], folder: Path | None) -> Any:
    """The tokenizer: from the run's folder, the recipe's path, or trained on the first stage's data."""
    template = recipe.model.chat_template
    if folder is not None or not isinstance(recipe.model.tokenizer, TokenizerBuild):
        tokenizer = load_tokenizer(recipe.model, folder)
        return with_template(tokenizer, template) if template in TEMPLATES else tokenizer
    name, stage = next(iter(recipe.stages.items()))
    settings = recipe.model.tokenizer
    return build_tokenizer(
        corpus(stage.data, rows["stages", name]),
        vocab_size=settings.vocab_size,
        split_digits=settings.split_digits,
        template=template or "chatml",
    )


def fingerprint(rows: Rows) -> str:
    """A hash of what the rows hold: of all of them, or of the first ten thousand."""
    digest = hashlib.sha256(str(None if rows.streamed else len(rows)).encode())
    for row in islice(rows, MAX_HASHED_ROWS):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _data_blocks(recipe: Recipe) -> list[tuple[Loc, Data]]:
    """Every data block with the place of the block that holds it."""
    blocks: list[tuple[Loc, Data]] = []
    for name, stage in recipe.stages.items():
        blocks.append((("stages", name), stage.data))
        if stage.evaluation is not None:
            blocks.append((("stages", name, "evaluation"), stage.evaluation.data))
    return blocks


def _columns(data: Data, rows: Rows | None) -> list[str] | None:
    """What rewards may ask for; None where the rows could not be loaded."""
    if rows is None:
        return None
    return list(dict.fromkeys(chain(rows.column_names, ["answer"] if data.answer is not None else [])))


def _finite(items: Sequence[T] | Stream[T]) -> Sequence[T]:
    if isinstance(items, Stream):
        raise RecipeError("data.streaming: held-out rows are measured as a whole; leave streaming out, or use limit")
    return items
