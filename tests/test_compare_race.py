"""The race: both engines from one shared start, processes that are not repeated, paired numbers, one picture."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from grpo_lab.compare.picture import Curve, draw, sparkline
from grpo_lab.compare.race import plan_race, run_process
from grpo_lab.compare.race_report import pooled
from grpo_lab.errors import RecipeError
from grpo_lab.recipe import load

SVG = "{http://www.w3.org/2000/svg}"


def row(item, prompt, reward):
    return {
        "arm": "greedy",
        "id": item,
        "prompt": prompt,
        "num_tokens": 1,
        "finished": True,
        "terms": {},
        "reward": reward,
    }


def test_every_arm_of_a_seed_starts_from_the_weights_that_were_trained_once(toy_recipe, tmp_path):
    race = plan_race(load(toy_recipe, [f"output_dir={tmp_path}"]), None, [3, 4], "random")
    assert [run.recipe.name for run in race.runs] == [
        "start-s3", "native-s3", "trl-s3", "random-s3", "start-s4", "native-s4", "trl-s4", "random-s4",
    ]  # fmt: skip
    start, *arms = race.runs[:4]
    assert list(start.recipe.stages) == ["warm_start"]
    assert {run.recipe.model.path for run in arms} == {str(tmp_path / "toy-race" / "start-s3" / "warm_start" / "final")}
    assert [list(run.recipe.stages) for run in arms] == [["grpo"]] * 3
    stages = [run.recipe.stages["grpo"] for run in arms]
    assert [(stage.engine, stage.reward_control) for stage in stages] == [
        ("native", None), ("trl", None), ("native", "random"),
    ]  # fmt: skip
    assert {run.recipe.seed for run in arms} == {3}


def test_what_trl_lacks_is_refused_before_anything_is_trained(toy_recipe, tmp_path):
    with pytest.raises(RecipeError, match=r'kl_estimator=k1: engine "trl": TRL has the k3 estimator only'):
        plan_race(load(toy_recipe, ["stages.grpo.algorithm.kl_estimator=k1"]), None, [0], None)


def test_an_item_counts_once_over_seeds_and_items_of_several_seeds_stay_apart():
    same = pooled([[row("a", "1", 0.0)], [row("a", "1", 1.0)]])
    assert [each["id"] for each in same] == ["a", "a"]
    other = pooled([[row("a", "1", 0.0)], [row("a", "2", 1.0)]])
    assert len({each["id"] for each in other}) == 2


@pytest.fixture(scope="module")
def raced(tmp_path_factory, toy_text):
    """A race of two steps; its recipe, its folder and what it printed are shared by the tests below."""
    folder = tmp_path_factory.mktemp("race")
    path = folder / "toy.yaml"
    path.write_text(toy_text.replace("steps: 12", "steps: 2").replace("every: 5", "every: null"))
    return path, folder


def test_a_race_trains_all_arms_and_a_second_call_only_reports(cli, raced):
    path, folder = raced
    ran = cli("compare", path, "--race", "--output-dir", folder, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert list(found["speed"]) == ["native", "trl"]
    assert found["same_start"] == {"trl": True}
    changes = found["held_out"]["after"]["greedy/reward"]["differences"]
    assert [each["num_items"] for each in changes] == [10]
    assert [point["step"] for point in found["curves"]["trl"]["training"]] == [1, 2]
    for arm in found["speed"].values():
        assert {"sample_per_second", "score_per_second", "learn_per_second", "peak_memory_mib"} <= arm[0].keys()
        assert arm[0]["starts"] == 1
        assert arm[0]["wall_seconds"] > arm[0]["beside_steps_seconds"] > 0
    picture = ElementTree.fromstring((folder / "toy-race" / "race.svg").read_text())
    assert len(picture.findall(f"{SVG}polyline")) == 2

    before = (folder / "toy-race" / "processes.json").read_bytes()
    again = cli("compare", path, "--race", "--output-dir", folder)
    assert again.code == 0, again.err
    assert again.err.count("finished before") == 3
    assert (folder / "toy-race" / "processes.json").read_bytes() == before
    assert "trl - native" in again.out
    assert "every arm gave the same held-out answers: yes" in again.out

    runs = [folder / "toy-race" / name for name in ("native-s0", "trl-s0")]
    compared = cli("compare", *runs, "--picture", folder / "runs.svg")
    assert compared.code == 0, compared.err
    assert "reward, all steps" in compared.out
    overlaid = ElementTree.fromstring((folder / "runs.svg").read_text())
    assert len(overlaid.findall(f"{SVG}polyline")) == 2

    other = load(path, [f"output_dir={folder}", "stages.grpo.steps=3"])
    assert not any(run.is_finished for run in plan_race(other, None, [0], None).runs if run.arm is not None)


def test_the_native_arm_is_the_run_that_the_whole_recipe_trains(cli, raced):
    path, folder = raced
    if not (folder / "toy-race" / "native-s0").is_dir():
        pytest.skip("the race itself failed")
    assert cli("train", path, "--name", "whole", "--output-dir", folder, "--quiet").code == 0
    logs = [folder / name / "grpo" / "metrics.jsonl" for name in ("whole", "toy-race/native-s0")]
    assert logs[0].read_bytes() == logs[1].read_bytes()


def test_a_process_that_fails_hands_on_its_exit_code():
    assert run_process(["false"]) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--race", "--seeds", "0,x"], "--seeds 0,x: give whole numbers"),
        (["--race", "--control", "noise"], "--control noise: use random or shuffled"),
        (["--race", "--parity"], "ask for one at a time"),
        (["--parity", "--seeds", "0"], "--seeds, --control and --output-dir belong to --race"),
    ],
)
def test_options_that_make_no_sense_are_refused(cli, toy_recipe, arguments, message):
    ran = cli("compare", toy_recipe, *arguments)
    assert ran.code == 2
    assert message in ran.err


def test_a_picture_holds_what_it_was_given():
    curves = [
        Curve("<one>", [(1, 0.0), (2, 1.0), (3, float("nan"))], band=[(1, 0.0, 0.5), (2, 0.5, 1.0)], rings=[(0, 0.2)]),
        Curve("flat", [(1, 0.5)]),
    ]
    root = ElementTree.fromstring(draw("a & b", curves))
    lines = [each.get("points").split() for each in root.findall(f"{SVG}polyline")]
    assert [len(line) for line in lines] == [2, 1]  # what is not a number is left out
    heights = [float(point.split(",")[1]) for point in lines[0]]
    assert heights[0] > heights[1]  # up is more
    assert len(root.findall(f"{SVG}polygon")[0].get("points").split()) == 4
    assert len(root.findall(f"{SVG}circle")) == 1
    assert [each.text for each in root.findall(f"{SVG}text")][0] == "a & b"


@pytest.mark.parametrize("values", [[], [3.0], [float("nan")]])
def test_a_picture_of_nothing_is_a_picture(values):
    ElementTree.fromstring(draw("empty", [Curve("none", [(1, value) for value in values])]))


def test_a_sparkline_averages_neighbours_to_fit():
    assert sparkline([0.0, 1.0, 0.0, 1.0, 1.0, 1.0], low=0.0, high=1.0, width=3) == "▅▅█"
    assert sparkline([2.0, 2.0], low=2.0, high=2.0) == "▁▁"
