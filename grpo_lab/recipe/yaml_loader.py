"""Reads yaml as a tree that remembers where everything was written, and refuses what a recipe never needs.

Compared with plain PyYAML: 1e-6 is a number, only true and false are booleans, dates are text, keys are text, and
duplicate keys, aliases, merge keys, tags and several documents are errors with their position.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from grpo_lab.errors import RecipeError

Scalar = str | int | float | bool | None
Loc = tuple[str | int, ...]

# A recipe is a few thousand bytes. The caps keep the refusal of a hostile file far under a second.
MAX_BYTES = 128 * 1024
MAX_DEPTH = 32

_LITERALS: dict[str, Scalar] = {"": None, "~": None, "null": None, "true": True, "false": False}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Place:
    """Where something was written: a file's line and column (from 1), or an override on the command line.

    `rank` orders the places: 0 is the file that was asked for, 1 the file it extends, and so on; the command line comes
    last. `folder` is what relative paths written here are relative to. `override` is the key an override sets.
    """

    source: str
    folder: str
    rank: int = 0
    line: int = 0
    column: int = 0
    override: Loc | None = None

    def problem(self, loc: Loc, message: str) -> str:
        """One line: the place, the key, what is wrong."""
        where = self.source if self.override is not None else f"{self.source}:{self.line}:{self.column}"
        return f"{where}: {message}" if loc in ((), self.override) else f"{where}: {format_loc(loc)}: {message}"


@dataclass(frozen=True)
class Node:
    """A value as written. Mappings and lists hold nodes; an entry's place is its key's, a list item's its own."""

    value: "Scalar | dict[str, Node] | list[Node]"
    place: Place
    written: str = ""

    def plain(self) -> object:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        return [child.plain() for child in self.value] if isinstance(self.value, list) else self.value

    def described(self) -> str:
        """What was written, for a message."""
        if isinstance(self.value, dict):
            return "a mapping"
        return "a list" if isinstance(self.value, list) else shorten(self.written) or "nothing"

    def child(self, key: str | int) -> "Node | None":
        """The entry or item with this key, None if it is not written."""
        if isinstance(self.value, dict) and isinstance(key, str):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and 0 <= key < len(self.value):
            return self.value[key]
        return None


def shorten(text: str, length: int = 80) -> str:
    """The text, cut when it is too long for a message."""
    return text if len(text) <= length else text[: length - 3] + "..."


def format_loc(loc: Loc) -> str:
    """A path as recipes and overrides write it.

    >>> format_loc(("stages", "reasoning", "rewards", 1, "name"))
    'stages.reasoning.rewards[1].name'
    """
    parts = (f"[{part}]" if isinstance(part, int) else f".{_format_key(part)}" for part in loc)
    return "".join(parts).removeprefix(".")


def _format_key(key: str) -> str:
    return key if re.fullmatch(r"[\w-]{1,80}", key) else json.dumps(shorten(key), ensure_ascii=False)


def resolve_scalar(text: str) -> Scalar:
    """What an unquoted scalar means.

    >>> [resolve_scalar(text) for text in ("1e-6", "7", "true", "yes", "null", "2024-01-01", "007")]
    [1e-06, 7, True, 'yes', None, '2024-01-01', '007']

    Raises:
        OverflowError: a number outside what 64 bits hold.
    """
    if text in _LITERALS:
        return _LITERALS[text]
    if _INT.fullmatch(text):
        if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
            raise OverflowError(text)
        return int(text)
    if _FLOAT.fullmatch(text) and not text.isdigit():
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise OverflowError(text)
        return number
    return text


At = Callable[[int, int], Place]
"""Makes a place from a line and a column, both counted from 1."""


def parse_yaml(text: str, at: At) -> Node | None:
    """The one document in `text` as a tree, None if there is none. `at` makes a place from a line and a column.

    Raises:
        RecipeError: the text is not yaml, or uses a part of yaml that recipes do without.
    """
    try:
        events = yaml.parse(text, Loader=yaml.SafeLoader)  # events, not nodes: they need no recursion of PyYAML's
        next(events)  # the stream starts
        if isinstance(next(events), yaml.StreamEndEvent):
            return None
        root = _node(next(events), events, at, (), None)
        next(events)  # the document ends
        event = next(events)
    except yaml.MarkedYAMLError as error:
        place = _place(error.problem_mark or error.context_mark, at)
        raise _refused(place, (), f"not valid yaml: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = at(before.count("\n") + 1, len(before) - before.rfind("\n"))
        code = f"U+{ord(text[error.position]):04X}"
        raise _refused(place, (), f"not valid yaml: character {code} is not allowed") from None
    if isinstance(event, yaml.DocumentStartEvent):
        raise _refused(_place(event.start_mark, at), (), "a second document starts here; a recipe is one document")
    return root


def _place(mark: Any, at: At) -> Place:
    """PyYAML counts from 0. All events and errors of its parser have a mark, though its types leave that open."""
    return at(mark.line + 1, mark.column + 1)


def _refused(place: Place, loc: Loc, message: str) -> RecipeError:
    return RecipeError(place.problem(loc, message))


def _node(event: yaml.Event, events: Iterator[yaml.Event], at: At, loc: Loc, place: Place | None) -> Node:
    """The node that starts with `event`. `place` is its key's, None for list items and the root."""
    here = _place(event.start_mark, at)
    if isinstance(event, yaml.AliasEvent):
        raise _refused(here, loc, f'alias "*{event.anchor}": recipes have no aliases; write the value out')
    assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)  # the parser guarantees it
    if event.tag is not None:
        raise _refused(here, loc, f'tag "{shorten(event.tag)}": recipes have no tags; write the plain value')
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event, loc, here, place or here)
    if len(loc) >= MAX_DEPTH:
        raise _refused(here, loc[:3], f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(event, yaml.MappingStartEvent):
        return Node(_entries(events, at, loc), place or here)
    items: list[Node] = []
    while not isinstance(event := next(events), yaml.SequenceEndEvent):
        items.append(_node(event, events, at, (*loc, len(items)), None))
    return Node(items, place or here)


def _scalar(event: yaml.ScalarEvent, loc: Loc, here: Place, place: Place) -> Node:
    _refuse_surrogates(event.value, loc, here)
    if event.style is not None:
        return Node(event.value, place, json.dumps(event.value, ensure_ascii=False))
    try:
        return Node(resolve_scalar(event.value), place, event.value)
    except OverflowError:
        message = f"{shorten(event.value)} is too large a number; quote it if it is text"
        raise _refused(here, loc, message) from None


def _entries(events: Iterator[yaml.Event], at: At, loc: Loc) -> dict[str, Node]:
    entries: dict[str, Node] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        place = _place(event.start_mark, at)
        if not isinstance(event, yaml.ScalarEvent):
            raise _refused(place, loc, "a key must be plain text")
        key = event.value
        _refuse_surrogates(key, loc, place)
        if event.tag is not None:
            raise _refused(place, loc, f'tag "{shorten(event.tag)}": recipes have no tags; write the plain key')
        if key == "<<":
            raise _refused(place, loc, 'merge key "<<": recipes have none; write the values out or use extends')
        if key in entries:
            raise _refused(place, (*loc, key), f"duplicate key; first on line {entries[key].place.line}")
        entries[key] = _node(next(events), events, at, (*loc, key), place)
    return entries


def _refuse_surrogates(text: str, loc: Loc, place: Place) -> None:
    """Half a character (`"\\ud800"`) is legal yaml but can be written to no file."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise _refused(place, loc, "half a character (a surrogate) is not allowed")
