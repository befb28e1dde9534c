"""What both benchmarks train on: a tokenizer of words, answers that end evenly, and the operations that learning needs."""

import math
from typing import Any


def word_tokenizer(vocabulary: int) -> Any:
    """One token for each of the words w1, w2, ...; token 0 ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, **{f"w{index}": index for index in range(1, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def end_evenly(model: Any, mean_length: float) -> None:
    """Give a new model with tied embeddings a constant probability of ending at each token.

    The first coordinate of every embedding is large and the same, and so, nearly, is that of every final state: more
    weight there gives the end token the same share at every place.
    """
    import torch

    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        vocabulary = len(embedding)
        embedding[:, 0] = 1.0
        states = model.model(torch.randint(1, vocabulary, (8, 128), device=embedding.device)).last_hidden_state
        embedding[0, 0] += math.log(vocabulary / mean_length) / states[..., 0].float().mean()


def needed_tflop(
    shape: dict[str, int], prompts: list[int], lengths: list[list[int]], *, adapter: bool = False
) -> float:
    """The trillion floating-point operations that learning needs: each prompt, token and logit once, forward and backward.

    Counted are matrix products, 2 operations a multiplication: the layers' weights for every token, queries with keys
    and probabilities with values for every pair that sees each other, the head for every token that is predicted from.
    Of all other tokens the last layer needs keys and values only. A backward pass costs twice the forward pass, beside
    frozen weights once; an adapter's own products are not counted.

    Args:
        shape: `hidden`, `mlp`, `layers`, `heads`, `kv_heads` and `vocab` of the model.
        prompts: the length of each prompt, and `lengths` those of the answers to it.
    """
    hidden, layers = shape["hidden"], shape["layers"]
    keys_and_values = 2 * hidden * shape["kv_heads"] * (hidden // shape["heads"])
    others = 2 * hidden**2 + 3 * hidden * shape["mlp"]
    tokens = sum(prompts) + sum(map(sum, lengths))
    predicted = sum(n - 1 for group in lengths for n in group) + len(prompts)
    weights = layers * keys_and_values * tokens + others * ((layers - 1) * tokens + predicted)
    head = hidden * shape["vocab"] * predicted
    answers = sum(prompt * n + n * n / 2 for prompt, group in zip(prompts, lengths, strict=True) for n in group)
    pairs = 2 * hidden * (layers * answers + sum((layers - 1) * n * n / 2 + n for n in prompts))
    return 2e-12 * ((2 if adapter else 3) * (weights + head) + 3 * pairs)
