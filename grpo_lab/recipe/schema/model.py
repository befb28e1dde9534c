"""The policy: which model, which tokenizer, what of it learns."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from grpo_lab.recipe.schema.block import Block, PositiveInt

SHIPPED_TEMPLATES = ("chatml", "mistral", "llama3")


class TokenizerBuild(Block):
    """A byte-level BPE tokenizer with a chat template, trained on the text of the first stage's data."""

    vocab_size: Annotated[int, Field(ge=260)]
    """How many tokens: 256 bytes, the special tokens, and as many merges as remain."""
    split_digits: bool = True
    """Whether every digit is a token of its own, which helps arithmetic."""


class Lora(Block):
    """Learn low-rank updates beside frozen weights (LoRA, arXiv:2106.09685) through peft."""

    r: PositiveInt = 16
    """The rank of an update."""
    alpha: PositiveInt = 32
    """An update is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before an update, in supervised stages; GRPO learns without."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the model learn too."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """The layers with an update: names as in the model, or every linear layer but the output head."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)."""
    dora: bool = False
    """Learn the size of every output beside its direction (DoRA, arXiv:2402.09353)."""


class Quantization(Block):
    """Keep the frozen weights in 4 bits (bitsandbytes); they cannot learn, so this goes with `lora`."""

    type: Literal["nf4", "fp4"] = "nf4"
    """The 16 values that a weight may take, before scaling: of a normal distribution, or floating-point."""
    double_quant: bool = True
    """Quantize the scales as well."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """The type of the products; null = the model's dtype."""


class StageModel(Block):
    """What a stage changes of the recipe's model block; the loader fills what is not written from there."""

    lora: Lora | None = None
    """Learn an adapter; null = all weights. An adapter that the stage starts from goes on, if its settings are these."""
    quantization: Quantization | None = None
    """Keep the frozen weights in 4 bits; null = not."""

    @model_validator(mode="after")
    def _quantized_weights_do_not_learn(self) -> "StageModel":
        return quantized_with_lora(self)


class Model(Block):
    """The policy: a pretrained model (`path`) or a new one (`config` with `tokenizer`)."""

    path: str | None = None
    """A local folder or a hub id."""
    revision: str | None = None
    """The hub revision (branch, tag or commit) of `path`."""
    config: dict[str, Any] | None = None
    """A transformers config for a new model: `model_type` and its settings; vocab_size comes from the tokenizer."""
    tokenizer: str | TokenizerBuild | None = None
    """A folder or hub id, or how to build one; null takes the model's own."""
    chat_template: str | None = None
    """`chatml`, `mistral`, `llama3`, or a file with a Jinja template; null takes the tokenizer's own (built: chatml)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of weights and computation. Where all weights learn, bfloat16 rounds away steps below 1/256 of a weight."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Which attention implementation transformers uses."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Whether Python code that lies in the model's repository may run."""
    lora: Lora | None = None
    """Learn an adapter instead of all weights; a stage may say otherwise."""
    quantization: Quantization | None = None
    """Keep the frozen weights in 4 bits; a stage may say otherwise."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Model":
        if (self.path is None) == (self.config is None):
            raise ValueError("give either path (a pretrained model) or config (a new one)")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("a model made from config needs a tokenizer: a path, or {vocab_size: ...} to build one")
        own = self.chat_template is not None and self.chat_template not in SHIPPED_TEMPLATES
        if isinstance(self.tokenizer, TokenizerBuild) and own:
            raise ValueError(
                f"a built tokenizer has the tokens of one of the templates {', '.join(SHIPPED_TEMPLATES)}; name one"
            )
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs model_type, for example llama or qwen2")
        return quantized_with_lora(self)


M = TypeVar("M", Model, StageModel)


def quantized_with_lora(block: M) -> M:
    """Refuse 4-bit weights without an adapter."""
    if block.quantization is not None and block.lora is None:
        raise ValueError("quantization: weights in 4 bits cannot learn; add lora, or set quantization: null")
    return block
