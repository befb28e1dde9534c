"""The family of GRPO variants as rows: a preset fills the algorithm keys that a recipe did not write."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One variant: the keys in which it differs from `grpo`, what they mean in a line, and where it was published."""

    keys: Mapping[str, Any]
    idea: str
    source: str


@dataclass(frozen=True)
class Rule:
    """What goes with what: where `key` has one of `values`, the other keys must be as listed (or at their default)."""

    key: str
    values: tuple[Any, ...]
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


VARIANTS: Mapping[str, Preset] = {
    "grpo": Preset(
        {},
        "advantages centred and scaled in the group, a symmetric clip, every completion counts the same, k3 KL in the loss",
        "DeepSeekMath, arXiv:2402.03300",
    ),
    "dr_grpo": Preset(
        {"advantage_scale": "none", "reduction": "constant", "beta": 0.0},
        "no division by the std or by the completion's own length, no KL",
        "arXiv:2503.20783",
    ),
    "dapo": Preset(
        {"epsilon_high": 0.28, "reduction": "token", "beta": 0.0, "sampling_attempts": 4, "overlong_buffer": 0.2},
        "clip-higher, every token counts the same, groups without signal are sampled again, a soft penalty near the "
        "length limit, no KL (the paper has no fixed number of attempts)",
        "arXiv:2503.14476",
    ),
    "gspo": Preset(
        {"ratio_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4, "beta": 0.0},
        "one ratio per completion (the geometric mean of its tokens'), clipped very tightly, no KL",
        "arXiv:2507.18071",
    ),
    "cispo": Preset(
        {"surrogate": "cispo", "epsilon_high": 5.0, "reduction": "token", "beta": 0.0},
        "the ratio is a capped weight without gradient, so every token keeps a gradient; no KL",
        "MiniMax-M1, arXiv:2506.13585",
    ),
    "sapo": Preset(
        {"surrogate": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "beta": 0.0},
        "a sigmoid in place of the clip, fading faster for negative advantages; no KL",
        "arXiv:2511.20347",
    ),
    "rloo": Preset(
        {
            "advantage_baseline": "leave_one_out",
            "advantage_scale": "none",
            "surrogate": "none",
            "ratio_level": "sequence_sum",
            "beta": 0.05,
            "kl_estimator": "k1",
            "kl_placement": "reward",
        },
        "REINFORCE on whole completions against the mean of the others, KL in the reward (beta as in TRL), no clip",
        "arXiv:2402.14740",
    ),
    "reinforce_pp": Preset(
        {
            "advantage_baseline": "batch",
            "advantage_scale": "batch",
            "reduction": "token",
            "beta": 0.01,
            "kl_estimator": "k1",
            "kl_placement": "reward",
        },
        "centred and scaled over the whole step, KL in the reward (summed over the completion, where the paper sums over "
        "the tokens still to come)",
        "REINFORCE++, arXiv:2501.03262",
    ),
    "reinforce_pp_baseline": Preset(
        {"advantage_scale": "centred", "reduction": "token", "beta": 0.01, "kl_estimator": "k2"},
        "centred in the group, then scaled by the std of all those differences; k2 KL in the loss",
        "REINFORCE++ with baseline, arXiv:2501.03262",
    ),
    "gdpo": Preset(
        {"reward_aggregation": "normalize_then_sum", "advantage_scale": "centred"},
        "each reward is centred and scaled in its group before the weighted sum, which is then scaled over the step",
        "arXiv:2601.05242",
    ),
    "trl_default": Preset(
        {"reduction": "token", "beta": 0.0, "kl_bias_correction": True},
        "what TRL 1.16 does when nothing is set: DAPO's reduction, a symmetric clip, no KL (with its bias correction, "
        "should beta be set)",
        "TRL 1.16.0, GRPOConfig",
    ),
}

PRESETS: dict[str, dict[str, Any]] = {name: dict(preset.keys) for name, preset in VARIANTS.items()}

RULES = (
    Rule("surrogate", ("clipped",), unused=("sapo_temperature_pos", "sapo_temperature_neg")),
    Rule("surrogate", ("cispo",), unused=("epsilon_low", "delta", "sapo_temperature_pos", "sapo_temperature_neg")),
    Rule("surrogate", ("sapo",), unused=("epsilon_low", "epsilon_high", "delta")),
    Rule(
        "surrogate",
        ("none",),
        unused=("epsilon_low", "epsilon_high", "delta", "sapo_temperature_pos", "sapo_temperature_neg"),
    ),
    Rule("advantage_baseline", ("leave_one_out",), allowed={"advantage_scale": ("none",)}),
    Rule(
        "advantage_baseline",
        ("batch",),
        # every group has a signal there, so none would be sampled again; the step's mean makes centred and batch one
        allowed={"advantage_scale": ("batch", "none"), "sampling_attempts": (1,)},
    ),
    Rule("kl_placement", ("reward",), unused=("kl_bias_correction",)),
    Rule("beta", (0.0,), unused=("reference_refresh",)),
    Rule("sampler_correction", ("none",), unused=("sampler_correction_level", "sampler_correction_cap")),
)


def conflicts(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Keys that would have no effect, or not the one they promise, beside the others; one line each."""
    found = []
    for rule in RULES:
        if values[rule.key] not in rule.values:
            continue
        beside = f"with {rule.key}: {values[rule.key]}"
        for key in rule.unused:
            if values[key] != defaults[key]:
                default = "null" if defaults[key] is None else str(defaults[key]).lower()
                found.append(f"{key} has no effect {beside}; leave it at {default}")
        for key, choices in rule.allowed.items():
            if values[key] not in choices:
                found.append(f"{key} must be {' or '.join(map(str, choices))} {beside}, got {values[key]}")
    return found
