"""What a recipe may say: every key, its type, its default and its meaning. No I/O happens here.

A recipe is yaml; `load.py` reads it, this file checks it, and nothing later invents a default of its own.
"""

from math import inf
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from grpo_lab.recipe.presets import PRESETS, conflicts

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
StageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=100)]
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Block(BaseModel):
    """A mapping in the recipe. Unknown keys are errors; values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class TokenizerBuild(Block):
    """A byte-level BPE tokenizer with a ChatML template, trained on the text of the first stage's data."""

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
    """`chatml` or a file with a Jinja template; null takes the tokenizer's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of weights and computation."""
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
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs model_type, for example llama or qwen2")
        return quantized_with_lora(self)


M = TypeVar("M", Model, StageModel)


def quantized_with_lora(block: M) -> M:
    """Refuse 4-bit weights without an adapter."""
    if block.quantization is not None and block.lora is None:
        raise ValueError("quantization: weights in 4 bits cannot learn; add lora, or set quantization: null")
    return block


class Answer(Block):
    """Where the gold answer of a row is; rewards receive it as the column `answer`."""

    column: str
    """The data set's column."""
    extract: Literal["none", "hash", "boxed", "xml", "regex"] = "none"
    """How to cut the answer out of the column: as it is, after `####`, in \\boxed{}, in <answer> tags, or by pattern."""
    pattern: str | None = None
    """With `extract: regex`: the regular expression; its first group is the answer."""

    @model_validator(mode="after")
    def _pattern_goes_with_regex(self) -> "Answer":
        if (self.extract == "regex") != (self.pattern is not None):
            raise ValueError("pattern goes with extract: regex, and extract: regex needs a pattern")
        return self


class Data(Block):
    """Rows, and how a row becomes a prompt (and, for supervised stages, a completion)."""

    source: Literal["hub", "file", "task", "reasoning_gym"]
    """A hub data set, local files, one of this project's generated tasks, or a reasoning-gym data set."""
    path: str
    """The hub id, the file (or glob), the task's name, or the reasoning-gym data set's name."""
    name: str | None = None
    """The hub data set's configuration."""
    revision: str | None = None
    """The hub data set's revision."""
    split: str = "train"
    """Which split of a hub data set or of a task."""
    format: Literal["jsonl", "json", "csv", "parquet", "text"] | None = None
    """The files' format; null tells it from their ending."""
    streaming: bool = False
    """Read in file order without holding the rows; the rows are then not shuffled."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Rows left out at the start."""
    limit: PositiveInt | None = None
    """The most rows taken, after `skip`."""
    options: dict[str, Any] = {}
    """Options of a generated task or a reasoning-gym data set."""
    prompt: str | None = None
    """A column, or a template with {column} places."""
    completion: str | None = None
    """A column or a template: what the model should answer (supervised stages)."""
    messages: str | None = None
    """A column with chat messages: a list of {role, content}."""
    text: str | None = None
    """A column with plain text to learn as it is (supervised stages)."""
    answer: Answer | None = None
    """The gold answer, for rewards and evaluation."""
    system_prompt: str | None = None
    """A system message put before every chat prompt."""
    chat: bool = True
    """Whether prompts go through the chat template; false takes them as plain text."""

    @model_validator(mode="after")
    def _one_form(self) -> "Data":
        forms = [key for key in ("prompt", "messages", "text") if getattr(self, key) is not None]
        if len(forms) != 1:
            raise ValueError(f"give exactly one of prompt, messages, text; found {', '.join(forms) or 'none'}")
        if self.completion is not None and self.prompt is None:
            raise ValueError("completion goes with prompt")
        if self.system_prompt is not None and (not self.chat or self.text is not None):
            raise ValueError("system_prompt needs a chat prompt")
        if self.streaming and self.source not in ("hub", "file"):
            raise ValueError("streaming is for hub and file sources")
        return self


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


class WeightSchedule(Block):
    """A weight that moves in a line from `start` to `end` and then stays there."""

    start: Annotated[float, Field(allow_inf_nan=False)]
    """The weight in the stage's first step."""
    end: Annotated[float, Field(allow_inf_nan=False)]
    """The weight after `steps` steps, and in every evaluation, so that those can be compared."""
    steps: PositiveInt
    """Steps from start to end."""


