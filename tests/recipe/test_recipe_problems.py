from pathlib import Path

import pytest

from grpo_lab.errors import RecipeError
from grpo_lab.recipe import load_recipe

HEAD = """\
name: x
model: {path: a}
stages:
  g:
    kind: grpo
"""
DATA = "    data: {source: task, path: p, prompt: q}\n"
SAMPLING = "    sampling: {num_generations: 2, max_completion_length: 5}\n"
REWARDS = "    rewards: [{name: accuracy}]\n"
SIZES = "    prompts_per_step: 3\n    steps: 1\n"
OPTIMIZER = "    optimizer: {learning_rate: 1e-6}\n"


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def problems(text):
    Path("x.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe("x.yaml")
    return caught.value.problems


def grpo(*, data=DATA, sampling=SAMPLING, rewards=REWARDS, sizes=SIZES, optimizer=OPTIMIZER, more=""):
    return HEAD + data + sampling + rewards + sizes + optimizer + more


def test_the_test_recipe_itself_is_fine():
    Path("x.yaml").write_text(grpo())
    assert load_recipe("x.yaml").name == "x"


def test_all_problems_are_told_in_the_order_of_the_file():
    text = """\
# header
nam: x
model:
  path: a
  tokenizer: {vocab_size: 5}
stages:
  g:
    kind: grpo
    engine: natvie
    data: {source: hub, path: p, promt: q, options: 3}
    sampling: {num_generations: 1.0, max_completion_length: "5", temperature: 0}
    rewards:
      - {weight: yes}
      - 3
    algorithm: {betta: 1, advantage_scale: gropu, epsilon_low: 1.5}
    prompts_per_step: true
    steps: 1e3
    optimizer: {learning_rate: 1e-6, betas: [0.9]}
  k: {kind: gpro}
  n: {}
  o: 4
tracking:
"""
    assert problems(text) == [
        "x.yaml:2:1: name: field required",
        'x.yaml:2:1: nam: unknown key; did you mean "name"?',
        "x.yaml:5:15: model.tokenizer.vocab_size: input should be greater than or equal to 260, got 5",
        'x.yaml:9:5: stages.g.engine: unknown value "natvie"; did you mean "native"?',
        'x.yaml:10:34: stages.g.data.promt: unknown key; did you mean "prompt"?',
        "x.yaml:10:44: stages.g.data.options: input should be a mapping, got 3",
        "x.yaml:11:16: stages.g.sampling.num_generations: input should be a valid integer, got 1.0",
        'x.yaml:11:38: stages.g.sampling.max_completion_length: input should be a valid integer, got "5"',
        "x.yaml:11:66: stages.g.sampling.temperature: input should be greater than 0, got 0",
        "x.yaml:13:9: stages.g.rewards[0].name: field required",
        "x.yaml:13:10: stages.g.rewards[0].weight: input should be a valid number, got yes",
        "x.yaml:14:9: stages.g.rewards[1]: input should be a mapping, got 3",
        'x.yaml:15:17: stages.g.algorithm.betta: unknown key; did you mean "beta"?',
        'x.yaml:15:27: stages.g.algorithm.advantage_scale: unknown value "gropu"; did you mean "group"?',
        "x.yaml:15:51: stages.g.algorithm.epsilon_low: input should be less than 1, got 1.5",
        "x.yaml:16:5: stages.g.prompts_per_step: input should be a valid integer, got true",
        "x.yaml:17:5: stages.g.steps: input should be a valid integer, got 1e3",
        "x.yaml:18:38: stages.g.optimizer.betas[1]: field required",
        'x.yaml:19:7: stages.k.kind: unknown value "gpro"; did you mean "grpo"?',
        "x.yaml:20:3: stages.n.kind: field required",
        "x.yaml:21:3: stages.o: input should be a mapping, got 4",
        "x.yaml:22:1: tracking: input should be a mapping, got nothing",
    ]


def test_an_unknown_key_without_a_near_name_lists_the_known_ones():
    assert problems(grpo(more="    checkpoint: {zzz: 1}\n")) == [
        "x.yaml:12:18: stages.g.checkpoint.zzz: unknown key; known: every, keep"
    ]


def test_extends_is_offered_at_the_top():
    assert problems("extend: base.yaml\n" + grpo()) == ['x.yaml:1:1: extend: unknown key; did you mean "extends"?']


def test_an_unknown_value_without_a_near_one_lists_the_known_ones():
    assert problems(grpo(more="    algorithm: {reduction: dapo}\n")) == [
        'x.yaml:12:17: stages.g.algorithm.reduction: unknown value "dapo"; known: sequence, token, constant'
    ]
    assert problems(grpo(more="    algorithm: {reduction: 1}\n")) == [
        "x.yaml:12:17: stages.g.algorithm.reduction: input should be one of sequence, token, constant, got 1"
    ]


@pytest.mark.parametrize("kind, written", [("3", "3"), ("[a]", "a list"), ("", "nothing")])
def test_a_kind_of_the_wrong_type_is_named(kind, written):
    assert problems(grpo().replace("kind: grpo", f"kind: {kind}")) == [
        f"x.yaml:5:5: stages.g.kind: input should be one of sft, grpo, got {written}"
    ]


def test_text_and_booleans_of_the_wrong_type_get_a_hint():
    assert problems(grpo(more="seed: 1.5\noutput_dir: 7\ntracking: {rollouts: yes}\n")) == [
        "x.yaml:12:1: seed: input should be a valid integer, got 1.5",
        "x.yaml:13:1: output_dir: input should be a valid string, got 7; quote it if it is text",
        "x.yaml:14:12: tracking.rollouts: input should be a valid boolean, got yes; write true or false",
    ]


def test_a_value_that_may_be_text_or_a_mapping_is_one_problem():
    assert problems(grpo().replace("path: a}", "path: a, tokenizer: 4}")) == [
        "x.yaml:2:18: model.tokenizer: input should be a valid string, got 4; quote it if it is text"
    ]


def test_a_key_named_like_a_stage_kind_keeps_its_path():
    assert problems(grpo(more="    engin: {sft: 1}\n    grpo: {data: 1}\n")) == [
        'x.yaml:12:5: stages.g.engin: unknown key; did you mean "engine"?',
        "x.yaml:13:5: stages.g.grpo: unknown key; known: data, start_from, model, steps, micro_batch_size, optimizer, checkpoint, evaluation, "
        "kind, engine, sampling, rewards, algorithm, prompts_per_step, max_failed_rewards",
    ]


def test_a_bad_stage_name_is_placed_at_its_key():
    assert problems(grpo().replace("  g:", "  bad name:")) == [
        'x.yaml:4:3: stages."bad name": "bad name" is no name; it should match ^[A-Za-z0-9][A-Za-z0-9_-]*$'
    ]


def test_empty_collections_are_named():
    assert problems(grpo(rewards="    rewards: []\n")) == [
        "x.yaml:8:5: stages.g.rewards: needs at least 1 entry, has 0"
    ]
    assert problems("name: x\nmodel: {path: a}\nstages: {}\n") == ["x.yaml:3:1: stages: needs at least 1 entry, has 0"]


def test_what_the_schema_says_about_a_block_is_placed_at_the_block():
    assert problems(grpo(data="    data: {source: task, path: p, streaming: true}\n")) == [
        "x.yaml:6:5: stages.g.data: give exactly one of prompt, messages, text; found none"
    ]


def test_long_values_are_cut_and_stay_on_one_line():
    [problem] = problems(grpo(more=f'seed: "{"ab " * 100}\\n"\n'))
    assert problem == f'x.yaml:12:1: seed: input should be a valid integer, got "{("ab " * 100)[:76]}...'


def test_past_fifty_problems_are_counted():
    found = problems(grpo(more="".join(f"key_{i}: 1\n" for i in range(60))))
    assert len(found) == 51
    assert found[-1] == "... and 10 more problems"


@pytest.mark.parametrize("preset", ["[a]", "{a: 1}", "", "3"])
def test_a_preset_of_the_wrong_type_is_a_problem_not_a_crash(preset):
    [problem] = problems(grpo(more=f"    algorithm: {{preset: {preset}}}\n"))
    assert problem.startswith("x.yaml:12:17: stages.g.algorithm.preset: input should be one of ")
