"""Writes tests/goldens/*.npz: what `transformers` makes of six tiny models. From the root of the repository:

python -m tests.reference.write_goldens

Each file holds some rows of every intermediate (not that of LLaVA-1.6), all image embeddings, some rows of the logits, and
48 greedy tokens; the models themselves come from their seeds (tests/tiny.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__" and str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

import numpy as np  # noqa: E402
from tiny import TinySpec  # noqa: E402

from reference.cases import (  # noqa: E402
    CASES,
    GOLDEN_CASES,
    GOLDEN_PICTURE,
    NEXT_GOLDEN,
    NEXT_GOLDEN_PICTURE,
    Array,
    Case,
    newline,
    picture,
    pinpoints,
    prompt,
)
from reference.goldens import N_GREEDY, NEXT, fingerprint, golden_path, some_rows  # noqa: E402
from reference.reference import Reference, Weights, pixels_of  # noqa: E402


def golden(case: Case) -> dict[str, Array]:
    reference = Reference(case.spec, Weights.of(case.spec).with_f16_patches())
    pixels = pixels_of(picture(*GOLDEN_PICTURE), case.spec.image_size)[None]
    tower = reference.encode(pixels)
    parts = prompt(case.spec, [tower["mm.2"]])
    decoder = reference.run(parts)
    found = {"embeddings": tower.pop("mm.2"), "logits": some_rows(decoder.pop("logits"), 8)}
    found |= {f"tower/{name}": some_rows(x) for name, x in tower.items()}
    found |= {f"decoder/{name}": some_rows(x) for name, x in decoder.items()}
    found["greedy"] = np.array(reference.greedy(parts, N_GREEDY), np.int32)
    found["fingerprint"] = fingerprint(case.spec)
    return found


def next_golden(spec: TinySpec) -> dict[str, Array]:
    """LLaVA-1.6."""
    reference = Reference(spec, Weights.of(spec).with_f16_patches())
    rows = reference.next_embeddings(picture(*NEXT_GOLDEN_PICTURE), pinpoints(spec), newline(spec))
    parts = prompt(spec, [rows])
    found = {"embeddings": rows, "logits": some_rows(reference.logits(parts), 8)}
    found["greedy"] = np.array(reference.greedy(parts, N_GREEDY), np.int32)
    found["fingerprint"] = fingerprint(spec)
    return found


def write(name: str, found: dict[str, Array]) -> None:
    path = golden_path(name)
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **found)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    for name in GOLDEN_CASES:
        write(name, golden(CASES[name]))
    write(NEXT, next_golden(CASES[NEXT_GOLDEN].spec))


if __name__ == "__main__":
    main()
