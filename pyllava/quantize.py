"""Quantising: rows of float32 to the formats of a GGUF file, and whole files from one type to another."""

from __future__ import annotations

import collections
import os
import re
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _lib
from ._gguf_source import SourceFile, SourceTensor, opened, tensors_of
from ._mixes import TYPES, Fallback, Plan, ProjectorPlan
from ._part_file import check_new, replacing
from .errors import ModelFileError, NumericError, UnsupportedModelError
from .gguf import GgufFile

__all__ = ["TYPES", "Fallback", "Plan", "ProjectorPlan", "Report", "quantize", "quantize_rows"]

_ALIGNMENT = 32
_QUANTIZATION_VERSION = 2
_U32 = 4  # GGUF value type
_MAX_THREADS = 256  # each holds a few parts in memory
_LAYER = re.compile(r"blk\.\d+\.")
_CHUNK = 1 << 20  # elements that a thread takes at once
_EVEN = 8  # rows: parts begin at multiples of it, so that their addresses are multiples of 8


def quantize_rows(
    rows: npt.NDArray[np.float32], type_name: str, n_threads: int | None = None
) -> npt.NDArray[np.uint8]:
    """Rows f32 [n, k] as a GGUF file holds them: uint8 [n, bytes of a row]. `type_name` is ggml's, as "Q4_K".

    The same bytes for any number of threads. Raises ValueError for a type that has no quantiser or whose
    blocks do not divide k, and NumericError where a number is NaN, infinite or too large for the type.
    """
    x = np.ascontiguousarray(rows, dtype=np.float32)
    if x.ndim != 2:
        raise ValueError(f"rows: shape {list(x.shape)}, need [n, k]")
    kind = _lib.tensor_type(type_name)
    n, k = x.shape
    if not k or k % kind.block:
        raise ValueError(f"rows of {k}, {kind.name} needs a multiple of {kind.block}")
    out = np.empty((n, kind.n_bytes(k)), np.uint8)
    step = max(_CHUNK // k // _EVEN, 1) * _EVEN
    parts = [slice(i, i + step) for i in range(0, n, step)]
    threads = min(n_threads or default_threads(), len(parts))

    def part(rows: slice) -> None:
        _lib.quantize(x[rows], kind, out[rows], rows.start)

    if threads <= 1:
        for rows_of_part in parts:
            part(rows_of_part)
        return out
    with ThreadPoolExecutor(threads, thread_name_prefix="quantize") as pool:
        for _ in pool.map(part, parts):
            pass
    return out


def default_threads() -> int:
    """The hardware threads that this process may use; fewer where a control group allows less of their time."""
    return int(_lib.lib.pyllava_cpu_count())


# --------------------------------------------------------------------------------------------------- files


AnyPlan: TypeAlias = Plan | ProjectorPlan


@dataclass(frozen=True)
class Report:
    """What `quantize` did. Sizes are bytes of tensors; `types` counts the new file's tensors of each type."""

    source: Path
    target: Path
    type: str
    n_bytes_before: int
    n_bytes: int
    n_weights: int
    types: dict[str, int]
    fallbacks: tuple[Fallback, ...]
    n_requantized: int
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_weights


@dataclass(frozen=True)
class _Job:
    """A tensor and the type it gets."""

    tensor: SourceTensor
    before: _lib.TensorType
    after: _lib.TensorType

    @property
    def n_elements(self) -> int:
        return self.tensor.n_rows * self.tensor.n_per_row

    @property
    def n_bytes(self) -> int:
        return self.tensor.n_rows * self.after.n_bytes(self.tensor.n_per_row)


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type_name: str,
    *,
    n_threads: int | None = None,
    pure: bool = False,
    overwrite: bool = True,
    progress: Callable[[str, float], object] | None = None,
) -> Report:
    """Write the language model or projector `source` again, its matrices in the type `type_name` (one of
    `TYPES`).

    Metadata are kept as they are, the files of a split model become one, and `target` appears only when it is
    complete; with `overwrite` False, not where there is one already. `pure` gives every matrix the base type instead of a mix. The same bytes for any number of
    threads. `progress` is called with "quantize" and the fraction done.

    Raises ValueError for an unknown type or where `target` is an input, ModelFileError for a damaged file or
    a weight that is NaN, infinite or too large for the type, OSError where reading or writing fails (FileExistsError: see
    above).
    """
    started = time.monotonic()
    path, out = (Path(os.path.expanduser(name)) for name in (source, target))
    with opened(path) as files:
        if not overwrite:
            check_new(out, [file.path for file in files])
        plan, jobs = _planned(files, type_name, pure)
        header = _header(files[0], plan.mix.file_type, jobs)
        n_bytes = len(header) + sum(_padded(job.n_bytes) for job in jobs)
        with replacing(out, n_bytes=n_bytes, inputs=[file.path for file in files]) as file:
            file.write(header)
            _write_tensors(file, jobs, min(n_threads or default_threads(), _MAX_THREADS), progress)
            file.flush()
            _check_written(Path(file.name), jobs)
    return Report(
        source=path,
        target=out,
        type=plan.mix.name,
        n_bytes_before=sum(job.tensor.info.n_bytes for job in jobs),
        n_bytes=sum(job.n_bytes for job in jobs),
        n_weights=sum(job.n_elements for job in jobs),
        types=dict(collections.Counter(job.after.name for job in jobs).most_common()),
        fallbacks=tuple(plan.fallbacks),
        n_requantized=sum(job.before.block > 1 and job.after != job.before for job in jobs),
        seconds=time.monotonic() - started,
    )


