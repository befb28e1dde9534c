"""A model and its tokenizer: from a folder or the hub, or new from a config; and written where others can load them."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from grpo_lab.attention.fused import as_theirs
from grpo_lab.errors import CheckpointError, RecipeError
from grpo_lab.policy.adapter_files import base_of, is_adapter, quantization_of
from grpo_lab.policy.freed import govern_freed_memory
from grpo_lab.recipe.schema import SHIPPED_TEMPLATES, Model, Quantization
from grpo_lab.seeds import derive_seed
from grpo_lab.types import Policy

# What transformers raises for a folder, a config or weights that it cannot use.
LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, RuntimeError, StrictDataclassError, SafetensorError)
SAVED_GAP = 1e-5  # of the largest logit; it is 0 where the same kernels run twice
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(model: Model, folder: str | Path | None = None) -> Any:
    """The tokenizer that a recipe names (not the one it wants built); `folder` overrides where it lies."""
    source = str(folder or (model.tokenizer if isinstance(model.tokenizer, str) else model.path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except LOADING_ERRORS as error:
        raise RecipeError(f"model: cannot load a tokenizer from {source}: {first_line(error)}") from error
    for key in ("is_local", "local_files_only"):  # how it was loaded, which would be written beside the final model
        tokenizer.init_kwargs.pop(key, None)
    if model.chat_template is not None and model.chat_template not in SHIPPED_TEMPLATES:
        template = Path(model.chat_template)
        if not template.is_file():
            raise RecipeError(
                f"model.chat_template: {template} is not a file (nor one of {', '.join(SHIPPED_TEMPLATES)})"
            )
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def model_config(model: Model, tokenizer: Any) -> Any:
    """The transformers config, read without loading weights."""
    if model.config is None:
        try:
            return AutoConfig.from_pretrained(
                base_of(model.path or ""), revision=model.revision, trust_remote_code=model.trust_remote_code
            )
        except LOADING_ERRORS as error:
            raise RecipeError(f"model.path: cannot load {model.path}: {first_line(error)}") from error
    settings = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **model.config,
    }
    model_type = settings.pop("model_type")
    try:
        return AutoConfig.for_model(model_type, **settings)
    except LOADING_ERRORS as error:
        raise RecipeError(f"model.config: {first_line(error)}") from error


def generation_config(model: Model) -> GenerationConfig | None:
    """What the model's repository says of generation, read without loading weights; None where it says nothing."""
    if model.path is None:
        return None
    try:
        return GenerationConfig.from_pretrained(base_of(model.path), revision=model.revision)
    except OSError:  # the file is optional
        return None


def load_policy(model: Model, tokenizer: Any, *, seed: int, folder: str | Path | None = None) -> Policy:
    """The policy with its weights: from `folder` (an earlier stage's result), else from `path`, else new from `config`.

    With `model.lora` the weights are frozen and an adapter learns: a fresh one, or the one in `folder`. With
    `model.quantization` the frozen weights are in 4 bits. New weights are a function of `seed`. Only safetensors are
    read; code in a model's repository does not run unless the recipe says so.
    """
    source = None if folder is None and model.config is not None else str(folder or model.path)
    network = new_network(model, tokenizer, seed=seed) if source is None else read_base(model, source)
    if model.gradient_checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    network = network.to("cuda" if torch.cuda.is_available() else "cpu")
    govern_freed_memory(network)
    if source is not None and is_adapter(source):
        from grpo_lab.policy.adapter import attach_saved  # a second of import, needed only here

        network = attach_saved(network, Path(source), model.lora, seed=seed)
    elif model.lora is not None:
        from grpo_lab.policy.adapter import attach

        network = attach(network, model.lora, seed=seed)
    return as_policy(network, tokenizer)


