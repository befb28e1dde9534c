"""The command line. No logic here: each command imports what it needs when it runs, so that `--help` is quick."""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from grpo_lab.cli_rewards import Json, Overrides, importing, rewards_app, show
from grpo_lab.errors import GrpoLabError, UsageError

app = typer.Typer(
    help="Train language models with GRPO, and see that the numbers are right.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
recipes_app = typer.Typer(help="The recipes that come with grpo-lab.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(rewards_app, name="rewards")

RecipePath = Annotated[str, typer.Argument(help="a recipe's file, or the name of a shipped one")]


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run of this name, if there is one")] = False,
    name: Annotated[str | None, typer.Option(help="the run's name, instead of the recipe's")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="where run folders are made")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="at most this many steps in every stage")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything and show sizes; train nothing")] = False,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="show only what went wrong")] = False,
    nproc: Annotated[int, typer.Option(min=1, help="train with so many processes on this machine")] = 1,
) -> None:
    """Take a model through a recipe's stages."""
    together = int(os.environ.get("WORLD_SIZE", "1"))
    if nproc > 1 and not dry_run and together == 1:
        from grpo_lab.commands.launching import launch

        raise typer.Exit(launch(sys.argv[1:], nproc))
    if together > 1 and nproc not in (1, together):
        raise UsageError(f"--nproc {nproc}: a launcher has started {together} processes already; leave --nproc out")
    from grpo_lab.commands.recipes import load_with_limit

    overrides = [*(overrides or [])]
    overrides += [f"name={name}"] if name is not None else []
    overrides += [f"output_dir={output_dir}"] if output_dir is not None else []
    loaded = load_with_limit(recipe, overrides, max_steps)
    with importing():
        from grpo_lab.commands import training

    if dry_run:
        training.dry_run(loaded, as_json=as_json)
    else:
        training.train(loaded, recipe, go_on=resume, as_json=as_json, quiet=quiet)


@app.command()
def validate(
    recipes: Annotated[list[str], typer.Argument(help="recipes to check, data and rewards included")],
    as_json: Json = False,
) -> None:
    """Check recipes as `train` would, without training."""
    with importing():
        from grpo_lab.commands import training

    raise typer.Exit(training.validate(recipes, as_json=as_json))


@app.command()
def estimate(
    recipe: RecipePath,
    overrides: Overrides = None,
    memory: Annotated[float | None, typer.Option(help="GiB: also say which sizes fit")] = None,
    as_json: Json = False,
) -> None:
    """What a recipe will take of memory, from the model's config alone."""
    with importing():
        from grpo_lab.commands import estimating

    estimating.estimate(recipe, overrides or [], memory=memory, as_json=as_json)


@app.command(name="eval")
def evaluate(
    target: Annotated[str, typer.Argument(help="a run's folder, or a model (folder or hub id) with --recipe")],
    recipe: Annotated[str | None, typer.Option(help="whose held-out data and rewards; a run knows its own")] = None,
    stage: Annotated[str | None, typer.Option(help="which GRPO stage; the last one if not given")] = None,
    samples: Annotated[int, typer.Option(min=0, help="sampled completions per prompt")] = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="the first so many prompts")] = None,
    as_json: Json = False,
) -> None:
    """Measure a model on held-out data: greedy, sampled, pass@k, strict and lenient accuracy."""
    with importing():
        from grpo_lab.commands import training

    training.evaluate(target, recipe=recipe, stage=stage, samples=samples, limit=limit, as_json=as_json)


@app.command()
def baseline(
    target: Annotated[str, typer.Argument(help="a recipe, or a run's folder: then the run is compared with them")],
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="which GRPO stage; the last one if not given")] = None,
    as_json: Json = False,
) -> None:
    """What a task's held-out data gives without a model: majority class, no entities, lead-3, copied source, ..."""
    with importing():
        from grpo_lab.commands import baselines

    baselines.baseline(target, overrides or [], stage=stage, as_json=as_json)


@app.command()
def compare(
    targets: Annotated[
        list[str], typer.Argument(help="a recipe with key=value overrides, or two or more finished runs")
    ],
    parity: Annotated[bool, typer.Option("--parity", help="one recorded batch through both engines")] = False,
    presets: Annotated[
        bool, typer.Option("--presets", help="with --parity: every variant, not the recipe's own")
    ] = False,
    itself: Annotated[
        bool, typer.Option("--self", help="native: micro-batches, padding, order and processes change nothing")
    ] = False,
    race: Annotated[bool, typer.Option("--race", help="train with both engines, side by side")] = False,
    stage: Annotated[str | None, typer.Option(help="which GRPO stage; the last one if not given")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="prompts in the recorded batch")] = 4,
    processes: Annotated[int, typer.Option(min=1, help="with --self: real processes that share a step; 1 = none")] = 2,
    seeds: Annotated[str | None, typer.Option(help="with --race: seeds, e.g. 0,1,2; the recipe's if not given")] = None,
    control: Annotated[
        str | None, typer.Option(help="with --race: one more arm, whose rewards are random or shuffled")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="with --race: where its folder is made")] = None,
    picture: Annotated[Path | None, typer.Option(help="of finished runs: write their curves to this SVG file")] = None,
    as_json: Json = False,
) -> None:
    """Do both engines compute the same (--parity)? Which is faster (--race)? Is the native one itself (--self)? How do
    finished runs differ?"""
    with importing():
        from grpo_lab.commands import comparing

    if race:
        if parity or itself or picture is not None:
            raise UsageError("--race, --parity, --self and --picture are different comparisons; ask for one at a time")
        comparing.race_engines(
            targets, stage=stage, seeds=seeds, control=control, output_dir=output_dir, as_json=as_json
        )
        return
    if seeds is not None or control is not None or output_dir is not None:
        raise UsageError("--seeds, --control and --output-dir belong to --race")
    if parity or itself:
        passed = comparing.compare_engines(
            targets,
            parity=parity,
            presets=presets,
            itself=itself,
            stage=stage,
            prompts=prompts,
            processes=processes,
            as_json=as_json,
        )
        raise typer.Exit(0 if passed else 1)
    comparing.compare_runs(targets, picture=picture, as_json=as_json)


