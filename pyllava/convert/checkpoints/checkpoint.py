"""A checkpoint: one or more files of tensors, found by name, opened by content, seen as one table."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..errors import CheckpointError, NoCheckpoint, shown
from .json_file import read_json
from .safetensors_file import read_safetensors
from .tensor import InputFile, Tensor
from .torch_zip import read_torch_zip
from .unsuitable import adapter_advice, adapter_in, check_numbers

_log = logging.getLogger("pyllava.convert")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# In order of preference; safetensors come first. Within a row: a glob of shard names, then whole files.
_PATTERNS = (
    ("model-*-of-*.safetensors", "model.safetensors", "consolidated.safetensors"),
    ("pytorch_model-*-of-*.bin", "pytorch_model.bin", "consolidated.00.pth", "*.pt", "*.pth"),
)


def checkpoint_files(model: Path) -> list[Path]:
    """The files of the checkpoint `model`: a folder, a file, or one shard of several."""
    if model.is_dir():
        return _in_folder(model)
    if not model.exists():
        raise FileNotFoundError(f"{model}: no such file or folder")
    return _siblings(model)


def _in_folder(folder: Path) -> list[Path]:
    files = _weights_in(folder)
    adapter = adapter_in(folder)
    if files and adapter:
        _log.warning("%s: %s is not merged: what is written is the model without it", folder, adapter)
    if files:
        return files
    if adapter:
        raise NoCheckpoint(f"{folder}: {adapter_advice(folder)}")
    raise NoCheckpoint(
        f"{folder}: no checkpoint: need model*.safetensors or pytorch_model*.bin, found {_listing(folder)}"
    )


def _weights_in(folder: Path) -> list[Path]:
    if (folder / "consolidated.01.pth").exists():
        raise CheckpointError(
            f"{folder}: consolidated.*.pth in several slices; convert the Hugging Face layout instead"
        )
    for index, patterns in zip(_INDEXES, _PATTERNS, strict=True):
        if (folder / index).exists():
            return _from_index(folder / index)
        for pattern in patterns:
            found = sorted(folder.glob(pattern))
            if not found:
                continue
            files = _siblings(found[0])
            if len(found) > len(files):
                raise CheckpointError(
                    f"{folder}: more than one checkpoint: {found[0].name} and {found[-1].name}"
                )
            return files
    return []


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "an empty folder"


def _siblings(path: Path) -> list[Path]:
    """`path` itself, or all shards of the set it belongs to by its number pattern."""
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= count <= 9999:
        raise CheckpointError(f"{path.name}: a set of {count} shards")
    files = [
        path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}{match['suffix']}")
        for i in range(1, count + 1)
    ]
    return _present(files)


def _present(files: list[Path]) -> list[Path]:
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise CheckpointError(
            f"{files[0].parent}: {len(missing)} of {len(files)} shards missing, first {missing[0]}"
        )
    return files


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard name of an index, every shard name a plain name in the same folder."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index}: no weight_map")
    for name, shard in table.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", shard):
            raise CheckpointError(
                f"{index}: {shown(name)} is in {shown(shard)}, which is no file name in this folder"
            )
    return table


def _from_index(index: Path) -> list[Path]:
    return _present([index.parent / shard for shard in sorted(set(_weight_map(index).values()))])


def open_file(path: Path) -> tuple[InputFile, dict[str, Tensor]]:
    """One file of tensors, its format told by its first bytes, with its tensors. Raises CheckpointError."""
    file = InputFile(path)
    try:
        start = bytes(file.read(0, min(16, file.size)))
        if start[:4] == b"PK\x03\x04":
            return file, read_torch_zip(file)
        advice = _foreign(start)
        if advice:
            raise CheckpointError(f"{path}: {advice}")
        return file, read_safetensors(file)
    except BaseException:
        file.close()
        raise


def _foreign(start: bytes) -> str:
    """What a file is that is neither format, in words; "" if it may be safetensors."""
    if not start:
        return "an empty file"
    if start.startswith(b"version https://"[: len(start)]) and len(start) >= 8:
        return "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    if start.startswith(b"GGUF"):
        return "a GGUF file, converted already"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "an HTML page, not a checkpoint"
    if start[:1] == b"\x80" and start[8:9] != b"{":
        return (
            "saved in torch's old format (before 1.6); load it in torch (weights_only=True) and save it again"
        )
    if start.startswith((b"./", b"pickle", b"storages", b"tensors", b"sys_info")):
        return (
            "saved as a tar file by a very old torch; load it in torch (weights_only=True) and save it again"
        )
    return ""


class Checkpoint(Mapping[str, Tensor]):
    """All tensors of a set of files by name. Close it, or use it in `with`: tensors read from open files."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = list(files)
        self._open = contextlib.ExitStack()
        self._tensors: dict[str, Tensor] = {}
        try:
            for path in self.files:
                file, tensors = open_file(path)
                self._open.enter_context(file)
                for name, tensor in tensors.items():
                    if name in self._tensors:
                        first = self._tensors[name].file.path.name
                        raise CheckpointError(f"{shown(name)} is both in {first} and in {path.name}")
                    self._tensors[name] = tensor
            self._check_indexes()
            if self.files:
                check_numbers(self.files[0].parent, self._tensors)
        except BaseException:
            self.close()
            raise

    def _check_indexes(self) -> None:
        """Every tensor that an index promises is there, in the shard it names."""
        for index in {path.parent / name for path in self.files for name in _INDEXES}:
            if not index.exists():
                continue
            table = _weight_map(index)
            if set(table.values()) != {path.name for path in self.files}:
                continue  # the index of another set in the same folder
            for name, shard in table.items():
                if name not in self._tensors or self._tensors[name].file.path.name != shard:
                    raise CheckpointError(
                        f"{index.parent / shard}: {shown(name)} is missing, {index.name} promises it"
                    )

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_checkpoint(model: Path) -> Checkpoint:
    """The checkpoint in a folder, a file, or the set that a shard belongs to."""
    return Checkpoint(checkpoint_files(model))


def summary(names: Iterable[str], limit: int = 8) -> str:
    """What a checkpoint holds, in a few words: names with their numbers collapsed, and how many of each."""
    kinds: dict[str, int] = {}
    for name in names:
        kind = ".".join(shown(name, 200)[1:-1].split(".")[:3])
        kinds[re.sub(r"\d+", "*", kind)] = kinds.get(re.sub(r"\d+", "*", kind), 0) + 1
    parts = [f"{kind} ({n})" if n > 1 else kind for kind, n in sorted(kinds.items())]
    return ", ".join(parts[:limit]) + (", ..." if len(parts) > limit else "") if parts else "nothing"
