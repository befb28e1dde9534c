import json
from pathlib import Path

import pytest
import yaml

from grpo_lab.assemble import assemble, fingerprint
from grpo_lab.data.sources import Rows
from grpo_lab.data.stream import Stream
from grpo_lab.errors import RecipeError
from grpo_lab.recipe import load, resolved_yaml
from grpo_lab.stages.plan import GrpoPlan, SftPlan

NO_ANSWER = (
    "stages.grpo.evaluation.data={source: task, path: addition, split: test, prompt: prompt, options: {digits: 1}}"
)


def rows_of(values: list[dict]) -> Rows:
    return Rows(values, tuple(values[0]), "d", "d.jsonl")


def test_stages_are_planned_in_the_recipes_order_with_their_data(toy_recipe):
    plan = assemble(load(toy_recipe))
    warm_start, grpo = plan.stages
    assert isinstance(warm_start, SftPlan)
    assert isinstance(grpo, GrpoPlan)
    assert (warm_start.name, grpo.name) == ("warm_start", "grpo")
    assert (len(warm_start.rows.at(0)), len(grpo.prompts.at(0))) == (8, 4)
    assert (len(warm_start.held_out), len(grpo.held_out)) == (10, 10)
    assert grpo.rewards.names == ["accuracy", "length"]


def test_held_out_answers_are_read_strictly_and_leniently_beside_the_stages_rewards(toy_recipe):
    grpo = assemble(load(toy_recipe)).stages[1]
    assert grpo.held_out_rewards.names == ["accuracy", "length", "accuracy_strict", "accuracy_lenient"]
    assert [term.weight for term in grpo.held_out_rewards.terms] == [1.0, 0.1, 0.0, 0.0]


def test_without_held_out_answers_only_the_stages_rewards_are_measured(toy_recipe):
    grpo = assemble(load(toy_recipe, [NO_ANSWER, "stages.grpo.rewards=[{name: length}]"])).stages[1]
    # the task's own column is called answer
    assert grpo.held_out_rewards.names == ["length", "accuracy_strict", "accuracy_lenient"]
    folder = toy_recipe.parent
    (folder / "d.jsonl").write_text('{"question": "1+1="}\n')
    override = "stages.grpo.evaluation.data={source: file, path: d.jsonl, prompt: question}"
    grpo = assemble(load(toy_recipe, [override, "stages.grpo.rewards=[{name: length}]"])).stages[1]
    assert grpo.held_out_rewards.names == ["length"]


def test_a_reward_whose_column_the_held_out_data_lack_is_placed_at_the_evaluation(toy_recipe):
    (toy_recipe.parent / "d.jsonl").write_text('{"question": "1+1="}\n')
    override = "stages.grpo.evaluation.data={source: file, path: d.jsonl, prompt: question}"
    with pytest.raises(RecipeError) as error:
        assemble(load(toy_recipe, [override]))
    assert error.value.problems == [
        f'{toy_recipe}:32:5: stages.grpo.evaluation: "accuracy" needs a dataset column "answer"; the data has: question'
    ]


