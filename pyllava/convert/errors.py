"""The exceptions of the converters. Their text is one line that says what was found and what was needed."""

from __future__ import annotations

from ..errors import PyllavaError


class ConvertError(PyllavaError):
    """A conversion that cannot go on."""


class CheckpointError(ConvertError):
    """A checkpoint (weights, config, tokenizer) that is malformed, incomplete or of an unsupported kind."""


class NoCheckpoint(CheckpointError):
    """A folder with no file of weights in it."""


class UnsafeCheckpoint(CheckpointError):
    """A pickle that asks for anything but tensors: nothing of it was run."""


class OutputError(ConvertError):
    """An output file that did not read back as what was meant, or is refused."""


def shown(value: object, limit: int = 80) -> str:
    """`value` from an untrusted file as one short printable piece of a message."""
    text = (
        repr(value) if isinstance(value, (str, bytes, int, float, bool, type(None))) else type(value).__name__
    )
    return text if len(text) <= limit else text[: limit - 3] + "..."
