import json
import subprocess
import sys

import pytest

from grpo_lab.errors import CheckpointError, DiskError, RecipeError
from grpo_lab.tracking.run_folder import RunFolder, StageFolder


def create(path, *, recipe="name: toy\n", resolved="name: toy\nseed: 0\n", plugins=(), facts=None):
    return RunFolder.create(path, recipe_text=recipe, resolved_text=resolved, plugins=list(plugins), facts=facts or {})


def test_a_new_run_holds_its_recipe_its_plugins_and_what_it_ran_on(tmp_path):
    plugin = tmp_path / "my_rewards.py"
    plugin.write_text("def short(completion): return 1.0\n")
    package = tmp_path / "more"
    package.mkdir()
    (package / "long.py").write_text("x = 1\n")
    facts = {"seed": 3, "hashes": {"rewards": {"short": "abc"}}}
    with create(tmp_path / "runs" / "toy", plugins=[plugin, package], facts=facts) as run:
        assert (run.path / "recipe.yaml").read_text() == "name: toy\n"
        assert (run.path / "resolved.yaml").read_text() == "name: toy\nseed: 0\n"
        assert (run.path / "plugins" / "my_rewards.py").read_text() == plugin.read_text()
        assert (run.path / "plugins" / "more" / "long.py").read_text() == "x = 1\n"
        info = run.info()
    assert (info["status"], info["exact"], info["inexact_because"], info["seed"]) == ("running", True, [], 3)
    assert info["hashes"].keys() == {"recipe.yaml", "resolved.yaml", "plugins", "rewards"}
    assert info["hashes"]["plugins"].keys() == {"my_rewards.py", "more"}
    assert {"python", "torch", "transformers", "trl", "accelerate"} <= info["environment"]["versions"].keys()
    assert info["environment"]["num_threads"] >= 1
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["toy"]


def test_a_run_that_exists_is_refused_with_the_two_ways_on(tmp_path):
    create(tmp_path / "toy").close()
    before = (tmp_path / "toy" / "run.json").read_bytes()
    with pytest.raises(RecipeError) as error:
        create(tmp_path / "toy", recipe="name: other\n")
    assert str(error.value) == (f"{tmp_path}/toy: exists already; --resume continues it, --name starts another run")
    assert (tmp_path / "toy" / "run.json").read_bytes() == before


def test_an_empty_folder_may_become_a_run(tmp_path):
    (tmp_path / "toy").mkdir()
    with create(tmp_path / "toy") as run:
        assert run.info()["status"] == "running"


def test_a_run_that_cannot_be_made_leaves_nothing(tmp_path, disk_full_after):
    with disk_full_after(100), pytest.raises(DiskError, match="toy.*could not be written"):
        create(tmp_path / "toy", recipe="#" * 1000)
    for folder in ("x", "y"):
        (tmp_path / "src" / folder).mkdir(parents=True)
        (tmp_path / "src" / folder / "a.py").write_text("")
    with pytest.raises(RecipeError, match='plugins: two are named "a.py"; rename one'):
        create(tmp_path / "toy", plugins=[tmp_path / "src/x/a.py", tmp_path / "src/y/a.py"])
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_kill_at_any_moment_leaves_no_run_or_a_whole_one(tmp_path, killed_at):
    for n in range(1, 200):
        path = tmp_path / str(n) / "toy"
        got_through = not killed_at(n, lambda path=path: create(path))
        if path.exists():
            with RunFolder.open(path) as run:
                assert run.info()["status"] == "running"
        if got_through:
            break
    assert got_through


