"""What TRL asks for while it trains: prompts in the shared order, completions if a sampler of ours draws them, rewards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from grpo_lab.data.stream import PromptStream
from grpo_lab.engines.trl_config import scheduled
from grpo_lab.engines.trl_dataset import LazyRows
from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.sampling.decoding import Sampler
from grpo_lab.scoring import RewardSet, before_step, check_budget, controlled
from grpo_lab.seeds import derive_seed, sampling_seed
from grpo_lab.tracking.stopwatch import Stopwatch
from grpo_lab.types import Completion, Example, Group, Policy, Scores

RewardFunction = Callable[..., list[float | None]]


@dataclass(frozen=True)
class TrlParts:
    """Everything the TRL engine works with. `sampler` is None where TRL generates itself.

    `reference` is a folder or hub id with the weights of the KL's reference, None when beta is 0.
    """

    name: str
    stage: GrpoStage
    seed: int
    policy: Policy
    reference: str | None
    prompts: PromptStream[Example]
    sampler: Sampler | None
    rewards: RewardSet
    folder: Path


class Rollouts:
    """The groups and scores of the step in progress, and where its time goes. Every group is scored once."""

    def __init__(self, parts: TrlParts) -> None:
        self.parts = parts
        self.clock = Stopwatch()
        self.groups: list[Group] = []
        self.scores: Scores | None = None
        self._drawn: list[Group] = []  # by our own sampler, not yet scored
        self._scored_ids: Sequence[Sequence[int]] | None = None
        self._examples = lru_cache(maxsize=4)(parts.prompts.at)

    def begin(self) -> None:
        """A step starts."""
        self.clock, self.groups, self.scores = Stopwatch(), [], None

    def dataset(self) -> LazyRows:
        """One epoch of prompts: every step's, in the order of the shared stream. Chat prompts are messages."""
        stage = self.parts.stage

        def row(position: int) -> dict[str, Any]:
            example = self._examples(position // stage.prompts_per_step)[position % stage.prompts_per_step]
            if self.parts.sampler is None:
                check_same_tokens(self.parts.policy.tokenizer, example)
            return {"prompt": as_trl_prompt(example), "position": position}

        return LazyRows.of(stage.steps * stage.prompts_per_step, row)

    def sample(self, step: int) -> dict[str, list[list[int]] | None]:
        """What `rollout_func` returns: one step's completions, drawn by our sampler as in the native engine."""
        parts, model = self.parts, self.parts.policy.model
        assert parts.sampler is not None
        self._drawn = parts.sampler.sample(
            self._examples(step),
            num_generations=parts.stage.sampling.num_generations,
            seed=sampling_seed(parts.seed, parts.name, step),
        )
        model.train()  # TRL tells training from evaluation by this flag, which the sampler has cleared
        rows = [(group.example, completion) for group in self._drawn for completion in group.completions]
        return {
            "prompt_ids": [list(example.prompt_ids) for example, _ in rows],
            "completion_ids": [list(completion.token_ids) for _, completion in rows],
            "logprobs": None,
        }

    def reward_functions(self) -> list[RewardFunction]:
        """One function per term, as TRL wants them; all are served from one call of the RewardSet.

        Under a reward control there is one function: the total to learn from, whose weight is 1.
        """
        if self.parts.stage.reward_control is not None:
            return [self._controlled_total]
        return [self._reward_function(name) for name in self.parts.rewards.names]

    def _controlled_total(
        self, completion_ids: Sequence[Sequence[int]], position: Sequence[int], **_: Any
    ) -> list[float | None]:
        totals = self._score(completion_ids, position).total.flatten().tolist()
        return [total if total == total else None for total in totals]

    def _reward_function(self, name: str) -> RewardFunction:
        is_scheduled = name in scheduled(self.parts.stage)  # TRL then has weight 1, as its weights cannot change

        def reward(completion_ids: Sequence[Sequence[int]], position: Sequence[int], **_: Any) -> list[float | None]:
            scores = self._score(completion_ids, position)
            factor = scores.weights[name] if is_scheduled else 1.0
            values = zip(scores.terms[name].flatten().tolist(), scores.total.flatten().tolist(), strict=True)
            # a completion without a total has no term either, and nan is no value
            return [factor * value if value == value and total == total else None for value, total in values]

        reward.__name__ = name
        return reward

    def _score(self, completion_ids: Sequence[Sequence[int]], position: Sequence[int]) -> Scores:
        if self.scores is not None and self._scored_ids is completion_ids:
            return self.scores
        parts = self.parts
        self.groups = self._drawn or self._group(completion_ids, position)
        self._drawn, self._scored_ids = [], completion_ids
        self.clock.lap("learn" if "sample_seconds" in self.clock.seconds else "sample")
        step = position[0] // parts.stage.prompts_per_step
        scores = parts.rewards.score(self.groups, before_step(parts.stage, step))
        check_budget(scores, self.groups, max_failed=parts.stage.max_failed_rewards, folder=parts.folder)
        seed = derive_seed(sampling_seed(parts.seed, parts.name, step), "control")  # as the native engine's
        self.scores = controlled(scores, parts.stage.reward_control, seed=seed)
        self.clock.lap("score")
        return self.scores

    def _group(self, completion_ids: Sequence[Sequence[int]], position: Sequence[int]) -> list[Group]:
        """Rows as groups. They come group-major, which is checked, so nothing is recovered from prompts."""
        stage, policy = self.parts.stage, self.parts.policy
        size = stage.sampling.num_generations
        step, offset = divmod(position[0], stage.prompts_per_step)
        expected = [position[0] + row // size for row in range(stage.prompts_per_step * size)]
        if offset or list(position) != expected:
            raise AssertionError(f"TRL gave the completions of prompts {list(position)}, expected {expected}")
        texts = policy.tokenizer.batch_decode([list(ids) for ids in completion_ids], skip_special_tokens=True)
        completions = [
            Completion(text, tuple(ids), bool(ids) and ids[-1] in policy.eos_ids)
            for text, ids in zip(texts, completion_ids, strict=True)
        ]
        return [
            Group(example, tuple(completions[index * size : (index + 1) * size]))
            for index, example in enumerate(self._examples(step))
        ]


def as_trl_prompt(example: Example) -> str | list[dict[str, Any]]:
    """Chat prompts as messages: TRL adds special tokens to every string, so a templated one would have them twice."""
    return example.prompt if example.messages is None else [dict(message) for message in example.messages]


def check_same_tokens(tokenizer: Any, example: Example) -> None:
    """Refuse a prompt that TRL would tokenise to other ids than this project.

    Raises:
        RecipeError: names the example and says how to train on it.
    """
    if example.messages is None:
        ids = tokenizer(text=example.prompt)["input_ids"]
    else:
        messages = [dict(message) for message in example.messages]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
    if tuple(ids) != example.prompt_ids:
        raise RecipeError(
            f"data: {example.id}: TRL makes other tokens of this prompt ({len(ids)}) than this project "
            f"({len(example.prompt_ids)}); set sampling.backend: native, which hands it the tokens"
        )
