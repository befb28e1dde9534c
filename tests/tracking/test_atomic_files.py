import json

import pytest

from grpo_lab.errors import CheckpointError, DiskError
from grpo_lab.tracking.files import append_line, dump_line, hash_source, read_jsonl, write_atomic, write_json

HOSTILE = [
    "<script>alert(1)</script>",
    "\x1b[2J\x1b]0;title\x07",
    "\u202egnp.exe\u2069",
    "a\x00b\x7f\x85\u2028\u2029",
    "\ud800 lone \udfff",
    "é 漢字 😀",
    '"}\n{"forged": true',
    "x" * 1_000_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_one_line_of_printable_ascii_and_comes_back_as_it_was(tmp_path, text):
    log = tmp_path / "log.jsonl"
    append_line(log, {"text": text, text[:50]: 1})
    content = log.read_bytes()
    assert content.endswith(b"\n")
    assert all(32 <= byte < 127 for byte in content[:-1])
    assert read_jsonl(log) == [{"text": text, text[:50]: 1}]


def test_values_that_json_lacks_become_null():
    line = dump_line({"a": float("nan"), "b": [float("inf"), (1.5, -float("inf"))], "c": {"d": float("nan")}})
    assert line == '{"a": null, "b": [null, [1.5, null]], "c": {"d": null}}'


def test_keys_keep_their_order():
    assert dump_line({"step": 1, "b": 2, "a": 3}) == '{"step": 1, "b": 2, "a": 3}'


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, disk_full_after):
    path = tmp_path / "run.json"
    write_json(path, {"old": 1})
    with disk_full_after(100), pytest.raises(DiskError) as error:
        write_atomic(path, "x" * 1000)
    assert str(error.value) == (
        f"{path}: could not be written: File too large; what was saved before is intact: make room, then --resume"
    )
    assert error.value.exit_code == 8
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("room", [0, 1, 20, 39])
def test_a_log_on_a_full_disk_ends_with_its_last_whole_line(tmp_path, disk_full_after, room):
    log = tmp_path / "metrics.jsonl"
    append_line(log, {"step": 1})
    before = log.read_bytes()
    with disk_full_after(len(before) + room), pytest.raises(DiskError):
        append_line(log, {"step": 2, "text": "x" * 40})
    assert log.read_bytes() == before


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_file(tmp_path, killed_at):
    path = tmp_path / "run.json"
    seen = set()
    for n in range(1, 100):
        path.write_text("old")
        got_through = not killed_at(n, lambda: write_atomic(path, "new"))
        seen.add(path.read_text())
        if got_through:
            break
    assert got_through
    assert seen == {"old", "new"}


def test_the_old_file_is_replaced_and_never_written_into(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    with path.open() as old:
        write_atomic(path, "new")
        assert old.read() == "old"
    assert path.read_text() == "new"


def test_a_torn_last_line_is_left_out_and_a_broken_one_before_it_is_an_error(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 1}\n{"st')
    assert read_jsonl(log) == [{"step": 1}]
    log.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match="log.jsonl:2: not a line of JSON"):
        read_jsonl(log)


def test_the_hash_of_a_source_folder_sees_names_and_contents_but_no_byte_code(tmp_path):
    (tmp_path / "a.py").write_text("1")
    first = hash_source(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_bytes(b"x")
    assert hash_source(tmp_path) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert hash_source(tmp_path) != first
