"""A wheel, built and installed elsewhere, works without the checkout."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("build")
pytest.importorskip("hatchling")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    with (target / "grpo_lab" / "_bundled" / "recipes" / "quickstart.yaml").open("a") as recipe:
        recipe.write("# the installed one\n")  # so that it cannot be taken for the checkout's
    return target


@pytest.fixture
def run(installed, tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `grpo-lab` as installed, from a folder that has nothing to do with the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, str(installed / "bin" / "grpo-lab"), *arguments]
        return subprocess.run(program, capture_output=True, text=True, env=environment, cwd=tmp_path)

    return command


def names(folder: str, pattern: str) -> set[str]:
    return {path.name for path in (ROOT / folder).glob(pattern)}


def test_a_wheel_holds_the_package_its_recipes_and_its_rewards_and_nothing_else(wheel):
    files = zipfile.ZipFile(wheel).namelist()
    bundled = {name.removeprefix("grpo_lab/_bundled/") for name in files if name.startswith("grpo_lab/_bundled/")}
    recipes = names("recipes", "*.yaml") | {"CORRECTIONS.md"}
    assert bundled == {f"recipes/{name}" for name in recipes} | {f"rewards/{name}" for name in names("rewards", "*.py")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "grpo_lab").rglob("*.py")}
    templates = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "grpo_lab" / "data" / "templates").glob("*.jinja")
    }
    assert len(templates) == 3
    assert {name for name in files if not name.startswith("grpo_lab/_bundled/")} - modules - templates == {
        f"grpo_lab-{wheel.name.split('-')[1]}.dist-info/{name}"
        for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")
    }
    assert modules | templates <= set(files)


def test_installed_elsewhere_it_lists_its_own_recipes(run, installed):
    done = run("recipes", "ls")
    assert (done.returncode, done.stderr) == (0, "")
    assert {line.split()[0] for line in done.stdout.splitlines()} == {
        name.removesuffix(".yaml") for name in names("recipes", "*.yaml") if not name.startswith("_")
    }
    shown = run("recipes", "show", "quickstart").stdout
    assert shown == (ROOT / "recipes" / "quickstart.yaml").read_text() + "# the installed one\n"


def test_installed_elsewhere_it_lists_its_own_rewards(run):
    done = run("rewards", "ls")
    assert (done.returncode, done.stderr) == (0, "")
    listed = {line.partition(":")[0] for line in done.stdout.splitlines() if not line.startswith(" ")}
    assert listed == {name.removesuffix(".py") for name in names("rewards", "*.py") if not name.startswith("_")}


def test_installed_elsewhere_the_quickstart_is_fine(run, tmp_path):
    done = run("validate", "quickstart")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "quickstart: fine"), done.stderr
    assert list(tmp_path.iterdir()) == []
