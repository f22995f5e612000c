"""Captions for the pictures of a ``ray.data.Dataset``: a column in, six columns out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bulk import inputs, tables
from ..bulk.rows import outcome
from ..bulk.texts import Texts
from ..errors import ImageError
from ..sampling import STRUCTURES, Options
from .cluster import assigned_cpus, cpus_of_nodes, library, node, seen_by_workers, sizes

if TYPE_CHECKING:
    from ..batch import Result

COLUMNS = ("bytes", "image", "path")
"""Where nothing else is told, the first of these that a batch has holds the pictures."""
ADDED = ("caption", "finish_reason", "tokens", "seconds", "status", "error")
"""What a batch gets: columns of the rows that ``pyllava-cli caption`` writes. Null: no caption, or no error.
Columns of these names that it has are replaced."""
_PARALLEL = 8
_log = logging.getLogger("pyllava")
_OF_ASKING = (*Options.__annotations__, "system", "raw")


class Captioner:
    """Captions batches of pictures, for ``Dataset.map_batches``: the model is loaded once, where an instance is made.

    - `model`, `mmproj`: as for `Llava`; the files must be where the workers run.
    - `prompt`: the question about each picture.
    - `column`: where the pictures are: file names, bytes of files (or Hugging Face's pairs of both) or pixels, as
      ``ray.data.read_binary_files`` and ``read_images`` give them (default: bytes, image or path, whichever there is).
    - `options`: those of `Llava` and of `Llava.ask`. In a Ray actor `n_threads` are the CPUs that the actor was given.

    With `schema`, `regex`, `choices` or `grammar` a caption is the text of a structured answer; one that was cut is an error.
    A picture that fails costs nothing but its caption: its row has status "error", and `error` says why, and on which node.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        mmproj: str | os.PathLike[str] | None = None,
        *,
        prompt: str,
        column: str | None = None,
        **options: Any,
    ) -> None:
        from ..llava import Llava

        self._asking = {name: options.pop(name) for name in _OF_ASKING if name in options}
        self._texts, self._column = Texts(prompt), column
        defaults = {"n_parallel": _PARALLEL, "kv_cells": "pictures", "n_threads": assigned_cpus()}
        self.model = Llava(model, mmproj, **{**defaults, **options})

    def __call__(self, batch: Any) -> Any:
        """The batch and six columns more: a dict of NumPy arrays, or a ``pyarrow.Table``, whose columns keep their types.

        Raises ValueError where it has no column of pictures.
        """
        is_table = not isinstance(batch, dict)
        names = batch.column_names if is_table else list(batch)
        column = _column_of(names, self._column)
        values = [value.as_py() for value in batch.column(column)] if is_table else batch[column]
        results = self.model.batch(values, self._texts.prompt, load=_picture, **self._asking)
        rows = [self._row(result) for result in results]
        return _with_arrow(batch, rows) if is_table else {**batch, **_arrays(rows)}

    def _row(self, result: Result[Any]) -> tables.Row:
        name = result.source if isinstance(result.source, str) else ""
        structured = any(self._asking.get(option) is not None for option in STRUCTURES)
        row = outcome(self._texts, result.answers, result.error, name, has_data=structured)
        return row if row["error"] is None else {**row, "error": row["error"] + node()}


def _column_of(names: Sequence[str], wanted: str | None) -> str:
    found = [name for name in (COLUMNS if wanted is None else (wanted,)) if name in names]
    if not found:
        need = "one of " + ", ".join(COLUMNS) if wanted is None else f"a column {wanted!r}"
        raise ValueError(
            f"the batch has the columns {', '.join(names)}, need {need}: column= names another one"
        )
    return found[0]


def _picture(value: Any) -> Any:
    """What a cell has, as `load_image` takes it."""
    if isinstance(value, dict):  # as Hugging Face's datasets keep pictures
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise ImageError("no picture: the cell is null")
    return value


def _arrays(rows: Sequence[tables.Row]) -> dict[str, np.ndarray[Any, Any]]:
    kinds = {"int32": np.int32, "float64": np.float64, "string": object}
    return {name: np.array([row[name] for row in rows], kinds[tables.COLUMNS[name]]) for name in ADDED}


def _with_arrow(table: Any, rows: Sequence[tables.Row]) -> Any:
    """With types of its own: a batch without an error would else have a column without a type."""
    arrow = library("pyarrow")
    for name in ADDED:
        column = arrow.array([row[name] for row in rows], arrow.type_for_alias(tables.COLUMNS[name]))
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, column)
    return table


def caption_dataset(
    pictures: Any,
    prompt: str,
    *,
    model: str | os.PathLike[str] | None = None,
    mmproj: str | os.PathLike[str] | None = None,
    n_actors: int | None = None,
    num_cpus: float | None = None,
    num_gpus: float = 0,
    batch_size: int = 4 * _PARALLEL,
    **options: Any,
) -> Any:
    """A ``ray.data.Dataset`` with the columns of `Captioner`, computed by actors as it is read.

    - `pictures`: a Dataset; or files, folders, patterns and lists as ``pyllava-cli caption`` takes them, which the workers
      must see under the same names.
    - `n_actors`, each of `num_cpus` CPUs, which are its threads (default: the CPUs of the smallest node but one, and as many
      actors as there is room for). A Dataset is read by tasks, which need a CPU that no actor has: without one Ray waits for ever.
    - `num_gpus`: those of each actor, which is then where its model is.
    - `options`: those of `Captioner`.

    Ray starts actors that die again, and gives their batches to others.
    """
    data, ray = library("ray.data"), library()
    is_read = isinstance(pictures, data.Dataset)
    if not is_read:
        pictures = data.from_items([{"path": path} for path in _paths(pictures)])
    if not ray.is_initialized():
        ray.init()
    nodes = cpus_of_nodes(ray)
    n_actors, num_cpus = sizes([n - 1 for n in nodes], n_actors, num_cpus)
    if is_read and sum(nodes) - n_actors * num_cpus < 1:
        _log.warning(
            "n_actors=%d, num_cpus=%g: no CPU of the cluster's %d is left to read pictures with: need fewer",
            *(n_actors, num_cpus, sum(nodes)),
        )
    files = {"model": seen_by_workers(model), "mmproj": seen_by_workers(mmproj)}
    return pictures.map_batches(
        Captioner,
        fn_constructor_kwargs={**files, "prompt": prompt, **options},
        compute=data.ActorPoolStrategy(size=n_actors),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        batch_size=batch_size,
        batch_format="pyarrow",
    )


def _paths(names: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str]:
    """The files that names stand for. Raises ValueError for what is a part of one."""
    given = [names] if isinstance(names, str | os.PathLike) else names
    entries = inputs.found(os.fspath(name) for name in given)
    for entry in entries:
        if not entry.has_place:
            raise ValueError(f"{entry.path}: no file of its own: need a Dataset with its bytes, see ray.data")
    return [os.path.abspath(entry.file) for entry in entries]
