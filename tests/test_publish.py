"""Model cards, and what is sent to the hub: against a small server that speaks the hub's API."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi
from rich.console import Console

from grpo_lab.assemble import assemble
from grpo_lab.card import model_card
from grpo_lab.checks import base_is_local
from grpo_lab.errors import RecipeError
from grpo_lab.finished import finished_stage, load_finished
from grpo_lab.pipeline import train_recipe
from grpo_lab.policy.load import load_policy, load_tokenizer, logits_gap
from grpo_lab.recipe import load
from grpo_lab.recipe.schema import Model
from grpo_lab.summary import summarise
from grpo_lab.tracking.files import read_json, read_jsonl, write_json

TOKEN = "hf_thisIsASecretOfTheTest"


@pytest.fixture(scope="module")
def run(tmp_path_factory, toy_text) -> Path:
    """A full warm start, then an adapter on it."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "toy.yaml").write_text(toy_text)
    changes = ["stages.warm_start.steps=1", "stages.grpo.steps=1", "stages.grpo.model={lora: {r: 2}}"]
    loaded = load(folder / "toy.yaml", [f"output_dir={folder}/runs", *changes])
    return train_recipe(loaded, toy_text, go_on=False, console=Console(file=io.StringIO()), quiet=True)


class Hub(ThreadingHTTPServer):
    """As much of the hub as a push needs. `received` holds what was sent; a repository is private if created so."""

    def __init__(self, *, private: bool | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.private = private  # None = the repository is not there yet
        self.tokens: set[str | None] = set()
        self.received: dict[str, bytes] = {}
        self.commits: list[str] = []  # their messages
        self.takes_commits = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.path == "/api/repos/create":
            there = self.server.private is not None
            if not there:
                asked = json.loads(body)
                self.server.private = asked.get("private") or asked.get("visibility") == "private"
            self.answer({"url": f"{self.server.address}/me/toy"}, 409 if there else 200)
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path and not self.server.takes_commits:
            self.answer({"error": "no more room"}, 403)
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.server.commits.append(line["value"]["summary"])
                if line["key"] == "file":
                    self.server.received[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.server.address}/me/toy/commit/1", "commitOid": "1"})
        else:  # the check of the card's front matter
            self.answer({"warnings": [], "errors": []})

    def do_GET(self) -> None:
        self.answer({"id": "me/toy", "private": self.server.private, "tags": [], "siblings": [], "downloads": 0})

    def answer(self, values: dict, status: int = 200) -> None:
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(hub: Hub) -> Iterator[None]:
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def command(hub: Hub, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`grpo-lab` in a process of its own: the hub's client reads its environment when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", "from grpo_lab.cli import main; main()"]
    with served(hub):
        return subprocess.run([*program, *words], capture_output=True, text=True, env=environment)


def push(hub: Hub, run: Path, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return command(hub, home, "push", str(run), "--repo", "me/toy", *options)


def test_a_push_sends_the_merged_model_and_its_card_to_a_private_repository(run, tmp_path):
    hub = Hub()
    ran = push(hub, run, tmp_path, "--merge", "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert hub.private is True
    assert (found["private"], found["kind"]) == (True, "merged")
    assert found["files"] == {name: len(content) for name, content in hub.received.items()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= hub.received.keys()
    assert "manifest.json" not in hub.received
    assert hub.tokens == {f"Bearer {TOKEN}"}
    written = [path for folder in (run, tmp_path) for path in folder.rglob("*") if path.is_file()]
    assert all(TOKEN.encode() not in content for content in hub.received.values())
    assert all(TOKEN.encode() not in path.read_bytes() for path in written)


def test_nothing_is_sent_to_a_public_repository_unasked(run, tmp_path):
    hub = Hub(private=False)
    ran = push(hub, run, tmp_path, "--merge")
    assert (ran.returncode, hub.received) == (2, {})
    assert "me/toy: is there and public; " in ran.stderr


def test_a_dry_run_lists_the_files_and_asks_nobody(cli, run):
    ran = cli("push", run, "--repo", "me/toy", "--merge", "--dry-run")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1].startswith("nothing was sent: ")
    assert re.search(r"^ +[\d,]+  model\.safetensors$", ran.out, re.MULTILINE)


def test_a_hub_that_cannot_be_reached_is_said_with_exit_code_4(run, cli, monkeypatch):
    from grpo_lab import publish

    monkeypatch.setattr(publish, "HfApi", partial(HfApi, endpoint="http://127.0.0.1:9", token=TOKEN))  # nobody listens
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    ran = cli("push", run, "--repo", "me/toy", "--merge")
    assert ran.code == 4
    assert ran.err.startswith("error: me/toy: the hub said no: ")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli("push", run, "--repo", "me/toy", "--merge").code == 4


def test_an_adapter_that_nobody_else_could_use_is_not_sent(cli, run):
    ran = cli("push", run, "--repo", "me/toy", "--dry-run")
    assert ran.code == 2
    assert "the adapter's base is a folder of this machine, so nobody could use it; add --merge" in ran.err


LORA = "stages.grpo.model={lora: {r: 2}}"
SHORT = ["stages.warm_start.steps=1", "stages.grpo.steps=3", "stages.grpo.evaluation=null"]


@pytest.fixture
def train(cli, monkeypatch, tmp_path, toy_text):
    """A function: a short run with `tracking.push`, against a hub. In this process, which costs fewer seconds."""

    def run(hub: Hub, push: str, *changes: str):
        from grpo_lab import publish

        monkeypatch.setattr(publish, "HfApi", partial(HfApi, endpoint=hub.address, token=TOKEN))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        (tmp_path / "toy.yaml").write_text(toy_text)
        words = [f"output_dir={tmp_path}/runs", f"tracking.push={push}", *SHORT, *changes]
        with served(hub):
            return cli("train", tmp_path / "toy.yaml", *words, "--quiet")

    return run


def messages(folder: Path) -> list[str]:
    return [line["message"] for line in read_jsonl(folder / "runs" / "toy" / "grpo" / "events.jsonl")]


@pytest.mark.parametrize("engine", ["native", "trl"])
def test_a_run_sends_its_checkpoints_and_at_the_end_its_final_model(train, tmp_path, engine):
    hub = Hub()
    ran = train(hub, "{repo: me/toy, merge: true}", LORA, f"stages.grpo.engine={engine}")
    assert ran.code == 0, ran.err
    assert hub.private is True
    assert hub.commits[0] == "grpo-lab: stage grpo of toy, step 1"
    assert hub.commits[-1] == "grpo-lab: stage grpo of toy"
    said = [message for message in messages(tmp_path) if message.startswith("me/toy: ")]
    assert said[-1] == f"me/toy: sent the finished model: {hub.address}/me/toy/commit/1"
    assert any(message.startswith("me/toy: sent step 1: ") for message in said)
    (tmp_path / "sent").mkdir()
    for name, content in hub.received.items():
        (tmp_path / "sent" / name).write_bytes(content)
    of = finished_stage(tmp_path / "runs" / "toy", "grpo")
    sent = load_policy(Model(path=str(tmp_path / "sent")), load_tokenizer(Model(path=str(of.final))), seed=0)
    assert logits_gap(load_finished(of), sent) < 1e-4
    assert "The run is not finished" not in hub.received["README.md"].decode()


def test_a_hub_that_takes_nothing_more_does_not_stop_a_run(train, tmp_path):
    hub = Hub()
    hub.takes_commits = False
    ran = train(hub, "{repo: me/toy}")
    assert ran.code == 0, ran.err
    assert "me/toy: the finished model was not sent: me/toy: the hub said no: " in ran.err
    assert any(message.startswith("me/toy: step 1 was not sent: ") for message in messages(tmp_path))
    assert read_json(tmp_path / "runs" / "toy" / "run.json")["status"] == "finished"


def test_a_repository_that_cannot_be_used_is_said_before_anything_is_trained(train, tmp_path):
    ran = train(Hub(private=False), "{repo: me/toy}")
    assert (ran.code, "me/toy: is there and public" in ran.err) == (2, True)
    assert not (tmp_path / "runs").exists()


def test_an_adapter_that_nobody_else_could_use_is_refused_in_a_recipe(toy_recipe):
    push = "tracking.push={repo: me/toy}"
    with pytest.raises(
        RecipeError, match="tracking.push.*: the last stage leaves an adapter on a model that only this"
    ):
        assemble(load(toy_recipe, [push, LORA]))
    with pytest.raises(RecipeError, match="tracking.push.*repo"):
        load(toy_recipe, ["tracking.push={repo: toy}"])


def test_a_base_is_local_if_this_machine_made_it(toy_recipe, tmp_path):
    def local(*changes: str) -> bool:
        return base_is_local(load(toy_recipe, list(changes)).recipe)

    hub_model = "model={path: Qwen/Qwen2-0.5B}"
    assert not local()  # no adapter
    assert local(LORA)
    assert local(hub_model, LORA)  # on the warm start's weights
    assert not local(hub_model, LORA, "stages.grpo.start_from=base")
    assert local(f"model={{path: {tmp_path}}}", LORA, "stages.grpo.start_from=base")
    assert not local(hub_model, LORA, "stages.warm_start.model={lora: {r: 2}}")  # one adapter through both stages


def test_the_card_of_a_run_in_progress_says_so(run, tmp_path):
    shutil.copytree(run, tmp_path / "toy")
    (tmp_path / "toy" / "grpo" / "result.json").unlink()
    shutil.rmtree(tmp_path / "toy" / "grpo" / "evaluations")
    write_json(tmp_path / "toy" / "run.json", {**read_json(run / "run.json"), "status": "running"})
    card = model_card(tmp_path / "toy", "grpo", kind="whole")
    assert "- The run is not finished: running." in card
    assert "| greedy/" not in card


def test_the_card_says_what_the_run_says(run):
    card = model_card(run, "grpo", kind="merged")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "transformers"
    hashes = read_json(run / "run.json")["hashes"]["data"]
    assert all(sha in card for sha in hashes.values())
    assert "- reward: `accuracy` x 1.0" in card
    assert "- reward: `length` x 0.1 (target: 8)" in card
    values = summarise(run)["stages"]["grpo"]["held_out"]["greedy/length"]
    cells = [
        f"{values[key]['mean']:.3f} [{values[key]['low']:.3f}, {values[key]['high']:.3f}]"
        for key in values
        if key != "num_prompts"
    ]
    assert f"| greedy/length | 10 | {' | '.join(cells)} |" in card
    assert "GRPO, 1 steps, LoRA (r 2, alpha 32)" in card
    assert "- One run with one seed" in card
    assert str(run.parent) not in card
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["stages"]["grpo"]["model"]["lora"]["r"] == 2
