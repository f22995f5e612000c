"""What a golden file holds and how it is read: shared by the script that writes them and the test that needs no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import tiny

Array = npt.NDArray[np.float32]
N_GREEDY = 48
NEXT = "llava-1.6"


def golden_path(name: str) -> Path:
    return Path(__file__).resolve().parents[1] / "goldens" / f"{name.replace(' ', '_')}.npz"


def some_rows(x: Array, n: int = 3) -> Array:
    """`n` rows, from the first to the last."""
    return x[np.linspace(0, len(x) - 1, n).round().astype(int)]


def fingerprint(spec: tiny.TinySpec) -> npt.NDArray[np.float64]:
    """Sums over all weights: another number here means that tiny.py draws other models than it did."""
    tensors = [tiny.language_tensors(spec), tiny.projector_tensors(spec), tiny.vision_tensors(spec)]
    arrays = [x.astype(np.float64) for table in tensors for x in table.values()]
    return np.array([sum(x.sum() for x in arrays), sum(np.abs(x).sum() for x in arrays)])


def read_golden(name: str) -> dict[str, Array]:
    with np.load(golden_path(name)) as file:
        return {key: file[key] for key in file.files}


def part(golden: dict[str, Array], prefix: str) -> dict[str, Array]:
    return {key.removeprefix(prefix): x for key, x in golden.items() if key.startswith(prefix)}
