"""Whether the text is JSON, and the JSON what was asked for."""

import json as reader
import math
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from grpo_lab.scoring import reward
from grpo_lab.text import extract as extracted
from grpo_lab.text_metrics import missing_package
from grpo_lab.types import Completion

_MAX_DEPTH = 100
_FENCE = "```"


def _checked_schema(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    """Checked with the recipe: a schema that is none would fail every completion."""
    if schema is not None:
        _validator(reader.dumps(schema, sort_keys=True))
    return schema


@reward
def json(
    completion: Completion,
    *,
    schema: Annotated[dict[str, Any] | None, AfterValidator(_checked_schema)] = None,
    fenced: bool = True,
    partial: float = 0.0,
    extract: Literal["none", "xml"] = "none",
) -> float:
    """1.0 if the completion is JSON and conforms to the JSON schema, else 0.0; `partial` for JSON that breaks it.

    Without a schema any object or list will do, also an empty one, so `{}` scores: train with a schema. A number or a
    word is JSON, too, but counts only with a schema that allows it. The schema may be of any draft (`$schema`; 2020-12
    by default); references to other documents are never fetched.

    The JSON is the whole completion, or what stands in <answer> tags ("xml"); with `fenced` a Markdown code fence
    around all of it is taken off. Refused as in RFC 8259, and where readers disagree: NaN and Infinity, keys that stand
    twice, numbers too large for a float, more than 100 levels, a text after the end.

    Args:
        schema: the JSON schema that it must conform to; null takes any object or list.
        extract: "none" the whole completion, "xml" what stands in <answer> tags.
    """
    text = extracted(completion.text, extract)
    if text is None:
        return 0.0
    try:
        value = reader.loads(
            _unfenced(text) if fenced else text,
            object_pairs_hook=_object,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_bounded,
        )
    except (ValueError, RecursionError):
        return 0.0
    if _deeper_than(value, _MAX_DEPTH):
        return 0.0
    if schema is None:
        return float(isinstance(value, dict | list))
    return 1.0 if _validator(reader.dumps(schema, sort_keys=True)).is_valid(value) else partial


def _unfenced(text: str) -> str:
    """The content of one Markdown fence, if that is all there is."""
    plain = text.strip()
    if not (plain.startswith(_FENCE) and plain.endswith(_FENCE) and plain.count(_FENCE) == 2):
        return text
    language, _, content = plain.removeprefix(_FENCE).removesuffix(_FENCE).partition("\n")
    return content if language.strip().casefold() in ("", "json") else text


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


def _bounded(digits: str) -> int:
    _finite(digits)
    return int(digits)


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return False
    return any(isinstance(each, dict | list) for each in level)


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    try:
        from jsonschema import Draft202012Validator, SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry
    except ImportError as error:
        raise missing_package("jsonschema", "metrics", error) from error
    content = reader.loads(schema)
    kind = validator_for(content, default=Draft202012Validator)
    try:
        kind.check_schema(content)
    except SchemaError as error:
        place = "".join(f"[{part!r}]" for part in error.absolute_path)
        raise ValueError(f"schema{place} is no JSON schema: {error.message}") from error
    return kind(content, registry=Registry())
