"""JSON files beside a checkpoint (config, tokenizer), and getters for values of a known kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, shown
from .tensor import InputFile

MAX_BYTES = 256 << 20


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError, FileNotFoundError."""
    with InputFile(path) as file:
        if file.size > MAX_BYTES:
            raise CheckpointError(f"{path}: {file.size} bytes, at most {MAX_BYTES}")
        data = bytes(file.read(0, file.size))
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As `read_json`; {} where there is no such file."""
    return read_json(path) if path.exists() else {}


class Config:
    """A table of settings with typed getters. `where` names it in messages."""

    def __init__(
        self, where: str, table: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.where = where
        self.table = table
        self.defaults = defaults or {}

    def get(self, *keys: str) -> Any:
        """The first of `keys` that is present and not null; else a default; else None."""
        for table in (self.table, self.defaults):
            for key in keys:
                if table.get(key) is not None:
                    return table[key]
        return None

    def sub(self, key: str, defaults: Mapping[str, Any] | None = None) -> Config | None:
        """The table under `key`, or None."""
        value = self.table.get(key)
        return Config(f"{self.where}: {key}", value, defaults) if isinstance(value, dict) else None

    def integer(self, *keys: str, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.get(*keys)
        if value is None:
            raise CheckpointError(f"{self.where}: {keys[0]} is missing")
        if type(value) is not int or not low <= value <= high:
            raise CheckpointError(
                f"{self.where}: {keys[0]} is {shown(value)}, need an integer in {low}..{high}"
            )
        return value

    def number(self, *keys: str, low: float = 0.0, high: float = 1e30) -> float:
        """A finite number with low < value < high."""
        value = self.get(*keys)
        if value is None:
            raise CheckpointError(f"{self.where}: {keys[0]} is missing")
        if type(value) not in (int, float) or not low < value < high:
            raise CheckpointError(f"{self.where}: {keys[0]} is {shown(value)}, need a number above {low:g}")
        return float(value)

    def text(self, key: str) -> str | None:
        """A text, or None where the key is missing or null."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{self.where}: {key} is {shown(value)}, need a text")
        return value
