"""The plain sampler: transformers' `generate`, one group at a time. Slow, and a check on the native one."""

import torch
from transformers import GenerationConfig

from grpo_lab.sampling.decoding import Decoding
from grpo_lab.seeds import derive_seed
from grpo_lab.types import Completion, Example, Group, Policy


class HfSampler:
    """Samples through `model.generate`; its noise comes from torch's global generator, seeded per group."""

    def __init__(self, policy: Policy, decoding: Decoding) -> None:
        self.policy = policy
        self.decoding = decoding

    def sync(self, policy: Policy) -> None:
        """Nothing to copy: the sampler uses the trained weights themselves."""
        self.policy = policy

    @torch.inference_mode()
    def sample(self, examples: list[Example], *, num_generations: int, seed: int, first_group: int = 0) -> list[Group]:
        """`num_generations` completions for each example."""
        self.policy.model.eval()
        size = min(num_generations, self.decoding.max_rows or num_generations)
        sizes = [min(size, num_generations - first) for first in range(0, num_generations, size)]
        groups = []
        for index, example in enumerate(examples, first_group):
            with torch.random.fork_rng():
                torch.manual_seed(derive_seed(seed, "noise", index))
                completions = [done for count in sizes for done in self._generate(example, count)]
                groups.append(Group(example, tuple(completions)))
        return groups

    def _generate(self, example: Example, num_generations: int) -> list[Completion]:
        greedy = self.decoding.temperature == 0.0
        settings = GenerationConfig(
            max_new_tokens=self.decoding.max_completion_length,
            do_sample=not greedy,
            temperature=None if greedy else self.decoding.temperature,
            top_k=None if greedy else self.decoding.top_k or 0,
            top_p=None if greedy else self.decoding.top_p,
            min_p=None if greedy else self.decoding.min_p or None,
            eos_token_id=list(self.policy.eos_ids),
            pad_token_id=self.policy.pad_id,
            output_scores=True,
            return_dict_in_generate=True,
        )
        prompt = torch.tensor([example.prompt_ids], device=next(self.policy.model.parameters()).device)
        rows = prompt.repeat(num_generations, 1)
        model = self.policy.model
        own, model.generation_config = model.generation_config, GenerationConfig()  # its penalties would slip in
        try:
            out = model.generate(rows, attention_mask=torch.ones_like(rows), generation_config=settings)
        finally:
            model.generation_config = own
        tokens = out.sequences[:, prompt.shape[1] :]
        logps = torch.stack([scores.float().log_softmax(-1) for scores in out.scores], 1)  # [G, T, V]
        chosen = logps.gather(-1, tokens[..., None]).squeeze(-1)
        completions = []
        for ids, values in zip(tokens.tolist(), chosen.tolist(), strict=True):
            end = next((t for t, token in enumerate(ids) if token in self.policy.eos_ids), None)
            length = len(ids) if end is None else end + 1
            text = self.policy.tokenizer.decode(ids[:length], skip_special_tokens=True)
            sampled = (0.0,) * length if greedy else tuple(values[:length])
            completions.append(Completion(text, tuple(ids[:length]), end is not None, sampled))
        return completions
