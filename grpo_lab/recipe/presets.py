"""The family of GRPO variants as rows: a preset fills the algorithm keys that a recipe did not write."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeekMath, arXiv:2402.03300, section 4.1
    "grpo": {},
    # "Understanding R1-Zero-Like Training", arXiv:2503.20783: no division by the std, one constant length, no KL
    "dr_grpo": {"advantage_scale": "none", "reduction": "constant", "beta": 0.0},
}
