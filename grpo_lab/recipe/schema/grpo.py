"""The GRPO stage."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo_lab.recipe.schema.algorithm import Algorithm
from grpo_lab.recipe.schema.block import Fraction, PositiveInt
from grpo_lab.recipe.schema.rewards import RewardTerm
from grpo_lab.recipe.schema.sampling import OWN_WEIGHTS, Sampling
from grpo_lab.recipe.schema.stage import StageBase


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
    score_while_sampling: bool = False
    """Call such rewards, code and judge in their processes as soon as the answer or group they score has ended, while others
    are still being sampled; not one over completions, an object, or one over completion with only_if."""
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

    @model_validator(mode="before")
    @classmethod
    def _correct_what_vllm_samples(cls, values: Any) -> Any:
        """Other kernels are not quite the policy: unless the recipe says otherwise, tokens are weighted for it."""
        if not isinstance(values, dict) or not isinstance(values.get("sampling"), dict):
            return values
        algorithm = values.get("algorithm", {})
        if values["sampling"].get("backend") not in OWN_WEIGHTS or not isinstance(algorithm, dict):
            return values
        return {**values, "algorithm": {"sampler_correction": "truncate", **algorithm}}

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
        if self.sampling.one_step_off and self.algorithm.sampler_correction == "none":
            problems.append(
                "sampling.vllm.one_step_off learns from completions of the policy before the last update, so the "
                "gradient would be biased; set algorithm.sampler_correction: truncate"
            )
        if self.score_while_sampling and self.sampling.backend not in ("auto", "native"):
            problems.append(
                f'score_while_sampling: sampling.backend "{self.sampling.backend}" tells of no answer early; set native'
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self
