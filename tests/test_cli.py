import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

from grpo_lab.bundled import recipes_folder
from grpo_lab.pipeline import train_recipe
from grpo_lab.recipe import load, load_recipe
from grpo_lab.tracking.files import read_json, read_jsonl

SHORT = ["stages.warm_start.steps=2", "stages.grpo.steps=2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, toy_text) -> Path:
    """The folder of a finished run. It is only read."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "toy.yaml").write_text(toy_text)
    loaded = load(folder / "toy.yaml", [f"output_dir={folder}", *SHORT])
    return train_recipe(loaded, toy_text, go_on=False, console=Console(file=io.StringIO()), quiet=True)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder, which is not the recipe's."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# help and usage


def test_help_names_every_command(cli):
    ran = cli("--help")
    assert (ran.code, ran.err) == (0, "")
    for command in ("train", "validate", "eval", "recipes", "rewards"):
        assert f" {command} " in ran.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["tarin"],
        ["train"],
        ["train", "x.yaml", "--max-steps", "0"],
        ["train", "x.yaml", "--steps", "3"],
        ["validate"],
        [],
    ],
    ids=" ".join,
)
def test_a_command_line_that_makes_no_sense_exits_2_with_its_usage(cli, arguments):
    ran = cli(*arguments)
    assert ran.code == 2
    assert "Usage: " in ran.out + ran.err
    assert "Traceback" not in ran.err


# train


def test_train_leaves_a_finished_run_where_runs_are_made(cli, toy_recipe, here):
    ran = cli("train", toy_recipe, "--max-steps", "1")
    assert ran.code == 0
    assert sorted(path.name for path in here.iterdir()) == ["runs"]
    run = here / "runs" / "toy"
    assert read_json(run / "run.json")["status"] == "finished"
    assert (run / "recipe.yaml").read_bytes() == toy_recipe.read_bytes()
    for stage in ("warm_start", "grpo"):
        assert (run / stage / "final" / "model.safetensors").is_file()


def test_away_from_a_terminal_every_step_is_one_plain_line_on_standard_error(cli, toy_recipe, here):
    ran = cli("train", toy_recipe, *SHORT)
    lines = ran.err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "warm_start info at step 0",
        "warm_start evaluation after 0 steps",
        "warm_start 1/2",
        "warm_start 2/2",
        "warm_start evaluation after 2 steps",
        "warm_start info at step 2",
        "grpo info at step 0",
        "grpo evaluation after 0 steps",
        "grpo 1/2",
        "grpo 2/2",
        "grpo evaluation after 2 steps",
        "grpo info at step 2",
    ]
    assert "\x1b" not in ran.err + ran.out
    assert "reward " in lines[8]
    assert "KL " in lines[8]
    assert "tokens/s" in lines[8]


def test_train_ends_with_the_table_three_answers_and_what_to_try_next(cli, toy_recipe, here):
    out = cli("train", toy_recipe, *SHORT).out
    assert "grpo: held-out, 10 prompts, 95 % intervals" in out
    assert "greedy/accuracy_strict" in out
    assert "…" not in out  # a pipe has no width to cut at
    assert [out.count(f"\n  {label}  ") for label in ("prompt", "before", "after ")] == [3, 3, 3]
    assert "\nrun:   runs/toy  (" in out
    assert "\nmodel: runs/toy/grpo/final  (" in out
    assert "\nnext:  grpo-lab eval runs/toy " in out


def test_json_is_alone_on_standard_output(cli, toy_recipe, here):
    ran = cli("train", toy_recipe, "--max-steps", "1", "--json")
    found = json.loads(ran.out)
    assert (found["run"], found["status"], found["exact"], found["seed"]) == ("runs/toy", "finished", True, 0)
    assert list(found["stages"]) == ["warm_start", "grpo"]
    assert found["stages"]["grpo"]["held_out"]["greedy/accuracy"].keys() == {"before", "after", "change", "num_prompts"}
    assert "grpo 1/1: " in ran.err


def test_quiet_says_nothing_where_nothing_goes_wrong(cli, toy_recipe, here):
    assert cli("train", toy_recipe, "--max-steps", "1", "--quiet") == (0, "", "")


def test_name_and_output_dir_say_where_the_run_is(cli, toy_recipe, here):
    ran = cli("train", toy_recipe, "--max-steps", "1", "--name", "other", "--output-dir", here / "a" / "b", "--json")
    assert json.loads(ran.out)["run"] == f"{here}/a/b/other"
    assert load_recipe(here / "a" / "b" / "other" / "resolved.yaml").name == "other"


def test_max_steps_caps_every_stage_and_lengthens_none(cli, toy_recipe, here):
    cli("train", toy_recipe, "stages.warm_start.steps=1", "--max-steps", "2", "--quiet")
    stages = load_recipe(here / "runs" / "toy" / "resolved.yaml").stages
    assert {name: stage.steps for name, stage in stages.items()} == {"warm_start": 1, "grpo": 2}
    assert len(read_jsonl(here / "runs" / "toy" / "grpo" / "timing.jsonl")) == 2


def test_overrides_reach_the_run(cli, toy_recipe, here):
    cli("train", toy_recipe, "seed=5", "stages.grpo.rewards[1].weight=0.5", "--max-steps", "1", "--quiet")
    recipe = load_recipe(here / "runs" / "toy" / "resolved.yaml")
    assert (recipe.seed, recipe.stages["grpo"].rewards[1].weight) == (5, 0.5)


def test_a_wrong_override_is_named_as_it_was_written(cli, toy_recipe, here):
    ran = cli("train", toy_recipe, "stages.grpo.algorithm.beta=-1")
    assert ran.code == 3
    assert ran.err == (
        "error: command line: stages.grpo.algorithm.beta=-1: input should be greater than or equal to 0, got -1\n"
    )
    assert listing(here) == []


def test_an_existing_run_is_refused_without_resume(cli, toy_recipe, finished):
    about = (finished / "run.json").read_bytes()
    ran = cli("train", toy_recipe, "--output-dir", finished.parent)
    assert (ran.code, ran.out) == (3, "")
    assert ran.err == f"error: {finished}: exists already; --resume continues it, --name starts another run\n"
    assert (finished / "run.json").read_bytes() == about


def test_resume_starts_a_run_that_is_not_there(cli, toy_recipe, here):
    assert cli("train", toy_recipe, "--max-steps", "1", "--resume", "--quiet").code == 0
    assert read_json(here / "runs" / "toy" / "run.json")["status"] == "finished"


# dry run


def test_a_dry_run_leaves_no_files(cli, toy_recipe, here):
    assert cli("train", toy_recipe, "--dry-run").code == 0
    assert cli("train", toy_recipe, "--dry-run", "--json").code == 0
    assert listing(here.parent) == ["here", "toy.yaml"]


def test_a_dry_run_shows_all_sizes(cli, toy_recipe, here):
    found = json.loads(cli("train", toy_recipe, "--dry-run", "--json").out)
    assert found["stages"]["warm_start"]["sizes"] == {
        "rows": 40,
        "rows_per_step": 8,
        "micro_batches_per_step": 3,  # of 3 rows, the last of 2
        "optimizer_steps": 4,
        "epochs": 0.8,
        "held_out_rows": 10,
    }
    assert found["stages"]["grpo"]["sizes"] == {
        "prompts": 10,
        "prompts_per_step": 4,
        "completions_per_step": 16,
        "completions_per_optimizer_step": 8,
        "micro_batches_per_optimizer_step": 2,  # of 5 completions, the last of 3
        "optimizer_steps": 48,  # 12 steps, 2 iterations, 2 mini-batches
        "completions_in_all": 192,
        "epochs": 4.8,
        "held_out_prompts": 10,
    }


def test_a_dry_run_shows_a_prompt_token_by_token(cli, toy_recipe, here):
    stage = json.loads(cli("train", toy_recipe, "--dry-run", "--json").out)["stages"]["warm_start"]
    texts = [text for _, text in stage["prompt"]]
    assert (texts[0], texts[-2:]) == ("<|im_start|>", ["assistant", "\n"])
    assert "".join(texts).startswith("<|im_start|>user\n")
    assert stage["learned"][-1][1] == "<|im_end|>"
    shown = cli("train", toy_recipe, "--dry-run").out
    assert "\nfirst prompt: 1:'<|im_start|>' " in shown


def test_a_dry_run_shows_what_rewards_say_of_gold_and_empty_answers(cli, toy_recipe, here):
    rewards = json.loads(cli("train", toy_recipe, "--dry-run", "--json").out)["stages"]["grpo"]["rewards"]
    assert rewards["empty"]["accuracy"] == 0.0
    assert rewards["gold in tags"]["accuracy"] == 1.0
    # nothing but the token that ends it: 7 short of the target 8; the weight is 0.1
    assert rewards["empty"]["length"] == -0.875
    assert rewards["empty"]["total"] == pytest.approx(-0.0875)


def test_a_dry_run_takes_one_of_several_golds(cli, toy_recipe, here):
    rows = [{"question": f"Which city, {n}?", "answer": ["Rome", "Roma"] if n else []} for n in range(4)]
    here.joinpath("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"{{source: file, path: {here}/rows.jsonl, prompt: question, answer: {{column: answer}}}}"
    changes = [f"stages.grpo.data={data}", "stages.grpo.rewards=[{name: exact_match}]", "stages.grpo.evaluation=null"]
    rewards = json.loads(cli("train", toy_recipe, "--dry-run", "--json", *changes).out)["stages"]["grpo"]["rewards"]
    assert rewards["gold bare"]["exact_match"] == 1.0
    assert rewards["empty"]["exact_match"] == 0.25  # the one that has no answer


def test_a_dry_run_shows_the_sizes_of_the_steps_that_were_asked_for(cli, toy_recipe, here):
    found = json.loads(cli("train", toy_recipe, "--dry-run", "--json", "--max-steps", "3").out)
    assert found["stages"]["grpo"]["sizes"]["optimizer_steps"] == 12


# validate


TOY_REWARDS = "  grpo: reward at most 1 = accuracy (0 to 1) + length (at most 0)\n"


def test_validate_says_what_is_fine_and_what_is_not(cli, toy_recipe, here):
    bad = toy_recipe.with_name("bad.yaml")
    bad.write_text(toy_recipe.read_text().replace("name: length", "name: lenght"))
    ran = cli("validate", toy_recipe, bad)
    assert (ran.code, ran.err) == (3, "")
    assert ran.out == (
        f"{toy_recipe}: fine\n{TOY_REWARDS}"
        f'{bad}:25:10: stages.grpo.rewards[1].name: unknown reward "lenght"; did you mean "length"?\n'
    )
    assert listing(here) == []


def test_validate_is_0_when_all_are_fine(cli, toy_recipe):
    assert cli("validate", toy_recipe, toy_recipe) == (0, f"{toy_recipe}: fine\n{TOY_REWARDS}" * 2, "")


def test_validate_as_json_lists_every_recipe(cli, toy_recipe):
    ran = cli("validate", toy_recipe, "nowhere.yaml", "--json")
    assert ran.code == 3
    fine, missing = json.loads(ran.out)
    assert fine == {
        "recipe": f"{toy_recipe}",
        "problems": [],
        "rewards": {"grpo": "at most 1 = accuracy (0 to 1) + length (at most 0)"},
    }
    assert missing["problems"][0].startswith('no recipe or file "nowhere.yaml" (shipped: ')


# recipes and rewards


def test_shipped_recipes_are_listed_with_what_they_are_for(cli):
    rows = {row["name"]: row["about"] for row in json.loads(cli("recipes", "ls", "--json").out)}
    assert rows["quickstart"].startswith("A tiny model learns two-digit addition")
    lines = cli("recipes", "ls").out.splitlines()
    assert [line.split()[0] for line in lines] == list(rows)


def test_a_recipe_is_shown_byte_for_byte(cli):
    assert cli("recipes", "show", "quickstart").out == (recipes_folder() / "quickstart.yaml").read_text()


def test_an_unknown_recipe_suggests_the_nearest(cli):
    ran = cli("recipes", "show", "quikstart")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith('error: no recipe or file "quikstart"; did you mean "quickstart"? (shipped: ')


def test_a_recipe_is_copied_to_a_file_or_into_a_folder(cli, here):
    assert cli("recipes", "cp", "quickstart", "mine.yaml") == (0, "mine.yaml\n", "")
    assert cli("recipes", "cp", "quickstart", here) == (0, f"{here}/quickstart.yaml\n", "")
    shipped = (recipes_folder() / "quickstart.yaml").read_bytes()
    assert {path.name: path.read_bytes() for path in here.iterdir()} == {
        "mine.yaml": shipped,
        "quickstart.yaml": shipped,
    }


def test_a_copy_overwrites_nothing(cli, here):
    (here / "mine.yaml").write_text("mine")
    ran = cli("recipes", "cp", "quickstart", "mine.yaml")
    assert ran == (2, "", "error: mine.yaml: exists already; name another file\n")
    assert (here / "mine.yaml").read_text() == "mine"


def test_a_copy_into_a_folder_that_is_not_there_is_an_error_of_use(cli, here):
    ran = cli("recipes", "cp", "quickstart", "no/such/mine.yaml")
    assert ran == (2, "", "error: no/such: there is no such folder\n")


def test_rewards_are_listed_with_options_and_columns(cli):
    rows = {row["name"]: row for row in json.loads(cli("rewards", "ls", "--json").out)}
    assert {"accuracy", "format", "length"} <= rows.keys()
    assert rows["accuracy"]["columns"] == ["answer"]
    assert rows["length"]["options"]["target"].items() >= {"type": "int", "default": 100}.items()
    assert rows["length"]["version"].startswith("grpo-lab ")
    out = cli("rewards", "ls").out
    assert "\n    needs the column answer\n" in out
    assert "\n    option target: int = 100\n" in out


def test_a_plugins_rewards_are_listed_too(cli, here):
    (here / "mine.py").write_text(
        "from grpo_lab.scoring import reward\n\n@reward\ndef short(completion):\n    'Short.'\n"
    )
    assert "\nshort: Short.\n" in cli("rewards", "ls", "--plugin", "mine.py").out
    missing = cli("rewards", "ls", "--plugin", "other.py")
    assert missing == (3, "", "error: plugins: no file or folder other.py\n")


# eval


def test_eval_of_a_run_repeats_its_last_evaluation(cli, finished):
    """One sample as in the recipe: the same noise, so the same numbers, from the model that was written."""
    ran = cli("eval", finished, "--samples", "2", "--json")
    assert ran.code == 0
    found = json.loads(ran.out)
    assert (found["target"], found["stage"]) == (f"{finished}", "grpo")
    last = read_jsonl(finished / "grpo" / "metrics.jsonl")[-1]
    logged = {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}
    assert logged["num_prompts"] == 10
    assert {name: found["metrics"][name] for name in logged} == logged
    assert found["metrics"].keys() - logged.keys() == {"pass@1", "pass@2"}


def test_eval_shows_a_line_with_its_interval_for_every_quantity(cli, finished):
    lines = [line.split() for line in cli("eval", finished, "--limit", "3").out.splitlines()]
    shown = {words[0]: words[1:] for words in lines}
    assert shown["num_prompts"] == ["3.0000"]
    assert len(shown["greedy/accuracy_strict"]) == len(shown["sampled/accuracy_lenient"]) == 3
    assert {"pass@1", "pass@2", "pass@4"} <= shown.keys()


def test_eval_without_samples_is_greedy_only(cli, finished):
    metrics = json.loads(cli("eval", finished, "--samples", "0", "--limit", "2", "--json").out)["metrics"]
    assert {name.partition("/")[0] for name in metrics} == {"num_prompts", "greedy"}


def test_eval_writes_nothing(cli, finished, here):
    files = listing(finished)
    assert cli("eval", finished, "--limit", "1").code == 0
    assert listing(here) == []
    assert listing(finished) == files


def test_eval_of_a_model_takes_a_recipes_held_out_data(cli, finished, toy_recipe):
    model = finished / "grpo" / "final"
    of_model = json.loads(cli("eval", model, "--recipe", toy_recipe, "--json").out)["metrics"]
    of_run = json.loads(cli("eval", finished, "--json").out)["metrics"]
    assert of_model == of_run


def test_eval_of_a_model_without_recipe_asks_for_one(cli, finished):
    model = finished / "grpo" / "final"
    assert cli("eval", model) == (
        2,
        "",
        f"error: {model}: is no run folder; a model needs --recipe, for its held-out data and rewards\n",
    )


def test_eval_of_what_is_no_model_exits_3(cli, toy_recipe):
    ran = cli("eval", "./nowhere", "--recipe", toy_recipe)
    assert (ran.code, ran.out) == (3, "")
    assert "cannot load a tokenizer from ./nowhere" in ran.err


@pytest.mark.parametrize("stage", ["warm_start", "nowhere"])
def test_eval_of_a_stage_without_held_out_prompts_says_which_have_them(cli, finished, stage):
    ran = cli("eval", finished, "--stage", stage)
    assert ran == (2, "", f"error: no GRPO stage {stage} with an evaluation block; there are: grpo\n")


def test_eval_of_an_unfinished_run_says_how_to_finish_it(cli, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "grpo" / "final")
    assert cli("eval", tmp_path / "run") == (
        2,
        "",
        f"error: {tmp_path}/run/grpo/final: is not there; the stage is not finished (grpo-lab train --resume goes on)\n",
    )


# how it ends otherwise


def test_a_missing_package_exits_4_before_anything_is_written(cli, toy_recipe, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python does for a module that cannot be imported
    ran = cli("train", toy_recipe, "tracking.wandb={project: p}")
    assert (ran.code, ran.out) == (4, "")
    assert ran.err == 'error: tracking.wandb: "wandb" is not installed; pip install "grpo-lab[wandb]"\n'
    assert listing(here) == []


def test_a_bug_of_ours_exits_70_with_its_traceback(cli, monkeypatch):
    def broken(recipes, *, as_json):
        raise KeyError("surprise")

    monkeypatch.setattr("grpo_lab.commands.training.validate", broken)
    ran = cli("validate", "quickstart")
    assert ran.code == 70
    assert ran.err.startswith("Traceback (most recent call last):\n")
    assert ran.err.endswith("KeyError: 'surprise'\nthis is a bug in grpo-lab; please report it with the lines above\n")


def test_ctrl_c_before_there_is_anything_to_save_exits_130(cli, monkeypatch):
    def interrupted(recipes, *, as_json):
        raise KeyboardInterrupt

    monkeypatch.setattr("grpo_lab.commands.training.validate", interrupted)
    ran = cli("validate", "quickstart")
    assert ran.code == 130
    assert "Traceback" not in ran.err
