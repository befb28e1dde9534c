import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_lab.errors import RecipeError
from grpo_lab.recipe import load, load_recipe

RECIPE = """\
name: toy
model: {path: some/model}
stages:
  grpo:
    kind: grpo
    data: {source: task, path: copy, prompt: question}
    sampling: {num_generations: 4, max_completion_length: 8}
    rewards:
      - {name: accuracy, weight: 2.0}
      - {name: format}
    algorithm: {beta: 0.04}
    prompts_per_step: 2
    steps: 3
    optimizer: {learning_rate: 1e-6}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(RECIPE)
    return tmp_path


def problems(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 3
    return caught.value.problems


def test_a_recipe_is_read(folder):
    recipe = load_recipe("toy.yaml")
    assert recipe.name == "toy"
    assert recipe.stages["grpo"].optimizer.learning_rate == 1e-6
    assert [term.weight for term in recipe.stages["grpo"].rewards] == [2.0, 1.0]


def test_a_byte_order_mark_is_no_problem(folder):
    Path("bom.yaml").write_bytes(b"\xef\xbb\xbf" + RECIPE.encode())
    assert load_recipe("bom.yaml") == load_recipe("toy.yaml")


# Files that are no recipes


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "x.yaml: empty; a recipe is a mapping with name, model and stages"),
        (b"# nothing\n", "x.yaml: empty; a recipe is a mapping with name, model and stages"),
        (b"- a\n", "x.yaml:1:1: a recipe is a mapping with name, model and stages, got a list"),
        (b"# top\nhello\n", "x.yaml:2:1: a recipe is a mapping with name, model and stages, got hello"),
        (b"name: \xff\n", "x.yaml: not utf-8 text (byte 6)"),
        (b"#" * 131073, "x.yaml: larger than 128 KiB; that is no recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(folder, content, message):
    Path("x.yaml").write_bytes(content)
    assert problems("x.yaml") == [message]


def test_a_missing_file_and_a_folder_are_refused(folder):
    Path("sub").mkdir()
    assert problems("none.yaml") == ["none.yaml: no such file"]
    assert problems("sub") == ["sub: a folder or device, not a file"]


def test_the_largest_file_is_judged_at_once(folder):
    Path("x.yaml").write_text("".join(f"k{i}: 1\n" for i in range(14_000)))
    started = time.process_time()
    assert problems("x.yaml")[-1].startswith("... and ")
    assert time.process_time() - started < 3  # 0.4 s without the tests' type checks; a quadratic loop takes minutes


# extends


def test_mappings_merge_and_everything_else_replaces(folder):
    Path("child.yaml").write_text(
        "extends: toy.yaml\nname: child\nstages: {grpo: {rewards: [{name: length}], optimizer: {schedule: cosine}}}\n"
    )
    recipe = load_recipe("child.yaml")
    stage = recipe.stages["grpo"]
    assert recipe.name == "child"
    assert [term.name for term in stage.rewards] == ["length"]
    assert (stage.optimizer.learning_rate, stage.optimizer.schedule) == (1e-6, "cosine")


def test_stages_keep_the_parents_order_and_new_ones_follow(folder):
    stage = (
        "{kind: sft, data: {source: task, path: copy, text: t}, steps: 1, batch_size: 1, optimizer: {learning_rate: 1}}"
    )
    Path("child.yaml").write_text(f"extends: toy.yaml\nstages:\n  last: {stage}\n  grpo: {{steps: 9}}\n")
    assert list(load_recipe("child.yaml").stages) == ["grpo", "last"]


def test_parents_may_extend_and_are_relative_to_the_file_that_names_them(folder):
    Path("sub").mkdir()
    Path("sub/middle.yaml").write_text("extends: ../toy.yaml\nname: middle\nseed: 5\n")
    Path("child.yaml").write_text("extends: sub/middle.yaml\nname: child\n")
    recipe = load_recipe("child.yaml")
    assert (recipe.name, recipe.seed, recipe.model.path) == ("child", 5, "some/model")


def test_a_problem_points_to_the_file_that_wrote_the_value(folder):
    Path("sub").mkdir()
    Path("sub/child.yaml").write_text("# 14 lines\n" * 14 + "extends: ../base.yaml\nseed: x\n")
    Path("base.yaml").write_text(RECIPE.replace("beta: 0.04", "beta: -1"))
    assert problems("sub/child.yaml") == [
        "sub/child.yaml:16:1: seed: input should be a valid integer, got x",
        "base.yaml:11:17: stages.grpo.algorithm.beta: input should be greater than or equal to 0, got -1",
    ]


def test_a_missing_field_of_a_merged_block_is_placed_in_the_child(folder):
    Path("base.yaml").write_text(RECIPE.replace("    steps: 3\n", ""))
    Path("child.yaml").write_text("extends: base.yaml\nstages:\n  grpo: {micro_batch_size: 1}\n")
    assert problems("child.yaml") == ["child.yaml:3:3: stages.grpo.steps: field required"]


def test_a_circle_of_parents_is_refused(folder):
    Path("a.yaml").write_text("extends: b.yaml\n")
    Path("b.yaml").write_text("name: b\nextends: a.yaml\n")
    assert problems("a.yaml") == ["b.yaml:2:1: extends: goes in a circle: a.yaml -> b.yaml -> a.yaml"]
    Path("self.yaml").write_text("extends: self.yaml\n")
    assert problems("self.yaml") == ["self.yaml:1:1: extends: goes in a circle: self.yaml -> self.yaml"]


def test_a_long_chain_of_parents_is_read(folder):
    Path("c0.yaml").write_text("extends: toy.yaml\n")
    for i in range(1, 1200):
        Path(f"c{i}.yaml").write_text(f"extends: c{i - 1}.yaml\n")
    assert load_recipe("c1199.yaml").name == "toy"


@pytest.mark.parametrize(
    "extends, message",
    [
        ("none.yaml", "child.yaml:1:1: extends: none.yaml: no such file"),
        ("[a.yaml]", "child.yaml:1:1: extends: should be a file, got a list"),
        ("", "child.yaml:1:1: extends: should be a file, got nothing"),
        ('"a\\0b"', 'child.yaml:1:1: extends: should be a file, got "a\\u0000b"'),
    ],
)
def test_a_parent_that_cannot_be_read_is_named(folder, extends, message):
    Path("child.yaml").write_text(f"extends: {extends}\nname: child\n")
    assert problems("child.yaml") == [message]


# overrides


def test_overrides_set_values(folder):
    recipe = load_recipe(
        "toy.yaml",
        [
            "seed=1",
            "stages.grpo.rewards.0.weight=0.5",
            "stages.grpo.rewards[1].name=length",
            "stages.grpo.algorithm.beta=0",
            "stages.grpo.optimizer.betas=[0.5, 1e-1]",
            "tracking.wandb.project=p",
            "output_dir=a=b",
        ],
    )
    stage = recipe.stages["grpo"]
    assert (recipe.seed, recipe.output_dir, recipe.tracking.wandb.project) == (1, "a=b", "p")
    assert [(term.name, term.weight) for term in stage.rewards] == [("accuracy", 0.5), ("length", 1.0)]
    assert (stage.algorithm.beta, stage.optimizer.betas) == (0, (0.5, 0.1))


def test_an_override_is_text_whatever_signs_are_in_it(folder):
    def prompt(text):
        return load_recipe("toy.yaml", [f"stages.grpo.data.system_prompt={text}"]).stages["grpo"].data.system_prompt

    assert prompt("Answer: yes # please") == "Answer: yes # please"
    assert prompt("*") == "*"
    assert prompt("yes") == "yes"
    assert prompt('"1"') == "1"
    assert prompt('"two\\nlines"') == "two\nlines"
    assert prompt("null") is None
    assert prompt("") is None


def test_the_last_override_wins(folder):
    assert load_recipe("toy.yaml", ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    "override, message",
    [
        ("seed", "command line: seed: write key=value, for example seed=1 or stages.grpo.steps=10"),
        ("=1", "command line: =1: write key=value, for example seed=1 or stages.grpo.steps=10"),
        ("a..b=1", "command line: a..b=1: write key=value, for example seed=1 or stages.grpo.steps=10"),
        ("stages.grpo.steps.x=1", "command line: stages.grpo.steps.x=1: stages.grpo.steps is 3, not a mapping"),
        (
            "stages.grpo.rewards.2.weight=1",
            "command line: stages.grpo.rewards.2.weight=1: stages.grpo.rewards is a list of 2, counted from 0; it has no entry 2",
        ),
        (
            "stages.grpo.rewards.accuracy=1",
            "command line: stages.grpo.rewards.accuracy=1: stages.grpo.rewards is a list of 2, counted from 0; it has no entry accuracy",
        ),
        (
            "stages.grpo.algorithm.beta=-1",
            "command line: stages.grpo.algorithm.beta=-1: input should be greater than or equal to 0, got -1",
        ),
        ("sede=1", 'command line: sede=1: unknown key; did you mean "seed"?'),
        (
            "stages.grpo.rewards=[{nam: a}]",
            "command line: stages.grpo.rewards=[{nam: a}]: stages.grpo.rewards[0].name: field required",
        ),
        ("seed=[1", "command line: seed=[1: not valid yaml: expected ',' or ']', but got '<stream end>'"),
        ("seed=1e999", "command line: seed=1e999: too large a number; quote it if it is text"),
        ("extends=toy.yaml", "command line: extends=toy.yaml: extends is for files; it cannot be set here"),
    ],
)
def test_a_wrong_override_is_named(folder, override, message):
    assert problems("toy.yaml", override)[0] == message


def test_all_wrong_overrides_are_named(folder):
    assert problems("toy.yaml", "seed", "name.x=1") == [
        "command line: seed: write key=value, for example seed=1 or stages.grpo.steps=10",
        "command line: name.x=1: name is toy, not a mapping",
    ]


def test_the_command_line_comes_after_the_files(folder):
    Path("x.yaml").write_text(RECIPE + "seed: x\n")
    assert problems("x.yaml", "name=1") == [
        "x.yaml:15:1: seed: input should be a valid integer, got x",
        "command line: name=1: input should be a valid string, got 1; quote it if it is text",
    ]


# paths


def test_data_root_is_the_folder_of_the_file_that_was_asked_for(folder):
    Path("sub").mkdir()
    Path("sub/child.yaml").write_text("extends: ../toy.yaml\n")
    assert load_recipe("toy.yaml").data_root == str(folder)
    assert load_recipe("sub/child.yaml").data_root == str(folder / "sub")
    assert load_recipe("toy.yaml", ["data_root=null"]).data_root == str(folder)


def test_relative_paths_are_relative_to_the_file_that_wrote_them(folder):
    Path("sub").mkdir()
    Path("sub/base.yaml").write_text(RECIPE + "data_root: ../data\nplugins: [mine.py, ./more]\n")
    Path("child.yaml").write_text("extends: sub/base.yaml\nmodel: {path: ./weights, chat_template: ../chat.jinja}\n")
    recipe = load_recipe("child.yaml")
    assert recipe.data_root == str(folder / "data")
    assert recipe.plugins == [str(folder / "sub/mine.py"), str(folder / "sub/more")]
    assert recipe.model.path == str(folder / "weights")
    assert recipe.model.chat_template == str(folder.parent / "chat.jinja")


def test_paths_on_the_command_line_are_relative_to_the_working_folder(folder, monkeypatch):
    Path("sub").mkdir()
    monkeypatch.chdir(folder / "sub")
    recipe = load_recipe("../toy.yaml", ["data_root=here", "plugins=[mine.py]", "model.tokenizer=./tok"])
    assert recipe.data_root == str(folder / "sub/here")
    assert recipe.plugins == [str(folder / "sub/mine.py")]
    assert recipe.model.tokenizer == str(folder / "sub/tok")


def test_hub_ids_stay_and_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "home"))
    recipe = load_recipe("toy.yaml", ["model.tokenizer=other/model", "model.chat_template=chatml", "plugins=[~/p.py]"])
    assert (recipe.model.path, recipe.model.tokenizer) == ("some/model", "other/model")
    assert recipe.model.chat_template == "chatml"
    assert recipe.plugins == [str(folder / "home/p.py")]


# what later checks use


def test_later_checks_name_the_line(folder):
    Path("sub").mkdir()
    Path("sub/child.yaml").write_text("extends: ../toy.yaml\nname: child\n")
    sources = load("sub/child.yaml", ["stages.grpo.algorithm.beta=0.1"]).sources
    assert (
        sources.problem(("stages", "grpo", "rewards", 1, "name"), "unknown reward")
        == "toy.yaml:10:10: stages.grpo.rewards[1].name: unknown reward"
    )
    assert sources.problem(("name",), "taken") == "sub/child.yaml:2:1: name: taken"
    assert (
        sources.problem(("stages", "grpo", "algorithm", "beta"), "needs a reference")
        == "command line: stages.grpo.algorithm.beta=0.1: needs a reference"
    )


def test_what_is_not_written_is_placed_at_its_nearest_written_parent(folder):
    sources = load("toy.yaml").sources
    assert (
        sources.problem(("stages", "grpo", "sampling", "backend"), "not installed")
        == "toy.yaml:7:5: stages.grpo.sampling.backend: not installed"
    )
    assert sources.problem(("tracking", "wandb"), "off") == "toy.yaml:1:1: tracking.wandb: off"
    assert sources.problem((), "no") == "toy.yaml:1:1: no"


def test_later_checks_are_sorted_by_place(folder):
    found = [(("stages",), "c"), (("seed",), "d"), (("name",), "a"), (("model",), "b")]
    assert load("toy.yaml", ["seed=1"]).sources.problems(found) == [
        "toy.yaml:1:1: name: a",
        "toy.yaml:2:1: model: b",
        "toy.yaml:3:1: stages: c",
        "command line: seed=1: d",
    ]


def test_reading_a_recipe_imports_neither_torch_nor_transformers():
    code = "import sys, grpo_lab.recipe, grpo_lab.bundled; print({'torch', 'transformers', 'jaxtyping'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "set()"
