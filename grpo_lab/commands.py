"""What the commands do, between the command line and the parts; imported only when a command runs."""

import json
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_lab import finished
from grpo_lab.assemble import Plan, assemble
from grpo_lab.bench.cases import cases_beside, run_cases, show_cases
from grpo_lab.bench.named import named_reward
from grpo_lab.bench.recipes import recipe_report
from grpo_lab.bench.rescore import rescored
from grpo_lab.bench.tables import show_recipe_report, show_rescored
from grpo_lab.bundled import find_recipe, shipped_recipes
from grpo_lab.compare import race, race_report, report, runs
from grpo_lab.errors import RecipeError, UsageError
from grpo_lab.inspection import describe_plan, show_plan
from grpo_lab.pipeline import quiet_libraries, train_recipe
from grpo_lab.policy.load import DTYPES, load_policy
from grpo_lab.recipe import LoadedRecipe, Recipe, load
from grpo_lab.recipe.schema import GrpoStage, Model
from grpo_lab.scoring import bind, discover
from grpo_lab.scoring.composition import in_words
from grpo_lab.stages.grpo import measure_policy
from grpo_lab.stages.plan import GrpoPlan
from grpo_lab.summary import show, summarise
from grpo_lab.tracking.console import QuietPipeConsole, safe
from grpo_lab.tracking.files import write_atomic
from grpo_lab.tracking.run_folder import RESOLVED, RUN, StageFolder
from grpo_lab.types import Policy


def load_with_limit(recipe: str, overrides: Sequence[str], max_steps: int | None) -> LoadedRecipe:
    """The recipe, with every stage's steps capped at `max_steps`."""
    path = find_recipe(recipe)
    loaded = load(path, overrides)
    if max_steps is None:
        return loaded
    caps = [f"stages.{name}.steps={min(stage.steps, max_steps)}" for name, stage in loaded.recipe.stages.items()]
    return load(path, [*overrides, *caps])


def train(loaded: LoadedRecipe, recipe: str, *, go_on: bool, as_json: bool, quiet: bool) -> None:
    """Train, then show what came of it."""
    quiet_libraries()
    console = QuietPipeConsole(stderr=True)
    text = find_recipe(recipe).read_text(encoding="utf-8")
    summary = summarise(train_recipe(loaded, text, go_on=go_on, console=console, quiet=quiet))
    output(summary, as_json=as_json, quiet=quiet)


def output(summary: Any, *, as_json: bool, quiet: bool) -> None:
    """The outcome on standard output."""
    if as_json:
        print_json(summary)
    elif not quiet:
        show(summary, wide_console())


def dry_run(loaded: LoadedRecipe, *, as_json: bool) -> None:
    """Everything but training: one prompt token by token, rewards on gold and empty answers, sizes."""
    quiet_libraries()
    plan = assemble(loaded)
    found = describe_plan(plan)
    if as_json:
        print_json(found)
    else:
        show_plan(found, wide_console())


def validate(recipes: Sequence[str], *, as_json: bool) -> int:
    """Check each recipe with its data and rewards; 3 if any has problems."""
    quiet_libraries()
    results = []
    for recipe in recipes:
        try:
            plan = assemble(load(find_recipe(recipe)))
            results.append({"recipe": recipe, "problems": [], "rewards": reward_ranges(plan)})
        except RecipeError as error:
            results.append({"recipe": recipe, "problems": error.problems})
    console = Console()
    if as_json:
        print_json(results)
    for result in [] if as_json else results:
        stages = [f"  {name}: reward {said}" for name, said in result.get("rewards", {}).items()]
        for line in result["problems"] or [f"{result['recipe']}: fine", *stages]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 3 if any(result["problems"] for result in results) else 0


def reward_ranges(plan: Plan) -> dict[str, str]:
    """For every GRPO stage in words: the range of the total, and what each term adds to it."""
    return {
        stage.name: f"{in_words(stage.rewards.range)} = "
        + " + ".join(f"{term.label} ({in_words(term.weighted_range)})" for term in stage.rewards.terms)
        for stage in plan.stages
        if isinstance(stage, GrpoPlan)
    }


