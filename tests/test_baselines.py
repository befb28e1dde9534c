import json

import pytest
from typer.testing import CliRunner

from grpo_lab.baselines import dictionary, lead, majority, source_column
from grpo_lab.cli import app
from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import Data

RECIPE = """
name: b
model: {config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,
  num_key_value_heads: 2, max_position_embeddings: 64}, tokenizer: {vocab_size: 270}}
stages:
  learn:
    kind: sft
    data: {source: file, path: train.tsv, prompt: text, completion: label, shape: {kind: classes, column: label}}
    batch_size: 2
    steps: 1
    optimizer: {learning_rate: 1.0e-3}
  grpo:
    kind: grpo
    data: {source: file, path: train.tsv, prompt: text, answer: {column: label}, shape: {kind: classes, column: label}}
    sampling: {num_generations: 2, max_completion_length: 4}
    rewards: [{name: label, options: {labels: [bad, good]}}]
    prompts_per_step: 2
    steps: 1
    optimizer: {learning_rate: 1.0e-3}
    evaluation:
      num_samples: 0
      data: {source: file, path: test.tsv, prompt: text, answer: {column: label}, shape: {kind: classes, column: label}}
"""


def write(folder, test="nice\tgood\nawful\tbad\nfine\tgood\ngreat\tgood\n"):
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "train.tsv").write_text("text\tlabel\na\tgood\nb\tbad\nc\tgood\n")
    (folder / "test.tsv").write_text("text\tlabel\n" + test)
    return folder / "r.yaml"


def run(*arguments):
    result = CliRunner().invoke(app, ["baseline", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_the_majority_class_is_that_of_the_training_rows():
    answers = majority({"answer": label} for label in ("b", "a", "b", "c"))
    assert [(name, answer({})) for name, answer in answers.items()] == [("always b", "b")]


def test_the_dictionary_takes_the_longest_match_and_the_type_seen_most():
    train = [{"answer": "LOC: New York"}, {"answer": "ORG: New York"}, {"answer": "LOC: New York\nPER: York"}]
    answers = dictionary(train, form="lines")
    assert answers["dictionary"]({"sentence": "York left New York"}) == "per: York\nloc: New York"
    assert answers["no entities"]({"sentence": "York"}) == answers["dictionary"]({"sentence": "nobody"}) == "none"


def test_lead_takes_sentences():
    assert lead("One. Two! Three? Four.", 3) == "One. Two! Three?"


def test_a_copied_source_is_one_column():
    assert source_column(Data(source="file", path="x", prompt="Translate: {english}")) == "english"
    with pytest.raises(RecipeError, match="copies its one column; this prompt has a, b"):
        source_column(Data(source="file", path="x", prompt="{a} {b}"))


def test_the_command_measures_baselines_on_held_out_rows(tmp_path):
    found = json.loads(run(write(tmp_path), "--json"))
    values = found["baselines"]["always good"]
    assert found["num_prompts"] == 4
    assert values["greedy/accuracy"]["runs"][0]["mean"] == 0.75  # three of the four held-out rows are good
    assert values["greedy/f1_bad"]["runs"][0]["mean"] == 0.0


def test_a_run_is_compared_with_them_in_pairs_and_its_label_map_is_sorted(tmp_path):
    recipe = write(tmp_path)
    trained = CliRunner().invoke(app, ["train", str(recipe), "--output-dir", str(tmp_path), "--quiet"])
    assert trained.exit_code == 0, trained.output
    assert json.loads((tmp_path / "b" / "run.json").read_text())["labels"]["learn"] == {"bad": 0, "good": 1}
    values = json.loads(run(tmp_path / "b", "--json"))["baselines"]["always good"]["greedy/accuracy"]
    baseline, ours = (each["mean"] for each in values["runs"])
    assert values["differences"][0]["mean"] == pytest.approx(ours - baseline)
    assert "run - always good" in run(tmp_path / "b")


def test_held_out_labels_that_training_does_not_have_are_an_error(tmp_path):
    recipe = write(tmp_path, test="hm\tmixed\n")
    result = CliRunner().invoke(app, ["baseline", str(recipe)])
    assert isinstance(result.exception, RecipeError)
    assert "labels that the training rows do not have: mixed" in str(result.exception)
