"""Shared by the converters' tests: paths, a GGUF reader that is not the converters' own, and ready checkpoints."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(ROOT / "tests"))

gguf = pytest.importorskip("gguf")
pytest.importorskip("sentencepiece")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "reference: compares with torch or transformers")


@dataclass
class Gguf:
    """`kv` by key, `types` the value types; `tensors` as float32 in row-major order, `kinds` their GGUF types."""

    kv: dict[str, Any]
    types: dict[str, list[Any]]
    tensors: dict[str, np.ndarray]
    kinds: dict[str, str]


def read_gguf(path: Path) -> Gguf:
    reader = gguf.GGUFReader(path)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
        tensors[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return Gguf(
        {key: field.contents() for key, field in fields.items()},
        {key: field.types for key, field in fields.items()},
        tensors,
        {tensor.name: tensor.tensor_type.name for tensor in reader.tensors},
    )


@pytest.fixture
def script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script of convert/, as a user does in the source tree."""

    def run(
        name: str, *args: object, cwd: Path | None = None, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "convert" / f"{name}.py"), *map(str, args)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=cwd, timeout=600, check=False, **more
        )

    return run


def failure(result: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The error line of a script that failed as it should: its code, nothing on stdout, one error line, no traceback."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if ": error: " in line or code == 2]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]
