"""The same recipe and seeds through both engines, one after the other, each in a process of its own."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grpo_lab.assemble import assemble
from grpo_lab.engines.trl_config import require_trl, unsupported
from grpo_lab.errors import ProcessError, RecipeError, UsageError
from grpo_lab.recipe import LoadedRecipe, Recipe, load_recipe, resolved_yaml
from grpo_lab.recipe.resolved import difference
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.tracking.files import read_json, write_atomic, write_json
from grpo_lab.tracking.run_folder import RESOLVED, RUN, StageFolder

Control = Literal["random", "shuffled"]
WHERE_IT_LIES = ("output_dir:", "plugins[")  # a run keeps its plugins under another path
PROCESSES = "processes.json"
COMMAND = (sys.executable, "-c", "from grpo_lab.cli import main; main()", "train")


@dataclass(frozen=True)
class Run:
    """One process of the race: a recipe that trains into `folder`. `arm` is what is raced, None for a shared start."""

    arm: str | None
    seed: int
    recipe: Recipe

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir) / self.recipe.name

    @property
    def is_finished(self) -> bool:
        """Whether it lies there, finished, from this very recipe."""
        if not (self.folder / RUN).is_file() or read_json(self.folder / RUN)["status"] != "finished":
            return False
        changes = difference(load_recipe(self.folder / RESOLVED), self.recipe)
        return all(change.startswith(WHERE_IT_LIES) for change in changes)


@dataclass(frozen=True)
class Race:
    """What is raced: the GRPO stage `stage`, and all processes in order."""

    folder: Path
    stage: str
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]

    @property
    def arms(self) -> list[str]:
        """`native`, `trl`, and the control if there is one."""
        return list(dict.fromkeys(run.arm for run in self.runs if run.arm is not None))

    def of(self, arm: str) -> list[Run]:
        """The arm's runs, one per seed."""
        return [run for run in self.runs if run.arm == arm]


def plan_race(loaded: LoadedRecipe, stage: str | None, seeds: Sequence[int], control: Control | None) -> Race:
    """All processes of a race. Stages before the raced one are trained once per seed, and every arm starts from there.

    Raises:
        UsageError: there is no such stage.
        RecipeError: TRL cannot do what the recipe asks for, or the recipe cannot be trained at all.
        SetupError: TRL is missing.
    """
    recipe = loaded.recipe
    names = [name for name, each in recipe.stages.items() if isinstance(each, GrpoStage) and stage in (None, name)]
    if not names:
        raise UsageError(f"no GRPO stage {stage or 'in this recipe'}; there are: {', '.join(recipe.stages)}")
    name = names[-1]
    raced = recipe.stages[name]
    assert isinstance(raced, GrpoStage)
    require_trl()
    problems = [loaded.sources.problem(("stages", name, *key), text) for key, text in unsupported(raced)]
    if problems:
        raise RecipeError(problems)
    assemble(loaded)
    folder = Path(os.path.abspath(recipe.output_dir)) / f"{recipe.name}-race"
    arms: dict[str, dict[str, Any]] = {"native": {"engine": "native"}, "trl": {"engine": "trl"}}
    if control is not None:
        arms[control] = {"engine": "native", "reward_control": control}
    before = dict(list(recipe.stages.items())[: list(recipe.stages).index(name)])
    runs: list[Run] = []
    for seed in dict.fromkeys(seeds):
        own_track = recipe.tracking.model_copy(update={"push": None})  # nobody asked for the arms on the hub
        common = recipe.model_copy(update={"seed": seed, "output_dir": str(folder), "tracking": own_track})
        model = common.model
        if before:
            start = common.model_copy(update={"name": f"start-s{seed}", "stages": before})
            runs.append(Run(None, seed, start))
            final = StageFolder(folder / start.name / list(before)[-1]).final
            origin = {"path": str(final), "revision": None, "config": None, "tokenizer": None, "chat_template": None}
            model = model.model_copy(update=origin)
        for arm, changes in arms.items():
            stages = {name: raced.model_copy(update=changes)}
            own = {"name": f"{arm}-s{seed}", "model": model, "stages": stages}
            runs.append(Run(arm, seed, common.model_copy(update=own)))
    return Race(folder, name, tuple(dict.fromkeys(seeds)), tuple(runs))


def run_race(race: Race, say: Callable[[str], None]) -> None:
    """Every process that has not finished, one after the other; one that was interrupted goes on where it stopped.

    Raises:
        ProcessError: one ended with an error, which it has shown; its exit code is this one's.
    """
    race.folder.mkdir(parents=True, exist_ok=True)
    notes = race.folder / PROCESSES
    taken: dict[str, Any] = read_json(notes) if notes.exists() else {}
    for number, run in enumerate(race.runs, start=1):
        name, place = run.recipe.name, f"[{number}/{len(race.runs)}]"
        if run.is_finished:
            say(f"{place} {name}: finished before")
            continue
        recipe = race.folder / "recipes" / f"{name}.yaml"
        recipe.parent.mkdir(exist_ok=True)
        write_atomic(recipe, resolved_yaml(run.recipe))
        say(f"{place} {name}")
        began, cpu = time.perf_counter(), children_seconds()
        code = run_process([*COMMAND, str(recipe), "--resume"])
        seconds = {"wall": time.perf_counter() - began, "cpu": children_seconds() - cpu}
        taken[name] = [*taken.get(name, []), seconds]
        write_json(notes, taken)
        if code != 0:
            how = f"ended with exit code {code}" if code > 0 else f"was killed by signal {-code}"
            again = "the same command goes on with the race"
            raise ProcessError(f"{name} {how}; {again}", code if code > 0 else ProcessError.exit_code)
        say(f"{place} {name}: {seconds['wall']:.0f} s")


def run_process(command: Sequence[str]) -> int:
    """Run it with its news on our standard error. SIGTERM and Ctrl-C are handed on, so that it saves before it ends."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as child:

        def hand_on(number: int, _frame: Any) -> None:
            child.send_signal(number)

        before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def children_seconds() -> float:
    """CPU seconds of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
