"""Torch's zip format (`.bin`, `.pth`): a stored archive with one pickle and one member of raw numbers per
storage.

Read without torch: `torch_pickle` names the tensors, and their bytes are located in the archive, checked, and
read later.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, shown
from . import torch_pickle
from .dtypes import STORED
from .tensor import InputFile, Tensor

MAX_MEMBERS = 131_072
MAX_PICKLE = 64 << 20
MAX_TENSORS = 65_536
_ZIP_ERRORS = (
    zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError, EOFError, RuntimeError,
)  # fmt: skip


@dataclass(frozen=True)
class Member:
    offset: int  # of the first byte of its contents in the file
    size: int


def read_torch_zip(file: InputFile) -> dict[str, Tensor]:
    """All tensors of the table in an open file. Raises CheckpointError, UnsafeCheckpoint."""
    members = _members(file)
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{file.path}: {len(pickles)} data.pkl in the archive, need 1")
    prefix = pickles[0][: -len("data.pkl")]
    order = members.get(prefix + "byteorder")
    if order is not None and (order.size > 16 or bytes(file.read(order.offset, order.size)) != b"little"):
        raise CheckpointError(f"{file.path}: numbers are not little-endian")
    member = members[pickles[0]]
    if member.size > MAX_PICKLE:
        raise CheckpointError(f"{file.path}: a pickle of {member.size} bytes, at most {MAX_PICKLE}")
    try:
        root = torch_pickle.load(bytes(file.read(member.offset, member.size)))
    except CheckpointError as error:
        raise type(error)(f"{file.path}: {error}") from None
    table = _tensor_table(file.path, root)
    return {name: _tensor(file, name, view, prefix, members) for name, view in table.items()}


def _members(file: InputFile) -> dict[str, Member]:
    try:
        with zipfile.ZipFile(file.path) as archive:
            infos = archive.infolist()
    except _ZIP_ERRORS as error:
        raise CheckpointError(f"{file.path}: not a readable zip archive: {error}") from None
    if len(infos) > MAX_MEMBERS:
        raise CheckpointError(f"{file.path}: {len(infos)} members in the archive, at most {MAX_MEMBERS}")
    members: dict[str, Member] = {}
    for info in infos:
        name = info.orig_filename
        where = f"{file.path}: member {shown(name)}"
        if name in members:
            raise CheckpointError(f"{where} appears twice")
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
            raise CheckpointError(f"{where} has a name that leads out of the archive")
        if (
            info.compress_type != zipfile.ZIP_STORED
            or info.compress_size != info.file_size
            or info.flag_bits & 1
        ):
            raise CheckpointError(f"{where} is compressed or encrypted, torch stores its members plainly")
        members[name] = _locate(file, info, where)
    return members


def _locate(file: InputFile, info: zipfile.ZipInfo, where: str) -> Member:
    """Where the contents begin: after 30 fixed bytes, the name and the extra field."""
    head = bytes(file.read(info.header_offset, 30))
    n_name, n_extra = struct.unpack("<HH", head[26:30])
    name = bytes(file.read(info.header_offset + 30, n_name))
    if head[:4] != b"PK\x03\x04" or name != info.orig_filename.encode("utf-8"):
        raise CheckpointError(f"{where} has a header that disagrees with the archive's directory")
    offset = info.header_offset + 30 + n_name + n_extra
    if offset + info.file_size > file.size:
        raise CheckpointError(f"{where} runs past the end of the file")
    return Member(offset, info.file_size)


def _tensor_table(path: Path, root: Any) -> dict[str, torch_pickle.View]:
    """The tensors by name: the object itself, or the table that training tools wrap in one key."""
    if isinstance(root, dict):
        for table in (root, *(root[key] for key in ("state_dict", "model", "module") if key in root)):
            if isinstance(table, dict):
                views = {
                    k: v for k, v in table.items() if isinstance(k, str) and isinstance(v, torch_pickle.View)
                }
                if len(views) > MAX_TENSORS:
                    raise CheckpointError(f"{path}: {len(views)} tensors, at most {MAX_TENSORS}")
                if views:
                    return views
        if not root:
            return {}
    raise CheckpointError(f"{path}: holds no table of tensors but {shown(root)}")


def _tensor(
    file: InputFile, name: str, view: torch_pickle.View, prefix: str, members: Mapping[str, Member]
) -> Tensor:
    storage = view.storage
    member = members.get(f"{prefix}data/{storage.key}")
    if member is None:
        raise CheckpointError(
            f"{file.path}: {shown(name)}: storage {shown(storage.key)} is not in the archive"
        )
    item = STORED[storage.dtype].itemsize
    if member.size != storage.n_elements * item:
        raise CheckpointError(
            f"{file.path}: {shown(name)}: storage {shown(storage.key)} has {member.size} bytes, "
            f"{storage.n_elements} {storage.dtype} need {storage.n_elements * item}"
        )
    return Tensor(name, storage.dtype, view.shape, view.strides, file, member.offset + view.offset * item)
