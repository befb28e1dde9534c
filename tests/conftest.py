"""What tests share: shapes and types checked at run time, a tiny model with a real tokenizer, a toy recipe."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow a busy machine tenfold
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

from jaxtyping import install_import_hook

PACKAGE = Path(__file__).parents[1] / "grpo_lab"
# all but `kernels`: Triton compiles a function itself, and not what checks its arguments
CHECKED = sorted({path.stem for path in PACKAGE.iterdir()} - {"__init__", "__pycache__", "kernels"})
install_import_hook([f"grpo_lab.{name}" for name in CHECKED], "beartype.beartype")

import importlib.util  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterable  # noqa: E402
from functools import partial  # noqa: E402
from textwrap import dedent  # noqa: E402
from typing import NamedTuple  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

from grpo_lab.cli import main  # noqa: E402
from grpo_lab.data.tokenizer import build_tokenizer  # noqa: E402
from grpo_lab.policy.load import load_policy  # noqa: E402
from grpo_lab.recipe.schema import Model  # noqa: E402
from grpo_lab.types import Completion, Example, Group, Policy  # noqa: E402

CORPUS = ["12+34=", "<think>2+4=6 c0;1+3=4 c0</think>\n<answer>46</answer>"] * 20

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

TOY_RECIPE = """\
# A toy recipe for tests.
name: toy
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2, max_position_embeddings: 128, tie_word_embeddings: true}
  tokenizer: {vocab_size: 300}
stages:
  warm_start:
    kind: sft
    data: {source: task, path: addition, prompt: prompt, completion: completion, options: {digits: 1, size: 40}}
    batch_size: 8
    micro_batch_size: 3
    steps: 4
    optimizer: {learning_rate: 2.0e-3, schedule: linear, warmup_steps: 1}
    checkpoint: {every: 1, keep: 2}
    evaluation:
      data: {source: task, path: addition, split: test, prompt: prompt, completion: completion, options: {digits: 1}}
      every: 2
  grpo:
    kind: grpo
    data: {source: task, path: addition, prompt: prompt, answer: {column: answer}, options: {digits: 1, size: 10}}
    sampling: {num_generations: 4, max_completion_length: 12}
    rewards:
      - {name: accuracy}
      - {name: length, weight: 0.1, options: {target: 8}}
    algorithm: {beta: 0.04, num_iterations: 2, num_minibatches: 2}
    prompts_per_step: 4
    micro_batch_size: 5
    steps: 12
    optimizer: {learning_rate: 1.0e-3}
    checkpoint: {every: 1, keep: 2}
    evaluation:
      data: {source: task, path: addition, split: test, prompt: prompt, answer: {column: answer},
             options: {digits: 1}}
      every: 5
      num_samples: 2
"""


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(CORPUS, vocab_size=300, split_digits=True)


def make_policy(
    tokenizer, *, seed: int = 0, attention="sdpa", dtype="float32", gradient_checkpointing=False, **config
) -> Policy:
    """A policy with random weights, large enough that distributions are far from uniform."""
    settings = {"attention": attention, "dtype": dtype, "gradient_checkpointing": gradient_checkpointing}
    policy = load_policy(Model(config={**LLAMA, **config}, tokenizer="built", **settings), tokenizer, seed=seed)
    spread(policy.model.parameters(), 0.25, seed=seed)
    return policy


@torch.no_grad()
def spread(parameters: Iterable[torch.Tensor], std: float, *, seed: int = 0) -> None:
    """Random matrices in place of those that a new model has, whose distributions are nearly uniform."""
    torch.manual_seed(seed)
    for parameter in parameters:
        if parameter.ndim >= 2:
            parameter.normal_(0.0, std)


@pytest.fixture(scope="session", name="spread")
def _spread():
    return spread


@pytest.fixture
def tiny_policy(tokenizer) -> Policy:
    return make_policy(tokenizer)


def make_examples(tokenizer, prompts=("1+2=", "33+44=", "5+6=")) -> list[Example]:
    return [
        Example(f"p{i}", text, tuple(tokenizer(text)["input_ids"]), {"answer": str(i)})
        for i, text in enumerate(prompts)
    ]


def make_group(example: Example, rows: list[tuple[tuple[int, ...], bool]]) -> Group:
    return Group(example, tuple(Completion("", ids, finished) for ids, finished in rows))


@pytest.fixture(name="make_policy")
def _make_policy(tokenizer):
    return partial(make_policy, tokenizer)


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Lay out and decode as on a GPU, whose kernels plain torch stands in for."""
    from grpo_lab.attention import layout, varlen
    from grpo_lab.sampling import native, static

    spec = importlib.util.spec_from_file_location("gpu_stand_in", Path(__file__).with_name("gpu_stand_in.py"))
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    for module in (layout, native):
        monkeypatch.setattr(module, "on_gpu", lambda device: True)
    monkeypatch.setattr(varlen, "flash", stand_in.flash)
    monkeypatch.setattr(varlen, "flash_backward", stand_in.flash_backward)
    monkeypatch.setattr(static, "flash_cached", stand_in.flash_cached)


@pytest.fixture(name="make_examples")
def _make_examples(tokenizer):
    return partial(make_examples, tokenizer)


@pytest.fixture(name="make_group")
def _make_group():
    return make_group


@pytest.fixture(scope="session")
def toy_text() -> str:
    return dedent(TOY_RECIPE)


@pytest.fixture
def toy_recipe(tmp_path: Path, toy_text: str) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(toy_text)
    return path


class Ran(NamedTuple):
    """How a command ended, and what it wrote on standard output and standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """The command line, in this process: `cli("validate", "x.yaml").code`."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["grpo-lab", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return Ran(stop.value.code or 0, *capsys.readouterr())

    return run
