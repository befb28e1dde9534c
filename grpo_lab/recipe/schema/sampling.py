"""How completions are drawn."""

from typing import Annotated, Literal

from pydantic import Field

from grpo_lab.recipe.schema.block import Block, Fraction, PositiveInt


class Sampling(Block):
    """How completions are drawn."""

    backend: Literal["auto", "native", "hf"] = "auto"
    """`native` is this project's decoding loop, `hf` is transformers' generate; auto = the engine's own."""
    num_generations: Annotated[int, Field(ge=2)]
    """G: completions per prompt."""
    max_completion_length: PositiveInt
    """The most tokens of a completion, EOS included."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Logits are divided by it, in sampling and in every log-prob of the loss."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with this probability mass; 1 = off."""
    top_k: PositiveInt | None = None
    """Sample from the k likeliest tokens; null = off."""
    min_p: Fraction = 0.0
    """Leave out tokens less likely than this share of the likeliest one; 0 = off."""
    max_rows: PositiveInt | None = None
    """The most completions decoded at once (bounds the KV cache); null = all of a step."""

    @property
    def truncates(self) -> bool:
        """Whether the sampled distribution is not the policy's own."""
        return self.top_p < 1 or self.top_k is not None or self.min_p > 0
