"""From names to pictures: files, folders, patterns, lists, tables with a column of paths, WebDataset tars, standard input."""

from __future__ import annotations

import csv
import errno
import glob
import hashlib
import importlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .._named_pictures import SUFFIXES, by_number
from .._picture_heads import MAX_BYTES
from .._sources import Stream, local_path, open_path, open_stdin
from .._text_file import text_of
from ..errors import ImageError
from .tables import pyarrow

COLUMNS = ("path", "file_name", "image_path", "image", "filename", "file")
"""Of a table without a word about it, the first of these that it has holds the paths."""
STDIN = "-"


@dataclass(frozen=True)
class Entry:
    """A picture: a file, or a part of a tar."""

    path: str
    """What rows call it: the path as it was given, ``TAR/MEMBER`` in a tar, "-" for standard input."""
    file: str
    offset: int | None = None
    """Where it begins in a tar; None: it is the whole file."""
    size: int = 0
    """Its bytes in a tar."""

    @property
    def folder(self) -> str:
        return os.path.dirname(self.path)

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @property
    def stem(self) -> str:
        return os.path.splitext(self.name)[0]

    @property
    def has_place(self) -> bool:
        """Whether a file can lie beside it."""
        return self.offset is None and self.path != STDIN

    def stamp(self) -> tuple[int, int] | None:
        """Size in bytes and time of change in ns; None where there is no file that could be asked."""
        try:
            found = os.stat(self.file)
        except (OSError, ValueError):
            return None
        return (found.st_size if self.offset is None else self.size), found.st_mtime_ns

    def read(self) -> Stream:
        """All of its bytes, and what messages call them."""
        if self.path == STDIN:
            return open_stdin()
        stamp = self.stamp()
        if stamp is not None and stamp[0] > MAX_BYTES:
            raise ImageError(f"{self.path}: more than {MAX_BYTES:,} bytes")
        with open_path(self.file) as file:
            if self.offset is not None:
                file.seek(self.offset)
            stream = Stream(file.read() if self.offset is None else file.read(self.size))
        stream.name = self.path
        return stream


