"""A tiny model of a real architecture with random weights, to try a recipe for a real model without downloading it.

python scripts/stand_in.py qwen2 /tmp/stand-in
grpo-lab train recipes/qwen2.5-0.5b-gsm8k.yaml model.path=/tmp/stand-in --dry-run
"""

import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from grpo_lab.data.tokenizer import build_tokenizer

TEXT = ["Natalia sold clips to 48 of her friends in April. #### 72", "<answer>\n12\n</answer>"]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,  # multiples of 64, as 4-bit weights on a CPU need
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def stand_in(model_type: str, folder: Path) -> Path:
    """Write the model and a byte-level tokenizer with a chat template to `folder`, in the form the hub has."""
    tokenizer = build_tokenizer(TEXT, vocab_size=320, split_digits=True)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **SIZES, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    stand_in(sys.argv[1], Path(sys.argv[2]))
