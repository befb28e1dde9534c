"""Faults put into whole runs, and what must come of them (exit codes: 3 recipe or data, 4 machine, 5 rewards, 6 numbers,
8 disk). Faults of single parts are tested beside those parts; kills and stops in test_resume.py."""

import itertools
import json
import resource
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch

from grpo_lab.tracking.environment import PACKAGES
from grpo_lab.tracking.files import read_json, read_jsonl
from grpo_lab.tracking.folders import read_manifest
from grpo_lab.types import Batch

# GRPO from random weights and nothing else: 8 completions a step.
RECIPE = """\
name: faulty
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
           num_key_value_heads: 1, max_position_embeddings: 64, tie_word_embeddings: true}
  tokenizer: {vocab_size: 280}
stages:
  grpo:
    kind: grpo
    data: {source: task, path: addition, prompt: prompt, answer: {column: answer}, options: {digits: 1, size: 10}}
    sampling: {num_generations: 4, max_completion_length: 6}
    rewards:
      - {name: length, options: {target: 3}}
    algorithm: {beta: 0.0}
    prompts_per_step: 2
    steps: 2
    optimizer: {learning_rate: 1.0e-3}
    checkpoint: {every: 1, keep: 9}
"""
DATA = "data: {source: task, path: addition, prompt: prompt, answer: {column: answer}, options: {digits: 1, size: 10}}"
LENGTH = "{name: length, options: {target: 3}}"


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "faulty.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def train(cli, recipe) -> Callable[..., Any]:
    """`grpo-lab train` on the recipe as it is now; runs are made in `runs` beside it."""
    return lambda *arguments: cli("train", recipe, "--output-dir", recipe.parent / "runs", "--quiet", *arguments)


@pytest.fixture
def with_reward(recipe) -> Callable[..., None]:
    """Make the recipe's only reward the plugin function `fault`, whose source is given."""

    def write(source: str) -> None:
        code = f"from grpo_lab.scoring import reward\n\n{dedent(source)}"
        (recipe.parent / "plugin.py").write_text(code)
        text = RECIPE.replace("model:\n", "plugins: [./plugin.py]\nmodel:\n", 1).replace(LENGTH, "{name: fault}")
        recipe.write_text(text)

    return write


@pytest.fixture
def run(recipe) -> Path:
    return recipe.parent / "runs" / "faulty"


def status(run: Path) -> str:
    return read_json(run / "run.json")["status"]


def newest(run: Path) -> str:
    return max(path.name for path in (run / "grpo" / "checkpoints").iterdir())


# Bad input gets a clear error, and nothing is half-written.


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("beta: 0.0", "betta: 0.0", ':13:17: stages.grpo.algorithm.betta: unknown key; did you mean "beta"?'),
        ("steps: 2", "steps: many", ":15:5: stages.grpo.steps: input should be a valid integer, got many"),
        (
            "num_generations: 4",
            "num_generations: 1",
            ":10:16: stages.grpo.sampling.num_generations: input should be greater than or equal to 2, got 1",
        ),
        (
            "size: 10}}",
            "size: 1}}",
            ":9:5: stages.grpo.data: a step needs 2 prompts, the data has 1",
        ),
        (
            "max_completion_length: 6",
            "max_completion_length: 60",
            ":7:3: stages.grpo: addition-train-0: the prompt has 12 tokens; with max_completion_length 60 that is more "
            "than the model's context of 64",
        ),
        ("name: length", "name: lenght", ':12:10: stages.grpo.rewards[0].name: unknown reward "lenght"; did you mean "length"?'),
        (
            "name: faulty",
            "name: ../evil",
            ':1:1: name: "../evil" is no name; it should match ^[A-Za-z0-9][A-Za-z0-9_.-]*$',
        ),
        (
            "  grpo:\n",
            "  base:\n",
            ':7:3: stages.base: "base" is a folder of every run; give the stage another name',
        ),
        ("prompt: prompt", "prompt: question", ':9:42: stages.grpo.data.prompt: column "question" is not in the data; known: '
         "prompt, completion, answer"),
        ("model:\n", "plugins: [./nowhere.py]\nmodel:\n", ":2:1: plugins: no file or folder {folder}/nowhere.py"),
    ],
    ids=[
        "unknown key",
        "wrong type",
        "group of one",
        "fewer prompts than a step needs",
        "prompt longer than the context",
        "unknown reward",
        "name outside the folder",
        "stage with a taken name",
        "unknown column",
        "missing plugin",
    ],
)  # fmt: skip
def test_a_bad_recipe_exits_3_with_its_place_and_leaves_nothing(train, recipe, old, new, message):
    assert RECIPE.count(old) == 1
    recipe.write_text(RECIPE.replace(old, new))
    ran = train()
    assert (ran.code, ran.out) == (3, "")
    lines = ran.err.splitlines()
    assert lines[0] == f"error: {recipe}{message.replace('{folder}', f'{recipe.parent}')}"
    assert [path.name for path in recipe.parent.iterdir()] == ["faulty.yaml"]


