"""`rewards test RECIPE`: the shipped recipes pass on their data, and each kind of bad reward is found out."""

import json
import os
from pathlib import Path

import pytest

from grpo_lab.assemble import assemble
from grpo_lab.bench.recipes import recipe_report
from grpo_lab.bundled import find_recipe, shipped_recipes
from grpo_lab.recipe import load, load_recipe

REAL_DATA = Path(os.environ.get("GRPO_LAB_DATA", Path(__file__).parents[3] / "shared" / "data"))
FILES = {  # shipped recipes whose data is no part of the project
    "gsm8k-tiny": "gsm8k",
    "questions-tiny": "gsm8k",
    "sentiment-tiny": "uci_sentiment",
    "squad2-tiny": "squad2",
    "tatoeba-tiny": "tatoeba_en_fr",
    "wikigold-tiny": "wikigold",
}
LIMITS = {"data": 200, "evaluation.data": 20}  # rows


def result(stage: dict, check: str) -> tuple[str, str]:
    return next((each["result"], each["detail"]) for each in stage["checks"] if each["check"] == check)


@pytest.mark.parametrize("name", [path.stem for path in shipped_recipes()])
def test_a_shipped_recipe_passes(cli, name):
    recipe = load_recipe(find_recipe(name))
    sources = {stage.data.source for stage in recipe.stages.values()}
    if recipe.model.path is not None or sources - {"task", "file"}:
        pytest.skip("needs a model or a data set from a hub")
    overrides = [f"stages.{stage}.{key}.limit={rows}" for stage in recipe.stages for key, rows in LIMITS.items()]
    if "file" in sources:
        folder = REAL_DATA / FILES[name]
        if not folder.is_dir():
            pytest.skip(f"no real data in {folder}; set GRPO_LAB_DATA")
        overrides.append(f"data_root={folder}")
    ran = cli("rewards", "test", name, *overrides, "--limit", "5", "--json")
    assert ran.code == 0, ran.out + ran.err
    found = json.loads(ran.out)
    assert found["passed"] is True
    for stage in found["stages"].values():
        assert stage["probes"]["gold"]["total"] == pytest.approx(stage["maximum"])
        assert result(stage, "golds reach the maximum")[0] == "pass"
        assert (
            max(stage["probes"][each]["total"] for each in ("empty", "gold repeated", "boxed spam")) < stage["maximum"]
        )


@pytest.fixture
def report(toy_recipe):
    """The bench's report on the toy recipe with rewards written here, 6 rows."""

    def of(*terms: str, code: str = "") -> dict:
        (toy_recipe.parent / "mine.py").write_text("from grpo_lab.scoring import reward\n" + code)
        text = toy_recipe.read_text().replace(
            "name: toy\n", "name: toy\nplugins: [./mine.py]\n" if code else "name: toy\n"
        )
        path = toy_recipe.with_name("bench.yaml")
        path.write_text(text)
        plan = assemble(
            load(path, [f"stages.grpo.rewards=[{', '.join(terms)}]", "stages.grpo.sampling.max_completion_length=64"])
        )
        return recipe_report(plan, stage=None, limit=6)["stages"]["grpo"]

    return of


def failed(stage: dict) -> list[str]:
    return [each["check"] for each in stage["checks"] if each["result"] == "FAIL"]


def test_a_good_reward_passes_everything(report):
    stage = report("{name: accuracy}", "{name: format, weight: 0.5}")
    assert failed(stage) == []
    assert (stage["num_rows"], stage["maximum"], stage["range"]) == (6, 1.5, "0 to 1.5")
    assert {each["result"] for each in stage["checks"]} == {"pass"}
    assert stage["probes"]["wrong, well-formed"] == {"accuracy": 0.0, "format": 1.0, "total": 0.5}
    assert stage["agreement"]["accuracy"]["gold"] == 1.0
    assert stage["agreement"]["accuracy"]["guesses, gold last"] == 0.0
    times = stage["milliseconds_per_call"]["accuracy"]
    assert times["calls"] == 6 * len(stage["probes"])
    assert 0 < times["p50"] <= times["p95"]


def test_a_reward_that_takes_the_last_of_many_guesses_is_found_out(report):
    stage = report("{name: accuracy, options: {strict: false}}")
    assert failed(stage) == ["junk stays below"]
    assert '"guesses, gold last" pays like a gold on 6 rows' in result(stage, "junk stays below")[1]
    assert '"gold repeated" pays like a gold on 6 rows' in result(stage, "junk stays below")[1]