def test_held_out_rows_that_are_streamed_are_refused_at_their_place(toy_recipe):
    (toy_recipe.parent / "d.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    data = "{source: file, path: d.jsonl, prompt: question, answer: {column: answer}, streaming: true}"
    with pytest.raises(RecipeError) as error:
        assemble(load(toy_recipe, [f"stages.grpo.evaluation.data={data}"]))
    (problem,) = error.value.problems
    assert problem.startswith("command line: stages.grpo.evaluation.data=")
    assert problem.endswith(
        "stages.grpo.evaluation.data.streaming: held-out rows are measured as a whole; leave streaming out, or use limit"
    )


def test_a_column_missing_in_held_out_data_is_placed_at_the_evaluation(toy_recipe):
    text = toy_recipe.read_text()
    place = "split: test, prompt: prompt, answer"
    assert text.count(place) == 1
    toy_recipe.write_text(text.replace(place, "split: test, prompt: promt, answer"))
    with pytest.raises(RecipeError) as error:
        assemble(load(toy_recipe))
    assert error.value.problems == [
        f'{toy_recipe}:33:57: stages.grpo.evaluation.data.prompt: column "promt" is not in the data; did you mean "prompt"? '
        "it has: prompt, completion, answer"
    ]


def test_problems_of_all_stages_are_found_together(toy_recipe):
    overrides = [
        "stages.warm_start.batch_size=41",
        "stages.grpo.prompts_per_step=12",
        "stages.grpo.sampling.max_completion_length=120",
    ]
    with pytest.raises(RecipeError) as error:
        assemble(load(toy_recipe, overrides))
    first, *prompts, last = error.value.problems
    assert first.endswith("stages.warm_start.data: a step needs 41 prompts, the data has 40")
    assert last.endswith("stages.grpo.data: a step needs 12 prompts, the data has 10")
    assert len(prompts) == 20  # ten of training, ten held out
    assert all("the prompt has 12 tokens; with max_completion_length 120" in problem for problem in prompts)


def test_a_built_tokenizer_learns_from_the_first_stages_texts(toy_recipe):
    plan = assemble(load(toy_recipe))
    vocabulary = plan.tokenizer.get_vocab()
    assert {"think", "answer", "user"} <= vocabulary.keys()
    again = assemble(load(toy_recipe)).tokenizer
    assert again.backend_tokenizer.to_str() == plan.tokenizer.backend_tokenizer.to_str()


def test_the_tokenizer_of_a_run_is_taken_as_it_is(toy_recipe, tokenizer):
    tokenizer.save_pretrained(toy_recipe.parent / "base")
    taken = assemble(load(toy_recipe), tokenizer_folder=toy_recipe.parent / "base").tokenizer
    assert taken.get_vocab() == tokenizer.get_vocab()


def test_every_data_block_and_every_reward_is_hashed(toy_recipe):
    hashes = assemble(load(toy_recipe)).hashes
    assert list(hashes["data"]) == [
        "stages.warm_start",
        "stages.warm_start.evaluation",
        "stages.grpo",
        "stages.grpo.evaluation",
    ]
    assert list(hashes["rewards"]) == ["grpo.accuracy", "grpo.length"]
    assert hashes == assemble(load(toy_recipe)).hashes


@pytest.mark.parametrize(
    "other",
    [[{"a": 1}], [{"a": 1}, {"a": 3}], [{"a": 1}, {"b": 2}], [{"a": 2}, {"a": 1}], [{"a": 1}, {"a": "2"}]],
    ids=["fewer", "another value", "another column", "another order", "another type"],
)
def test_other_rows_have_another_fingerprint(other):
    rows = [{"a": 1}, {"a": 2}]
    assert fingerprint(rows_of(rows)) == fingerprint(rows_of([*rows]))
    assert fingerprint(rows_of(other)) != fingerprint(rows_of(rows))


def test_a_stream_has_a_fingerprint_of_its_beginning():
    def stream(size: int) -> Rows:
        return Rows(Stream(lambda: iter({"a": i} for i in range(size))), ("a",), "d", "d.jsonl")

    assert fingerprint(stream(10_001)) == fingerprint(stream(10_002))
    assert fingerprint(stream(9_999)) != fingerprint(stream(10_000))


def test_assembling_writes_nothing(toy_recipe):
    assemble(load(toy_recipe))
    assert [path.name for path in toy_recipe.parent.iterdir()] == ["toy.yaml"]


def test_seeds_order_prompts_differently_and_stages_independently(toy_recipe):
    def order(*overrides: str) -> list[str]:
        prompts = assemble(load(toy_recipe, overrides)).stages[1].prompts
        return [example.id for step in range(2) for example in prompts.at(step)]

    assert order() == order()
    assert order() != order("seed=1")
    assert order() == order("stages.warm_start.batch_size=4", "stages.warm_start.steps=9")


def test_the_resolved_recipe_plans_the_same_work(toy_recipe, tmp_path):
    loaded = load(toy_recipe)
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "resolved.yaml"
    copy.write_text(resolved_yaml(loaded.recipe))
    assert yaml.safe_load(copy.read_text())["data_root"] == str(Path(toy_recipe).parent)
    assert json.dumps(assemble(load(copy)).hashes) == json.dumps(assemble(loaded).hashes)
