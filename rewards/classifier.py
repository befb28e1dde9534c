"""What a trained sequence classifier makes of the text."""

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch

from grpo_lab.scoring import reward
from grpo_lab.types import Group


class _Loaded(NamedTuple):
    model: Any
    tokenizer: Any
    names: tuple[str, ...]  # the labels, by output


@reward
def classifier(
    group: Group,
    *,
    model: str = "",
    revision: str | None = None,
    label: str | int | None = None,
    output: Literal["probability", "logit"] = "probability",
    with_prompt: bool = False,
    max_tokens: int = 512,
    cut: Literal["end", "start"] = "end",
    batch_size: int = 16,
    device: str = "cpu",
) -> list[float]:
    """The probability that a sequence classifier gives to `label`, from 0 to 1; or that label's logit, without bounds.

    `model` is a folder or hub id that `AutoModelForSequenceClassification` loads (safetensors only, code in it is never
    run, `revision` pins it). `label` is one of the model's label names, or its number; a model with one output, such as
    a reward model, needs none, and its probability is the sigmoid. With `with_prompt` the model reads prompt and
    completion, as a pair of texts where its tokenizer makes pairs.

    A group's completions are scored in batches of `batch_size` on `device`, in float32 without dropout; the model is
    loaded once. Of a text of more than `max_tokens` tokens (or than the tokenizer allows) its `cut` is not read: what
    is written there is not rewarded and not punished. Special tokens that a completion spells out, such as [SEP], are
    read as text. A policy learns what the classifier likes and not what it
    means; watch a measure that the classifier does not see.

    Args:
        output: the "probability" of the label, or its "logit".
    """
    if not model:
        raise ValueError("classifier needs the option model: a folder or a hub id")
    loaded = _load(model, revision, device)
    index = _index(loaded.names, label)
    prompt = group.example.prompt if with_prompt else None
    texts = [completion.text for completion in group.completions]
    if loaded.tokenizer.pad_token_id is None:
        batch_size = 1  # nothing to pad with
    values: list[float] = []
    for start in range(0, len(texts), batch_size):
        inputs = _encoded(loaded, prompt, texts[start : start + batch_size], max_tokens, cut)
        with torch.inference_mode():
            logits = loaded.model(**inputs.to(device)).logits.float()
        if output == "probability":
            logits = logits.sigmoid() if len(loaded.names) == 1 else logits.softmax(-1)
        values += logits[:, index].tolist()
    return values


def _encoded(loaded: _Loaded, prompt: str | None, texts: list[str], max_tokens: int, cut: str) -> Any:
    loaded.tokenizer.truncation_side = "right" if cut == "end" else "left"
    clean = [_inert(loaded, text.encode("utf-8", "replace").decode()) for text in texts]  # half a character is no text
    first, second = (clean, None) if prompt is None else ([prompt] * len(clean), clean)
    # of a pair only the completion is cut
    strategy = "longest_first" if prompt is None else "only_second"
    limit = min(max_tokens, loaded.tokenizer.model_max_length)
    return loaded.tokenizer(
        first, second, padding=len(clean) > 1, truncation=strategy, max_length=limit, return_tensors="pt"
    )


def _inert(loaded: _Loaded, text: str) -> str:
    """With a space in every special token that a completion spells out: it would be read as a mark of the model's own."""
    for token in loaded.tokenizer.added_tokens_decoder.values():
        if token.special:
            text = text.replace(token.content, f"{token.content[:1]} {token.content[1:]}")
    return text


def _index(names: tuple[str, ...], label: str | int | None) -> int:
    if label is None and len(names) == 1:
        return 0
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    if label in names:
        return names.index(str(label))
    raise ValueError(f"label is {label!r}, but the model's labels are {', '.join(names)} (or 0 to {len(names) - 1})")


@lru_cache(maxsize=4)
def _load(path: str, revision: str | None, device: str) -> _Loaded:
    """Deterministic: the same files give the same model, so keeping it changes nothing."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, info = AutoModelForSequenceClassification.from_pretrained(
        path, revision=revision, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = ", ".join(sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))[:3])
        raise ValueError(f"{path} is no trained classifier: it has no weights for {missing}")
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    if tokenizer.pad_token_id is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    names = tuple(str(model.config.id2label[index]) for index in range(model.config.num_labels))
    return _Loaded(model.requires_grad_(False).eval().to(device), tokenizer, names)