def test_a_second_process_is_refused_and_told_who_uses_the_run(tmp_path):
    path = tmp_path / "toy"
    code = (
        "import os, sys, pathlib\n"
        "from grpo_lab.tracking.run_folder import RunFolder\n"
        "run = RunFolder.create(pathlib.Path(sys.argv[1]), recipe_text='', resolved_text='', plugins=[], facts={})\n"
        "print(os.getpid(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        pid = other.stdout.readline().strip()
        with pytest.raises(RecipeError) as error:
            RunFolder.open(path)
        assert str(error.value) == f"{path}: is in use by process {pid}; wait for it or stop it"
        assert error.value.exit_code == 3
    finally:
        other.kill()
        other.wait()
    with RunFolder.open(path) as run:  # the kill released it
        assert run.info()["status"] == "running"


def test_a_closed_run_may_be_opened_again_and_an_open_one_not(tmp_path):
    with create(tmp_path / "toy") as run, pytest.raises(RecipeError, match="is in use by process"):
        RunFolder.open(tmp_path / "toy")
    run.close()
    RunFolder.open(tmp_path / "toy").close()


def test_opening_what_is_no_run_is_refused_and_leaves_no_trace(tmp_path):
    with pytest.raises(RecipeError) as error:
        RunFolder.open(tmp_path)
    assert str(error.value) == f"{tmp_path}: there is no run here (run.json is missing)"
    assert list(tmp_path.iterdir()) == []


def test_status_and_reasons_for_inexactness_are_kept(run_folder):
    run_folder.mark_inexact("a reward timed out at step 3")
    run_folder.mark_inexact("a reward timed out at step 3")
    run_folder.mark_inexact("a micro-batch was halved at step 4")
    run_folder.set_status("interrupted")
    info = run_folder.info()
    assert (info["status"], info["exact"]) == ("interrupted", False)
    assert info["inexact_because"] == ["a reward timed out at step 3", "a micro-batch was halved at step 4"]


def test_another_thread_count_makes_a_resumed_run_inexact(run_folder):
    assert run_folder.compare_environment() == []
    assert run_folder.info()["exact"]
    info = run_folder.info()
    now = info["environment"]["num_threads"]
    info["environment"]["num_threads"] = 999
    (run_folder.path / "run.json").write_text(json.dumps(info))
    assert run_folder.compare_environment() == [f"num_threads: was 999, is now {now}"]
    assert run_folder.info()["inexact_because"] == [f"resumed elsewhere: num_threads: was 999, is now {now}"]


def test_a_resume_with_a_changed_recipe_or_reward_is_refused_with_the_difference(tmp_path):
    plugin = tmp_path / "p.py"
    plugin.write_text("a = 1\n")
    run = create(tmp_path / "toy", plugins=[plugin], facts={"hashes": {"rewards": {"r": "aa"}}})
    same = "name: toy\nseed: 0\n"
    run.refuse_changes(resolved_text=same, plugins=[plugin], hashes={"rewards": {"r": "aa"}})
    with pytest.raises(CheckpointError) as error:
        run.refuse_changes(resolved_text="name: toy\nseed: 1\n", plugins=[plugin], hashes={"rewards": {"r": "bb"}})
    assert str(error.value) == (
        f"{tmp_path}/toy: cannot be resumed, something changed since it began; undo it or start another run with "
        "--name:\n--- the run's recipe\n+++ the recipe now\n@@ -1,2 +1,2 @@\n name: toy\n-seed: 0\n+seed: 1\n"
        "rewards.r: was aa, is now bb"
    )
    assert error.value.exit_code == 7
    plugin.write_text("a = 2\n")
    with pytest.raises(CheckpointError, match=r"plugins\.p\.py: was [0-9a-f]{64}, is now [0-9a-f]{64}$"):
        run.refuse_changes(resolved_text=same, plugins=[plugin], hashes={"rewards": {"r": "aa"}})


def test_a_stage_has_its_places(run_folder):
    stage = run_folder.stage("warm_start")
    assert stage == StageFolder(run_folder.path / "warm_start")
    assert stage.rollout(12) == run_folder.path / "warm_start" / "rollouts" / "step-000012.jsonl"
    assert stage.evaluation(0) == run_folder.path / "warm_start" / "evaluations" / "step-000000.jsonl"
    assert sorted(path.name for path in stage.path.iterdir()) == ["checkpoints", "evaluations", "rollouts"]


@pytest.mark.parametrize("name", ["../evil", "a/b", "/abs", "..", "", ".hidden"])
def test_a_stage_cannot_leave_the_run_folder(run_folder, name):
    with pytest.raises(RecipeError) as error:
        run_folder.stage(name)
    assert str(error.value) == f'stages: "{name}" cannot be the name of a folder'


def test_no_secret_of_the_environment_is_written(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "s3cr3t-t0ken")
    with create(tmp_path / "toy") as run:
        run.stage("a")
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"s3cr3t-t0ken" not in path.read_bytes()
