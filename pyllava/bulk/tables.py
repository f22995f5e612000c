"""Rows as files: JSON Lines one by one, CSV and Parquet as a whole."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from .._part_file import replacing

Row = dict[str, Any]

COLUMNS = MappingProxyType(
    {
        "path": "string",
        "sha256": "string",
        "width": "int32",
        "height": "int32",
        "caption": "string",
        "captions": "list<string>",
        "data": "string",
        "prompt": "string",
        "model": "string",
        "tokens": "int32",
        "seconds": "float64",
        "finish_reason": "string",
        "status": "string",
        "error": "string",
        "bytes": "int64",
        "mtime_ns": "int64",
        "settings": "string",
    }
)
"""What a row has, with Parquet's types; `captions` only where several were asked for, `data` (as JSON, but
in JSON Lines) only where answers have a structure, and null what is not known."""

_BATCH = 10_000  # rows of a Parquet file's group


def line_of(row: Row) -> bytes:
    """A row as a line; a path that is no text keeps its bytes as escaped surrogates."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row).encode() + b"\n"


def _file(path: Path) -> contextlib.AbstractContextManager[BinaryIO]:
    """A new file for `path`, or for what that is a link to."""
    return replacing(Path(os.path.realpath(path)), n_bytes=0)


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    with _file(path) as file:
        file.writelines(map(line_of, rows))


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    with _file(path) as file:
        text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="")
        table = csv.DictWriter(text, COLUMNS, restval="")
        table.writeheader()
        for row in rows:
            table.writerow({**row, **_as_json(row, "captions", "data")})
        text.flush()
        text.detach()


def write_parquet(path: Path, rows: Iterable[Row]) -> None:
    arrow = pyarrow(str(path))
    parquet = importlib.import_module("pyarrow.parquet")
    kinds = {"list<string>": arrow.list_(arrow.string())}
    schema = arrow.schema(
        [(name, kinds.get(kind) or arrow.type_for_alias(kind)) for name, kind in COLUMNS.items()]
    )
    rest = iter(rows)
    with _file(path) as file, parquet.ParquetWriter(file, schema) as writer:
        while batch := list(itertools.islice(rest, _BATCH)):
            told = ({**row, **_as_json(row, "data")} for row in batch)
            whole = [{name: _text(row.get(name)) for name in COLUMNS} for row in told]
            writer.write_table(arrow.Table.from_pylist(whole, schema))


def _as_json(row: Row, *names: str) -> Row:
    """What a column of texts cannot hold, as JSON."""
    return {name: json.dumps(row[name], ensure_ascii=False) for name in names if row.get(name) is not None}


def _text(value: Any) -> Any:
    """Parquet's texts are UTF-8, which a path need not be."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def pyarrow(path: str) -> Any:
    """The library for Parquet. Raises ValueError, with what to install, where it is missing."""
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        raise ValueError(f"{path}: Parquet needs pyarrow: pip install 'pyllava[parquet]'") from None


WRITERS: MappingProxyType[str, Callable[[Path, Iterable[Row]], None]] = MappingProxyType(
    {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}
)
"""What makes a whole file of rows, by the ending of its name."""