def _planned(files: Sequence[SourceFile], type_name: str, pure: bool) -> tuple[AnyPlan, list[_Job]]:
    tensors = tensors_of(files)
    plan = _plan(files[0], type_name, {tensor.info.name for tensor in tensors}, pure)
    jobs = []
    for tensor in tensors:
        name, shape = tensor.info.name, tensor.info.shape
        before = after = _lib.tensor_type(tensor.info.type)
        if before.can_dequantize and plan.quantizes(name, shape):
            after = _lib.tensor_type(plan.tensor_type(name, shape))
        jobs.append(_Job(tensor, before, after))
    return plan, jobs


def _plan(first: SourceFile, type_name: str, names: set[str], pure: bool) -> AnyPlan:
    architecture = first.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not names:
        raise UnsupportedModelError(f"{first.path}: no general.architecture, or no weights: not a model")
    if architecture == "clip":
        return ProjectorPlan(type_name)
    layers = [int(name.split(".")[1]) for name in names if _LAYER.match(name)]
    n_head = _most(first.metadata.get(f"{architecture}.attention.head_count"), 1)
    return Plan(
        type_name,
        n_layer=1 + max(layers, default=0),
        n_head=n_head,
        n_head_kv=_most(first.metadata.get(f"{architecture}.attention.head_count_kv"), n_head),
        tied="output.weight" not in names,
        pure=pure,
    )


def _most(value: object, default: int) -> int:
    """The integer, or the largest of one per layer."""
    counts = (
        [n for n in np.ravel(np.asarray(value)).tolist() if isinstance(n, int)] if value is not None else []
    )
    return max(counts, default=default)


def _header(first: SourceFile, file_type: int, jobs: Sequence[_Job]) -> bytes:
    """The bytes before the tensors; key-value pairs are copied, except those of the split and the type."""
    ours = {"general.file_type": file_type, "general.quantization_version": _QUANTIZATION_VERSION}
    pairs = []
    for key, (offset, size) in first.records.items():
        if key in ours:
            pairs.append(_u32_pair(key, ours.pop(key)))
        elif not key.startswith("split.") and key != "general.alignment":
            pairs.append(first.read(offset, size).tobytes())
    pairs += [_u32_pair(key, value) for key, value in ours.items()]
    table, offset = [], 0
    for job in jobs:
        name, shape = job.tensor.info.name.encode(), job.tensor.info.shape
        table += [struct.pack("<Q", len(name)), name, struct.pack("<I", len(shape))]
        table.append(struct.pack(f"<{len(shape)}QIQ", *reversed(shape), job.after.id, offset))
        offset += _padded(job.n_bytes)
    header = b"".join([struct.pack("<4sIQQ", b"GGUF", 3, len(jobs), len(pairs)), *pairs, *table])
    return header.ljust(_padded(len(header)), b"\0")


def _u32_pair(key: str, value: int) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<II", _U32, value)


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


def _write_tensors(
    out: BinaryIO, jobs: Sequence[_Job], n_threads: int, progress: Callable[[str, float], object] | None
) -> None:
    """Reads and writes in order, converts in threads; a few parts per thread are in memory at a time."""
    n_all, n_done = sum(job.n_elements for job in jobs), 0
    waiting: collections.deque[tuple[Future[npt.NDArray[np.uint8]], int, int]] = collections.deque()

    def write_one() -> None:
        nonlocal n_done
        future, n_elements, n_padding = waiting.popleft()
        out.write(future.result().data)
        out.write(bytes(n_padding))
        n_done += n_elements
        if progress is not None:
            progress("quantize", n_done / n_all)

    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="quantize")
    try:
        for job in jobs:
            for start, stop in _parts(job.tensor):
                future = pool.submit(_convert, job, job.tensor.rows(start, stop), start, stop)
                n_padding = _padded(job.n_bytes) - job.n_bytes if stop == job.tensor.n_rows else 0
                waiting.append((future, (stop - start) * job.tensor.n_per_row, n_padding))
                if len(waiting) > 2 * n_threads:
                    write_one()
        while waiting:
            write_one()
    finally:
        pool.shutdown(cancel_futures=True)


def _parts(tensor: SourceTensor) -> Iterator[tuple[int, int]]:
    step = max(_CHUNK // tensor.n_per_row, 1)
    for start in range(0, tensor.n_rows, step):
        yield start, min(start + step, tensor.n_rows)


def _convert(job: _Job, data: npt.NDArray[np.uint8], start: int, stop: int) -> npt.NDArray[np.uint8]:
    """Converts rows [start, stop) of a tensor, which must be finite, from the old type to the new one."""
    if not job.before.can_dequantize:
        return data
    n, n_per_row = stop - start, job.tensor.n_per_row
    x = np.empty((n, n_per_row), np.float32)
    try:
        _lib.dequantize(data, job.before, x, start)
        if job.after == job.before:
            return data
        out = np.empty((n, job.after.n_bytes(n_per_row)), np.uint8)
        _lib.quantize(x, job.after, out, start)
    except NumericError as error:
        raise ModelFileError(f"{job.tensor.file.path}: {job.tensor.info.name}: {error}") from None
    return out


def _check_written(path: Path, jobs: Sequence[_Job]) -> None:
    """Reads the new file's header back: a file that the library refuses must not appear."""
    written = [(info.name, info.type, info.shape) for info in GgufFile(path).tensors]
    wanted = [(job.tensor.info.name, job.after.name, job.tensor.info.shape) for job in jobs]
    if written != wanted:
        raise ModelFileError(f"{path}: reads back differently")
