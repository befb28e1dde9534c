"""What the tests of the data floor share: a small tokenizer, and rows from literal values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from grpo_lab.data.sources import Rows, load_rows
from grpo_lab.data.tokenizer import build_tokenizer
from grpo_lab.recipe.schema import Data


@pytest.fixture
def tokenizer():
    return build_tokenizer(["one and two is three"], vocab_size=270, split_digits=True)


@pytest.fixture
def bos_tokenizer():
    """Adds <|im_start|> as BOS in front of every text, as Llama's tokenizers do with theirs."""
    made = build_tokenizer([], vocab_size=260, split_digits=True)
    made.bos_token = "<|im_start|>"
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    return made


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Rows]:
    """Writes rows to a file named d.jsonl and loads them; `load(rows, data)`."""

    def write_and_load(rows: list[dict[str, Any]], data: Data) -> Rows:
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_rows(data, root=tmp_path, seed=0)

    return write_and_load
