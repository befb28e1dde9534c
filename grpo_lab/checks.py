"""What is wrong with a recipe, collected with its places; and what its stages and processes cannot do together."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from grpo_lab.errors import RecipeError
from grpo_lab.recipe import Recipe, SourceMap
from grpo_lab.recipe.schema import GrpoStage

T = TypeVar("T")
Loc = tuple[str | int, ...]
FOLDERS_OF_A_RUN = {"base", "plugins"}  # beside the stages' own


class Problems:
    """Collects what is wrong, each at its place in the recipe, so that a user sees everything at once."""

    def __init__(self, sources: SourceMap) -> None:
        self.sources = sources
        self.found: list[str] = []

    def add(self, parent: Loc, message: str) -> None:
        """A message may begin with the key that it is about: `data.prompt: column ...`."""
        head, separator, rest = message.partition(": ")
        keys = head.split(".")
        if separator and keys[0] in ("data", "model", "plugins") and all(key.isidentifier() for key in keys):
            above = parent if keys[0] == "data" else ()
            self.found.append(self.sources.problem((*above, *keys), rest))
        else:
            self.found.append(self.sources.problem(parent, message))

    def attempt(self, parent: Loc, work: Callable[[], T]) -> T | None:
        """The result of `work`, or None with its problems noted."""
        try:
            return work()
        except RecipeError as error:
            for problem in error.problems:
                self.add(parent, problem)
            return None

    def stop_if_any(self) -> None:
        """Raise them all together."""
        if self.found:
            raise RecipeError(self.found)


def check_order(recipe: Recipe, found: Problems) -> None:
    """Stages have names of their own and start from what there is before them."""
    for name in sorted(FOLDERS_OF_A_RUN & recipe.stages.keys()):
        found.add(("stages", name), f'"{name}" is a folder of every run; give the stage another name')
    earlier = ["previous", "base"]
    for name, stage in recipe.stages.items():
        if name == "previous":
            found.add(("stages", name), '"previous" has a meaning in start_from; give the stage another name')
        if stage.start_from not in earlier:
            found.add(("stages", name, "start_from"), f'"{stage.start_from}" is none of {", ".join(earlier)}')
        earlier.append(name)
    push = recipe.tracking.push
    if not found.found and push is not None and not push.merge and base_is_local(recipe):
        message = "the last stage leaves an adapter on a model that only this machine has, so nobody could use it; add"
        found.add(("tracking", "push"), f"{message} merge: true")


def base_is_local(recipe: Recipe) -> bool:
    """Whether the last stage leaves an adapter whose base only this machine has: other stages' work, or a local model."""
    names = list(recipe.stages)
    name = names[-1]
    while True:
        stage = recipe.stages[name]
        if recipe.model_of(stage).lora is None:
            return name != names[-1]
        earlier = names[: names.index(name)]
        name = stage.start_from if stage.start_from != "previous" else earlier[-1] if earlier else "base"
        if name == "base":
            return recipe.model.path is None or Path(recipe.model.path).is_dir()


def check_processes(recipe: Recipe, num_processes: int, found: Problems) -> None:
    """What several processes, or weights in pieces, cannot do."""
    strategy = recipe.distributed.strategy
    in_pieces = strategy != "ddp"
    for name, stage in recipe.stages.items():
        model = recipe.model_of(stage)
        if in_pieces and (model.lora is not None or model.quantization is not None):
            message = (
                f"{strategy} is for stages in which all weights learn, and {name} learns an adapter; ddp is for those"
            )
            found.add(("distributed", "strategy"), message)
        if in_pieces and "8bit" in stage.optimizer.name:
            message = (
                f"{stage.optimizer.name} cannot keep its state in pieces (distributed.strategy: {strategy}); set adamw"
            )
            found.add(("stages", name, "optimizer", "name"), message)
        if stage.engine == "trl" and (in_pieces or num_processes > 1):
            message = (
                "trl trains in one process here: over several its trainer deals prompts, reduces losses and saves in its "
                "own way, which nothing compares with ours; use engine: native, or one process and strategy ddp"
            )
            found.add(("stages", name, "engine"), message)
        if isinstance(stage, GrpoStage) and stage.sampling.backend == "vllm" and num_processes > 1:
            message = "vLLM in this process samples for one process; with several use vllm-server, or native"
            found.add(("stages", name, "sampling", "backend"), message)
        if isinstance(stage, GrpoStage) and stage.score_while_sampling and num_processes > 1:
            message = "several processes score when all have sampled; leave it out, or use one process"
            found.add(("stages", name, "score_while_sampling"), message)