def evaluate(
    target: str, *, recipe: str | None, stage: str | None, samples: int, limit: int | None, as_json: bool
) -> None:
    """Measure a run's final model, or any model on a recipe's held-out data."""
    quiet_libraries()
    run = Path(target)
    is_run = (run / RUN).is_file()
    if not is_run and recipe is None:
        raise UsageError(f"{target}: is no run folder; a model needs --recipe, for its held-out data and rewards")
    loaded = load(run / RESOLVED if recipe is None else find_recipe(recipe))
    name = measured_stage(loaded.recipe, stage)
    if is_run:
        folder = StageFolder(run / name).final
        if not folder.is_dir():
            raise UsageError(f"{folder}: is not there; the stage is not finished (grpo-lab train --resume goes on)")
        of_stage = loaded.recipe.model_of(loaded.recipe.stages[name])
        model = of_stage.model_copy(update={"path": str(folder), "config": None, "tokenizer": None})
    else:
        model = Model(path=target, dtype=loaded.recipe.model.dtype)
    loaded = LoadedRecipe(loaded.recipe.model_copy(update={"model": model}), loaded.sources)
    plan = assemble(loaded)
    found = next(each for each in plan.stages if isinstance(each, GrpoPlan) and each.name == name)
    if limit is not None:
        found = GrpoPlan(**{**vars(found), "held_out": found.held_out[:limit]})
    policy = load_policy(model, plan.tokenizer, seed=plan.recipe.seed)
    counts = tuple(k for k in (1, 2, 4, 8, 16, 32, 64) if k <= samples)
    result = measure_policy(policy, found, seed=plan.recipe.seed, num_samples=samples, pass_at=counts)
    if as_json:
        print_json({"target": target, "stage": found.name, "metrics": result.metrics})
    else:
        show_metrics(result.metrics, Console())


def check_reward(
    target: str,
    overrides: Sequence[str],
    *,
    cases: Path | None,
    options: Sequence[str],
    plugins: Sequence[Path],
    stage: str | None,
    limit: int,
    as_json: bool,
) -> bool:
    """One reward against written cases, or a recipe's reward against its own data; whether everything passed."""
    quiet_libraries()
    if cases is None and target.endswith(".py") and cases_beside(target).is_file():
        cases = cases_beside(target)
    if cases is not None:
        if overrides:
            raise UsageError(f"{' '.join(overrides)}: overrides are for recipes; a reward takes --options key=value")
        found = run_cases(named_reward(target, options, plugins), cases)
        show_found: Callable[[Any, Console], None] = show_cases
    else:
        if options or plugins or target.endswith(".py") or target in discover().names():
            raise UsageError(f"{target}: a reward is tested with --cases FILE, a recipe takes key=value overrides only")
        found = recipe_report(assemble(load(find_recipe(target), overrides)), stage=stage, limit=limit)
        show_found = show_recipe_report
    if as_json:
        print_json(found)
    else:
        show_found(found, wide_console())
    return bool(found["passed"])


