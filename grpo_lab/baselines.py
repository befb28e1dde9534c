"""What a task's held-out rows give without a model: the answers that every result should be compared with."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from string import Formatter
from typing import Any

from grpo_lab.corpus_metrics import KINDS, corpus_metrics
from grpo_lab.data.tagged import written
from grpo_lab.data.tokens import token_ids
from grpo_lab.errors import RecipeError
from grpo_lab.evaluate import Evaluation, measured
from grpo_lab.recipe.schema import Data, RewardTerm
from grpo_lab.stages.plan import GrpoPlan
from grpo_lab.text_metrics import read_entities
from grpo_lab.types import Completion, Example, Group

Columns = Mapping[str, Any]
Answer = Callable[[Columns], str]


def baselines(plan: GrpoPlan, tokenizer: Any) -> dict[str, Evaluation]:
    """Every baseline of the stage's task, scored on its held-out rows as a policy's greedy answers would be.

    Raises:
        RecipeError: the stage has no held-out rows, or none of its rewards is the metric of a task.
    """
    stage = plan.stage
    if stage.evaluation is None:
        raise RecipeError(f"stages.{plan.name}: without evaluation there are no held-out rows to measure baselines on")
    answers: dict[str, Answer] = {}
    for term in stage.reward_terms:
        train = (example.columns for example in plan.prompts.items)
        answers |= _of_task(term, train, stage.evaluation.data)
    if not answers:
        raise RecipeError(f"stages.{plan.name}.rewards: none has baselines; those of these have: {', '.join(KINDS)}")
    return {name: _measured(plan, tokenizer, answer) for name, answer in answers.items()}


def _of_task(term: RewardTerm, train: Iterable[Columns], data: Data) -> dict[str, Answer]:
    match KINDS.get(term.name, ("",))[0]:
        case "classification":
            return majority(train)
        case "entities":
            return dictionary(train, form=term.options.get("form", "lines"))
        case "squad":
            word = term.options.get("unanswerable", "unanswerable")
            return {"unanswerable": lambda _: word, "first sentence": lambda columns: lead(columns["context"], 1)}
        case "rouge":
            source = source_column(data)
            return {f"lead-{n}": lambda columns, n=n: lead(columns[source], n) for n in (1, 3)}
        case "bleu" | "chrf":
            source = source_column(data)
            return {"copied source": lambda columns: str(columns[source])}
        case _:
            return {}


def majority(train: Iterable[Columns]) -> dict[str, Answer]:
    """Always the most frequent class of the training rows; of equally frequent ones, the first by name."""
    counts = Counter(str(columns["answer"]) for columns in train)
    name = min(counts, key=lambda each: (-counts[each], each))
    return {f"always {name}": lambda _: name}


def dictionary(train: Iterable[Columns], *, form: str) -> dict[str, Answer]:
    """No entities at all; and every text that the training rows name as an entity, with the type it mostly has there.

    The longest match wins, from left to right.
    """
    if form == "tags":
        return {"no entities": lambda columns: " ".join("O" for _ in columns["answer"])}
    types: dict[tuple[str, ...], Counter[str]] = {}
    for columns in train:
        for kind, text in read_entities(columns["answer"], form) or ():  # type: ignore[arg-type]
            types.setdefault(tuple(text.split()), Counter())[kind] += 1
    longest = max(map(len, types), default=0)

    def look_up(columns: Columns) -> str:
        words, found, at = columns["sentence"].split(), [], 0
        while at < len(words):
            sizes = range(min(longest, len(words) - at), 0, -1)
            size = next((size for size in sizes if tuple(words[at : at + size]) in types), 0)
            if size:
                name = tuple(words[at : at + size])
                found.append((types[name].most_common(1)[0][0], " ".join(name)))
            at += max(1, size)
        return written(found, form)

    return {"no entities": lambda _: written([], form), "dictionary": look_up}


def lead(text: str, count: int) -> str:
    """The first sentences of a text.

    >>> lead("It rained. We left! Then? Home.", 3)
    'It rained. We left! Then?'
    """
    return " ".join(re.split(r"(?<=[.!?])\s+", text.strip())[:count])


def source_column(data: Data) -> str:
    """The one column that the prompt is made of.

    Raises:
        RecipeError: it is made of several, or of messages.
    """
    prompt = data.prompt or ""
    names = [name for _, name, _, _ in Formatter().parse(prompt) if name] if "{" in prompt else [prompt]
    if len(names) != 1 or not names[0]:
        raise RecipeError(
            "data.prompt: a baseline copies its one column; this prompt has " + (", ".join(names) or "none")
        )
    return names[0]


def _measured(plan: GrpoPlan, tokenizer: Any, answer: Answer) -> Evaluation:
    groups = [_group(example, answer(example.columns), tokenizer) for example in plan.held_out]
    scores = plan.held_out_rewards.score(groups)
    of_corpus = corpus_metrics({term.name: term.options for term in plan.stage.reward_terms})
    found = measured("greedy", groups, scores, of_corpus)
    return Evaluation({"num_prompts": float(len(groups)), **found.metrics}, found.rows)


def _group(example: Example, text: str, tokenizer: Any) -> Group:
    return Group(example, (Completion(text, token_ids(tokenizer, text), finished=True),))
