"""From a file to a checked recipe: yaml, then `extends`, then overrides, then absolute paths, then the schema."""

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from grpo_lab.errors import RecipeError
from grpo_lab.recipe.problems import SourceMap, schema_problems
from grpo_lab.recipe.schema import Recipe, StageModel
from grpo_lab.recipe.yaml_loader import MAX_BYTES, Loc, Node, Place, format_loc, parse_yaml, resolve_scalar, shorten

_COMMAND_LINE_RANK = sys.maxsize


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and where each of its values was written, so that later checks can name the line."""

    recipe: Recipe
    sources: SourceMap


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, with `key=value` overrides from the command line.

    Raises:
        RecipeError: holds every problem, one line each.
    """
    return load(path, overrides).recipe


def load(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Like `load_recipe`, and remembers where every value was written."""
    root = _with_overrides(_read_with_parents(Path(path)), overrides)
    root = _with_absolute_paths(root, folder=os.path.abspath(Path(path).parent))
    root = _with_stage_models(root)
    sources = SourceMap(root)
    try:
        # As json, because pydantic's strict mode then takes a list for a tuple but still no text for a number.
        recipe = Recipe.model_validate_json(json.dumps(root.plain()), strict=True)
    except ValidationError as error:
        raise RecipeError(schema_problems(error.errors(include_url=False), sources)) from None
    return LoadedRecipe(recipe, sources)


def _read_with_parents(path: Path) -> Node:
    """The file merged over the file it extends, and so on."""
    chain: list[Path] = []
    seen: set[str] = set()
    layers: list[Node] = []
    named_by: Node | None = None
    while True:
        layer = _read(path, rank=len(chain), named_by=named_by)
        chain.append(path)
        seen.add(os.path.abspath(path))
        layers.append(layer)
        named_by = layer.child("extends")
        if named_by is None:
            break
        path = _parent_path(path, named_by)
        if os.path.abspath(path) in seen:
            cycle = " -> ".join(str(file) for file in [*chain, path])
            raise RecipeError(named_by.place.problem(("extends",), f"goes in a circle: {cycle}"))
    merged = layers.pop()
    while layers:
        merged = _merge(merged, layers.pop())
    assert isinstance(merged.value, dict)  # _read refuses everything else
    return replace(merged, value={key: child for key, child in merged.value.items() if key != "extends"})


def _parent_path(path: Path, extends: Node) -> Path:
    if not isinstance(extends.value, str) or not extends.value or "\0" in extends.value:
        raise RecipeError(extends.place.problem(("extends",), f"should be a file, got {extends.described()}"))
    return Path(os.path.normpath(path.parent / extends.value))


def _read(path: Path, *, rank: int, named_by: Node | None) -> Node:
    start = Place(source=str(path), folder=os.path.abspath(path.parent), rank=rank, line=1, column=1)
    try:
        text = _read_text(path)
    except (OSError, ValueError) as error:
        reason = _why_unreadable(path, error)
        if named_by is not None:
            raise RecipeError(named_by.place.problem(("extends",), f"{path}: {reason}")) from None
        raise RecipeError(f"{path}: {reason}") from None

    root = parse_yaml(text, lambda line, column: replace(start, line=line, column=column))
    if root is None:
        raise RecipeError(f"{path}: empty; a recipe is a mapping with name, model and stages")
    if not isinstance(root.value, dict):
        raise RecipeError(
            root.place.problem((), f"a recipe is a mapping with name, model and stages, got {root.described()}")
        )
    return root


def _read_text(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise ValueError("a folder or device, not a file")
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES // 1024} KiB; that is no recipe")
    return raw.decode("utf-8")


def _why_unreadable(path: Path, error: OSError | ValueError) -> str:
    match error:
        case FileNotFoundError():
            return "no such file"
        case UnicodeDecodeError():
            return f"not utf-8 text (byte {error.start})"
        case OSError():
            return error.strerror or str(error)
    return str(error)


def _merge(parent: Node, child: Node) -> Node:
    """Mappings merge, in the parent's order; everything else replaces."""
    if not isinstance(parent.value, dict) or not isinstance(child.value, dict):
        return child
    merged = dict(parent.value)
    for key, node in child.value.items():
        merged[key] = _merge(merged[key], node) if key in merged else node
    return replace(child, value=merged)


def _with_overrides(root: Node, overrides: Sequence[str]) -> Node:
    problems = []
    for index, override in enumerate(overrides):
        try:
            root = _with_override(root, override, index)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return root


def _with_override(root: Node, override: str, index: int) -> Node:
    key, equals, text = override.partition("=")
    parts = re.sub(r"\[(\d+)\]", r".\1", key.strip()).split(".")
    written = shorten(" ".join(override.split()))
    loc = _override_loc(root, parts)
    place = Place(f"command line: {written}", os.getcwd(), _COMMAND_LINE_RANK, line=index, override=loc)
    if not equals or not all(parts):
        raise RecipeError(f"command line: {written}: write key=value, for example seed=1 or stages.grpo.steps=10")
    if loc == ("extends",):
        raise RecipeError(place.problem(loc, "extends is for files; it cannot be set here"))
    return _put(root, loc, _override_value(text.strip(), place), ())


def _override_loc(root: Node, parts: list[str]) -> Loc:
    """The path as a loc: a number is an index where the recipe has a list."""
    loc: Loc = ()
    node: Node | None = root
    for part in parts:
        is_index = node is not None and isinstance(node.value, list) and part.isascii() and part.isdigit()
        step = int(part[:9]) if is_index else part
        loc = (*loc, step)
        node = node.child(step) if node is not None else None
    return loc


def _override_value(text: str, place: Place) -> Node:
    """A flow collection or quoted text is read as yaml, everything else is one scalar, whatever signs are in it."""
    if text[:1] in ("{", "[", '"', "'"):
        node = parse_yaml(text, lambda line, column: place)
        assert node is not None  # the text is not empty
        return node
    try:
        return Node(resolve_scalar(text), place, text)
    except OverflowError:
        raise RecipeError(place.problem((), "too large a number; quote it if it is text")) from None


def written_value(text: str, source: str) -> object:
    """A value as overrides write it: a number, true, false, null, text, or yaml in brackets. `source` is for errors."""
    return _override_value(text.strip(), Place(source, os.getcwd(), override=())).plain()


def _put(node: Node, loc: Loc, new: Node, done: Loc) -> Node:
    """The tree with `new` at `loc`; mappings on the way are made where nothing is written."""
    if not loc:
        return new
    key, rest = loc[0], loc[1:]
    if isinstance(node.value, list):
        if not isinstance(key, int) or key >= len(node.value):
            message = f"{format_loc(done)} is a list of {len(node.value)}, counted from 0; it has no entry {key}"
            raise RecipeError(new.place.problem((), message))
        items = list(node.value)
        items[key] = _put(items[key], rest, new, (*done, key))
        return replace(node, value=items)
    if node.value is not None and not isinstance(node.value, dict):
        raise RecipeError(new.place.problem((), f"{format_loc(done)} is {node.described()}, not a mapping"))
    entries = node.value or {}
    child = entries.get(str(key), Node(None, new.place))
    return replace(node, value={**entries, str(key): _put(child, rest, new, (*done, key))})


def _with_absolute_paths(root: Node, *, folder: str) -> Node:
    """What is written relative to a file becomes absolute, so that the resolved recipe trains the same run anywhere."""
    data_root = root.child("data_root")
    if data_root is None or data_root.value is None:
        root = _put(root, ("data_root",), Node(folder, (data_root or root).place, folder), ())
    root = _change(root, ("data_root",), _absolute)
    plugins = root.child("plugins")
    if plugins is not None and isinstance(plugins.value, list):
        for index in range(len(plugins.value)):
            root = _change(root, ("plugins", index), _absolute)
    for key in ("path", "tokenizer", "chat_template"):
        root = _change(root, ("model", key), _absolute_if_it_looks_like_a_path)
    return root


def _with_stage_models(root: Node) -> Node:
    """A stage's model block gets what it does not say from the recipe's."""
    model, stages = root.child("model"), root.child("stages")
    if model is None or stages is None or not isinstance(stages.value, dict):
        return root
    for name, stage in stages.value.items():
        own = stage.child("model")
        for key in StageModel.model_fields:
            above = model.child(key)
            if own is not None and isinstance(own.value, dict) and own.child(key) is None and above is not None:
                root = _put(root, ("stages", name, "model", key), above, ())
    return root


def _change(root: Node, loc: Loc, change: Callable[[Node], Node]) -> Node:
    node: Node | None = root
    for part in loc:
        node = node.child(part) if node is not None else None
    return root if node is None else _put(root, loc, change(node), ())


def _absolute(node: Node) -> Node:
    if not isinstance(node.value, str) or not node.value:
        return node
    return replace(node, value=os.path.normpath(os.path.join(node.place.folder, os.path.expanduser(node.value))))


def _absolute_if_it_looks_like_a_path(node: Node) -> Node:
    """Hub ids look like relative paths, so only `./x`, `../x`, `/x` and `~/x` are taken as files."""
    return _absolute(node) if isinstance(node.value, str) and node.value.startswith((".", "/", "~")) else node
