"""What pydantic found, in the reader's words: one line per problem, at the place that wrote the value."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic_core import ErrorDetails

from grpo_lab.recipe.schema import Block, Recipe
from grpo_lab.recipe.yaml_loader import Loc, Node, Place, shorten

MAX_PROBLEMS = 50

# Pydantic's words where they are about Python rather than about yaml.
_WORDING = {
    "model_type": "input should be a mapping",
    "model_attributes_type": "input should be a mapping",
    "dict_type": "input should be a mapping",
    "list_type": "input should be a list",
    "tuple_type": "input should be a list",
}
_HINTS = {"string_type": "; quote it if it is text", "bool_type": "; write true or false"}


@dataclass(frozen=True)
class SourceMap:
    """Where every value of a recipe was written."""

    root: Node

    def place(self, loc: Loc) -> Place:
        """Where `loc` was written, or its nearest written parent."""
        node: Node = self.root
        for part in loc:
            child = node.child(part)
            if child is None:
                break
            node = child
        return node.place

    def problem(self, loc: Loc, message: str) -> str:
        """One line that names the place: `recipes/x.yaml:14:3: stages.reasoning.rewards[1].name: message`."""
        return self.place(loc).problem(loc, message)

    def problems(self, found: Iterable[tuple[Loc, str]]) -> list[str]:
        """One line each, in the order in which they stand in the files, the command line last."""
        return [self.problem(loc, message) for loc, message in self._in_file_order(found)]

    def _in_file_order(self, found: Iterable[tuple[Loc, str]]) -> list[tuple[Loc, str]]:
        def position(item: tuple[Loc, str]) -> tuple[int, int, int]:
            place = self.place(item[0])
            return place.rank, place.line, place.column

        return sorted(found, key=position)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them.

    >>> did_you_mean("betta", ["beta", "delta"])
    '; did you mean "beta"?'
    >>> did_you_mean("zzz", ["beta", "delta"])
    '; known: beta, delta'
    """
    known = list(known)
    nearest = difflib.get_close_matches(word, known, n=1)
    return f'; did you mean "{nearest[0]}"?' if nearest else f"; known: {', '.join(known)}"


def schema_problems(errors: list[ErrorDetails], sources: SourceMap) -> list[str]:
    """Pydantic's errors as lines, sorted by place; past MAX_PROBLEMS they are only counted."""
    found: list[tuple[Loc, str]] = []
    for error in errors[:MAX_PROBLEMS]:
        spot = _find(error["loc"], sources.root)
        if spot is not None:
            found += [_in_words(line, spot, error) for line in _raw_messages(error)]
    left_out = len(errors) - MAX_PROBLEMS
    return sources.problems(found) + ([f"... and {left_out} more problems"] if left_out > 0 else [])


@dataclass(frozen=True)
class _Spot:
    """What an error is about: the user's path, its node if written, its type and the block it is in."""

    loc: Loc
    node: Node | None
    annotation: Any
    block: type[Block]


def _find(raw_loc: Loc, root: Node) -> _Spot | None:
    """Follows a pydantic loc through the schema and leaves out the names of the union branches that it contains.

    None when the error comes from a branch that the user did not mean: a mapping tried as text, or text as a mapping.
    """
    annotation: Any = Recipe
    block: type[Block] = Recipe
    node: Node | None = root
    loc: Loc = ()
    for part in raw_loc:
        members = _members(annotation)
        if len(members) > 1:
            annotation = next((member for member in members if _is_branch(member, part)), Any)
            if annotation is not Any and node is not None and _is_mapping(annotation) != isinstance(node.value, dict):
                return None
            continue
        kind = members[0]
        if _is_block(kind):
            block = kind
            annotation = kind.model_fields[part].annotation if part in kind.model_fields else Any
        elif get_origin(kind) in (dict, list, tuple):
            annotation = get_args(kind)[1 if get_origin(kind) is dict else 0]
        else:
            break
        loc = (*loc, part)
        node = node.child(part) if node is not None else None
    return _Spot(loc, node, annotation, block)


def _members(annotation: Any) -> list[Any]:
    """The types that a value may have, without None and without annotations."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) if part is not type(None) for member in _members(part)]
    return [annotation]


def _is_block(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Block)


def _is_mapping(kind: Any) -> bool:
    return _is_block(kind) or get_origin(kind) is dict


def _is_branch(kind: Any, part: str | int) -> bool:
    """Whether pydantic calls this branch of a union so: by its `kind`, or by the type's name."""
    if not _is_block(kind):
        return bool(kind is not Any and kind.__name__ == part)
    tag = kind.model_fields.get("kind")
    return kind.__name__ == part or (tag is not None and part in get_args(tag.annotation))


def _raw_messages(error: ErrorDetails) -> list[str]:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"]).splitlines()
    return [error["msg"][:1].lower() + error["msg"][1:]]


def _in_words(message: str, spot: _Spot, error: ErrorDetails) -> tuple[Loc, str]:
    kind = error["type"]
    got = f", got {spot.node.described()}" if spot.node is not None else ""
    match kind:
        case "value_error" | "missing":
            return spot.loc, message
        case "extra_forbidden":
            known = [*spot.block.model_fields, *(["extends"] if spot.block is Recipe else [])]
            return spot.loc, f"unknown key{did_you_mean(str(spot.loc[-1]), known)}"
        case "literal_error":
            return spot.loc, _unknown_value(spot.node, get_args(_members(spot.annotation)[0]))
        case "union_tag_not_found":
            return (*spot.loc, "kind"), "field required"
        case "union_tag_invalid":
            choices = [tag for member in _members(spot.annotation) for tag in _tags(member)]
            tag = spot.node.child("kind") if spot.node is not None else None
            return (*spot.loc, "kind"), _unknown_value(tag, choices)
        case "too_short":
            least, has = error["ctx"]["min_length"], error["ctx"]["actual_length"]
            return spot.loc, f"needs at least {least} {'entry' if least == 1 else 'entries'}, has {has}"
        case "string_pattern_mismatch":
            word = str(spot.loc[-1]) if error["loc"][-1] == "[key]" else str(error["input"])
            return spot.loc, f'"{shorten(word)}" is no name; it should match {error["ctx"]["pattern"]}'
    is_scalar = spot.node is not None and isinstance(spot.node.value, int | float | str)
    return spot.loc, f"{_WORDING.get(kind, message)}{got}{_HINTS.get(kind, '') if is_scalar else ''}"


def _tags(block: type[Block]) -> tuple[str, ...]:
    return get_args(block.model_fields["kind"].annotation)


def _unknown_value(node: Node | None, choices: Iterable[Any]) -> str:
    choices = [str(choice) for choice in choices]
    if node is None or not isinstance(node.value, str):
        return f"input should be one of {', '.join(choices)}, got {node.described() if node else 'nothing'}"
    return f'unknown value "{shorten(node.value)}"{did_you_mean(node.value, choices)}'
