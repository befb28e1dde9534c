"""`rewards test NAME --cases` and `rewards new`: what is written down is what must come out."""

import json
import re

import pytest

BRIEF = """
from grpo_lab.scoring import reward

@reward
def brief(group, *, answer, bonus: float = 1.0):
    shortest = min(len(each.token_ids) for each in group.completions)
    return [None if answer == "?" else bonus * (len(each.token_ids) == shortest) for each in group.completions]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_cases(folder, *cases, name="cases.jsonl"):
    (folder / name).write_text("".join(json.dumps(case) + "\n\n" for case in cases))
    return folder / name


def test_every_value_that_is_not_as_expected_is_a_line_and_the_exit_code_is_1(cli, here):
    cases = write_cases(
        here,
        {"completion": r"\boxed{4}", "columns": {"answer": "4"}, "expected": 1.0},
        {"completion": r"\boxed{5}", "columns": {"answer": "4"}, "expected": 1},
        {"completion": r"\boxed{4}", "columns": {"answer": None}, "expected": None},
        {"completion": r"\boxed{4}", "columns": {"answer": "4"}, "expected": None},
        {"completion": r"\boxed{4}", "columns": {"answer": ""}, "expected": 0.0},
        {"completion": r"\boxed{5}", "columns": {"answer": "4"}, "expected": 0.4, "tolerance": 0.5},
    )
    ran = cli("rewards", "test", "accuracy", "--cases", cases)
    assert ran.code == 1
    assert re.sub(r"accuracy.py:\d+", "accuracy.py:N", ran.out).splitlines() == [
        f'{cases}:3: expected 1, got 0: "\\\\boxed{{5}}"',
        f'{cases}:7: expected nothing (it abstains), got 1: "\\\\boxed{{4}}"',
        f"{cases}:9: expected 0, got reward \"accuracy\" raised ValueError: the column answer holds no answer, but '' "
        f'(accuracy.py:N) for example cases.jsonl:9, completion 0: "\\\\boxed{{4}}"',
        "accuracy: 3 of 6 values as expected",
    ]
    found = json.loads(cli("rewards", "test", "accuracy", "--cases", cases, "--json").out)
    assert (found["num_values"], found["num_failed"], found["passed"]) == (6, 3, False)
    assert [each["got"] for each in found["results"]] == [1.0, 0.0, None, 1.0, None, 0.0]


def test_options_reach_the_reward_with_their_types(cli, here):
    cases = write_cases(here, {"completion": "x", "num_tokens": 15, "expected": -0.5})
    options = ("--options", "target=10", "--options", "unit=tokens")
    assert cli("rewards", "test", "length", *options, "--cases", cases).code == 0
    ran = cli("rewards", "test", "length", "--options", "target=ten", "--options", "unti=x", "--cases", cases)
    assert (ran.code, ran.err.splitlines()) == (
        3,
        [
            'error: options.target: input should be a valid integer, got "ten"',
            'options.unti: unknown option "unti"; did you mean "unit"?',
        ],
    )


def test_a_group_is_scored_together_and_words_stand_for_tokens(cli, here):
    (here / "brief.py").write_text(BRIEF)
    cases = write_cases(
        here,
        {"group": ["a b", "a", {"completion": "a b c", "num_tokens": 1}], "columns": {"answer": "1"}, "expected": [0, 2, 2]},
        {"group": ["a", "b"], "columns": {"answer": "?"}, "expected": [None, None]},
    )  # fmt: skip
    ran = cli("rewards", "test", "brief", "--plugin", "brief.py", "--options", "bonus=2", "--cases", cases)
    assert ran == (0, "brief: 5 of 5 values as expected\n", "")


@pytest.mark.parametrize(
    "line, problem",
    [
        ('{"completion": "x"}', "expected: Field required"),
        ('{"expected": 1}', "case: Value error, give either completion or group"),
        ('{"group": ["x"], "expected": [1, 2]}', "case: Value error, expected is a list with one value for each"),
        ('{"completion": "x", "expected": [1]}', "case: Value error, expected is one value"),
        ('{"completion": "x", "expectd": 1, "expected": 1}', "expectd: Extra inputs are not permitted"),
        ("not json", "case: Invalid JSON"),
    ],
)
def test_a_line_that_is_no_case_exits_3_with_its_number(cli, here, line, problem):
    cases = here / "cases.jsonl"
    cases.write_text('{"completion": "x", "expected": null}\n' + line + "\n")
    ran = cli("rewards", "test", "length", "--cases", cases)
    assert ran.code == 3
    assert ran.err.startswith(f"error: {cases}:2: {problem}")


def test_the_starter_passes_its_own_test_and_is_never_overwritten(cli, here):
    ran = cli("rewards", "new", "my_reward")
    assert ran == (0, "my_reward.py\nmy_reward.cases.jsonl\ngrpo-lab rewards test my_reward.py\n", "")
    assert cli("rewards", "test", "my_reward.py") == (0, "my_reward: 6 of 6 values as expected\n", "")
    code = here / "my_reward.py"
    code.write_text(code.read_text().replace("partial: float = 0.2", "partial: float = 0.3"))
    assert cli("rewards", "test", "my_reward.py").code == 1
    before = code.read_text()
    again = cli("rewards", "new", "my_reward")
    assert again == (2, "", "error: my_reward.py: exists already; choose another name\n")
    code.rename(here / "other.py")
    again = cli("rewards", "new", "my_reward")
    assert again == (2, "", "error: my_reward.cases.jsonl: exists already; choose another name\n")
    assert (here / "other.py").read_text() == before
    assert not code.exists()


@pytest.mark.parametrize(
    "name, why", [("my-reward", "cannot be the name"), ("length", "is the name of a shipped reward")]
)
def test_a_starter_needs_a_name_of_its_own(cli, here, name, why):
    ran = cli("rewards", "new", name)
    assert ran.code == 2
    assert why in ran.err
    assert list(here.iterdir()) == []


def test_a_reward_is_shown_with_what_its_options_mean(cli):
    shown = json.loads(cli("rewards", "show", "length", "--json").out)
    assert shown["options"]["scale"]["doc"] == "`scale` is in the same unit; null takes the target itself."
    assert (shown["range"], shown["version"], shown["source"]) == ([None, 0.0], "grpo-lab 0.1.0", "rewards/length.py")
    out = cli("rewards", "show", "accuracy").out
    assert "\n    needs the column answer\n    scores a completion\n    returns 0.0 to 1.0\n" in out
    assert cli("rewards", "show", "lenght").err == 'error: unknown reward "lenght"; did you mean "length"?\n'
