"""How close is close enough: the one table of tolerances, and the comparisons that apply it. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Arrays = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Gate:
    """Upper bounds (infinite: not asked) and the least cosine of any row."""

    relative: float = np.inf  # max |found - expected| / std(expected)
    cosine: float = -1.0
    max_abs: float = np.inf
    nmse: float = np.inf  # |found - expected|^2 / |expected|^2
    kld: float = np.inf  # mean over rows of KL(softmax(expected) || softmax(found)), nats


# Both sides compute in float32 with the same weights and sum in another order: an error of 1e-6 is usual, and grows
# with depth. An index, a scale or an epsilon that is wrong shows as 1e-2 or more.
INTERMEDIATE = Gate(relative=1e-4, cosine=0.999999)
EMBEDDINGS = Gate(relative=1e-4, cosine=0.999999)
LOGITS = Gate(max_abs=1e-3, nmse=1e-9, kld=1e-8)

# Weights rounded to f16 (11 bits) against the unrounded ones: 1.4e-4 relative per weight, averaged over a row.
EMBEDDINGS_F16 = Gate(cosine=0.9999)
LOGITS_F16 = Gate(nmse=1e-5, kld=1e-4)

# With --use-f32 the patch convolution is f16 all the same (every reader of the format expects it): as above, but for
# one layer only.
EMBEDDINGS_F16_PATCHES = Gate(cosine=0.999999)

# Keys and values rounded on their way into the cache: bits of mantissa f16 11, bf16 8, q8_0 about 7, q5 about 5, q4
# about 4, with one scale for 32 entries of a head.
LOGITS_KV = {
    "f16": Gate(nmse=1e-6, kld=1e-6),
    "bf16": Gate(nmse=1e-4, kld=1e-4),
    "q8_0": Gate(nmse=2e-4, kld=2e-4),
    "q5_1": Gate(nmse=1e-2, kld=1e-2),
    "q5_0": Gate(nmse=1e-2, kld=1e-2),
    "q4_1": Gate(nmse=5e-2, kld=5e-2),
    "q4_0": Gate(nmse=5e-2, kld=5e-2),
}

# The same arithmetic in another grouping of rows (batch size, reuse, sequence slot).
LOGITS_REGROUPED = {"exact": Gate(max_abs=1e-4), "fast": Gate(kld=5e-4)}

# Normalised pixels: (x / 255 - mean) / std in float32, in any order of operations.
PIXELS = Gate(max_abs=1e-6)


def row_cosines(expected: Floats, found: Floats) -> Floats:
    a, b = (np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (expected, found))
    return (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-300)


def nmse(expected: Floats, found: Floats) -> float:
    a, b = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    return float(((a - b) ** 2).sum() / (a**2).sum())


def log_softmax(logits: Floats) -> Floats:
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kld(expected: Floats, found: Floats) -> float:
    p, q = log_softmax(expected), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def measure(expected: Floats, found: Floats) -> Gate:
    """What there is, in the form of what is asked."""
    worst = float(np.abs(np.asarray(expected, np.float64) - found).max())
    return Gate(
        relative=worst / max(float(np.std(expected)), 1e-30),
        cosine=float(row_cosines(expected, found).min()),
        max_abs=worst,
        nmse=nmse(expected, found),
        kld=kld(expected, found),
    )


def failures(gate: Gate, expected: Floats, found: Floats) -> list[str]:
    if expected.shape != found.shape:
        return [f"shape {found.shape}, need {expected.shape}"]
    if not np.isfinite(found).all():
        return ["not finite"]
    m = measure(expected, found)
    pairs = [(name, getattr(m, name), getattr(gate, name)) for name in ("relative", "max_abs", "nmse", "kld")]
    wrong = [f"{name} {value:.3g}, need at most {limit:g}" for name, value, limit in pairs if value > limit]
    if m.cosine < gate.cosine:
        wrong.append(f"worst row's cosine {m.cosine:.9f}, need at least {gate.cosine}")
    return wrong


def check(what: str, gate: Gate, expected: Floats, found: Floats) -> Gate:
    """Raises AssertionError where `found` is not within `gate`; gives the measurement."""
    wrong = failures(gate, expected, found)
    assert not wrong, f"{what}: " + "; ".join(wrong)
    return measure(expected, found)


def check_all(gate: Gate, expected: Arrays, found: Arrays) -> None:
    """Every named intermediate, in the order of computation; the first wrong one is named."""
    assert set(found) == set(expected), f"only one side has {sorted(set(found) ^ set(expected))}"
    wrong = {name: bad for name in found if (bad := failures(gate, expected[name], found[name]))}
    if wrong:
        first = next(iter(wrong))
        right = len(found) - len(wrong)
        raise AssertionError(
            f"first wrong intermediate: {first}: {'; '.join(wrong[first])} ({right} are right)"
        )