class RewardTerm(Block):
    """One reward in the sum: weight * clip(scale * value)."""

    name: str
    """A file in rewards/, a plugin's function, an installed package's entry point, or a dotted path."""
    weight: float | WeightSchedule = 1.0
    """What the reward is multiplied by: a number, or {start, end, steps}."""
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """The reward's own value is multiplied by this before it is clipped; metrics and `only_if` see the result."""
    clip: tuple[float | None, float | None] | None = None
    """[lowest, highest]: the scaled value is cut off there; null on one side leaves that side open."""
    only_if: str | None = None
    """The label of another term: this one counts only where that one is above 0."""
    options: dict[str, Any] = {}
    """The reward's options; `grpo-lab rewards ls` lists them."""
    label: Name | None = None
    """The term's name in metrics, needed when one reward is used twice; null = its name."""

    @model_validator(mode="after")
    def _clip_leaves_room(self) -> "RewardTerm":
        if self.clip is not None:
            low, high = (
                bound if bound is not None else open_ for bound, open_ in zip(self.clip, (-inf, inf), strict=True)
            )
            if not low < high:
                raise ValueError(f"clip should be [lowest, highest] with lowest below highest, got {list(self.clip)}")
        return self

    @property
    def key(self) -> str:
        """The term's name in metrics and in `only_if`."""
        return self.label or self.name.rsplit(".", 1)[-1]


class ReferenceRefresh(Block):
    """Lets the reference follow the policy: ref = alpha * policy + (1 - alpha) * ref."""

    every: PositiveInt
    """Steps between two refreshes."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """The policy's share; 1 replaces the reference."""


class Algorithm(Block):
    """The GRPO variant. A preset fills what is not written; see presets.py for the rows and their papers."""

    preset: Literal[
        "grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gdpo",
        "trl_default",
    ] = "grpo"  # fmt: skip
    """A row of the table of variants."""
    reward_aggregation: Literal["sum", "normalize_then_sum"] = "sum"
    """Sum the weighted rewards as they are, or each one first centred and scaled within its group (GDPO)."""
    advantage_baseline: Literal["group", "leave_one_out", "batch"] = "group"
    """What a reward is compared with: its group's mean, the mean of the others in its group, or the step's mean."""
    advantage_scale: Literal["group", "batch", "centred", "none"] = "group"
    """What the difference is divided by: the std of the group's rewards, of the step's, of the step's differences, or 1."""
    surrogate: Literal["clipped", "cispo", "sapo", "none"] = "clipped"
    """The objective: PPO's clip, CISPO's capped weight, SAPO's soft clip, or ratio * A as it is."""
    ratio_level: Literal["token", "sequence", "sequence_sum"] = "token"
    """The importance ratio: per token, its geometric mean over the completion, or its product (the completion's own)."""
    epsilon_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """surrogate clipped: the ratio is clipped below at 1 - epsilon_low."""
    epsilon_high: Annotated[float, Field(gt=0)] = 0.2
    """surrogate clipped: the ratio is clipped above at 1 + epsilon_high. cispo: the ratio's cap itself."""
    delta: Annotated[float, Field(gt=1)] | None = None
    """surrogate clipped: two-sided clipping, the ratio itself is capped here first; null = off."""
    sapo_temperature_pos: Annotated[float, Field(gt=0)] = 1.0
    """surrogate sapo: how fast the gradient fades where the advantage is positive."""
    sapo_temperature_neg: Annotated[float, Field(gt=0)] = 1.05
    """surrogate sapo: how fast the gradient fades where the advantage is negative."""
    reduction: Literal["sequence", "token", "constant"] = "sequence"
    """Every completion counts the same, every token counts the same, or a constant length divides."""
    beta: Annotated[float, Field(ge=0)] = 0.04
    """Weight of the KL penalty to the reference; 0 needs no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Which estimator of the KL."""
    kl_placement: Literal["loss", "reward"] = "loss"
    """Add the KL to every token's loss, or subtract a completion's summed KL from its reward."""
    kl_bias_correction: bool = False
    """Multiply the KL in the loss by the importance ratio, gradient included."""
    reference_refresh: ReferenceRefresh | None = None
    """When the reference follows the policy; null = it stays as the stage began."""
    entropy_bonus: Annotated[float, Field(ge=0)] = 0.0
    """This times the mean entropy per token (nats) is taken from the loss; 0 = off."""
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of tokens, those of highest entropy under pi_old, that the policy objective keeps; 1 = all."""
    mask_truncated_completions: bool = False
    """Leave completions that the length limit cut off out of the loss; they stay in their group's baseline."""
    sampling_attempts: PositiveInt = 1
    """Dynamic sampling: rounds of sampling in a step, groups without signal being replaced in each; 1 = off."""
    overlong_buffer: Fraction = 0.0
    """DAPO's soft overlong penalty over this last share of max_completion_length, as a reward `overlong`; 0 = off."""
    num_iterations: PositiveInt = 1
    """Passes over one batch of completions."""
    num_minibatches: PositiveInt = 1
    """Optimiser steps in one pass; each takes whole groups."""
    sampler_correction: Literal["none", "truncate", "mask"] = "none"
    """Weight tokens by pi_old / sampler, capped or left out beyond the cap: for samplers that are not quite the policy."""
    sampler_correction_level: Literal["token", "sequence"] = "token"
    """Whether that weight is a token's own or the product over its completion."""
    sampler_correction_cap: Annotated[float, Field(gt=0)] = 2.0
    """The cap of that weight."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", "grpo")
        return {**(PRESETS.get(preset, {}) if isinstance(preset, str) else {}), **values}

    @model_validator(mode="after")
    def _no_key_without_effect(self) -> "Algorithm":
        defaults = {key: field.default for key, field in type(self).model_fields.items()}
        problems = conflicts(self.model_dump(), defaults)
        if problems:
            raise ValueError("\n".join(problems))
        return self


class Optimizer(Block):
    """How weights move."""

    name: Literal["adamw", "sgd", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """The optimiser. 8bit: AdamW with its state in 8 bits (bitsandbytes); paged: the state may move to main memory."""
    learning_rate: Annotated[float, Field(gt=0)]
    """The peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate goes from its peak to 0 over the stage's optimiser steps."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0
    """Optimiser steps of linear warm-up; below 1, a share of all."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's decay rates."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's denominator floor."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; never on norms and biases."""
    momentum: Fraction = 0.0
    """SGD's momentum."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """The gradient's norm is clipped to this; null = never."""


