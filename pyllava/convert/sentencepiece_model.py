"""A SentencePiece model file (`tokenizer.model`), read field by field.

The file is a protocol buffer (sentencepiece_model.proto in github.com/google/sentencepiece). The fields are
few, and two of them that matter here (the kind of each piece, the kind of the model) are not offered by the
sentencepiece package.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .checkpoints.tensor import InputFile
from .errors import CheckpointError, shown

MAX_BYTES = 64 << 20
MAX_PIECES = 1 << 20
MAX_PIECE_BYTES = 4096
BPE = 2  # TrainerSpec.ModelType


@dataclass(frozen=True)
class Piece:
    """`kind`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte; the numbers of GGUF too."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """`special_ids` maps "unk", "bos", "eos", "pad" to ids, -1 for none."""

    pieces: tuple[Piece, ...]
    model_type: int
    special_ids: dict[str, int]
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    normalizes: bool  # a character map (NFKC or such) is applied before the pieces


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """The model in `path`. Raises CheckpointError."""
    with InputFile(path) as file:
        if file.size > MAX_BYTES:
            raise CheckpointError(f"{path}: {file.size} bytes, at most {MAX_BYTES}")
        data = bytes(file.read(0, file.size))
    try:
        model = _model(data)
    except _Malformed as error:
        raise CheckpointError(f"{path}: not a SentencePiece model: {error}") from None
    if not model.pieces:
        raise CheckpointError(f"{path}: not a SentencePiece model: no pieces")
    return model


class _Malformed(Exception):
    pass


def _model(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer, normalizer = b"", b""
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_bytes(value)))
            if len(pieces) > MAX_PIECES:
                raise _Malformed(f"more than {MAX_PIECES} pieces")
        elif number == 2:
            trainer = _bytes(value)
        elif number == 3:
            normalizer = _bytes(value)
    numbers = {number: value for number, value in _fields(trainer) if isinstance(value, int)}
    rules = dict(_fields(normalizer))
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=numbers.get(3, 1),
        special_ids={
            name: _signed(numbers.get(number, default))
            for name, number, default in (("unk", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("pad", 43, -1))
        },
        add_dummy_prefix=bool(rules.get(3, 1)),
        remove_extra_whitespaces=bool(rules.get(4, 1)),
        normalizes=bool(rules.get(2)),
    )


def _piece(data: bytes) -> Piece:
    text, score, kind = b"", 0.0, 1
    for number, value in _fields(data):
        if number == 1:
            text = _bytes(value)
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    if not 0 < len(text) <= MAX_PIECE_BYTES:
        raise _Malformed(f"a piece of {len(text)} bytes")
    if not 1 <= kind <= 6 or score != score or abs(score) == float("inf"):
        raise _Malformed(f"a piece of kind {kind} with score {score}")
    try:
        return Piece(text.decode("utf-8"), score, kind)
    except UnicodeDecodeError:
        raise _Malformed(f"a piece that is not UTF-8: {shown(text)}") from None


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one message: an int for a varint, else the raw bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire = key & 7
        if wire == 0:
            number, position = _varint(data, position)
            yield key >> 3, number
            continue
        if wire == 2:
            size, position = _varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _Malformed(f"wire type {wire} at byte {position}")
        if position + size > len(data):
            raise _Malformed(f"cut short at byte {position}")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise _Malformed("cut short inside a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _Malformed(f"a number too long at byte {position}")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise _Malformed("a number where a text or message belongs")
    return value


def _signed(value: int) -> int:
    """A varint of an int32: negative numbers come as 64-bit two's complement."""
    return value - 2**64 if value >= 2**63 else value
