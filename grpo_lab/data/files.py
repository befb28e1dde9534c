"""Local files as rows: which files a path means, and how each format is read."""

import csv
import glob
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from grpo_lab.data.questions import squad_rows
from grpo_lab.data.tagged import conll_rows
from grpo_lab.errors import RecipeError

Row = dict[str, Any]

ENDINGS = {
    "jsonl": "jsonl",
    "json": "json",
    "csv": "csv",
    "tsv": "tsv",
    "parquet": "parquet",
    "txt": "text",
    "conll": "conll",
}
_ENDING = re.compile(rf"\.({'|'.join(ENDINGS)})(?:\.gz)?$")


def find_files(path: str, root: Path) -> list[Path]:
    """The files that `path` (a file or a glob, relative to `root`) stands for, in name order."""
    full = root / path
    if full.is_file():
        return [full]
    if full.is_dir():
        raise RecipeError(f'data.path: "{path}" is a folder; name a file in it, or a glob such as "{path}/*.jsonl"')
    found = sorted(Path(name) for name in glob.glob(str(full), recursive=True) if Path(name).is_file())
    if not found:
        raise RecipeError(
            f'data.path: there is no file "{path}" in {root.resolve()}; that folder is the recipe\'s own unless '
            "data_root names another (in the recipe, or data_root=FOLDER on the command line)"
        )
    return found


def file_stem(path: str) -> str:
    """The name of a file or glob without ending or wildcards: the first part of its examples' ids.

    >>> file_stem("data/train.jsonl.gz"), file_stem("shards/*.parquet")
    ('train', 'shards')
    """
    for part in (_ENDING.sub("", Path(path).name), Path(path).parent.name):
        stem = re.sub(r"[^\w.-]+", "", part).strip("-_.")
        if stem:
            return stem
    return "rows"


def file_format(files: Sequence[Path]) -> str:
    """The one format that the files' endings tell."""
    formats = set()
    for path in files:
        match = _ENDING.search(path.name)
        if match is None:
            raise RecipeError(
                f"data.format: the ending of {path} tells no format; set one of {', '.join([*READERS, 'tsv'])}"
            )
        formats.add(ENDINGS[match[1]])
    if len(formats) > 1:
        raise RecipeError(f"data.path: the files have several formats ({', '.join(sorted(formats))}); name one kind")
    return formats.pop()


def read_files(files: Sequence[Path], format: str, columns: Sequence[str] | None = None) -> Iterator[Row]:  # noqa: A002
    """The rows of the files, one after the other; a row that cannot be read is named by file and line.

    `columns` names those of tsv files, whose first line names them otherwise.
    """
    for path in files:
        try:
            yield from _tsv(path, columns) if format == "tsv" else READERS[format](path)
        except (OSError, EOFError, zlib.error) as error:
            raise RecipeError(f"{path}: cannot be read: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their number from 1, decoded one by one so that broken bytes are found on their line."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as handle:
        for number, raw in enumerate(handle, start=1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise RecipeError(f"{path}:{number}: not UTF-8 text: {error}") from None
            yield number, line.removeprefix("\ufeff") if number == 1 else line


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if line.strip():
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise RecipeError(f"{path}:{number}: not JSON: {error}") from None
            yield _checked(row, f"{path}:{number}", line)


def _document(path: Path) -> tuple[Any, str]:
    """A json file's value, and its text."""
    text = "".join(line for _, line in _lines(path))
    try:
        return json.loads(text), text
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"{path}:{error.lineno}: not JSON: {error.msg}; for one object per line, format: jsonl"
        ) from None
    except RecursionError as error:
        raise RecipeError(f"{path}: not JSON: {error}") from None


def _json(path: Path) -> Iterator[Row]:
    rows, text = _document(path)
    if not isinstance(rows, list):
        raise RecipeError(
            f"{path}: expected a list of objects, found {_kind(rows)}; for one object per line, format: jsonl"
        )
    for number, row in enumerate(rows):
        yield _checked(row, f"{path}, item {number}", text)


def _csv(path: Path) -> Iterator[Row]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise RecipeError(f"{path}:1: a column name stands twice: {', '.join(header)}")
        for fields in reader:
            if fields and len(fields) != len(header):
                raise RecipeError(
                    f"{path}:{reader.line_num}: {len(fields)} fields, but the header has {len(header)}: {', '.join(header)}"
                )
            if fields:
                yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise RecipeError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def _tsv(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    """Lines end at line feeds and nowhere else, fields at tabs; white space around a field is none of it."""
    names = list(columns) if columns is not None else None
    for number, line in _lines(path):
        fields = [field.strip() for field in line.split("\t")]
        if names is None:
            names = fields
            continue
        if not line.strip():
            continue
        # the recipe names as many columns as it needs; a header names all there are
        if len(fields) < len(names) or (columns is None and len(fields) > len(names)):
            raise RecipeError(f"{path}:{number}: {len(fields)} fields, but {len(names)} columns: {', '.join(names)}")
        yield dict(zip(names, fields, strict=False))


def _folders(path: Path) -> Iterator[Row]:
    text = "".join(line for _, line in _lines(path)).strip()
    yield {"text": text, "label": path.parent.name, "file": path.name}


def _conll(path: Path) -> Iterator[Row]:
    return conll_rows(_lines(path), str(path))


def _squad(path: Path) -> Iterator[Row]:
    return squad_rows(_document(path)[0], str(path))


def _text(path: Path) -> Iterator[Row]:
    for _, line in _lines(path):
        if line.strip():
            yield {"text": line.rstrip("\r\n")}


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise RecipeError(f"{path}: not a readable parquet file: {error}") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "text": _text,
    "folders": _folders,
    "conll": _conll,
    "squad": _squad,
}


def _checked(row: Any, place: str, source: str) -> Row:
    if not isinstance(row, dict):
        raise RecipeError(f"{place}: expected an object, found {_kind(row)}")
    # JSON can spell half a character (\ud83d without its partner); no tokenizer and no file takes that as text.
    if "\\ud" in source.lower():
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("ascii", "backslashreplace").decode()
            raise RecipeError(f"{place}: broken unicode: {half} without its partner; repair or drop the row") from None
    return row


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
