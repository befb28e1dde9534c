"""What a finished stage left, loaded again: to be exported for others, and to be asked in the terminal."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpo_lab.card import model_card
from grpo_lab.data.chat import encode_chat, encode_plain, render_prompt
from grpo_lab.errors import CheckpointError, UsageError
from grpo_lab.policy.load import DTYPES, has_adapter, load_policy, load_tokenizer, logits_gap, write_policy
from grpo_lab.recipe import Recipe, load_recipe
from grpo_lab.recipe.schema import GrpoStage, Model
from grpo_lab.sampling import make_sampler
from grpo_lab.sampling.decoding import Decoding
from grpo_lab.tracking.folders import save_folder_atomic
from grpo_lab.tracking.run_folder import RESOLVED, RUN, StageFolder
from grpo_lab.types import Example, Policy

MERGED_GAP = 1e-4  # of the largest logit, in float32: merging adds up in another order
CARD = "README.md"
CONVERTER = "convert_hf_to_gguf.py"  # of llama.cpp


@dataclass(frozen=True)
class Finished:
    """One finished stage of a run. `start` is where it began, None for the recipe's own model."""

    recipe: Recipe
    stage: str
    final: Path
    start: Path | None

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.final.parent.parent

    @property
    def model(self) -> Model:
        """The model block as it held for the stage."""
        return self.recipe.model_of(self.recipe.stages[self.stage])


def finished_stage(run: Path, stage: str | None) -> Finished:
    """The stage of that name, or the run's last one.

    Raises:
        UsageError: there is no such run or stage, or the stage is not finished.
    """
    if not (run / RUN).is_file():
        raise UsageError(f"{run}: is no run folder ({RUN} is missing)")
    recipe = load_recipe(run / RESOLVED)
    names = list(recipe.stages)
    name = stage or names[-1]
    if name not in names:
        raise UsageError(f"no stage {name}; there are: {', '.join(names)}")
    final = StageFolder(run / name).final
    if not final.is_dir():
        raise UsageError(f"{final}: is not there; the stage is not finished (grpo-lab train --resume goes on)")
    base = run / "base" if recipe.model.config is not None else None
    starts = {"base": base, "previous": base}
    for each in names:
        start = starts[recipe.stages[each].start_from]
        if each == name:
            break
        starts["previous"] = starts[each] = StageFolder(run / each).final
    return Finished(recipe, name, final, start)


def load_finished(of: Finished, *, before: bool = False, **changes: Any) -> Policy:
    """The stage's policy as it ended, or as it began (`before`); `changes` are to the model block."""
    tokenizer = load_tokenizer(Model(path=str(of.final)))
    model = of.model.model_copy(update=changes)
    return load_policy(model, tokenizer, seed=of.recipe.seed, folder=of.start if before else of.final)


def export(of: Finished, to: Path, *, merge: bool, dtype: str | None) -> dict[str, Any]:
    """Write the stage's model to a new folder, an adapter as such or merged into the weights it was learnt beside.

    Merging happens in float32, 4-bit weights having been turned back first, and is checked against the adapter's own
    logits; only then are the weights turned to `dtype` (None = the recipe's).

    Raises:
        UsageError: the folder exists, or a dtype was asked of an adapter, which is float32.
        CheckpointError: the merged model is not the one with the adapter.
    """
    if to.exists():
        raise UsageError(f"{to}: exists already; give another folder with --to")
    exact = load_finished(of, dtype="float32", gradient_checkpointing=False)
    adapted = has_adapter(exact.model)
    if adapted and not merge:
        if dtype is not None:
            raise UsageError("--dtype goes with --merge: an adapter alone is float32")
        save_folder_atomic(to, lambda folder: write_with_card(of, exact, folder, "adapter"))
        return {"folder": str(to), "kind": "adapter", "dtype": "float32"}
    wanted = dtype or of.model.dtype
    whole = load_finished(of, dtype="float32", gradient_checkpointing=False, lora=None, quantization=None)
    gap = logits_gap(exact, whole)
    if not gap <= MERGED_GAP:
        raise CheckpointError(
            f"{of.final}: the merged model is not the one with the adapter: logits differ by {gap:.2g}"
        )
    whole.model.to(DTYPES[wanted])
    kind = "merged" if adapted else "whole"
    save_folder_atomic(to, lambda folder: write_with_card(of, whole, folder, kind))
    again = load_policy(Model(path=str(to), dtype=wanted), whole.tokenizer, seed=0)  # type: ignore[arg-type]
    written, meant = again.model.state_dict(), whole.model.state_dict()
    if not all(torch.equal(written[name], tensor) for name, tensor in meant.items()):
        shutil.rmtree(to)
        raise CheckpointError(f"{to}: the model that was written is not the one that was merged; it was deleted")
    rounded = logits_gap(exact, again)
    return {"folder": str(to), "kind": kind, "dtype": wanted, "merge_gap": gap, "gap": rounded}


def write_with_card(of: Finished, policy: Policy, folder: Path, kind: str) -> None:
    """The model, and beside it README.md, which says what it is."""
    write_policy(policy, folder, of.model.quantization if kind == "adapter" else None)
    (folder / CARD).write_text(model_card(of.run, of.stage, kind=kind), encoding="utf-8")


def gguf_command(folder: Path) -> list[str]:
    """How llama.cpp's converter makes one GGUF file of a whole model."""
    program = shutil.which(CONVERTER)
    return [*([program] if program else ["python", CONVERTER]), str(folder), "--outfile", f"{folder}.gguf"]


def answers(of: Finished, policy: Policy, messages: list[dict[str, str]], *, count: int, seed: int) -> list[str]:
    """Answers to a conversation; sampled as the stage samples, or greedy if one is asked for."""
    stage = of.recipe.stages[of.stage]
    chat = stage.data.chat and stage.data.text is None
    if chat and stage.data.system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": stage.data.system_prompt}, *messages]
    tokenizer = policy.tokenizer
    if chat:
        text = render_prompt(tokenizer, messages)
        ids = encode_chat(tokenizer, text)
    else:
        text = messages[-1]["content"]
        ids = encode_plain(tokenizer, text)
    room = policy.context_length - len(ids)
    if room < 1:
        raise UsageError(f"the prompt has {len(ids)} tokens; the model takes {policy.context_length} with its answer")
    decoding = Decoding.of(stage.sampling) if isinstance(stage, GrpoStage) else Decoding(room)
    decoding = Decoding(**{**vars(decoding), "max_completion_length": min(room, decoding.max_completion_length)})
    policy.model.eval()
    sampler = make_sampler("native", policy, decoding if count > 1 else decoding.greedy())
    (group,) = sampler.sample([Example("prompt", text, ids, {})], num_generations=count, seed=seed)
    return [completion.text for completion in group.completions]