class Checkpoint(Block):
    """When the state is saved."""

    every: PositiveInt = 50
    """Steps between two checkpoints."""
    keep: PositiveInt = 2
    """How many are kept."""


class Evaluation(Block):
    """Held-out data, measured before the first step, every `every` steps and after the last."""

    data: Data
    """The held-out rows."""
    every: PositiveInt | None = None
    """Steps between two evaluations; null = only before and after."""
    num_samples: Annotated[int, Field(ge=0)] = 1
    """Sampled completions per prompt beside the greedy one (GRPO stages)."""


class StageBase(Block):
    data: Data
    """What the stage learns from."""
    start_from: StageName = "previous"
    """The weights to begin with: the stage before, the recipe's model (`base`), or an earlier stage by name."""
    model: StageModel | None = None
    """What this stage changes of the model; null = nothing."""
    steps: PositiveInt
    """Steps of the stage."""
    micro_batch_size: PositiveInt | None = None
    """Rows held in memory at once; never changes the result. null = as many as a bound on tokens (4096)
    and on logits (256 MiB) allows, whole groups at a time."""
    optimizer: Optimizer
    """How weights move."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state is saved."""
    evaluation: Evaluation | None = None
    """What is measured on held-out data."""


class SftStage(StageBase):
    """Supervised fine-tuning: learn to write the completions of the data."""

    kind: Literal["sft"]
    """The stage's kind."""
    batch_size: PositiveInt
    """Rows per step."""
    max_length: PositiveInt | None = None
    """The most tokens of a row; longer ones are an error. null = the model's context."""
    loss_on: Literal["completion", "all"] = "completion"
    """Learn the completions only, or prompts as well."""

    @model_validator(mode="after")
    def _data_has_targets(self) -> "SftStage":
        for data in (self.data, self.evaluation.data if self.evaluation else None):
            if data is not None and data.prompt is not None and data.completion is None:
                raise ValueError("a supervised stage learns completions: data.prompt needs data.completion")
        return self


