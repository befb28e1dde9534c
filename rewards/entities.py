"""How many of the named entities are found."""

from typing import Any, Literal

from grpo_lab.scoring import reward
from grpo_lab.text import extract as extracted
from grpo_lab.text_metrics import bio_spans, entity_f1, read_entities
from grpo_lab.types import Completion


@reward(range=(0.0, 1.0))
def entities(
    completion: Completion,
    *,
    answer: Any,
    form: Literal["lines", "json", "tags"] = "lines",
    extract: Literal["none", "xml", "hash", "boxed"] = "none",
) -> float:
    r"""F1 over named entities, from 0 to 1: one counts if its type and its whole text are right (CoNLL's definition).

    How the completion writes them: "lines", one `type: text` per line, and `none` if there are none; "json", a list of
    `{"type": ..., "text": ...}`; "tags", one BIO tag per word, separated by white space. The column `answer` holds the
    same, as text or as a list (of such objects, of [type, text] pairs, or of tags).

    An entity that is named twice counts twice, so naming it again does not pay. Case counts in texts, not in types.
    A completion with anything else in it, or with another number of tags than words, scores 0; where there are no
    entities, only saying so is right. Over a corpus take `grpo_lab.text_metrics.corpus_entity_f1`: F1 is not a mean.
    The entities are the whole completion, or what stands in <answer> tags ("xml"), after `####` ("hash") or in \boxed{}.

    Args:
        form: how entities are written: "lines", "json" or "tags", as above.
        extract: "none" the whole completion, "xml" in <answer> tags, "hash" after `####`, "boxed" in \boxed{}; the last such place.
    """
    text = extracted(completion.text, extract)
    if form == "tags":
        gold_tags = answer.split() if isinstance(answer, str) else list(answer)
        return 0.0 if text is None else _tagged_f1(text.split(), gold_tags)
    gold = read_entities(answer, form)
    if gold is None:
        raise ValueError(f"the column answer holds no entities in the form {form}, but {answer!r:.80}")
    found = None if text is None else read_entities(text, form)
    return 0.0 if found is None else entity_f1(found, gold)


def _tagged_f1(found: list[str], gold: list[str]) -> float:
    spans = bio_spans(gold)
    try:
        return entity_f1(bio_spans(found), spans) if len(found) == len(gold) else 0.0
    except ValueError:  # the model wrote something that is no tag
        return 0.0
