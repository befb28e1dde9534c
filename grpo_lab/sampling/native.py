"""The native sampler: each prompt is computed once, finished rows leave the batch, noise is a function of the group."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from grpo_lab.attention.interface import NotPackableError
from grpo_lab.attention.layout import on_gpu
from grpo_lab.attention.probe import why_plain
from grpo_lab.padding import pad_left
from grpo_lab.sampling.decoding import Decoding, Listener, draw, group_noise
from grpo_lab.sampling.shared import SharedPromptDecoder
from grpo_lab.sampling.static import Slots, StaticDecoder
from grpo_lab.types import Completion, Example, Group, Policy


class NativeSampler:
    """Samples from the policy's own model with a decoding loop of our own."""

    def __init__(self, policy: Policy, decoding: Decoding) -> None:
        self.policy = policy
        self.decoding = decoding
        self._slots: Slots | None = None  # on a GPU: what the next call can use again

    def sync(self, policy: Policy) -> None:
        """Nothing to copy: the sampler uses the trained weights themselves."""
        self.policy = policy

    def sample(self, examples: list[Example], *, num_generations: int, seed: int, first_group: int = 0) -> list[Group]:
        """`num_generations` completions for each example, at most `max_rows` rows decoded at once."""
        return self.sample_telling(
            examples, lambda _: None, num_generations=num_generations, seed=seed, first_group=first_group
        )

    @torch.inference_mode()
    def sample_telling(
        self, examples: list[Example], listener: Listener, *, num_generations: int, seed: int, first_group: int = 0
    ) -> list[Group]:
        """As `sample`, and tell `listener` of each answer that ends."""
        if not examples:
            return []
        self.policy.model.eval()
        length = self.decoding.max_completion_length
        groups = range(first_group, first_group + len(examples))
        noise = torch.cat([group_noise(seed, group, num_generations, length) for group in groups])
        prompts = [example.prompt_ids for example in examples]
        completions = None
        if why_plain(self.policy.model) is None:
            completions = self._shared(prompts, num_generations, noise, listener)
        if completions is None:
            completions = self._plain(prompts, num_generations, noise, listener)
        starts = range(0, len(completions), num_generations)
        answers = (tuple(completions[start : start + num_generations]) for start in starts)
        return [Group(example, own) for example, own in zip(examples, answers, strict=True)]

    def _shared(
        self, prompts: list[tuple[int, ...]], num_generations: int, noise: Float[Tensor, "N T"], listener: Listener
    ) -> list[Completion] | None:
        """Each prompt computed once and kept once; None where the model's attention does not allow it."""
        num_rows = len(noise)
        slots = min(num_rows, self.decoding.max_rows or num_rows)
        of_prompt = [prompt for prompt in range(len(prompts)) for _ in range(num_generations)]
        decoder: SharedPromptDecoder | StaticDecoder
        if on_gpu(next(self.policy.model.parameters()).device):
            decoder = StaticDecoder(self.policy, self.decoding, prompts, slots, self._slots)
            self._slots = decoder.slots
        else:
            decoder = SharedPromptDecoder(self.policy, self.decoding, prompts, slots)
        done: dict[int, Completion] = {}
        try:
            for ended in decoder.decode(of_prompt, noise):
                made = self._completions([(row.tokens, row.logps, row.finished) for row in ended.values()])
                new = dict(zip(ended, made, strict=True))
                done |= new
                listener(new)
        except NotPackableError:  # before the first token
            return None
        return [done[row] for row in range(num_rows)]

    def _plain(
        self, prompts: list[tuple[int, ...]], num_generations: int, noise: Float[Tensor, "N T"], listener: Listener
    ) -> list[Completion]:
        """With transformers' cache, a copy of the prompt in every row: right for every decoder."""
        rows = self.decoding.max_rows or len(noise)
        at_once = max(1, rows // num_generations)
        done: list[Completion] = []
        for start in range(0, len(prompts), at_once):
            part = prompts[start : start + at_once]
            piece = noise[start * num_generations : (start + len(part)) * num_generations]
            for some in piece.split(rows):  # one, unless a single group is larger than max_rows
                first = len(done)  # the row of all that is the first here
                done += self._decode(part, len(some) // len(part), some, first, listener)
        return done

    def _decode(
        self,
        prompts: list[tuple[int, ...]],
        num_generations: int,
        noise: Float[Tensor, "N T"],
        first: int,
        listener: Listener,
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
        done: dict[int, Completion] = {}
        alive = torch.arange(num_rows, device=device)  # which row each row of the cache is
        for t in range(length):
            token, logp = draw(logits, noise[alive, t], self.decoding)
            tokens[alive, t], logps[alive, t] = token, logp
            finished = torch.isin(token, eos)
            ended = finished if t + 1 < length else torch.ones_like(finished)
            rows = alive[ended].tolist()
            if rows:
                written = tokens[rows, : t + 1].tolist(), logps[rows, : t + 1].tolist(), finished[ended].tolist()
                done |= zip(rows, self._completions(list(zip(*written, strict=True))), strict=True)
            listener({first + row: done[row] for row in rows})
            if len(done) == num_rows:
                break
            if rows:
                keep = (~ended).nonzero().squeeze(-1)
                alive, token, mask, position = alive[keep], token[keep], mask[keep], position[keep]
                cache.batch_select_indices(keep)
            position = position + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
        return [done[row] for row in range(num_rows)]

    def _completions(self, rows: Sequence[tuple[list[int], list[float], bool]]) -> list[Completion]:
        if not rows:
            return []
        texts = self.policy.tokenizer.batch_decode([ids for ids, _, _ in rows], skip_special_tokens=True)
        return [
            Completion(text, tuple(ids), done, tuple(logps))
            for text, (ids, logps, done) in zip(texts, rows, strict=True)
        ]
