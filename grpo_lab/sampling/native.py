"""The native sampler: each prompt is computed once, finished rows leave the batch, noise is a function of the group."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from grpo_lab.padding import pad_left
from grpo_lab.sampling.decoding import Decoding, group_noise, inverse_cdf, sampling_logps
from grpo_lab.types import Completion, Example, Group, Policy


class NativeSampler:
    """Samples from the policy's own model with a decoding loop of our own."""

    def __init__(self, policy: Policy, decoding: Decoding) -> None:
        self.policy = policy
        self.decoding = decoding

    def sync(self, policy: Policy) -> None:
        """Nothing to copy: the sampler uses the trained weights themselves."""
        self.policy = policy

    @torch.inference_mode()
    def sample(self, examples: list[Example], *, num_generations: int, seed: int) -> list[Group]:
        """`num_generations` completions for each example, at most `max_rows` rows decoded at once."""
        self.policy.model.eval()
        rows = self.decoding.max_rows or len(examples) * num_generations
        prompts_at_once = max(1, rows // num_generations)
        groups: list[Group] = []
        for start in range(0, len(examples), prompts_at_once):
            part = examples[start : start + prompts_at_once]
            length = self.decoding.max_completion_length
            noise = torch.cat([group_noise(seed, start + i, num_generations, length) for i in range(len(part))])
            prompts = [example.prompt_ids for example in part]
            pieces = noise.split(rows)  # one, unless a single group is larger than max_rows
            completions = [done for piece in pieces for done in self._decode(prompts, len(piece) // len(part), piece)]
            for i, example in enumerate(part):
                groups.append(Group(example, tuple(completions[i * num_generations : (i + 1) * num_generations])))
        return groups

    def _decode(
        self, prompts: list[tuple[int, ...]], num_generations: int, noise: Float[Tensor, "N T"]
    ) -> list[Completion]:
        model = self.policy.model
        device = next(model.parameters()).device
        ids, mask = pad_left(prompts, self.policy.pad_id)
        mask = mask.to(device)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config)
        logits = model(
            input_ids=ids.to(device),
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        cache.batch_repeat_interleave(num_generations)
        logits = logits.repeat_interleave(num_generations, 0)
        mask = mask.repeat_interleave(num_generations, 0).long()
        position = positions[:, -1:].repeat_interleave(num_generations, 0)

        num_rows, length = noise.shape
        noise = noise.to(device)
        eos = torch.tensor(self.policy.eos_ids, device=device)
        tokens = torch.zeros(num_rows, length, dtype=torch.long, device=device)
        logps = torch.zeros(num_rows, length, device=device)
        lengths = torch.full((num_rows,), length, device=device)
        finished = torch.zeros(num_rows, dtype=torch.bool, device=device)
        alive = torch.arange(num_rows, device=device)  # which row each row of the cache is
        for t in range(length):
            token, logp = self._draw(logits, noise[alive, t])
            tokens[alive, t], logps[alive, t] = token, logp
            ended = torch.isin(token, eos)
            if ended.any():
                finished[alive[ended]], lengths[alive[ended]] = True, t + 1
                keep = (~ended).nonzero().squeeze(-1)
                alive, token, mask, position = alive[keep], token[keep], mask[keep], position[keep]
                cache.batch_select_indices(keep)
            if alive.numel() == 0 or t + 1 == length:
                break
            position = position + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
        return self._completions(tokens, logps, lengths, finished)

    def _draw(
        self, logits: Float[Tensor, "N V"], uniform: Float[Tensor, "N"]
    ) -> tuple[Int[Tensor, "N"], Float[Tensor, "N"]]:
        if self.decoding.temperature == 0.0:
            token = logits.argmax(-1)
            return token, torch.zeros_like(uniform)
        logps = sampling_logps(logits, self.decoding)
        token = inverse_cdf(logps.exp(), uniform)
        return token, logps.gather(-1, token[:, None]).squeeze(-1)

    def _completions(
        self,
        tokens: Int[Tensor, "N T"],
        logps: Float[Tensor, "N T"],
        lengths: Int[Tensor, "N"],
        finished: Bool[Tensor, "N"],
    ) -> list[Completion]:
        rows = zip(tokens.tolist(), logps.tolist(), lengths.tolist(), finished.tolist(), strict=True)
        cut = [(tuple(ids[:n]), tuple(values[:n]), done) for ids, values, n, done in rows]
        texts = self.policy.tokenizer.batch_decode([list(ids) for ids, _, _ in cut], skip_special_tokens=True)
        return [Completion(text, ids, done, values) for text, (ids, values, done) in zip(texts, cut, strict=True)]
