import json
import os
from pathlib import Path

import pytest

from grpo_lab.data.sources import load_rows
from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import Data

REAL_DATA = Path(os.environ.get("GRPO_LAB_DATA", Path(__file__).parents[3] / "shared" / "data"))

CONLL_2003 = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
German JJ B-NP B-MISC
call NN I-NP O

-DOCSTART- -X- -X- O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
"""
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Normans",
            "paragraphs": [
                {
                    "context": "The Normans came from Normandy in France. Rollo led them. They swore fealty to King Charles.",
                    "qas": [
                        {
                            "id": "a",
                            "question": " Who led them?",
                            "answers": [{"text": "Rollo", "answer_start": 42}, {"text": "Rollo", "answer_start": 42}],
                            "is_impossible": False,
                        },
                        {
                            "id": "b",
                            "question": "Who led the Danes?",
                            "answers": [],
                            "plausible_answers": [{"text": "Rollo", "answer_start": 42}],
                            "is_impossible": True,
                        },
                    ],
                }
            ],
        }
    ],
}


def load(root, path="d.jsonl", **settings):
    return load_rows(Data(source="file", path=path, prompt="q", **settings), root=root, seed=0)


def message(root, **settings):
    with pytest.raises(RecipeError) as error:
        load(root, **settings)
    return str(error.value)


def squad(folder, change=lambda document: None):
    document = json.loads(json.dumps(SQUAD))
    change(document["data"][0]["paragraphs"][0]["qas"])
    (folder / "d.json").write_text(json.dumps(document))
    return {"path": "d.json", "format": "squad"}


# tsv


def test_a_tsv_s_quotes_are_characters_and_its_lines_end_at_line_feeds_only(tmp_path):
    (tmp_path / "d.tsv").write_text('A "fine\x85film.  \t1\tx\n"bad\t0\tx\n', encoding="utf-8")
    rows = load(tmp_path, "d.tsv", format="tsv", columns=["text", "label"])
    assert list(rows) == [{"text": 'A "fine\x85film.', "label": "1"}, {"text": '"bad', "label": "0"}]


def test_a_tsv_without_columns_has_a_header_and_short_lines_are_named(tmp_path):
    (tmp_path / "d.tsv").write_text("text\tlabel\ngood\t1\nbad\n")
    assert message(tmp_path, path="d.tsv").endswith("d.tsv:3: 1 fields, but 2 columns: text, label")


# folders


def test_the_folder_of_a_file_is_its_label(tmp_path):
    for label, name, text in (("pos", "0_9.txt", "Great.\n"), ("neg", "0_2.txt", "Bad."), ("unsup", "0_0.txt", "?")):
        (tmp_path / "train" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / label / name).write_text(text)
    rows = load(tmp_path, "train/[np]*/*.txt", format="folders")
    assert list(rows) == [
        {"text": "Bad.", "label": "neg", "file": "0_2.txt"},
        {"text": "Great.", "label": "pos", "file": "0_9.txt"},
    ]


# classes


def test_classes_get_their_names_and_a_class_without_one_is_an_error(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"q": "a", "label": 1}\n{"q": "b", "label": 0}\n')
    shape = {"kind": "classes", "column": "label", "names": {"0": "no", "1": "yes"}}
    assert [row["label"] for row in load(tmp_path, shape=shape)] == ["yes", "no"]
    shape["names"].pop("0")
    assert message(tmp_path, shape=shape) == (
        'd.jsonl, row 1 (from 0): data.shape.names: "label" is 0, which has no name here; there are: 1: yes'
    )


# tagged words


def test_both_layouts_of_conll_give_sentences_and_entities(tmp_path):
    (tmp_path / "d.conll").write_text(CONLL_2003)
    rows = list(load(tmp_path, "d.conll", shape={"kind": "tagged"}))
    assert [(row["sentence"], row["entities"]) for row in rows] == [
        ("EU rejects German call", "ORG: EU\nMISC: German"),
        ("Peter Blackburn", "PER: Peter Blackburn"),
    ]
    (tmp_path / "w.txt").write_text(
        "Empire\tB-location\nState\tI-location\n!\tO\n\t\nhi\tO\n"
    )  # W-NUT's blank lines hold a tab
    rows = list(load(tmp_path, "w.txt", format="conll", shape={"kind": "tagged", "form": "json"}))
    assert [row["entities"] for row in rows] == ['[{"type": "location", "text": "Empire State"}]', "[]"]


def test_tags_that_are_numbers_have_names(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"tokens": ["Ann", "left"], "ner_tags": [1, 0]}\n')
    shape = {"kind": "tagged", "tags": "ner_tags", "names": ["O", "B-PER"]}
    assert load(tmp_path, shape=shape)[0]["entities"] == "PER: Ann"
    assert "tag 1 has no name; 1 names are given" in message(tmp_path, shape={**shape, "names": ["O"]})


def test_a_word_without_a_tag_is_named_by_its_line(tmp_path):
    (tmp_path / "d.conll").write_text("EU B-ORG\nrejects\n")
    assert message(tmp_path, path="d.conll").endswith("d.conll:2: a word without a tag: rejects")


# questions


def test_squad_keeps_unanswerable_questions_and_all_golds(tmp_path):
    rows = list(load(tmp_path, **squad(tmp_path), shape={"kind": "questions"}))
    assert [(row["question"], row["golds"], row["answer"]) for row in rows] == [
        ("Who led them?", ["Rollo"], "Rollo"),
        ("Who led the Danes?", [], "unanswerable"),
    ]


@pytest.mark.parametrize("shift", [-2, -1, 1, 2])
def test_an_answer_off_by_one_or_two_characters_is_repaired(tmp_path, shift):
    settings = squad(tmp_path, lambda asked: asked[0]["answers"][0].update(answer_start=42 + shift))
    assert load(tmp_path, **settings, shape={"kind": "questions"})[0]["golds"] == ["Rollo"]


def test_an_answer_that_is_further_off_is_an_error_with_the_question_s_id(tmp_path):
    settings = squad(tmp_path, lambda asked: asked[0]["answers"][1].update(answer_start=39))
    found = message(tmp_path, **settings, shape={"kind": "questions"})
    assert 'question a: the answer "Rollo" stands neither at 39 nor within 2 characters of it' in found


def test_an_answerable_question_without_an_answer_is_an_error(tmp_path):
    settings = squad(tmp_path, lambda asked: asked[0].update(answers=[]))
    assert "question a has no answer, nor is it is_impossible" in message(tmp_path, **settings)


def test_windows_cover_the_context_and_hold_the_golds_that_stand_in_them(tmp_path):
    rows = [
        row
        for row in load(tmp_path, **squad(tmp_path), shape={"kind": "questions", "window": 8, "stride": 4})
        if row["question_id"] == "a"
    ]
    assert [row["context"] for row in rows] == [
        "The Normans came from Normandy in France. Rollo",
        "Normandy in France. Rollo led them. They swore",
        "led them. They swore fealty to King Charles.",
    ]
    assert [row["golds"] for row in rows] == [["Rollo"], ["Rollo"], []]


def test_an_answer_that_no_window_holds_whole_is_an_error(tmp_path):
    def longer(asked):
        asked[0]["answers"] = [{"text": "Normandy in France", "answer_start": 22}]

    found = message(tmp_path, **squad(tmp_path, longer), shape={"kind": "questions", "window": 2, "stride": 2})
    assert 'question a: no window holds all of the answer "Normandy in France"; raise window, or lower stride' in found


# cut and gathered


def test_a_text_is_cut_into_columns_and_what_does_not_match_is_dropped_only_if_told(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"q": "Ann has 3 pens. How many?"}\n{"q": "How many?"}\n')
    shape = {"kind": "cut", "column": "q", "pattern": "(?P<story>.*[.]) (?P<asked>.*)", "drop": True}
    assert [(row["story"], row["asked"]) for row in load(tmp_path, shape=shape)] == [("Ann has 3 pens.", "How many?")]
    assert "does not match 'How many?'; or set drop: true" in message(tmp_path, shape={**shape, "drop": False})


def test_rows_with_the_same_source_become_one_with_all_golds(tmp_path):
    (tmp_path / "d.jsonl").write_text(
        '{"q": "Go.", "fr": "Va !"}\n{"q": "Run!", "fr": "Cours !"}\n{"q": "Go.", "fr": "Marche."}\n'
    )
    rows = list(load(tmp_path, shape={"kind": "gathered", "by": "q", "column": "fr"}))
    assert rows == [{"q": "Go.", "fr": ["Va !", "Marche."]}, {"q": "Run!", "fr": ["Cours !"]}]


def test_a_shape_names_the_column_that_is_missing(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"q": "a"}\n')
    found = message(tmp_path, shape={"kind": "tagged"})
    assert found == 'd.jsonl, row 0 (from 0): data.shape: column "tokens" is not in the data; it has: q'


# real data

real = pytest.mark.skipif(not (REAL_DATA / "wnut17").is_dir(), reason=f"no real data in {REAL_DATA}; set GRPO_LAB_DATA")


@real
def test_the_real_sets_have_the_sizes_that_their_makers_state():
    for file, sentences, entities in (
        ("train", 3394, 1975),
        ("dev", 1009, 836),
        ("test", 1287, 1079),
    ):  # W-NUT 17, table 1
        rows = list(load(REAL_DATA / "wnut17", f"{file}.conll", shape={"kind": "tagged"}))
        named = sum(row["entities"].count("\n") + 1 for row in rows if row["entities"] != "none")
        assert (len(rows), named) == (sentences, entities)
    columns = {"format": "tsv", "columns": ["sentence", "label"]}
    assert len(load(REAL_DATA / "uci_sentiment", "*_labelled.txt", **columns)) == 3000
    questions = load(REAL_DATA / "squad2", "dev-v2.0.cs224n.json", format="squad", shape={"kind": "questions"})
    assert (len(questions), sum(not row["golds"] for row in questions)) == (6078, 3168)