@pytest.mark.parametrize(
    "rows, data, message",
    [
        ([], "answer: {column: answer}", ":9:26: stages.grpo.data.path: rows.jsonl has no rows: 0 in all"),
        (
            [{"prompt": "1+1="}] * 3,
            "answer: {column: answer}",
            ':9:69: stages.grpo.data.answer.column: column "answer" is not in the data; known: prompt',
        ),
        (
            [{"prompt": "1+1=", "answer": "#### 2"}, {"prompt": "1+2=", "answer": "three"}],
            "answer: {column: answer, extract: hash}",
            ':7:3: stages.grpo: rows.jsonl, row 1 (from 0): data.answer: extract: hash finds nothing in "answer": \'three\'',
        ),
        (
            [{"prompt": "1+1="}, {"prompt": "1+2=" * 20}],
            "limit: 9",
            ":7:3: stages.grpo: rows-1: the prompt has 88 tokens; with max_completion_length 6 that is more than the "
            "model's context of 64",
        ),
        (
            [{"prompt": "1+1="}, {"prompt": " "}],
            "limit: 9",
            ":7:3: stages.grpo: rows.jsonl, row 1 (from 0): data.prompt: the text is empty",
        ),
    ],
    ids=["empty", "missing answer column", "answer that does not parse", "long prompt", "empty prompt"],
)  # fmt: skip
def test_bad_data_exit_3_with_the_row_and_leave_nothing(train, recipe, rows, data, message):
    (recipe.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.write_text(RECIPE.replace(DATA, f"data: {{source: file, path: rows.jsonl, prompt: prompt, {data}}}"))
    ran = train()
    assert (ran.code, ran.out, ran.err) == (3, "", f"error: {recipe}{message}\n")
    assert sorted(path.name for path in recipe.parent.iterdir()) == ["faulty.yaml", "rows.jsonl"]


def test_a_reward_whose_column_the_data_lack_exits_3(train, recipe):
    (recipe.parent / "rows.jsonl").write_text('{"prompt": "1+1=", "solution": "2"}\n' * 3)
    text = RECIPE.replace(DATA, "data: {source: file, path: rows.jsonl, prompt: prompt}")
    recipe.write_text(text.replace(LENGTH, "{name: accuracy}"))
    ran = train()
    assert (ran.code, ran.err) == (
        3,
        f'error: {recipe}:12:9: stages.grpo.rewards[0]: "accuracy" needs a dataset column "answer"; the data has: prompt, '
        "solution\n",
    )
    assert not (recipe.parent / "runs").exists()


def test_chat_data_without_a_chat_template_exits_3_with_both_ways_out(train, recipe, tokenizer):
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    bare.save_pretrained(recipe.parent / "bare")
    recipe.write_text(RECIPE.replace("{vocab_size: 280}", "./bare"))
    ran = train()
    assert (ran.code, ran.err) == (
        3,
        f"error: {recipe}:2:1: model: the tokenizer has no chat template: set model.chat_template: chatml, or data.chat: "
        "false\n",
    )
    assert not (recipe.parent / "runs").exists()


@pytest.mark.parametrize(
    "source, cause",
    [
        ("def fault(completion)\n    return 1.0\n", "3: SyntaxError: expected ':'"),
        ("import a_package_that_is_missing\n", "3: ModuleNotFoundError: No module named 'a_package_that_is_missing'"),
        ("@rewrad\ndef fault(completion):\n    return 1.0\n", "3: NameError: name 'rewrad' is not defined"),
    ],
)
def test_an_unreadable_plugin_exits_3_with_the_real_cause_and_its_line(train, recipe, with_reward, source, cause):
    with_reward(source)
    ran = train()
    assert (ran.code, ran.err) == (3, f"error: {recipe}:2:1: plugins: {recipe.parent}/plugin.py:{cause}\n")
    assert not (recipe.parent / "runs").exists()


def test_every_problem_is_reported_at_once(train, recipe):
    (recipe.parent / "rows.jsonl").write_text('{"prompt": "1+1="}\n')
    text = RECIPE.replace(DATA, "data: {source: file, path: gone.jsonl, prompt: prompt}")
    text += "    evaluation: {data: {source: task, path: additoin, prompt: prompt}}\n"
    recipe.write_text(text.replace("name: length", "name: lenght").replace("model:", "plugins: [./gone.py]\nmodel:"))
    places = [
        line.removeprefix("error: ").removeprefix(f"{recipe}:").split(": ")[1] for line in train().err.splitlines()
    ]
    assert places == ["plugins", "stages.grpo.data.path", "stages.grpo.evaluation.data.path"]


# Rewards


FAILS_ONCE_IN_EIGHT = """
calls = []

@reward
def fault(completion):
    calls.append(completion)
    if len(calls) % 8 == 3:
        raise ZeroDivisionError("oops")
    return float(len(completion.token_ids) + len(calls) % 2)
"""


def test_a_reward_that_fails_once_in_eight_is_counted_and_the_run_goes_on(train, run, with_reward):
    with_reward(FAILS_ONCE_IN_EIGHT)
    ran = train()
    assert (ran.code, ran.err) == (0, "")
    for line in read_jsonl(run / "grpo" / "metrics.jsonl"):
        assert (line["lab/failed/fault"], line["lab/unscored"]) == (0.125, 0.125)
        assert line["grad_norm"] > 0
    rows = read_jsonl(run / "grpo" / "rollouts" / "step-000001.jsonl")
    assert [row["status"]["fault"] for row in rows] == ["ok", "ok", "error", *["ok"] * 5]
    assert [row["total"] is None for row in rows] == [False, False, True, *[False] * 5]
    assert rows[2]["terms"] == {"fault": None}


@pytest.mark.parametrize(
    "fault, status",
    [("time.sleep(60)", "timeout"), ("sum(range(10**12))", "timeout"), ("os._exit(1)", "crashed")],
)
def test_a_reward_that_hangs_or_dies_once_in_eight_is_counted_and_the_run_goes_on(
    train, run, with_reward, fault, status
):
    with_reward(
        f"""
        import os, pathlib, time

        @reward
        def fault(completion):
            calls = pathlib.Path({str(run.parent.parent / "calls")!r})  # a module's own counter dies with its process
            calls.open("a").write(".")
            if len(calls.read_text()) == 3:
                {fault}
            return float(len(completion.text))
        """
    )
    ran = train("stages.grpo.reward_timeout_seconds=1")
    assert (ran.code, ran.err) == (0, "")
    rows = read_jsonl(run / "grpo" / "rollouts" / "step-000001.jsonl")
    assert [row["status"]["fault"] for row in rows] == ["ok", "ok", status, *["ok"] * 5]
    assert [line["lab/failed/fault"] for line in read_jsonl(run / "grpo" / "metrics.jsonl")] == [0.125, 0.0]
    because = ['reward "fault" was stopped at its deadline'] if status == "timeout" else []
    assert read_json(run / "run.json")["inexact_because"] == because


def test_a_reward_s_state_is_a_part_of_the_checkpoint(train, recipe, run, monkeypatch):
    monkeypatch.syspath_prepend(recipe.parent)
    (recipe.parent / "with_state.py").write_text(
        dedent(
            """
            class Counter:
                def __init__(self): self.calls = 0
                def __call__(self, completions, **kwargs):
                    self.calls += len(completions)
                    return [self.calls + len(each) / 7 for each in completions]
                def state_dict(self): return {"calls": self.calls}
                def load_state_dict(self, state): self.calls = state["calls"]

            counter = Counter()
            """
        )
    )
    recipe.write_text(RECIPE.replace(LENGTH, "{name: with_state.counter}"))
    assert train().code == 0
    assert read_json(run / "run.json")["exact"] is True
    metrics = (run / "grpo" / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "grpo" / "checkpoints" / "step-000002")  # as if it had been killed before the last save
    shutil.rmtree(run / "grpo" / "final")
    (run / "grpo" / "result.json").unlink()
    assert train("--resume").code == 0
    assert (run / "grpo" / "metrics.jsonl").read_bytes() == metrics


CODE = "{name: code, options: {%s}}"


def test_code_runs_only_where_the_recipe_allows_it(train, recipe, run, monkeypatch):
    (recipe.parent / "rows.jsonl").write_text('{"prompt": "def f(x):", "test": "f(1)", "entry_point": "f"}\n' * 3)
    text = RECIPE.replace(DATA, "data: {source: file, path: rows.jsonl, prompt: prompt}")
    recipe.write_text(text.replace(LENGTH, CODE % ""))
    ran = train()
    assert (ran.code, ran.err) == (
        3,
        f'error: {recipe}:12:9: stages.grpo.rewards[0]: "code" runs programs that the model wrote; say so with options: '
        "{allow_code_execution: true}\n",
    )
    recipe.write_text(text.replace(LENGTH, CODE % "allow_code_execution: true, minimum_isolation: no-network"))
    monkeypatch.setattr("grpo_lab.sandbox.isolation", lambda: ("limits-only", "a test"))
    ran = train()
    assert ran.code == 4
    assert 'only as "limits-only" here, less than the "no-network" asked for (a test)' in ran.err
    assert not run.exists()
    monkeypatch.undo()
    recipe.write_text(text.replace(LENGTH, CODE % "allow_code_execution: true, minimum_isolation: limits-only"))
    assert train().code == 0
    said = [line["message"] for line in read_jsonl(run / "grpo" / "events.jsonl")]
    assert said[0].startswith('reward "code" runs programs that the model wrote; their isolation: ')


def test_a_reward_that_always_fails_exits_5_with_the_cause_and_the_examples(train, run, with_reward):
    with_reward(
        """
        @reward
        def fault(completion):
            return 1 / 0
        """
    )
    ran = train()
    saved = run / "grpo" / "failed_completions.json"
    assert (ran.code, ran.out) == (5, "")
    assert ran.err == (
        'error: reward "fault": 8 of 8 completions could not be scored (max_failed_rewards: 0.25); the first: reward "fault" '
        "raised ZeroDivisionError: division by zero (plugin.py:6) for example addition-train-5, completion 0; saved to "
        f"{saved}\n"
    )
    assert status(run) == "failed"
    assert len(json.loads(saved.read_text())["completions"]) == 8
    assert not list((run / "grpo" / "checkpoints").iterdir())


def test_a_reward_repaired_after_it_stopped_the_run_needs_another_name(train, with_reward):
    """Its source is part of the run: to go on with another one would be two runs under one name."""
    with_reward("@reward\ndef fault(completion):\n    return None + 1\n")
    assert train().code == 5
    with_reward("@reward\ndef fault(completion):\n    return 1\n")
    assert train("--resume").code == 7
    assert train("--name", "repaired").code == 0


def test_values_that_are_no_numbers_never_reach_the_advantages(train, run, with_reward):
    with_reward(
        """
        import itertools

        odd = itertools.cycle([float("nan"), float("inf"), 1e38, "1.0", 1.0, 0.0, 2, True])

        @reward
        def fault(completion):
            return next(odd)
        """
    )
    assert train("stages.grpo.max_failed_rewards=0.5").code == 0
    (line, _) = read_jsonl(run / "grpo" / "metrics.jsonl")
    assert line["reward"] == pytest.approx((1.0 + 0.0 + 2.0 + 1.0) / 4)
    assert (line["lab/failed/fault"], line["lab/unscored"]) == (0.5, 0.5)
    rows = read_jsonl(run / "grpo" / "rollouts" / "step-000001.jsonl")
    assert [row["status"]["fault"] for row in rows] == [*["non_finite"] * 3, "bad_type", *["ok"] * 4]


def test_a_reward_that_abstains_is_no_failure(train, run, with_reward):
    with_reward("@reward\ndef fault(completion):\n    return None\n")
    assert train().code == 0
    (line, _) = read_jsonl(run / "grpo" / "metrics.jsonl")
    assert (line["lab/failed/fault"], line["lab/unscored"], line["loss"], line["grad_norm"]) == (0.0, 1.0, 0.0, 0.0)
    assert "reward" not in line


def test_a_batched_reward_of_the_wrong_length_exits_5_with_both_numbers(train, run, with_reward):
    with_reward("@reward\ndef fault(completions, **kwargs):\n    return [1.0] * 7\n")
    ran = train()
    assert (ran.code, ran.err) == (
        5,
        'error: reward "fault" returned 7 values for 8 completions; it must return one for each, None where it does not '
        "apply\n",
    )
    assert status(run) == "failed"


def test_a_reward_that_fails_on_held_out_answers_is_said(train, recipe, run, with_reward):
    with_reward("@reward\ndef fault(completion, *, answer):\n    return 1.0 if int(answer) < 100 else 1 / 0\n")
    with recipe.open("a") as file:
        file.write(
            "    evaluation:\n      data: {source: task, path: addition, split: test, prompt: prompt, answer: {column: answer}, "
            "options: {digits: 2, size: 9}}\n"
        )
    ran = train()
    assert (ran.code, ran.out) == (5, "")
    assert 'reward "fault": ' in ran.err
    assert "raised ZeroDivisionError: division by zero (plugin.py:5) for example addition-test-" in ran.err


# Groups that teach nothing


def events(run: Path) -> list[tuple[int, str]]:
    """What a person must see."""
    lines = read_jsonl(run / "grpo" / "events.jsonl")
    return [(event["step"], event["message"]) for event in lines if event["kind"] != "info"]


def test_a_constant_reward_is_advised_about_after_ten_steps_once(train, run, with_reward):
    with_reward("@reward\ndef fault(completion):\n    return 1.2\n")
    ran = train("stages.grpo.steps=21")
    assert ran.code == 0
    ((step, message),) = events(run)
    assert step == 10
    assert message.startswith(
        "10 steps in a row: all completions of every group got the same reward, so nothing was learnt. "
    )
    assert ran.err == f"grpo advice at step 10: {message}\n"
    lines = read_jsonl(run / "grpo" / "metrics.jsonl")
    assert {line["frac_reward_zero_std"] for line in lines} == {1.0}
    assert {(line["loss"], line["grad_norm"]) for line in lines} == {(0.0, 0.0)}
    manifests = [read_manifest(path) for path in (run / "grpo" / "checkpoints").iterdir()]
    assert len({manifest["model.safetensors"]["sha256"] for manifest in manifests}) == 1  # the weights never moved


def test_all_completions_truncated_is_advised_about_and_divides_by_nothing(train, recipe, run):
    recipe.write_text(RECIPE.replace("name: length, options: {target: 3}", "name: length, options: {unit: characters}"))
    # of 270 tokens, the model's random weights hardly ever choose the one that ends an answer
    ran = train("stages.grpo.steps=11", "stages.grpo.sampling.max_completion_length=1", "seed=3")
    assert ran.code == 0
    lines = read_jsonl(run / "grpo" / "metrics.jsonl")
    assert {line["completions/clipped_ratio"] for line in lines} == {1.0}
    assert all("completions/mean_terminated_length" not in line for line in lines)
    assert all(line["loss"] == line["loss"] for line in lines)
    assert [message.partition(". ")[0] for step, message in events(run) if step == 10] == [
        "10 steps in a row: every completion was cut off by the length limit"
    ]


# Numbers


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """From the second step on, advantages are nan."""
    original = vars(sys.modules["grpo_lab.engines.native"])["with_advantages"]
    steps = itertools.count(1)

    def with_advantages(*arguments: Any) -> Batch:
        batch = original(*arguments)
        assert batch.advantages is not None
        return batch if next(steps) == 1 else replace(batch, advantages=batch.advantages * float("nan"))

    monkeypatch.setattr("grpo_lab.engines.native.with_advantages", with_advantages)


def test_updates_that_are_not_finite_are_skipped_and_the_third_in_a_row_exits_6(train, run, poisoned):
    ran = train("stages.grpo.steps=9")
    assert (ran.code, ran.out) == (6, "")
    assert ran.err == (
        "error: 3 optimiser steps in a row had a loss or gradient that is not finite (the last: loss nan, gradient norm nan); "
        "the weights were left as they were. Lower optimizer.learning_rate, or look at the last rollouts.\n"
    )
    assert status(run) == "failed"
    lines = read_jsonl(run / "grpo" / "metrics.jsonl")
    assert [line["lab/skipped_updates"] for line in lines] == [0.0, 1.0, 1.0]
    checkpoints = [run / "grpo" / "checkpoints" / f"step-{step:06d}" for step in (1, 2, 3)]
    assert len({read_manifest(path)["model.safetensors"]["sha256"] for path in checkpoints}) == 1
    assert not (run / "grpo" / "final").exists()


def test_a_run_resumed_after_two_skipped_updates_still_stops_at_the_third(train, run, poisoned):
    assert train("stages.grpo.steps=9").code == 6
    assert newest(run) == "step-000003"
    assert train("stages.grpo.steps=9", "--resume").code == 6
    assert newest(run) == "step-000003"


def test_weights_that_are_not_finite_are_never_saved_and_exit_6(train, run):
    ran = train("stages.grpo.steps=9", "stages.grpo.optimizer={name: sgd, learning_rate: 1.0e38, weight_decay: 1.0e9}")
    assert ran.code == 6
    assert ran.err.startswith("error: checkpoint of step 4: model: model.")  # the first three steps have no signal
    assert ran.err.endswith("values that are not finite; nothing was written, the checkpoint before stays\n")
    assert newest(run) == "step-000003"


# The machine


def test_out_of_memory_exits_4_with_what_to_lower(train, run, monkeypatch):
    def too_much(batch, policy, reference, stage, ranks):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr("grpo_lab.engines.native.with_logps", too_much)
    ran = train()
    assert (ran.code, ran.err) == (
        4,
        "error: out of memory; lower micro_batch_size or sampling.max_rows. tried to allocate 20 GiB\n",
    )
    assert status(run) == "failed"


def test_a_model_that_is_computed_the_slow_way_is_told_once_and_the_run_goes_on(train, run):
    assert train("model.attention=eager").code == 0
    said = [line["message"] for line in read_jsonl(run / "grpo" / "events.jsonl") if "slower" in line["message"]]
    assert said == ["prompts and padding are computed for every row, several times slower: model.attention is eager"]


def test_out_of_memory_at_a_micro_batch_halves_it_and_the_run_says_so(train, run, monkeypatch):
    original = vars(sys.modules["grpo_lab.policy.forward"])["packed_forward"]

    def small(model, batch, *, temperature):
        if batch.num_rows > 4 and torch.is_grad_enabled():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return original(model, batch, temperature=temperature)

    monkeypatch.setattr("grpo_lab.policy.forward.packed_forward", small)
    assert train().code == 0
    said = [line["message"] for line in read_jsonl(run / "grpo" / "events.jsonl") if line["kind"] == "warning"]
    assert said[-1].startswith("out of memory: micro-batches of ")
    info = read_json(run / "run.json")
    assert info["exact"] is False
    assert info["inexact_because"][0].startswith("out of memory at step 1 of ")


def test_a_full_disk_exits_8_keeps_what_was_saved_and_the_run_goes_on_with_room(train, run, monkeypatch):
    """The kernel refuses files over 10 kB: logs still fit, the second step's checkpoint does not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = vars(sys.modules["grpo_lab.stages.running"])["save_checkpoint"]

    disks = iter([10_000])

    def fill_the_disk(*arguments, step, **options):
        if step == 2 and (size := next(disks, None)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        return save(*arguments, step=step, **options)

    monkeypatch.setattr("grpo_lab.stages.running.save_checkpoint", fill_the_disk)
    try:
        ran = train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    target = run / "grpo" / "checkpoints"
    assert ran.code == 8
    assert ran.err.startswith(f"error: {target}/step-000002: could not be written: ")
    assert ran.err.endswith("; what was saved before is intact: make room, then --resume\n")
    assert [path.name for path in target.iterdir()] == ["step-000001"]
    assert [line["step"] for line in read_jsonl(run / "grpo" / "metrics.jsonl")] == [1, 2]
    assert status(run) == "failed"
    assert train("--resume").code == 0
    assert [line["step"] for line in read_jsonl(run / "grpo" / "metrics.jsonl")] == [1, 2]


def test_a_tracker_that_cannot_start_is_switched_off_and_the_run_goes_on(train, run, monkeypatch):
    def no_server(**options: Any) -> None:
        raise ConnectionError("api.wandb.ai: no route to host")

    fake = types.SimpleNamespace(Settings=lambda **options: options, init=no_server)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    ran = train("tracking.wandb={project: p, mode: online}")
    message = "WandbSink failed and is switched off, the run goes on: ConnectionError: api.wandb.ai: no route to host"
    assert (ran.code, ran.err) == (0, f"grpo tracker_failed at step 1: {message}\n")
    assert events(run) == [(1, message)]
    assert [line["step"] for line in read_jsonl(run / "grpo" / "metrics.jsonl")] == [1, 2]
    assert status(run) == "finished"


# What a run says about itself


def test_run_json_says_what_the_run_was_made_of(train, recipe, run, with_reward):
    with_reward("@reward\ndef fault(completion):\n    return 1\n")
    assert train().code == 0
    info = read_json(run / "run.json")
    assert (info["status"], info["exact"], info["inexact_because"]) == ("finished", True, [])
    assert info["environment"]["versions"].keys() == {"python", *PACKAGES}
    assert info["environment"]["versions"]["torch"] == torch.__version__
    assert info["environment"]["num_threads"] == torch.get_num_threads()
    assert info["hashes"].keys() == {"recipe.yaml", "resolved.yaml", "plugins", "data", "rewards"}
    assert info["hashes"]["data"].keys() == {"stages.grpo"}
    assert info["hashes"]["rewards"].keys() == {"grpo.fault"}
    assert info["hashes"]["plugins"] == {"plugin.py": info["hashes"]["rewards"]["grpo.fault"]}


def test_no_token_of_the_environment_is_in_any_file(train, run, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "s3cr3t-t0ken")
    assert train().code == 0
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if b"s3cr3t-t0ken" in path.read_bytes()] == []


@pytest.mark.slow
def test_a_run_with_wandb_offline_needs_no_account_and_leaves_its_log(cli, recipe, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    folder = recipe.parent / "runs"
    ran = cli("train", recipe, "--output-dir", folder, "--quiet", "tracking.wandb={project: p}")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    logs = list((folder / "faulty").rglob("*.wandb"))
    assert len(logs) == 1
    assert b"train/reward" in logs[0].read_bytes()
    assert all(b"k" * 40 not in path.read_bytes() for path in folder.rglob("*") if path.is_file())
