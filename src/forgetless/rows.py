"""Rows of a data source, each with its place in words: .jsonl, .json, .csv (each also as .gz), .parquet, or a dataset in Hugging Face's layout.

    for place, row in raw_rows("mails.csv", "mails"): ...        # "mails.csv, line 2", {"sentence": ..., "label": ...}

hub:OWNER/NAME              the split of the key's own name: train for data, validation for dev, test for test
hub:OWNER/NAME:SPLIT        another split, such as train[:1000]
hub:OWNER/NAME:CONFIG:SPLIT a dataset of several configs
hub:OWNER/NAME@REVISION     a branch, tag or commit, before any split; a folder that `datasets.load_dataset` reads may stand for OWNER/NAME

Files are read as UTF-8, with or without a byte order mark. A column whose numbers stand for names (ClassLabel) is read as the names.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .config import HUB
from .errors import DataError

KINDS = ".jsonl, .json, .csv (each also as .gz) and .parquet"
Rows = Iterator[tuple[str, Any]]  # (place in words, row)


def raw_rows(source: str, task: str, split: str = "train") -> Rows:
    """(place, row) for every row of `source`. split: what `hub:OWNER/NAME` without a split means. Raises DataError, with the file and the line or row."""
    if source.startswith("hub:"):
        return _hub(source, task, split)
    file = Path(source)
    if file.is_dir():
        raise DataError(f"task '{task}': {source} is a folder; name a file in it, or hub:{source} for one in the layout of Hugging Face's datasets")
    if not file.is_file():
        raise DataError(f"task '{task}': no such data file: {source}")
    kind = Path(file.name.removesuffix(".gz")).suffix
    read = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}.get(kind)
    if read is not None:
        return read(source, _text(file))
    if file.suffix == ".parquet":
        return _parquet(source)
    raise DataError(f"{source}: unknown kind of file; {KINDS} are read")


def _text(file: Path) -> str:
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error})") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}, line {line}: cannot be read as UTF-8 text ({error.reason}); save the file as UTF-8") from None


def _jsonl(source: str, text: str) -> Rows:
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if line.strip():
            try:
                yield f"{source}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{source}, line {number}: not valid JSON ({error.msg})") from None


def _json(source: str, text: str) -> Rows:
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise DataError(f"{source}, line {error.lineno}: not valid JSON ({error.msg})") from None
    if not isinstance(rows, list):
        raise DataError(f"{source}: expected a list of rows, got {type(rows).__name__}; one object a line goes into a .jsonl file")
    for number, row in enumerate(rows, 1):
        yield f"{source}, row {number}", row


def _csv(source: str, text: str) -> Rows:
    """The first line names the columns; commas between fields, and "double quotes" round one that holds a comma, a quote (doubled) or a line break."""
    lines, header, rows = csv.reader(io.StringIO(text, newline=""), strict=True), None, []
    limit = csv.field_size_limit(len(text) + 1)  # the module's own, 128 KiB a field, is less than a long document
    try:
        while True:
            place = f"{source}, line {lines.line_num + 1}"
            fields = next(lines, None)
            if fields is None:
                return iter(rows)
            if not fields or (len(fields) == 1 and not fields[0].strip()):
                continue  # a blank line
            if header is None:
                header = fields
                if twice := next((name for name in header if header.count(name) > 1), None):
                    raise DataError(f"{place}: two columns are named {twice!r}")
                if len(header) == 1 and (other := next((c for c in ";\t|" if c in header[0]), None)):
                    raise DataError(f"{place}: the columns seem to be separated by {other!r}; separate them by commas")
            elif len(fields) != len(header):
                raise DataError(
                    f"{place}: {len(fields)} fields, where the header names {len(header)}; put double quotes round a field that holds a comma"
                )
            else:
                rows.append((place, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        raise DataError(f"{place}: not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(source: str) -> Rows:
    pyarrow, parquet = _needed("pyarrow", source), _needed("pyarrow.parquet", source)
    try:
        with parquet.ParquetFile(source) as file:  # not datasets.load_dataset, which would leave a copy of the rows in the user's cache
            table = file.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source}: not a parquet file ({_first_line(error)})") from None
    names = {}
    if b"huggingface" in (table.schema.metadata or {}):  # the datasets library wrote it
        names = _class_names(_needed("datasets", source).Features.from_arrow_schema(table.schema))
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{source}, row {number}", _named(row, names)


def _hub(source: str, task: str, split: str) -> Rows:
    datasets = _needed("datasets", source)
    name, revision, one, two = re.fullmatch(HUB, source).groups()
    config, split = (one, two) if two else (None, one or split)
    try:
        dataset = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # no network, no such dataset, gated, no such config or split: each is its own class
        raise DataError(f"task '{task}': {source}, split {split}: cannot be loaded ({type(error).__name__}: {_first_line(error)})") from error
    names = _class_names(dataset.features)
    for number, row in enumerate(dataset, 1):
        yield f"{source}, split {split}, row {number}", _named(row, names)


def _needed(module: str, source: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{source}: reading it needs the package datasets, which is not installed. Run: pip install datasets") from None


def _class_names(features: dict[str, Any]) -> dict[str, list[str]]:
    """{column: names} of the columns that hold a class as a number."""
    return {column: feature.names for column, feature in features.items() if type(feature).__name__ == "ClassLabel"}


def _named(row: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """The row with class numbers replaced by their names; -1, which means not labelled, becomes None, and no column may be that."""
    return row | {column: known[row[column]] if row[column] in range(len(known)) else None for column, known in names.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def text_of(place: str, column: str, value: Any) -> str:
    """A value that must be text, or a whole number, and not empty. Raises DataError."""
    if not isinstance(value, (str, int)) or isinstance(value, bool) or not str(value).strip():
        raise DataError(f"{place}: '{column}' is {value!r}; it must be text that is not empty")
    if any("\ud800" <= c <= "\udfff" for c in str(value)):
        raise DataError(f"{place}: '{column}' holds half a character (a lone surrogate, often an emoji cut in two); mend or drop the row")
    return str(value)