def new_network(model: Model, tokenizer: Any, *, seed: int) -> Any:
    """A model from the recipe's config, its weights a function of `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "weights"))
        config = model_config(model, tokenizer)
        try:
            return AutoModelForCausalLM.from_config(
                config, dtype=DTYPES[model.dtype], attn_implementation=model.attention
            )
        except LOADING_ERRORS as error:
            raise RecipeError(f"model.config: {first_line(error)}") from error


def read_base(model: Model, source: str) -> Any:
    """The whole weights that `source` is, or that its adapter belongs to.

    An adapter that is to be merged was learnt beside certain weights: if those were in 4 bits, it gets them back, in
    the model's dtype.
    """
    learnt_beside = quantization_of(source)
    if model.lora is not None or learnt_beside is None:
        return read_network(model, base_of(source))
    lossy = model.model_copy(update={"quantization": Quantization.model_validate(learnt_beside)})
    return read_network(lossy, base_of(source)).dequantize(dtype=DTYPES[model.dtype])


def read_network(model: Model, source: str) -> Any:
    """The whole weights in a folder or on the hub."""
    quantized = {}
    if model.quantization is not None:
        from grpo_lab.policy.quantization import quantization_config

        quantized = {"quantization_config": quantization_config(model.quantization, DTYPES[model.dtype])}
    try:
        network, info = AutoModelForCausalLM.from_pretrained(
            source,
            revision=model.revision if source == model.path else None,
            trust_remote_code=model.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            dtype=DTYPES[model.dtype],
            attn_implementation=model.attention,
            **quantized,
        )
    except LOADING_ERRORS as error:
        raise RecipeError(f"model.path: cannot load {source}: {first_line(error)}") from error
    if info["missing_keys"]:  # transformers would train on with random ones
        names = sorted(info["missing_keys"])
        raise RecipeError(f"model.path: {source} lacks {len(names)} of the model's weights, the first {names[0]}")
    if Path(source).is_dir():
        network.name_or_path = str(Path(source).absolute())  # an adapter names its base by it
    if model.quantization is not None:
        from grpo_lab.policy.quantization import keep_weights_as_loaded

        keep_weights_as_loaded(network)
        for parameter in network.parameters():
            if parameter.is_floating_point():  # a view of the file, which stays in memory whole as long as one is left
                parameter.data = parameter.data.clone()
    return network


def as_policy(network: Any, tokenizer: Any) -> Policy:
    """Bundle a transformers model and its tokenizer with the facts that sampling and padding need."""
    eos = eos_ids(tokenizer, network.config, network.generation_config)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    return Policy(network, tokenizer, eos, pad, context_length(network.config))


def eos_ids(tokenizer: Any, config: Any, generation_config: GenerationConfig | None) -> tuple[int, ...]:
    """Every declared end-of-sequence token; the tokenizer's own comes first. An answer ends at any of them."""
    declared = [tokenizer.eos_token_id, config.get_text_config().eos_token_id]
    if generation_config is not None:
        declared.append(generation_config.eos_token_id)
    ids: list[int] = []
    for entry in declared:
        ids += [] if entry is None else [entry] if isinstance(entry, int) else list(entry)
    if not ids:
        raise RecipeError("model: neither the tokenizer nor the model declares an end-of-sequence token")
    return tuple(dict.fromkeys(ids))


def context_length(config: Any) -> int:
    """The most tokens a model can attend to, prompt and completion together."""
    text = config.get_text_config()
    name = text.attribute_map.get("max_position_embeddings", "max_position_embeddings")  # GPT-2 says n_positions
    length = text.to_dict().get(name)
    if not isinstance(length, int):
        raise RecipeError(f"model: the config of {config.model_type} does not state max_position_embeddings")
    return length


def has_adapter(network: Any) -> bool:
    """Whether this is peft's wrapper around a model, which transformers' own models are not."""
    return not isinstance(network, PreTrainedModel)


def write_policy(policy: Policy, folder: Path, quantization: Quantization | None = None) -> None:
    """Write the model (safetensors), or its adapter alone, and the tokenizer, so that transformers loads them.

    `quantization`: how the weights beside the adapter are kept, which is written down with it.
    """
    network: Any = policy.model
    if has_adapter(network):
        from grpo_lab.policy.adapter import write_adapter

        write_adapter(network, folder, quantization)
    else:
        network.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


@torch.no_grad()
def logits_gap(one: Policy, other: Policy) -> float:
    """The largest difference of two models' logits on a fixed text, as a share of the largest logit."""
    ids = torch.arange(16) * 7 % len(one.tokenizer)
    found = []
    for policy in (one, other):
        model: Any = policy.model.eval()
        with as_theirs(model):  # in bfloat16 another way to compute is another rounding
            found.append(model(input_ids=ids[None].to(next(model.parameters()).device)).logits.float())
    return float((found[0] - found[1]).abs().max() / found[0].abs().max())


def write_checked(policy: Policy, folder: Path, model: Model) -> float:
    """Write the policy, load it again from there, and compare the logits; returns the gap.

    Raises:
        CheckpointError: what was written is not the policy.
    """
    write_policy(policy, folder, model.quantization)
    gap = logits_gap(policy, load_policy(model, policy.tokenizer, seed=0, folder=folder))
    if not gap <= SAVED_GAP:
        raise CheckpointError(f"{folder}: the model that was written is not the model: its logits differ by {gap:.2g}")
    return gap


def first_line(error: BaseException) -> str:
    """The first line of an error's message, which is where libraries put the cause."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:  # it names its validator first
        error = error.__cause__
    text = f"unknown name {error}" if isinstance(error, KeyError) else str(error)
    return text.strip().partition("\n")[0] or type(error).__name__