class GrpoStage(StageBase):
    """Group Relative Policy Optimization."""

    kind: Literal["grpo"]
    """The stage's kind."""
    engine: Literal["native", "trl"] = "native"
    """Who runs the loop: this project, or TRL's GRPOTrainer (for comparison; it resumes, but not to the same bytes)."""
    sampling: Sampling
    """How completions are drawn."""
    rewards: Annotated[list[RewardTerm], Field(min_length=1)]
    """The reward is the weighted sum of these."""
    algorithm: Algorithm = Algorithm()
    """The GRPO variant."""
    prompts_per_step: PositiveInt
    """P: prompts per step."""
    max_failed_rewards: Fraction = 0.25
    """The run stops when more than this share of a step's completions could not be scored."""
    reward_workers: PositiveInt = 1
    """Processes of each reward that is not shipped with grpo-lab (a plugin's, a package's, a dotted path's)."""
    reward_timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """The most seconds of one call of such a reward, whatever it scores; its process is then killed and replaced."""
    reward_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory that such a process may take for itself; null = no limit but the machine's."""
    reward_control: Literal["random", "shuffled"] | None = None
    """Learn from totals that say nothing: drawn at random, or the real ones shuffled over the step; null = the real ones."""

    @property
    def reward_terms(self) -> list[RewardTerm]:
        """The rewards of the recipe, and the overlong penalty where the algorithm asks for it."""
        length = self.sampling.max_completion_length
        buffer = round(self.algorithm.overlong_buffer * length)
        if buffer == 0 or any(term.key == "overlong" for term in self.rewards):
            return self.rewards
        return [*self.rewards, RewardTerm(name="overlong", options={"max_length": length, "buffer": buffer})]

    @model_validator(mode="after")
    def _sizes_and_terms(self) -> "GrpoStage":
        problems = []
        for data in (self.data, self.evaluation.data if self.evaluation else None):
            if data is not None and (data.text is not None or data.completion is not None):
                problems.append("a GRPO stage samples its own completions: data takes prompt or messages only")
        if self.prompts_per_step % self.algorithm.num_minibatches:
            problems.append(
                f"prompts_per_step ({self.prompts_per_step}) must be a multiple of "
                f"algorithm.num_minibatches ({self.algorithm.num_minibatches})"
            )
        keys = [term.key for term in self.rewards]
        for key in sorted({key for key in keys if keys.count(key) > 1}):
            problems.append(f'rewards: "{key}" stands twice; give one of them a label')
        for term in self.rewards:
            if term.only_if is not None and (term.only_if not in keys or term.only_if == term.key):
                problems.append(f'rewards: only_if: "{term.only_if}" is not another term here ({", ".join(keys)})')
        if self.algorithm.sampling_attempts > 1 and self.data.streaming:
            problems.append("algorithm.sampling_attempts draws other prompts at random; turn data.streaming off")
        if self.sampling.truncates and self.algorithm.sampler_correction == "none":
            problems.append(
                "sampling.top_p, top_k and min_p change the sampled distribution, so the ratio would be biased; "
                "turn them off or set algorithm.sampler_correction: truncate"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


Stage = Annotated[SftStage | GrpoStage, Field(discriminator="kind")]


class Wandb(Block):
    """Weights & Biases."""

    project: str
    """The project's name."""
    mode: Literal["online", "offline"] = "offline"
    """Offline needs neither account nor network."""
    entity: str | None = None
    """The team or user."""


class Tracking(Block):
    """What is written beside the metrics."""

    rollouts: bool = True
    """Whether every completion with its rewards is stored."""
    wandb: Wandb | None = None
    """Also log to Weights & Biases; needs grpo-lab[wandb]."""


class Recipe(Block):
    """A run: a model and the stages it goes through."""

    name: Name
    """The run's name and folder."""
    seed: int = 0
    """Every random draw is a function of it."""
    output_dir: str = "runs"
    """Where run folders are made, relative to the working directory."""
    data_root: str | None = None
    """The folder that file sources are relative to; null = the recipe's own folder."""
    plugins: list[str] = []
    """Files or folders with reward functions, relative to the recipe."""
    num_threads: PositiveInt | None = None
    """CPU threads; null = torch's default. Part of exactness: resume checks it."""
    model: Model
    """The policy."""
    stages: Annotated[dict[StageName, Stage], Field(min_length=1)]
    """The stages, in order; the key is the stage's name and folder."""
    tracking: Tracking = Tracking()
    """What is written beside the metrics."""

    def model_of(self, stage: SftStage | GrpoStage) -> Model:
        """The model block as it holds for a stage."""
        return self.model if stage.model is None else self.model.model_copy(update=dict(stage.model))