def score_again(
    run: Path, *, other: str, options: Sequence[str], plugins: Sequence[Path], stage: str | None, as_json: bool
) -> None:
    """A run's stored answers under another recipe's reward, or another reward."""
    quiet_libraries()
    if not (run / RUN).is_file():
        raise UsageError(f"{run}: is no run folder")
    base = run / "base"
    plan = assemble(load(run / RESOLVED), tokenizer_folder=base if base.exists() else None)
    stages = [each for each in plan.stages if isinstance(each, GrpoPlan) and stage in (None, each.name)]
    if not stages:
        raise UsageError(f"{run}: no GRPO stage{'' if stage is None else f' {stage}'}")
    chosen = stages[-1]
    shipped = {path.stem for path in shipped_recipes()}
    if other.endswith((".yaml", ".yml")) or other in shipped:
        recipe = load(find_recipe(other)).recipe
        same = {name: each for name, each in recipe.stages.items() if isinstance(each, GrpoStage)}
        if not same:
            raise UsageError(f"{other}: has no GRPO stage")
        name = chosen.name if chosen.name in same else list(same)[-1]
        rewards = bind(same[name].reward_terms, discover(recipe.plugins))
        said = f"scored with stage {name} of {other}"
    else:
        rewards, said = named_reward(other, options, plugins), f"scored with {' '.join([other, *options])}"
    found = rescored(run, plan, chosen, rewards, said=said)
    if as_json:
        print_json(found)
    else:
        show_rescored(found, wide_console())


def measured_stage(recipe: Recipe, name: str | None) -> str:
    """The GRPO stage of that name, or the last one, that has held-out data."""
    names = [
        key for key, stage in recipe.stages.items() if isinstance(stage, GrpoStage) and stage.evaluation is not None
    ]
    chosen = [each for each in names if name in (None, each)]
    if not chosen:
        wanted = f"stage {name}" if name is not None else "stage"
        raise UsageError(f"no GRPO {wanted} with an evaluation block; there are: {', '.join(names) or 'none'}")
    return chosen[-1]


def compare_engines(
    targets: Sequence[str],
    *,
    parity: bool,
    presets: bool,
    itself: bool,
    stage: str | None,
    prompts: int,
    processes: int,
    as_json: bool,
) -> bool:
    """Both engines on one batch (`parity`), or the native one against itself; whether all gates were passed."""
    recipe, *overrides = targets
    if parity and itself:
        raise UsageError("--parity and --self are two checks; ask for one at a time")
    quiet_libraries()
    of = report.subject(assemble(load(find_recipe(recipe), overrides)), stage, prompts)
    if itself:
        found, show_report = report.self_report(of, processes=processes), report.show_self
    elif presets:
        found, show_report = report.presets_report(of), report.show_presets
    else:
        found, show_report = report.parity_report(of), report.show_parity
    if as_json:
        print_json(found)
    else:
        show_report(found, wide_console(width=150))
    return bool(found["passed"])


def race_engines(
    targets: Sequence[str],
    *,
    stage: str | None,
    seeds: str | None,
    control: str | None,
    output_dir: Path | None,
    as_json: bool,
) -> None:
    """The recipe through both engines, then what came of it."""
    recipe, *overrides = targets
    if control not in (None, "random", "shuffled"):
        raise UsageError(f"--control {control}: use random or shuffled")
    overrides += [f"output_dir={output_dir}"] if output_dir is not None else []
    quiet_libraries()
    loaded = load(find_recipe(recipe), overrides)
    try:
        numbers = [int(seed) for seed in seeds.split(",")] if seeds is not None else [loaded.recipe.seed]
    except ValueError as error:
        raise UsageError(f"--seeds {seeds}: give whole numbers with commas between them, as in 0,1,2") from error
    console = QuietPipeConsole(stderr=True)
    planned = race.plan_race(loaded, stage, numbers, control)  # type: ignore[arg-type]
    race.run_race(planned, lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))
    found = race_report.race_report(planned)
    if as_json:
        print_json(found)
    else:
        race_report.show_race(found, wide_console(width=190))


def compare_runs(targets: Sequence[str], *, picture: Path | None, as_json: bool) -> None:
    """Finished runs side by side."""
    if len(targets) < 2:
        raise UsageError("give two or more run folders to compare, or --parity, --race or --self with a recipe")
    found = runs.compare_runs([Path(target) for target in targets])
    if picture is not None:
        write_atomic(picture, runs.picture(found))
    if as_json:
        print_json(found)
    else:
        runs.show_runs(found, wide_console())


