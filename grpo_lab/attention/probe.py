"""Which models may be computed packed: those for which a small packed pass gives the logits of a plain one."""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_lab.attention.adapters import adapt
from grpo_lab.attention.fused import fuse, unfuse
from grpo_lab.attention.interface import NAME, NotPackableError
from grpo_lab.attention.last_layer import cut, predicted_states
from grpo_lab.attention.layout import PackedBatch
from grpo_lab.attention.packed import attending_to
from grpo_lab.padding import length_mask, pad_left, pad_right
from grpo_lab.types import Batch

# How far logits may differ, as a share of the largest: what rounding makes of another order of sums.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
# In bfloat16 that depends on the model: so many times what its eager attention makes of them, which is at least a rounding.
_TIMES_EAGER, _ROUNDING = 3.0, 2.0**-8
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
    if device.type not in ("cpu", "cuda"):
        return f"the packed pass is written for CPUs and CUDA, and the model is on {device.type}"
    if device.type == "cuda" and dtype != torch.bfloat16:
        return f"on a GPU the packed pass needs model.dtype: bfloat16, and its weights are {dtype}"
    if dtype not in (*_TOLERANCE, torch.bfloat16):
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
        batch = _small_batch(base.config.get_text_config().vocab_size, base.device)
        unfuse(base)  # a copy of a fused model
        theirs = _plain_logits(model, batch)
        eager = None
        if base.dtype == torch.bfloat16:
            base.set_attn_implementation("eager")
            eager = _plain_logits(model, batch)
            base.set_attn_implementation(NAME)
        if base.dtype == torch.float32 or base.device.type == "cuda":
            fuse(base)
        decoder, head = parts(model)
        if base.device.type == "cuda":
            adapt(base, decoder)
        cut(decoder)
        packed = PackedBatch.of(batch)
        attending = attending_to(packed)
        ours = head(predicted_states(decoder, attending))[packed.logits_row].to(theirs.dtype)
        if not attending.asked:
            return f"{base.config.model_type} computes attention by itself"
        differs = _differs(ours, theirs, eager)
        if differs is not None:
            return f"for {base.config.model_type} a packed pass gives other logits ({differs})"
    except (NotPackableError, TypeError, ValueError, RuntimeError) as error:  # also what a model makes of our keyword
        return f"a packed pass fails: {str(error).partition(chr(10))[0]}"
    finally:
        for module, mode in training.items():
            module.training = mode
    return None


def _small_batch(vocab_size: int, device: torch.device) -> Batch:
    ids = iter(range(17, 17 + 1000, 7))

    def some(length: int) -> list[int]:
        return [next(ids) % vocab_size for _ in range(length)]

    prompt_ids, prompt_mask = pad_left([some(length) for length in _PROMPTS], 0)
    completions = [some(length) for _, length in _ANSWERS]
    return Batch(
        prompt_ids=prompt_ids.to(device),
        prompt_mask=prompt_mask.to(device),
        prompt_index=torch.tensor([prompt for prompt, _ in _ANSWERS], device=device),
        completion_ids=pad_right(completions, 0, torch.long).to(device),
        completion_mask=length_mask([len(row) for row in completions]).to(device),
    )


def _differs(ours: Tensor, theirs: Tensor, eager: Tensor | None) -> str | None:
    """By how much logits [K, V] differ, if it is more than rounding explains. `not <=`, so that nan counts as different."""
    if eager is None:
        error, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
        limit = _TOLERANCE[theirs.dtype] * size
        return None if error <= limit else f"by {error:.2g} of {size:.2g}"
    share, usual = _distance(ours, theirs), _distance(eager, theirs)
    limit = _TIMES_EAGER * max(usual, _ROUNDING)
    return None if share <= limit else f"by {share:.2g} of their spread, where eager attention's differ by {usual:.2g}"


def _distance(some: Tensor, others: Tensor) -> float:
    """How far apart two sets of logits are, as a share of their spread; what is added to a whole row changes nothing."""
    some, others = (logits - logits.mean(-1, keepdim=True) for logits in (some, others))
    return float((some - others).norm() / others.norm())


def _plain_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits [K, V] that predict the completions' tokens, from a pass over each row alone; float32 at least."""
    logits = torch.cat([_row_logits(model, batch, row) for row in range(batch.num_rows)])
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _row_logits(model: nn.Module, batch: Batch, row: int) -> Tensor:
    prompt = int(batch.prompt_index[row])
    answer = batch.completion_ids[row][batch.completion_mask[row]]
    ids = torch.cat([batch.prompt_ids[prompt][batch.prompt_mask[prompt]], answer])
    return model(input_ids=ids[None], use_cache=False).logits[0, -len(answer) - 1 : -1]  # type: ignore[no-any-return]
