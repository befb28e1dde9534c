from pathlib import Path

import pytest
import yaml

from grpo_lab.recipe import difference, load_recipe, resolved_yaml

SFT = "{kind: sft, data: {source: task, path: p, text: t}, steps: 1, batch_size: 1, optimizer: {learning_rate: 1e-6}}"
RECIPE = f"""\
name: toy
model: {{config: {{model_type: llama, rope: {{theta: 1e4}}}}, tokenizer: {{vocab_size: 300}}}}
plugins: [mine.py]
stages:
  b: {SFT}
  a:
    kind: grpo
    data: {{source: task, path: copy, prompt: question, options: {{low: 1, high: null, flag: true, sizes: [1, 2.5]}}}}
    sampling: {{num_generations: 4, max_completion_length: 8}}
    rewards: [{{name: accuracy}}, {{name: format}}]
    algorithm: {{preset: dr_grpo}}
    prompts_per_step: 2
    steps: 3
    optimizer: {{learning_rate: 1e-6, betas: [0.9, 0.99]}}
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(RECIPE)
    return lambda *overrides: load_recipe("toy.yaml", overrides)


def test_the_resolved_recipe_is_the_same_recipe_from_any_folder(toy, tmp_path, monkeypatch):
    recipe = toy("model.tokenizer.split_digits=false")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "resolved.yaml").write_text(resolved_yaml(recipe))
    monkeypatch.chdir("/")
    again = load_recipe(elsewhere / "resolved.yaml")
    assert again == recipe
    assert list(again.stages) == ["b", "a"]
    assert resolved_yaml(again) == resolved_yaml(recipe)


def test_every_value_is_written_out(toy):
    written = yaml.safe_load(resolved_yaml(toy()))
    assert written["stages"]["a"]["algorithm"]["advantage_scale"] == "none"
    assert written["stages"]["a"]["sampling"]["max_rows"] is None
    assert written["tracking"] == {"rollouts": True, "wandb": None, "push": None}


@pytest.mark.parametrize(
    "text",
    [
        "1e5", "1e-6", "7", "true", "null", "~", "", "yes", "no", "on", "007", "0x1f", "1_0", ".5", "1e999", "9" * 30,
        "2024-01-01", "12:30:00", "=", "<<", " padded ", "# no comment", "a: b", "- item", "*alias", "&anchor", "!tag",
        "%x", "@x", "`x`", "{a}", "[a]", '"quoted"', "'single'", "back\\slash", "tab\there", "---", "...", "?", "|", ">",
        "two\nlines", "two\nlines\n", "\n", "\n\n", "\nfirst", "trailing \nspace", "  indented\nless", "end\n\n\n", "a\r\nb",
        "a\rb", "nul\0", "bell\x07", "esc\x1b[0m", "del\x7f", "nel\x85x", "\u2028", "\ufeffbom", "é", "日本語", "🙂 ok",
        "🙂\n日本", "word " * 60, ("word " * 40 + "\n") * 3, "x" * 300, "a\n # b\n\tc", "\t", "a\n\n b\n", "\ufffe",
    ],
)  # fmt: skip
def test_any_text_survives_being_written_out(toy, tmp_path, text):
    recipe = toy()
    stage = recipe.stages["a"]
    data = stage.data.model_copy(update={"system_prompt": text, "options": {text: text, "list": [text, {"k": text}]}})
    if text == "<<":  # as a key it is refused
        data = data.model_copy(update={"options": {}})
    changed = recipe.model_copy(update={"stages": {"a": stage.model_copy(update={"data": data})}})
    # as the run folder is written: utf-8, no translation of line ends
    (tmp_path / "resolved.yaml").write_bytes(resolved_yaml(changed).encode())
    assert load_recipe(tmp_path / "resolved.yaml") == changed


@pytest.mark.parametrize("number", ["1e-6", "5.0e-6", "1E5", "0.1", "1e-300", "123456789.123456789", "3", "1e22"])
def test_numbers_survive_being_written_out(toy, tmp_path, number):
    recipe = toy(f"stages.a.optimizer.learning_rate={number}", f"stages.a.data.options.x={number}")
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(recipe))
    again = load_recipe(tmp_path / "resolved.yaml")
    assert again == recipe
    assert type(again.stages["a"].data.options["x"]) is type(recipe.stages["a"].data.options["x"])


def test_system_prompts_stay_readable(toy):
    recipe = toy('stages.a.data.system_prompt="First line.\\nSecond: line."')
    assert "system_prompt: |-\n        First line.\n        Second: line.\n" in resolved_yaml(recipe)


def test_the_same_value_twice_is_written_twice(toy):
    recipe = toy()
    shared = {"x": [1]}
    stage = recipe.stages["a"].model_copy(
        update={"data": recipe.stages["a"].data.model_copy(update={"options": {"p": shared, "q": shared}})}
    )
    assert "&" not in resolved_yaml(recipe.model_copy(update={"stages": {"a": stage}}))


def test_equal_recipes_do_not_differ(toy):
    assert difference(toy(), toy()) == []


def test_differences_are_told_by_path(toy):
    new = toy(
        "name=other",
        "stages.a.algorithm.beta=0.1",
        "stages.a.rewards=[{name: accuracy, weight: 2}]",
        "stages.a.data.options={low: 1, more: x}",
        "num_threads=2",
    )
    assert difference(toy(), new) == [
        'name: "toy" -> "other"',
        "num_threads: null -> 2",
        "stages.a.data.options.high: null -> (absent)",
        "stages.a.data.options.flag: true -> (absent)",
        "stages.a.data.options.sizes: [1, 2.5] -> (absent)",
        'stages.a.data.options.more: (absent) -> "x"',
        "stages.a.rewards[0].weight: 1.0 -> 2.0",
        'stages.a.rewards[1]: {"name": "format", "weight": 1.0, "scale": 1.0, "clip": null, '
        '"only_if": null, "options": {}, "label": null} -> (absent)',
        "stages.a.algorithm.beta: 0.0 -> 0.1",
    ]


def test_another_order_of_stages_is_a_difference(toy):
    recipe = toy()
    turned = recipe.model_copy(update={"stages": {"a": recipe.stages["a"], "b": recipe.stages["b"]}})
    assert difference(recipe, turned) == ["stages: order b, a -> a, b"]
