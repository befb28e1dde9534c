"""Where rows come from: a hub data set, local files, a generated task, or reasoning-gym."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from grpo_lab.data.files import file_format, file_stem, find_files, read_files
from grpo_lab.data.partition import part
from grpo_lab.data.shapes import shaped
from grpo_lab.data.stream import Stream
from grpo_lab.data.tasks import task_rows
from grpo_lab.errors import RecipeError, SetupError
from grpo_lab.recipe.problems import did_you_mean
from grpo_lab.recipe.schema import Data
from grpo_lab.seeds import derive_seed

IN_MEMORY_BYTES = 64 * 2**20
"""Files larger than this together (and parquet always) are read through Arrow's memory map instead of into memory."""
ARROW = ("jsonl", "json", "csv", "text")
"""Formats that Arrow reads as we do."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a data set, after `skip` and `limit`.

    `items` is a list, an Arrow-backed data set or, with `streaming`, a Stream: then there is no `len`, and reading
    forwards is cheap. `name` starts the ids of examples, `place` is how messages call the data; rows are numbered as
    in the source, from 0, `skip` included.
    """

    items: Any
    column_names: tuple[str, ...]
    name: str
    place: str
    first: int = 0

    @property
    def streamed(self) -> bool:
        return isinstance(self.items, Stream)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.items)

    def id(self, index: int) -> str:
        """The stable id of a row, e.g. `gsm8k-train-17`."""
        return f"{self.name}-{self.first + index}"

    def row(self, index: int) -> str:
        """How messages call a row, e.g. `gsm8k/train.jsonl, row 17 (from 0)`."""
        return f"{self.place}, row {self.first + index} (from 0)"


def load_rows(data: Data, *, root: Path, seed: int) -> Rows:
    """The rows that `data` asks for; files are relative to `root`.

    `seed` is for reasoning-gym sets whose options name none: every split gets problems of its own.

    Raises:
        RecipeError: the data is not there, cannot be read, or has no rows; with the cause.
        SetupError: reasoning-gym is not installed.
    """
    rows = _source_rows(data, root=root, seed=seed)
    if data.shape is None:
        return rows
    items = list(shaped(rows, data.shape, row_name=rows.row))
    if not items:
        raise RecipeError(f"data.shape: {rows.place} has no row of that shape")
    return dataclasses.replace(rows, items=items, column_names=tuple(items[0]))


def _source_rows(data: Data, *, root: Path, seed: int) -> Rows:
    match data.source:
        case "file":
            return _file_rows(data, root)
        case "hub":
            return _hub_rows(data, root)
        case "task":
            items = task_rows(data.path, split=data.split, options=data.options)
            return _taken(data, items, name=f"{data.path}-{data.split}", place=f"{data.path} ({data.split})")
        case "reasoning_gym":
            return _taken(
                data, _gym_rows(data, seed), name=f"{data.path}-{data.split}", place=f"{data.path} ({data.split})"
            )


def _file_rows(data: Data, root: Path) -> Rows:
    files = find_files(data.path, root)
    format = data.format or file_format(files)  # noqa: A001
    name, place = file_stem(data.path), data.path
    if data.streaming and format == "json":
        raise RecipeError("data.streaming: a json list can only be read as a whole; use jsonl, or streaming: false")
    if data.streaming:
        return _streamed(data, lambda: read_files(files, format, data.columns), name=name, place=place)
    large = format in ARROW and sum(path.stat().st_size for path in files) > IN_MEMORY_BYTES
    if format == "parquet" or large:
        return _taken(data, _arrow_rows(files, format, place), name=name, place=place)
    return _taken(data, list(read_files(files, format, data.columns)), name=name, place=place)


def _arrow_rows(files: Sequence[Path], format: str, place: str) -> Any:  # noqa: A002
    import datasets

    options: dict[str, Any] = {}
    if format == "csv":  # every field is text, as in the reader for small files
        header = next(read_files(files, format), {})
        options = {
            "features": datasets.Features({name: datasets.Value("string") for name in header}),
            "na_filter": False,
        }
    builder = "json" if format == "jsonl" else format
    found = _load(builder, place, data_files=[str(path) for path in files], split="train", **options)
    return found.filter(lambda row: bool(row["text"].strip())) if format == "text" else found


def _hub_rows(data: Data, root: Path) -> Rows:
    folder = root / data.path
    found = _load(
        str(folder) if folder.is_dir() else data.path,
        data.path,
        name=data.name,
        revision=data.revision,
        split=data.split,
        streaming=data.streaming,
    )
    name, place = f"{Path(data.path).name}-{data.split}", f"{data.path} ({data.split})"
    if data.streaming:
        return _streamed(data, lambda: iter(found), name=name, place=place)
    return _taken(data, found, name=name, place=place)


def _load(path: str, place: str, **options: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, **options)
    # Reaching, finding, preparing: datasets raises all of these, and wraps the real cause of the last kind.
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, datasets.exceptions.DatasetsError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise RecipeError(f'data.path: cannot load "{place}": {type(cause).__name__}: {cause}') from error


def _gym_rows(data: Data, seed: int) -> list[dict[str, Any]]:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise SetupError(f'reasoning-gym cannot be imported ({error}); pip install "grpo-lab[gym]"') from error

    if data.path not in DATASETS:
        raise RecipeError(f'data.path: unknown reasoning-gym data set "{data.path}"{did_you_mean(data.path, DATASETS)}')
    known = [field.name for field in dataclasses.fields(DATASETS[data.path][1])]
    unknown = [key for key in data.options if key not in known]
    if unknown:
        raise RecipeError([f'data.options: unknown option "{key}"{did_you_mean(key, known)}' for key in unknown])
    options = {"seed": derive_seed(seed, "reasoning_gym", data.split) % 2**31, **data.options}
    try:
        found = create_dataset(data.path, **options)
        return [{"prompt": row["question"], "answer": row["answer"], "metadata": row["metadata"]} for row in found]
    # Its configs check themselves with assert.
    except (AssertionError, TypeError, ValueError) as error:
        raise RecipeError(f'data.options: reasoning-gym refuses them for "{data.path}": {error}') from error


def _taken(data: Data, items: Any, *, name: str, place: str) -> Rows:
    """All rows of the partition between `skip` and `limit`."""
    if data.partition is not None:
        chosen_rows = part(items, data.partition)
        items = [items[row] for row in chosen_rows] if isinstance(items, list) else items.select(chosen_rows)
        name, place = f"{name}-{data.partition.take}", f"{place} ({data.partition.take} part)"
    stop = len(items) if data.limit is None else min(len(items), data.skip + data.limit)
    if stop <= data.skip:
        raise RecipeError(f"data.path: {place} has no rows{_after_skip(data)}: {len(items)} in all")
    if isinstance(items, list):
        chosen = items[data.skip : stop]
        columns = tuple(dict.fromkeys(column for row in chosen for column in row))
    else:
        columns = tuple(items.column_names)
        chosen = items if (data.skip, stop) == (0, len(items)) else items.select(range(data.skip, stop))
    return Rows(chosen, columns, name, place, data.skip)


def _streamed(data: Data, open_items: Callable[[], Iterator[Mapping[str, Any]]], *, name: str, place: str) -> Rows:
    stop = None if data.limit is None else data.skip + data.limit
    items = Stream(lambda: islice(open_items(), data.skip, stop))
    head = next(iter(items), None)
    if head is None:
        raise RecipeError(f"data.path: {place} has no rows{_after_skip(data)}")
    return Rows(items, tuple(head), name, place, data.skip)


def _after_skip(data: Data) -> str:
    return f" after skip: {data.skip}" if data.skip else ""