def test_junk_that_is_paid_like_its_gold_is_found_out_where_the_maximum_is_unknown(report):
    code = "@reward\ndef anywhere(completion, *, answer):\n    return float(answer in completion.text)\n"
    stage = report("{name: anywhere}", "{name: format}", code=code)
    assert stage["maximum"] is None
    assert '"guesses in one place" pays like a gold on 6 rows' in result(stage, "junk stays below")[1]


def test_golds_that_are_not_paid_are_named_with_the_term_that_lacks(report):
    code = '@reward(range=(0, 1))\ndef picky(completion, *, answer):\n    return float(f"<answer> {answer}" in completion.text)\n'
    stage = report("{name: picky}", "{name: format}", code=code)
    verdict, detail = result(stage, "golds reach the maximum")
    assert verdict == "FAIL"
    assert detail.startswith("addition-train-0: 1 of 2 (picky 0 of 1); ")
    assert detail.endswith("; 3 more")


def test_wrong_answers_that_are_paid_like_golds_are_found_out(report):
    code = "@reward(range=(0, 1))\ndef blind(completion, *, answer):\n    return float('</answer>' in completion.text[-9:])\n"
    assert failed(report("{name: blind}", "{name: format}", code=code)) == [
        "junk stays below",
        "wrong answers score between",
    ]


def test_without_a_reward_that_reads_the_data_wrong_answers_are_not_asked_about_and_that_is_said(report):
    stage = report("{name: format}", "{name: accuracy, weight: 0.0}")
    assert failed(stage) == []
    assert result(stage, "wrong answers score between")[0] == "not asked"
    assert stage["warnings"][0].startswith("no reward with a weight reads the data")


def test_a_range_that_is_not_kept_is_found_out(report):
    code = "@reward(range=(0, 1))\ndef tall(completion):\n    return len(completion.text)\n"
    verdict, detail = result(report("{name: tall}", code=code), "values lie in their declared range")
    assert verdict == "FAIL"
    assert "is outside 0 to 1" in detail


def test_chance_order_and_failures_are_found_out(report):
    code = """
import random
from grpo_lab.text import tag

@reward
def chance(completion):
    return random.random()

def nth(completions, **kwargs):
    return [float(i) for i, _ in enumerate(completions)]
nth = reward(nth)

@reward
def fragile(completion):
    return float(tag(completion.text, "answer"))
"""
    stage = report("{name: chance}", "{name: nth}", "{name: fragile}", code=code)
    assert {"no reward fails", "the same again", "the same in another order"} <= set(failed(stage))
    assert result(stage, "the same again")[1].startswith("chance: ")
    assert "nth: " in result(stage, "the same in another order")[1]
    assert 'reward "fragile" raised TypeError' in result(stage, "no reward fails")[1]
    assert result(stage, "golds reach the maximum")[0] == "not asked"
    assert any("chance: declares no range" in each for each in stage["warnings"])


def test_a_constant_reward_is_warned_about(report):
    code = "@reward(range=(0, 2))\ndef same(completion):\n    return 1\n"
    stage = report("{name: same}", "{name: accuracy}", code=code)
    assert "same: always 1; it tells none of these answers apart" in stage["warnings"]


def test_a_failed_check_exits_1_with_its_line(cli, toy_recipe):
    ran = cli("rewards", "test", toy_recipe, "stages.grpo.rewards=[{name: length}]", "--limit", "3")
    assert ran.code == 1
    assert "\nFAIL       golds reach the maximum: addition-train-0: " in ran.out
    assert "reward at most 0" in ran.out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("quickstart", "--options", "a=1"), "quickstart: a reward is tested with --cases FILE"),
        (
            ("quickstart", "stages.warm_start.data.limit=80", "stages.grpo.data.limit=40", "--stage", "x"),
            "no GRPO stage x; there are: grpo",
        ),
        (("length",), "length: a reward is tested with --cases FILE"),
        (("length", "a=1", "--cases", "c.jsonl"), "a=1: overrides are for recipes"),
    ],
)
def test_a_command_that_makes_no_sense_exits_2(cli, arguments, message):
    ran = cli("rewards", "test", *arguments)
    assert ran.code == 2
    assert ran.err.startswith(f"error: {message}")