@dataclass(frozen=True)
class Shard:
    """A part of all pictures, which several machines share: from 1 to `n`."""

    number: int
    n: int

    def has(self, entry: Entry) -> bool:
        """By a hash of the path, so that it does not depend on which other pictures there are."""
        digest = hashlib.blake2b(entry.path.encode(errors="surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.n == self.number - 1

    def output(self, path: str) -> str:
        """The name of its own output."""
        stem, suffix = os.path.splitext(path)
        return f"{stem}-{self.number:05}-of-{self.n:05}{suffix}"


def shard_of(text: str) -> Shard:
    """``I/N``, or ``slurm``: the one that the variables of Slurm's job array say. Raises ValueError for another text."""
    if text == "slurm":
        names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
        given = [os.environ.get(name, "") for name in names]
        if not all(map(str.isdecimal, given)):
            raise ValueError(f"shard slurm: not in a job array, {', '.join(names)} are not all set")
        task, first, n = map(int, given)
        step = max(1, int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1")))  # of an array such as 0-6:2
        place, rest = divmod(task - first, step)
        if rest:
            raise ValueError(f"shard slurm: task {task} is not one of {first}, {first + step}, ...")
        text = f"{place + 1}/{n}"
    number, slash, n_all = text.partition("/")
    if not (slash and number.isdecimal() and n_all.isdecimal() and 1 <= int(number) <= int(n_all)):
        raise ValueError(f"shard {text!r}: need I/N with I from 1 to N, or slurm")
    return Shard(int(number), int(n_all))


def found(names: Iterable[str], column: str | None = None) -> list[Entry]:
    """The pictures that `names` stand for, each path once; what is in a folder or fits a pattern, as people sort.

    A name that stands for nothing is an error: it is a typing error more often than not. What a list names and is not there is
    an entry all the same, for a row to say so.
    """
    entries: dict[str, Entry] = {}
    for name in names:
        for entry in _entries(name, column):
            entries.setdefault(entry.path, entry)
    return list(entries.values())


def _entries(name: str, column: str | None) -> Iterable[Entry]:
    if name == STDIN:
        return [Entry(STDIN, STDIN)]
    if _is_list(name):
        return _listed(name[1:])
    path = local_path(name)
    if _is_pattern(path):
        files = sorted(_matches(path), key=by_number)
        if not files:
            raise ImageError(f"{name}: no file fits this pattern")
        return [entry for file in files for entry in _in_file(file, column)]
    if os.path.isdir(path):
        return _in_folder(path)
    if not os.path.exists(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    return _in_file(path, column)


def files_of(name: str) -> list[str]:
    """What is read for a name: the file of a list, those that fit a pattern, or the name itself."""
    if _is_list(name):
        return [name[1:]]
    path = local_path(name)
    return _matches(path) if _is_pattern(path) else [path]


def _is_list(name: str) -> bool:
    return name.startswith("@") and not os.path.lexists(name)


def _is_pattern(path: str) -> bool:
    return not os.path.lexists(path) and glob.has_magic(path)


def _matches(pattern: str) -> list[str]:
    return [match for match in glob.iglob(pattern, recursive=True) if not os.path.isdir(match)]


def _in_file(path: str, column: str | None) -> Iterable[Entry]:
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".tar":
        return _in_tar(path)
    if suffix in _TABLES:
        return _in_table(path, _TABLES[suffix](path), column)
    return [_entry(path)]


def _entry(path: str) -> Entry:
    path = os.path.normpath(path)
    return Entry(path, path)


def _in_folder(folder: str) -> list[Entry]:
    """Pictures in a folder and those below it; hidden ones are left out."""
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        shown = [name for name in names if name.lower().endswith(SUFFIXES) and name[0] != "."]
        files += [os.path.join(place, name) for name in shown]
    if not files:
        raise ImageError(f"{folder}: a folder without pictures ({', '.join(SUFFIXES)})")
    return [_entry(path) for path in sorted(files, key=by_number)]


def _in_tar(path: str) -> list[Entry]:
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in tar if member.isfile()]
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a sound tar file ({error})") from None
    path = os.path.normpath(path)
    return [
        Entry(f"{path}/{member.name}", path, member.offset_data, member.size)
        for member in members
        if member.name.lower().endswith(SUFFIXES)
    ]


# --- lists and tables ---


def _listed(path: str) -> list[Entry]:
    """A path on each line; empty lines are none."""
    if path == STDIN:
        text, folder = text_of(sys.stdin.buffer.read(), "standard input"), ""
    else:
        with open(path, "rb") as file:
            text, folder = text_of(file.read(), path), os.path.dirname(path)
    return [_placed(line.strip(), folder) for line in text.split("\n") if line.strip()]


def _placed(path: str, folder: str) -> Entry:
    """The file that a list in `folder` names: relative to that, or to the working folder."""
    path = local_path(path)
    beside = os.path.join(folder, path)
    return _entry(path if os.path.lexists(path) and not os.path.lexists(beside) else beside)


def _in_table(path: str, rows: Iterator[dict[str, Any]], column: str | None) -> list[Entry]:
    folder, entries = os.path.dirname(path), []
    for number, row in enumerate(rows, 1):
        name = column or next((name for name in COLUMNS if name in row), None)
        if name is None or name not in row:
            wanted = (
                f"a column {column!r}" if column else f"one of the columns {', '.join(COLUMNS)}, or --column"
            )
            raise ValueError(
                f"{path}: row {number} has the columns {', '.join(map(str, row))}: need {wanted}"
            )
        if not isinstance(row[name], str) or not row[name]:
            raise ValueError(f"{path}: row {number}, column {name!r}: found {row[name]!r:.80}, need a path")
        entries.append(_placed(row[name], folder))
    return entries


def _json_rows(path: str) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: line {number} is not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}: line {number}: found {type(row).__name__}, need an object")
            yield row


def _csv_rows(path: str) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        text = text_of(file.read(), path)
    rows = csv.DictReader(io.StringIO(text), delimiter="\t" if path.lower().endswith(".tsv") else ",")
    try:
        yield from rows
    except csv.Error as error:
        raise ValueError(f"{path}: line {rows.line_num + 1} is not CSV ({error})") from None


def _parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    pyarrow(path)
    parquet = importlib.import_module("pyarrow.parquet")
    file = parquet.ParquetFile(path)
    wanted = [name for name in file.schema_arrow.names if str(file.schema_arrow.field(name).type) in _TEXTS]
    for batch in file.iter_batches(columns=wanted):
        yield from batch.to_pylist()


_TEXTS = ("string", "large_string")  # other columns, pictures among them, are not read
_TABLES: dict[str, Callable[[str], Iterator[dict[str, Any]]]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
