"""The README is the manual: what it shows is run, and what it lists is complete."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grpo_lab.cli import app
from grpo_lab.recipe.schema import RewardTerm
from grpo_lab.scoring import bind, discover
from grpo_lab.types import Completion, Example, Group

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHEAP = ("recipes ls", "rewards ls", "validate quickstart", "train quickstart --dry-run")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands() -> list[str]:
    lines = [line.split(" #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line.removeprefix("grpo-lab ") for line in lines if line.startswith("grpo-lab ")]


def test_made_parts_are_as_the_code_says():
    spec = importlib.util.spec_from_file_location("readme_parts", ROOT / "scripts" / "readme_parts.py")
    parts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parts)
    assert parts.with_parts(README) == README, "run scripts/readme_parts.py"


@pytest.mark.parametrize("command", CHEAP)
def test_cheap_commands_work(command, monkeypatch, tmp_path):
    assert command in commands()
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, shlex.split(command), catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.strip()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [command for command in commands() if command not in CHEAP])
def test_options_of_the_other_commands_exist(command):
    words = shlex.split(command)
    command_words = words[: 2 if words[0] in ("recipes", "rewards") else 1]
    help_text = CliRunner().invoke(app, [*command_words, "--help"], env={"COLUMNS": "200"}).stdout
    for option in (word for word in words[1:] if word.startswith("--")):
        assert option in help_text


def test_the_reward_shown_can_be_used(tmp_path):
    (code,) = blocks("python")
    file = tmp_path / "my_rewards.py"
    file.write_text(code)
    rewards = bind([RewardTerm(name="ends_with_period", options={"bonus": 2.0})], discover([file]))
    example = Example("e", "p", (1,), {})
    scores = rewards.score([Group(example, (Completion("Yes. ", (1,), True), Completion("No", (1,), True)))])
    assert scores.total.tolist() == [[2.0, 0.0]]


def test_files_it_names_exist():
    named = re.findall(r"`((?:grpo_lab|rewards|recipes|scripts|tests)/[\w/.-]+)`", README)
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert missing == []
