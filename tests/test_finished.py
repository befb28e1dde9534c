"""Exporting and asking a finished run: merged logits are the adapter's, and what is written loads with transformers."""

import io
import json
import os

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from grpo_lab.errors import CheckpointError
from grpo_lab.finished import export, finished_stage, load_finished
from grpo_lab.pipeline import train_recipe
from grpo_lab.policy.load import logits_gap
from grpo_lab.recipe import load

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module", params=["null", "{}"], ids=["plain", "4bit"])
def run(request, tmp_path_factory, toy_text):
    """A full stage, then an adapter with a large learning rate (beside 4-bit weights)."""
    if request.param == "{}":
        pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
    folder = tmp_path_factory.mktemp("world")
    (folder / "toy.yaml").write_text(toy_text)
    loaded = load(
        folder / "toy.yaml",
        [
            f"output_dir={folder}/runs",
            "model.config.hidden_size=64",
            "stages.warm_start.steps=2",
            "stages.grpo.steps=2",
            "stages.grpo.optimizer.learning_rate=0.05",
            "stages.grpo.rewards=[{name: length, options: {target: 3, unit: characters}}]",
            f"stages.grpo.model={{lora: {{r: 2, alpha: 2}}, quantization: {request.param}}}",
        ],
    )
    return train_recipe(loaded, toy_text, go_on=False, console=Console(file=io.StringIO()), quiet=True)


def test_a_merged_export_has_the_adapter_s_logits_and_no_adapter(run, tmp_path):
    of = finished_stage(run, None)
    found = export(of, tmp_path / "merged", merge=True, dtype=None)
    assert (found["kind"], found["dtype"]) == ("merged", "float32")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapter = load_finished(of)
    assert torch.allclose(merged(IDS).logits, adapter.model(IDS).logits, atol=1e-4)
    with torch.no_grad(), adapter.model.disable_adapter():
        assert not torch.allclose(merged(IDS).logits, adapter.model(IDS).logits, atol=1e-2)


def test_a_merged_export_in_bfloat16_is_rounded_once_at_the_end(run, tmp_path):
    of = finished_stage(run, "grpo")
    found = export(of, tmp_path / "merged", merge=True, dtype="bfloat16")
    exact = export(of, tmp_path / "exact", merge=True, dtype="float32")
    rounded, full = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("merged", "exact"))
    assert all(torch.equal(rounded[name], full[name].bfloat16()) for name in full)
    assert 0 < found["gap"] < 0.1
    assert exact["gap"] <= 1e-4


def test_an_adapter_is_exported_as_such(run, tmp_path):
    found = export(finished_stage(run, None), tmp_path / "adapter", merge=False, dtype=None)
    assert found["kind"] == "adapter"
    final = run / "grpo" / "final" / "adapter_model.safetensors"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == final.read_bytes()


def test_a_merge_that_changes_the_model_is_refused(run, tmp_path, monkeypatch):
    from grpo_lab import finished

    of = finished_stage(run, None)
    loads = finished.load_policy

    def merged_wrongly(model, tokenizer, **where):
        policy = loads(model, tokenizer, **where)
        if model.lora is None:
            with torch.no_grad():
                policy.model.model.layers[0].mlp.up_proj.weight.add_(0.1)
        return policy

    monkeypatch.setattr(finished, "load_policy", merged_wrongly)
    with pytest.raises(CheckpointError, match="the merged model is not the one with the adapter"):
        export(of, tmp_path / "merged", merge=True, dtype=None)
    assert not (tmp_path / "merged").exists()


def test_before_is_what_the_stage_began_with(run):
    of = finished_stage(run, "grpo")
    assert of.start == run / "warm_start" / "final"
    before = load_finished(of, before=True)
    began = AutoModelForCausalLM.from_pretrained(of.start)
    plain = load_finished(of, before=True, quantization=None)
    assert torch.equal(plain.model(IDS).logits, began(IDS).logits)
    assert logits_gap(before, load_finished(of)) > 1e-3
    assert finished_stage(run, "warm_start").start == run / "base"


def test_the_commands(run, cli, tmp_path, monkeypatch):
    found = json.loads(cli("sample", run, "1+2=", "--count", "3", "--compare", "--json").out)
    assert (len(found["before"]), len(found["after"])) == (3, 3)
    assert json.loads(cli("sample", run, "1+2=", "--count", "3", "--compare", "--json").out) == found
    shown = cli("sample", run, "1+2=", "--compare").out
    assert "before" in shown
    assert "after" in shown
    for options in ([], ["--compare"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("1+2=\n3+4=\n\n"))
        talked = cli("chat", run, *options)
        assert (talked.code, talked.out.count("before")) == (0, 2 * len(options))
    result = cli("export", run, "--merge", "--gguf", "--to", tmp_path / "out")
    assert result.code == 0
    assert f"convert_hf_to_gguf.py {tmp_path}/out --outfile {tmp_path}/out.gguf" in result.out.replace("\n", "")
    assert cli("export", run, "--gguf", "--to", tmp_path / "b").code == 2  # an adapter alone
    assert not (tmp_path / "b").exists()
    assert cli("export", run, "--merge", "--to", tmp_path / "out").code == 2  # exists
    assert cli("export", run, "--dtype", "float64", "--to", tmp_path / "b").code == 2
    assert cli("export", run, "--dtype", "bfloat16", "--to", tmp_path / "b").code == 2
    assert cli("sample", tmp_path, "x").code == 2
    assert cli("sample", run, "x", "--stage", "nothing").code == 2


@pytest.mark.parametrize("code", [0, 3])
def test_an_installed_converter_is_run_and_its_failure_is_said(run, cli, tmp_path, monkeypatch, code):
    program = tmp_path / "bin" / "convert_hf_to_gguf.py"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho no such architecture\nexit {code}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    ran = cli("export", run, "--merge", "--gguf", "--to", tmp_path / "out")
    assert (tmp_path / "asked").read_text() == f"{tmp_path}/out --outfile {tmp_path}/out.gguf\n"
    assert ran.code == (4 if code else 0)
    assert ("ended with exit code 3:\nno such architecture" in ran.err) == (code == 3)
    assert (tmp_path / "out" / "model.safetensors").is_file()
