import gzip
import os
import sys
from pathlib import Path

import datasets
import pytest

from grpo_lab.data import sources
from grpo_lab.data.sources import load_rows
from grpo_lab.errors import RecipeError, SetupError
from grpo_lab.recipe.schema import Data

REAL_DATA = Path(os.environ.get("GRPO_LAB_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_real_data = pytest.mark.skipif(
    not (REAL_DATA / "gsm8k").is_dir(), reason=f"no real data in {REAL_DATA}; set GRPO_LAB_DATA"
)


def load(root, path="d.jsonl", source="file", prompt="q", **settings):
    return load_rows(Data(source=source, path=path, prompt=prompt, **settings), root=root, seed=0)


def message(root, **settings):
    with pytest.raises(RecipeError) as error:
        list(load(root, **settings))
    return str(error.value)


@pytest.fixture
def arrow_only(monkeypatch, tmp_path_factory):
    """As if every file were too large for memory."""
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", -1)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


FILES = [
    ("d.jsonl", '{"q": "a", "n": "1"}\n\n{"q": "b\u2028c", "n": "2"}\r\n'),
    ("d.json", '[{"q": "a", "n": "1"}, {"q": "b\u2028c", "n": "2"}]'),
    ("d.csv", 'q,n\na,1\n"b\u2028c",2\n'),
]


@pytest.mark.parametrize("name, content", FILES)
def test_every_format_gives_the_same_rows(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    rows = load(tmp_path, name)

    assert list(rows) == [{"q": "a", "n": "1"}, {"q": "b\u2028c", "n": "2"}]
    assert (len(rows), rows[1]["n"], rows.column_names) == (2, "2", ("q", "n"))


@pytest.mark.parametrize("name, content", FILES)
def test_large_files_give_the_same_rows_through_arrow(tmp_path, arrow_only, name, content):
    (tmp_path / name).write_text(content)
    rows = load(tmp_path, name)

    assert isinstance(rows.items, datasets.Dataset)
    assert list(rows) == [{"q": "a", "n": "1"}, {"q": "b\u2028c", "n": "2"}]
    assert (len(rows), rows[1]["n"], rows.column_names) == (2, "2", ("q", "n"))


@pytest.mark.parametrize("name, content", [FILES[0], FILES[2]])
def test_streamed_files_give_the_same_rows(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    rows = load(tmp_path, name, streaming=True)

    assert list(rows) == [{"q": "a", "n": "1"}, {"q": "b\u2028c", "n": "2"}]
    assert (rows.streamed, rows[1]["n"], rows.column_names) == (True, "2", ("q", "n"))
    with pytest.raises(TypeError):
        len(rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_gives_its_rows(tmp_path, arrow_only, streaming):
    datasets.Dataset.from_dict({"q": ["a", "b"], "n": [1, 2]}).to_parquet(tmp_path / "d.parquet")

    assert list(load(tmp_path, "d.parquet", streaming=streaming)) == [{"q": "a", "n": 1}, {"q": "b", "n": 2}]


@pytest.mark.parametrize("settings", [{}, {"streaming": True}])
def test_text_files_give_a_row_for_every_line_that_is_not_blank(tmp_path, settings):
    (tmp_path / "d.txt").write_bytes("\ufeffone\r\n\n  two\n".encode())

    assert list(load(tmp_path, "d.txt", **settings)) == [{"text": "one"}, {"text": "  two"}]


def test_csv_fields_are_text_also_through_arrow(tmp_path, arrow_only, monkeypatch):
    (tmp_path / "d.csv").write_text("q,n\nNA,007\n,1.50\n")
    large = list(load(tmp_path, "d.csv"))
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 1000)

    assert large == list(load(tmp_path, "d.csv")) == [{"q": "NA", "n": "007"}, {"q": "", "n": "1.50"}]


def test_broken_unicode_in_a_large_file_is_refused(tmp_path, arrow_only):
    (tmp_path / "d.jsonl").write_text('{"q": "x\\ud83d"}\n')

    assert message(tmp_path).startswith('data.path: cannot load "d.jsonl": ArrowInvalid: ')


def test_large_text_files_give_the_same_rows_through_arrow(tmp_path, arrow_only):
    (tmp_path / "d.txt").write_text("one\n\n  two\n")

    assert list(load(tmp_path, "d.txt")) == [{"text": "one"}, {"text": "  two"}]


def test_compressed_files_are_read(tmp_path):
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as handle:
        handle.write('{"q": "a"}\n')

    assert list(load(tmp_path, "d.jsonl.gz")) == [{"q": "a"}]


def test_a_glob_reads_its_files_in_name_order(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"q": "{name}"}}\n')

    assert [row["q"] for row in load(tmp_path, "*.jsonl")] == ["a", "b", "c"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path):
    (tmp_path / "d[1].jsonl").write_text('{"q": "a"}\n')

    assert load(tmp_path, "d[1].jsonl")[0] == {"q": "a"}


def test_the_format_can_be_said_when_the_ending_does_not_tell(tmp_path):
    (tmp_path / "d.log").write_text('{"q": "a"}\n')

    assert load(tmp_path, "d.log", format="jsonl")[0] == {"q": "a"}
    assert message(tmp_path, path="d.log") == (
        f"data.format: the ending of {tmp_path}/d.log tells no format; set one of jsonl, json, csv, parquet, text, folders, conll, squad, tsv"
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_skip_and_limit_cut_the_rows_and_keep_their_numbers(tmp_path, streaming):
    (tmp_path / "d.jsonl").write_text("".join(f'{{"q": "{number}"}}\n' for number in range(10)))
    rows = load(tmp_path, skip=3, limit=2, streaming=streaming)

    assert [row["q"] for row in rows] == ["3", "4"]
    assert (rows.id(1), rows.row(1)) == ("d-4", "d.jsonl, row 4 (from 0)")


def test_skip_and_limit_cut_arrow_rows(tmp_path, arrow_only):
    (tmp_path / "d.jsonl").write_text("".join(f'{{"q": "{number}"}}\n' for number in range(10)))

    assert [row["q"] for row in load(tmp_path, skip=8, limit=5)] == ["8", "9"]


def test_a_limit_beyond_the_end_takes_what_is_there(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"q": "a"}\n')

    assert len(load(tmp_path, limit=100)) == 1


def test_columns_are_those_of_all_rows(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"q": "a"}\n{"q": "b", "hint": "c"}\n')

    assert load(tmp_path).column_names == ("q", "hint")


def test_a_missing_file_names_path_and_root_and_the_setting(tmp_path):
    assert message(tmp_path, path="gsm/train.jsonl") == (
        f'data.path: there is no file "gsm/train.jsonl" in {tmp_path}; that folder is the recipe\'s own unless '
        "data_root names another (in the recipe, or data_root=FOLDER on the command line)"
    )


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "gsm").mkdir()

    assert message(tmp_path, path="gsm") == (
        'data.path: "gsm" is a folder; name a file in it, or a glob such as "gsm/*.jsonl"'
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_file_is_an_error(tmp_path, streaming):
    (tmp_path / "d.jsonl").write_text("\n")

    assert message(tmp_path, streaming=streaming).startswith("data.path: d.jsonl has no rows")


def test_skipping_everything_is_an_error(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"q": "a"}\n')

    assert message(tmp_path, skip=4) == "data.path: d.jsonl has no rows after skip: 4: 1 in all"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("d.jsonl", b'{"q": "a"}\n{"q": \n', ":2: not JSON: Expecting value: line 2 column 1 (char 7)"),
        ("d.jsonl", b'{"q": "a"}\n[1]\n', ":2: expected an object, found a list"),
        ("d.jsonl", b'{"q": "a"}\n{"q": "\xff"}\n', ":2: not UTF-8 text: 'utf-8' codec can't decode byte 0xff"),
        ("d.jsonl", b'{"q": "a"}\n{"q": "x\\ud83d"}\n', ":2: broken unicode: \\ud83d without its partner; repair"),
        ("d.csv", b"q,n\na,1\nb\n", ":3: 1 fields, but the header has 2: q, n"),
        ("d.csv", b"q,q\na,1\n", ":1: a column name stands twice: q, q"),
        ("d.csv", b'q,n\na,"1\n', ":2: not CSV: unexpected end of data"),
        ("d.jsonl.gz", b"no gzip", ": cannot be read: Not a gzipped file"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path, name, content, expected, streaming):
    (tmp_path / name).write_bytes(content)

    assert message(tmp_path, path=name, streaming=streaming).startswith(f"{tmp_path}/{name}{expected}")


def test_whole_characters_spelt_as_two_halves_are_text(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"q": "\\ud83d\\ude00"}\n')

    assert load(tmp_path)[0] == {"q": "😀"}


@pytest.mark.parametrize(
    "content, expected",
    [
        ('{"data": []}', ": expected a list of objects, found an object; for one object per line, format: jsonl"),
        ('{"q": 1}\n{"q": 2}', ":2: not JSON: Extra data; for one object per line, format: jsonl"),
        ('[{"q": 1}, 2]', ", item 1: expected an object, found a number"),
    ],
)
def test_a_json_file_holds_a_list_of_objects(tmp_path, content, expected):
    (tmp_path / "d.json").write_text(content)

    assert message(tmp_path, path="d.json") == f"{tmp_path}/d.json{expected}"


def test_a_json_list_cannot_be_streamed(tmp_path):
    (tmp_path / "d.json").write_text("[]")

    assert message(tmp_path, path="d.json", streaming=True) == (
        "data.streaming: a json list can only be read as a whole; use jsonl, or streaming: false"
    )


def test_a_broken_large_file_is_refused_with_its_cause(tmp_path, arrow_only):
    (tmp_path / "d.jsonl").write_text('{"q": "a"}\n{"q": \n')

    assert message(tmp_path).startswith('data.path: cannot load "d.jsonl": ArrowInvalid: JSON parse error')


def test_a_broken_parquet_file_is_refused(tmp_path, arrow_only):
    (tmp_path / "d.parquet").write_bytes(b"PAR1 not really")

    assert message(tmp_path, path="d.parquet").startswith('data.path: cannot load "d.parquet": ArrowInvalid: ')
    assert message(tmp_path, path="d.parquet", streaming=True).startswith(
        f"{tmp_path}/d.parquet: not a readable parquet file: "
    )


def test_a_tasks_rows_are_loaded():
    rows = load(Path(), "addition", source="task", split="test", options={"size": 30}, skip=10)

    assert (len(rows), rows.id(0), rows.column_names) == (20, "addition-test-10", ("prompt", "completion", "answer"))


@pytest.fixture
def hub_folder(tmp_path, arrow_only):
    """A data set folder, which `load_dataset` reads as it reads one from the hub."""
    for split, size in (("train", 5), ("test", 3)):
        made = datasets.Dataset.from_dict({"q": [f"{split}{row}" for row in range(size)]})
        made.to_parquet(tmp_path / "toy" / f"{split}.parquet")
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_gives_the_rows_of_its_split(hub_folder, streaming):
    rows = load(hub_folder, "toy", source="hub", split="test", skip=1, streaming=streaming)

    assert [row["q"] for row in rows] == ["test1", "test2"]
    assert (rows[1]["q"], rows.id(0), rows.column_names) == ("test2", "toy-test-1", ("q",))


def test_an_unknown_split_is_refused_with_the_real_cause(hub_folder):
    found = message(hub_folder, path="toy", source="hub", split="dev")

    assert found.startswith('data.path: cannot load "toy": ValueError: Unknown split "dev". Should be one of ')


def test_a_data_set_script_never_runs(tmp_path, arrow_only):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "toy.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    found = message(tmp_path, path="toy", source="hub")

    assert (
        found == 'data.path: cannot load "toy": RuntimeError: Dataset scripts are no longer supported, but found toy.py'
    )
    assert not (tmp_path / "ran").exists()


def test_reasoning_gym_gives_prompts_answers_and_metadata():
    pytest.importorskip("reasoning_gym", reason="needs grpo-lab[gym]")
    rows = load(Path(), "leg_counting", source="reasoning_gym", options={"size": 3, "max_animals": 4})

    assert (len(rows), rows.column_names, rows.id(2)) == (3, ("prompt", "answer", "metadata"), "leg_counting-train-2")
    assert rows[0]["metadata"]["source_dataset"] == "leg_counting"
    assert list(rows) == list(
        load(Path(), "leg_counting", source="reasoning_gym", options={"size": 3, "max_animals": 4})
    )
    assert rows[0] != load(Path(), "leg_counting", source="reasoning_gym", split="test", options={"max_animals": 4})[0]


@pytest.mark.parametrize(
    "path, options, expected",
    [
        ("leg_countin", {}, 'data.path: unknown reasoning-gym data set "leg_countin"; did you mean "leg_counting"?'),
        ("leg_counting", {"sise": 3}, 'data.options: unknown option "sise"; did you mean "size"?'),
        (
            "leg_counting",
            {"min_animals": 0},
            'data.options: reasoning-gym refuses them for "leg_counting": min_animals must be positive',
        ),
    ],
)
def test_reasoning_gym_options_are_checked(path, options, expected):
    pytest.importorskip("reasoning_gym", reason="needs grpo-lab[gym]")

    assert message(Path(), path=path, source="reasoning_gym", options=options) == expected


def test_a_missing_reasoning_gym_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(SetupError) as error:
        load(Path(), "leg_counting", source="reasoning_gym")

    assert str(error.value).endswith('pip install "grpo-lab[gym]"')


@needs_real_data
@pytest.mark.parametrize("streaming", [False, True])
def test_gsm8k_is_read_from_its_files(streaming):
    rows = load(REAL_DATA, "gsm8k/test.jsonl", streaming=streaming)

    assert rows.column_names == ("question", "answer")
    assert sum(1 for _ in rows) == 1319
    assert rows[1318]["answer"].splitlines()[-1].startswith("#### ")


def test_a_part_of_a_large_file_holds_the_rows_of_the_same_part_of_a_small_one(tmp_path, request):
    (tmp_path / "d.jsonl").write_text("".join(f'{{"q": "{n}", "label": "{n % 3}"}}\n' for n in range(60)))
    partition = {"take": "test", "test": 0.2, "stratify": "label"}
    small = list(load(tmp_path, partition=partition))
    request.getfixturevalue("arrow_only")
    large = load(tmp_path, partition=partition)
    assert isinstance(large.items, datasets.Dataset)
    assert list(large) == small
    assert len(small) == 12
