import platform
import subprocess
import sys

import pytest

from grpo_lab.errors import SetupError
from grpo_lab.recipe.schema import Wandb
from grpo_lab.tracking.wandb import WandbSink

OFFLINE_RUN = """
import pathlib, sys
from grpo_lab.recipe.schema import Wandb
from grpo_lab.tracking.wandb import WandbSink
from grpo_lab.types import StepEnd

sink = WandbSink(pathlib.Path(sys.argv[1]), name="toy", options=Wandb(project="p"), config={"seed": 7})
sink.step(StepEnd("warm_start", 1, 1, {"loss": 2.5}, {"step_seconds": 0.5}))
sink.evaluation("grpo", 0, {"reward": 0.125}, [])
sink.step(StepEnd("grpo", 1, 1, {"reward": 0.5}, {}))
sink.close()
sink.close()
"""


def test_wandb_works_offline_without_account_network_or_secrets(tmp_path):
    pytest.importorskip("wandb")
    nowhere = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "HTTP", "HTTPS")}
    environment = {"HOME": str(tmp_path / "home"), "HF_TOKEN": "s3cr3t-t0ken", "WANDB_API_KEY": "k" * 40, **nowhere}
    folder = tmp_path / "run"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE_RUN, str(folder)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    logs = list(folder.rglob("*.wandb"))
    assert len(logs) == 2  # one per stage
    content = b"".join(log.read_bytes() for log in logs)
    for name in (
        b"train/loss",
        b"train/reward",
        b"eval/reward",
        b"train/global_step",
        b"toy/warm_start",
        b"toy/grpo",
        b"not recorded",
    ):
        assert name in content
    for private in (platform.platform().encode(), b"proc.cpu"):  # where it ran, and what else ran there
        assert private not in content
    for path in folder.rglob("*"):
        if path.is_file():
            assert b"s3cr3t-t0ken" not in path.read_bytes()
            assert b"k" * 40 not in path.read_bytes()


def test_a_missing_wandb_is_named_with_its_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python does for a module that cannot be imported
    with pytest.raises(SetupError) as error:
        WandbSink(tmp_path, name="toy", options=Wandb(project="p"), config={})
    assert str(error.value) == 'tracking.wandb: "wandb" is not installed; pip install "grpo-lab[wandb]"'
    assert error.value.exit_code == 4
