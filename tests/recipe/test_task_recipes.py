"""The recipes of the classic tasks for real models: checked to the last key on a stand-in, with rows in the hub's form."""

import json
import os
import runpy
from pathlib import Path

import pytest

from grpo_lab.assemble import assemble
from grpo_lab.baselines import baselines
from grpo_lab.bundled import find_recipe, shipped_recipes
from grpo_lab.data.fields import text_field
from grpo_lab.data.sources import load_rows
from grpo_lab.recipe import load, load_recipe
from grpo_lab.stages.plan import GrpoPlan

ROOT = Path(__file__).parents[2]
REAL_DATA = Path(os.environ.get("GRPO_LAB_DATA", ROOT.parent / "shared" / "data"))
REVIEWS = [{"text": f"Film {n}. It was long. It was {'fine' if n % 2 else 'dull'}.", "label": n % 2} for n in range(60)]
STARS = [{"text": f"Place {n}. Food came.", "label": n % 5} for n in range(200)]
PAIRS = [{"premise": f"{n} ants run.", "hypothesis": f"{n} ants sit.", "label": n % 3} for n in range(200)]
SAME = [{"sentence1": f"{n} ants run.", "sentence2": f"{n} ants ran.", "label": n % 2} for n in range(200)]
WORDS = [{"tokens": ["Ann", "Lee", "saw", f"Rome{n}", "."], "ner_tags": [1, 2, 0, 5, 0]} for n in range(60)]
CONTEXT = "Rollo led the Normans. They came from Norway and settled in France."
ASKED = [
    {
        "id": f"q{n}",
        "title": f"t{n}",
        "context": CONTEXT,
        "question": "Who led them?" if n % 2 else "Who left?",
        "answers": {"text": ["Rollo"], "answer_start": [0]} if n % 2 else {"text": [], "answer_start": []},
    }
    for n in range(100)
]
ARTICLES = [{"article": f"One {n}. Two. Three. Four.", "highlights": f"Two {n}."} for n in range(200)]
TRANSLATIONS = [
    {"english": f"Go {n // 2}.", "non_english": f"{'Va' if n % 2 else 'Marche'} {n // 2} !"} for n in range(600)
]
# name -> rows in the hub's form, the baselines of its task
RECIPES = {
    "qwen2.5-0.5b-imdb": (REVIEWS, ["always"]),
    "qwen2.5-0.5b-yelp": (STARS, ["always"]),
    "qwen2.5-0.5b-mnli": (PAIRS, ["always"]),
    "qwen2.5-0.5b-mrpc": (SAME, ["always"]),
    "qwen2.5-0.5b-conll2003": (WORDS, ["no entities", "dictionary"]),
    "qwen2.5-0.5b-squad2": (ASKED, ["unanswerable", "first sentence"]),
    "qwen2.5-0.5b-cnn-dailymail": (ARTICLES, ["lead-1", "lead-3"]),
    "qwen2.5-0.5b-tatoeba-en-fr": (TRANSLATIONS, ["copied source"]),
}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    return runpy.run_path(str(ROOT / "scripts" / "stand_in.py"))["stand_in"]("qwen2", tmp_path_factory.mktemp("qwen2"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_task_s_recipe_assembles_on_rows_in_the_hub_s_form_and_its_baselines_are_measured(name, stand_in, tmp_path):
    rows, expected = RECIPES[name]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"model.path={stand_in}"]
    for block in ("warm_start.data", "warm_start.evaluation.data", "grpo.data", "grpo.evaluation.data"):
        place = f"stages.{block}"
        overrides += [f"{place}.source=file", f"{place}.path={tmp_path}/rows.jsonl", f"{place}.name=null"]
    for block in ("warm_start.data", "grpo.data"):
        if name in ("qwen2.5-0.5b-yelp", "qwen2.5-0.5b-cnn-dailymail"):  # which take a tenth of a large set
            overrides += [f"stages.{block}.partition.test=0.0", f"stages.{block}.partition.validation=0.1"]
    if name in ("qwen2.5-0.5b-yelp", "qwen2.5-0.5b-mnli"):
        part = "stages.warm_start.evaluation.data.partition"
        overrides += [f"{part}.validation=0.1", f"{part}.test=0.0"]
    plan = assemble(load(find_recipe(name), overrides))
    measured = next(each for each in plan.stages if isinstance(each, GrpoPlan))
    found = baselines(measured, plan.tokenizer)
    assert ["always" if name.startswith("always ") else name for name in found] == expected


@pytest.mark.parametrize("name", RECIPES)
def test_a_task_s_recipe_says_that_it_was_not_run_here(name):
    assert "Not run on the machine this project was made on" in find_recipe(name).read_text()


TINY = {
    "sentiment-tiny": "uci_sentiment",
    "wikigold-tiny": "wikigold",
    "squad2-tiny": "squad2",
    "questions-tiny": "gsm8k",
    "tatoeba-tiny": "tatoeba_en_fr",
}


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_task_recipe_assembles_on_real_data_and_no_prompt_stands_on_both_sides(name):
    root = REAL_DATA / TINY[name]
    if not root.is_dir():
        pytest.skip(f"no real data in {REAL_DATA}; set GRPO_LAB_DATA")
    few = [f"stages.{block}.limit=200" for block in ("warm_start.data", "grpo.data")]
    plan = assemble(load(find_recipe(name), [f"data_root={root}", *few]))
    assert len(plan.stages[-1].held_out) >= 150
    stage = load_recipe(find_recipe(name)).stages["grpo"]
    learnt, measured = (prompts(data, root) for data in (stage.data, stage.evaluation.data))
    assert len(learnt) > 1000
    assert not learnt & measured


def prompts(data, root) -> set[str]:
    return {text_field(row, data.prompt, "data.prompt") for row in load_rows(data, root=root, seed=0)}


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_task_recipe_s_header_has_the_numbers_of_a_run(name):
    header = find_recipe(name).read_text().split("\nname:")[0]
    assert "# Result, 2026-" in header
    assert header.count("[") > 3  # intervals
    assert "baseline" in header


def test_every_task_recipe_is_here():
    shipped = {path.stem for path in shipped_recipes()}
    assert shipped >= RECIPES.keys() | TINY.keys()