def export(
    run: Path, *, to: Path | None, stage: str | None, merge: bool, dtype: str | None, gguf: bool, as_json: bool
) -> None:
    """Write a run's model for others."""
    if dtype not in (None, *DTYPES):
        raise UsageError(f"--dtype {dtype}: choose {' or '.join(DTYPES)}")
    quiet_libraries()
    of = finished.finished_stage(run, stage)
    folder = to or run.with_name(f"{run.name}-{of.stage}" + ("-merged" if merge else ""))
    found = finished.export(of, folder, merge=merge, dtype=dtype)
    if gguf:
        if found["kind"] == "adapter":
            raise UsageError("--gguf needs a whole model: add --merge")
        command = finished.gguf_command(folder)
        found["gguf"] = shlex.join(command)
        if Path(command[0]).is_absolute():
            subprocess.run(command, check=True)
    if as_json:
        print_json(found)
        return
    lines = [f"{found['kind']} model, {found['dtype']}, in {folder}"]
    if "gap" in found:
        gaps = f"{found['merge_gap']:.1g} in float32, {found['gap']:.1g} in {found['dtype']}"
        lines.append(f"its logits differ from the run's by {gaps} (of the largest)")
    if gguf and not Path(command[0]).is_absolute():
        lines.append(f"llama.cpp's {finished.CONVERTER} is not on the path; with it: {found['gguf']}")
    for line in lines:
        Console(soft_wrap=True).print(line, markup=False, highlight=False)


def sample(run: Path, prompt: str, *, stage: str | None, count: int, both: bool, seed: int, as_json: bool) -> None:
    """Ask a run's model, and the one before it if `both`."""
    quiet_libraries()
    of = finished.finished_stage(run, stage)
    messages = [{"role": "user", "content": prompt}]
    found = {
        name: finished.answers(of, policy, messages, count=count, seed=seed) for name, policy in asked(of, both).items()
    }
    if as_json:
        print_json({"prompt": prompt, **found})
    else:
        show_answers(found)


def asked(of: finished.Finished, both: bool) -> dict[str, Policy]:
    """The policies that are asked: before the stage and after it, or after it alone."""
    before = {"before": finished.load_finished(of, before=True)} if both else {}
    return {**before, "after": finished.load_finished(of)}


def show_answers(found: dict[str, list[str]]) -> None:
    """Answers row by row, one column for each policy."""
    table = Table(*found, show_header=len(found) > 1, show_lines=True)
    for row in zip(*found.values(), strict=True):
        table.add_row(*(Text("\n".join(map(safe, text.splitlines()))) for text in row))
    wide_console().print(table)


def chat(run: Path, *, stage: str | None, both: bool) -> None:
    """Lines from standard input, answered with the whole conversation in mind; each policy has its own."""
    quiet_libraries()
    of = finished.finished_stage(run, stage)
    policies = asked(of, both)
    talks: dict[str, list[dict[str, str]]] = {name: [] for name in policies}
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        found = {}
        for name, policy in policies.items():
            talks[name].append({"role": "user", "content": line})
            found[name] = finished.answers(of, policy, talks[name], count=1, seed=0)
            talks[name].append({"role": "assistant", "content": found[name][0]})
        show_answers(found)


def show_metrics(metrics: dict[str, float], console: Console) -> None:
    """One line per quantity, with its interval where it has one."""
    for name, value in metrics.items():
        if name.endswith(("/low", "/high")):
            continue
        base = name.removesuffix("/mean")
        bounds = f" [{metrics[f'{base}/low']:.4f}, {metrics[f'{base}/high']:.4f}]" if f"{base}/low" in metrics else ""
        console.print(f"{base:32} {value:.4f}{bounds}", markup=False, highlight=False, soft_wrap=True)


def wide_console(width: int = 120) -> Console:
    """Standard output; a pipe or file, which has no width, gets tables whole."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def print_json(values: Any) -> None:
    """JSON and nothing else on standard output."""
    Console(soft_wrap=True).out(json.dumps(values, indent=1), highlight=False)