Run = Annotated[Path, typer.Argument(help="a run's folder")]
Stage = Annotated[str | None, typer.Option(help="which stage; the last one if not given")]


@app.command()
def export(
    run: Run,
    to: Annotated[Path | None, typer.Option(help="a new folder; beside the run if not given")] = None,
    stage: Stage = None,
    merge: Annotated[bool, typer.Option("--merge", help="an adapter into the weights it was learnt beside")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; the recipe's if not given")] = None,
    gguf: Annotated[bool, typer.Option("--gguf", help="also one GGUF file, by llama.cpp's converter")] = False,
    as_json: Json = False,
) -> None:
    """Write a run's model for others: checked against the run's own logits."""
    with importing():
        from grpo_lab.commands import results

    results.export(run, to=to, stage=stage, merge=merge, dtype=dtype, gguf=gguf, as_json=as_json)


@app.command()
def sample(
    run: Run,
    prompt: Annotated[str, typer.Argument(help="what to ask")],
    stage: Stage = None,
    count: Annotated[int, typer.Option(min=1, help="answers; one is greedy, more are sampled")] = 1,
    both: Annotated[bool, typer.Option("--compare", help="also the model that the stage began with")] = False,
    seed: Annotated[int, typer.Option(help="of the sampled answers")] = 0,
    as_json: Json = False,
) -> None:
    """Ask a run's model."""
    with importing():
        from grpo_lab.commands import results

    results.sample(run, prompt, stage=stage, count=count, both=both, seed=seed, as_json=as_json)


@app.command()
def chat(
    run: Run,
    stage: Stage = None,
    both: Annotated[bool, typer.Option("--compare", help="also the model that the stage began with")] = False,
) -> None:
    """Talk to a run's model, line by line; an empty line or Ctrl-D ends it."""
    with importing():
        from grpo_lab.commands import results

    results.chat(run, stage=stage, both=both)


@app.command()
def push(
    run: Run,
    repo: Annotated[str, typer.Option(help="the hub's name for it: owner/name")],
    stage: Stage = None,
    merge: Annotated[bool, typer.Option("--merge", help="an adapter into the weights it was learnt beside")] = False,
    public: Annotated[bool, typer.Option("--public", help="for everybody; private if not given")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what would be sent; send nothing")] = False,
    as_json: Json = False,
) -> None:
    """Send a run's model with its card to the hub; the token is HF_TOKEN, or the one `hf auth login` stored."""
    with importing():
        from grpo_lab.commands import publishing

    publishing.push(run, repo=repo, stage=stage, merge=merge, public=public, dry_run=dry_run, as_json=as_json)


@recipes_app.command("ls")
def list_recipes(as_json: Json = False) -> None:
    """List the shipped recipes."""
    from grpo_lab.bundled import describe, shipped_recipes

    found = [{"name": path.stem, "about": describe(path)} for path in shipped_recipes()]
    show(found, as_json, [f"{row['name']:20} {row['about']}" for row in found])


@recipes_app.command("show")
def show_recipe(name: RecipePath) -> None:
    """Print a recipe."""
    from grpo_lab.bundled import find_recipe

    typer.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("cp")
def copy_recipe(name: RecipePath, to: Annotated[Path, typer.Argument(help="a new file, or a folder")]) -> None:
    """Copy a recipe, to change it."""
    from grpo_lab.bundled import find_recipe
    from grpo_lab.errors import UsageError

    source = find_recipe(name)
    target = to / source.name if to.is_dir() else to
    if target.exists():
        raise UsageError(f"{target}: exists already; name another file")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent}: there is no such folder")
    target.write_bytes(source.read_bytes())
    typer.echo(str(target))


def main() -> None:
    """Run the command line; the exit codes are listed in the README."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # before torch is imported: threads that spin while they wait slow a busy machine tenfold; some microseconds of it,
    # between one product and the next, are a tenth of a step
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        app()
    except GrpoLabError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:  # noqa: BLE001 - the last stop: whatever is left is a bug of ours, shown whole
        traceback.print_exc()
        typer.echo("this is a bug in grpo-lab; please report it with the lines above", err=True)
        sys.exit(70)
