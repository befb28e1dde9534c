"""Which models may be computed packed: those for which a small packed pass gives the logits of a plain one."""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_lab.attention.fused import fuse, unfuse
from grpo_lab.attention.interface import NAME, NotPackableError
from grpo_lab.attention.last_layer import cut, predicted_states
from grpo_lab.attention.layout import PackedBatch
from grpo_lab.attention.packed import PackedLayers
from grpo_lab.padding import length_mask, pad_left, pad_right
from grpo_lab.types import Batch

# How far logits may differ, as a share of the largest: what rounding makes of another order of sums.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}
_KINDS_OF_LAYERS = {"full_attention", "sliding_attention"}
_PROMPTS, _ANSWERS = (7, 4), ((0, 3), (0, 5), (1, 4))  # lengths, and (prompt, length): one shared prompt, one not

_verdicts: "WeakKeyDictionary[nn.Module, str]" = WeakKeyDictionary()


class Parts(NamedTuple):
    """A causal language model in two: what makes hidden states of tokens, and the linear layer that makes logits."""

    decoder: nn.Module
    head: nn.Linear


def parts(model: nn.Module) -> Parts:
    """The decoder and LM head of a transformers model, or of one that carries an adapter."""
    base: Any = model if isinstance(model, PreTrainedModel) else model.get_base_model()  # type: ignore[operator]
    return Parts(base.base_model, base.get_output_embeddings())


def why_plain(model: nn.Module) -> str | None:
    """Why a model cannot be computed packed, in words; None if it can. Tried once for each model.

    Trying sets the model's attention to ours, which is transformers' sdpa attention wherever nothing is packed.
    """
    if model not in _verdicts:
        _verdicts[model] = _try(model) or ""
    return _verdicts[model] or None


def _try(model: nn.Module) -> str | None:
    base: Any = model if isinstance(model, PreTrainedModel) else model.get_base_model()  # type: ignore[operator]
    config = base.config.get_text_config()
    device, dtype = base.device, base.dtype
    if device.type != "cpu":
        return f"the packed pass is written for the CPU, and the model is on {device.type}"
    if dtype not in _TOLERANCE:
        return f"its weights are {dtype}"
    if config._attn_implementation not in ("sdpa", NAME):
        return f"model.attention is {config._attn_implementation}"
    kinds = set(config.to_dict().get("layer_types") or ()) - _KINDS_OF_LAYERS
    if kinds or config.to_dict().get("attention_chunk_size"):
        return f"it has layers of another kind: {', '.join(sorted(kinds)) or 'chunked_attention'}"
    if type(base.get_output_embeddings()) is not nn.Linear:
        return f"its LM head is a {type(base.get_output_embeddings()).__name__}, not a plain linear layer"
    base.set_attn_implementation(NAME)
    reason = f"{config.model_type} does not let its attention be chosen"
    if config._attn_implementation == NAME:
        reason = _compared(model, base)
    if reason is not None:
        base.set_attn_implementation("sdpa")
        unfuse(base)
    return reason


@torch.no_grad()
def _compared(model: nn.Module, base: Any) -> str | None:
    """Compare packed and plain logits of a few tokens, with dropout off."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        batch = _small_batch(base.config.get_text_config().vocab_size)
        unfuse(base)  # a copy of a fused model
        theirs = torch.cat([_plain_logits(model, batch, row) for row in range(batch.num_rows)]).float()
        if base.dtype == torch.float32:
            fuse(base)
        decoder, head = parts(model)
        cut(decoder)
        packed = PackedBatch.of(batch)
        attending = PackedLayers(packed)
        ours = head(predicted_states(decoder, attending))[packed.logits_row].float()
        error, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
        if not attending.asked:
            return f"{base.config.model_type} computes attention by itself"
        # not <=, so that nan counts as different
        if not error <= _TOLERANCE[base.dtype] * size:
            return f"for {base.config.model_type} a packed pass gives other logits (by {error:.2g} of {size:.2g})"
    except (NotPackableError, TypeError, ValueError, RuntimeError) as error:  # also what a model makes of our keyword
        return f"a packed pass fails: {str(error).partition(chr(10))[0]}"
    finally:
        for module, mode in training.items():
            module.training = mode
    return None


def _small_batch(vocab_size: int) -> Batch:
    ids = iter(range(17, 17 + 1000, 7))

    def some(length: int) -> list[int]:
        return [next(ids) % vocab_size for _ in range(length)]

    prompt_ids, prompt_mask = pad_left([some(length) for length in _PROMPTS], 0)
    completions = [some(length) for _, length in _ANSWERS]
    return Batch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        prompt_index=torch.tensor([prompt for prompt, _ in _ANSWERS]),
        completion_ids=pad_right(completions, 0, torch.long),
        completion_mask=length_mask([len(row) for row in completions]),
    )


def _plain_logits(model: nn.Module, batch: Batch, row: int) -> Tensor:
    """The logits [n, V] that predict one row's n completion tokens, from a pass over that row alone."""
    prompt = int(batch.prompt_index[row])
    answer = batch.completion_ids[row][batch.completion_mask[row]]
    ids = torch.cat([batch.prompt_ids[prompt][batch.prompt_mask[prompt]], answer])
    return model(input_ids=ids[None], use_cache=False).logits[0, -len(answer) - 1 : -1]  # type: ignore[no-any-return]
