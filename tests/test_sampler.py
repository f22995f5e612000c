"""Choosing a token against the stages written down in NumPy and float64 (`sampler_reference.py`), of which
`test_samplers.py` has the less usual ones: what is kept, how it is drawn, what it is worth.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sampler_reference import Logits, Reference, log_softmax, uniform

from pyllava import _lib
from pyllava._lib import SamplerHandle

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
write_model = pytest.importorskip("bench.sampler").write_model

SMALL, MEDIUM, LARGE = 300, 32_000, 152_064
N = 20_000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, _lib.ModelHandle]]:
    folder = tmp_path_factory.mktemp("sampler")
    handles = {
        n: _lib.ModelHandle(write_model(folder / f"{n}.gguf", n), None) for n in (SMALL, MEDIUM, LARGE)
    }
    yield handles
    for handle in handles.values():
        handle.close()


@pytest.fixture(scope="module")
def small(models: dict[int, _lib.ModelHandle]) -> _lib.ModelHandle:
    return models[SMALL]


def padded(values: npt.ArrayLike) -> Logits:
    """A few logits in a vocabulary of SMALL; the rest cannot be drawn."""
    out = np.full(SMALL, -1e30, np.float32)
    out[: np.size(values)] = values
    return out


LOGITS = padded(np.random.RandomState(0).standard_normal(40) * 2)


def bits(allowed: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    """The mask that lets these tokens pass."""
    filled = np.zeros((len(allowed) + 31) // 32 * 32, bool)
    filled[: len(allowed)] = allowed
    return np.packbits(filled, bitorder="little").view("<u4").astype(np.uint32)


def handle(model: _lib.ModelHandle, reference: Reference, **options: Any) -> SamplerHandle:
    return SamplerHandle(model, **{**reference.__dict__, **options})


# ------------------------------------------------------------------------------ every stage, draw by draw


def kinds(n_vocab: int) -> dict[str, Logits]:
    random = np.random.RandomState(n_vocab)
    normal = random.standard_normal(n_vocab)
    one_high = np.where(np.arange(n_vocab) == n_vocab // 3, 10, normal * 1e-3)
    drawn = {
        "Gaussian": normal * 3,
        "flat": normal * 1e-2,
        "alike": np.full(n_vocab, -7.25),
        "ties": np.round(normal),
        "peaked": np.where(np.arange(n_vocab) == 5, 25, normal * 3),
        "one high": one_high,
        "one low": np.where(np.arange(n_vocab) == 5, -1e30, normal),
        "far apart": normal * 1e30,
        "offset": 1000 + normal * 1e-3,
        "ascending": np.linspace(-8, 8, n_vocab),
    }
    return {name: np.asarray(x, np.float32) for name, x in drawn.items()}


COMBINATIONS = [
    Reference(temperature, top_k, top_p, min_p, penalty)
    for temperature, top_k, top_p, min_p, penalty in itertools.product(
        (0.7, 1.5), (0, 40, 1000), (1.0, 0.9, 0.999), (0.0, 0.05), (1.0, 1.3)
    )
]


def agrees(reference: Reference, logits: Logits, sampler: SamplerHandle, draws: Iterator[float]) -> None:
    """A few tokens in a row. Each is the one at which the running sum of the reference, in the order of ids, passes
    the next number of the generator; sums of float32 weights may leave the choice to a neighbour.
    """
    recent: tuple[int, ...] = ()
    for _ in range(3):
        choice, share = sampler.sample(logits), next(draws)
        p = reference.distribution(logits, recent)
        running = np.cumsum(p)
        assert p[choice.id] > 0 or on_the_edge(reference, logits, recent, choice.id), "it was cut off"
        assert running[choice.id] - p[choice.id] - 2e-5 <= share <= running[choice.id] + 2e-5
        assert choice.log_prob == pytest.approx(log_softmax(logits)[choice.id], rel=1.2e-7, abs=3e-6)
        recent = (*recent, choice.id)


def on_the_edge(reference: Reference, logits: Logits, recent: tuple[int, ...], token: int) -> bool:
    """Whether a change of top_p by a rounding of its sum keeps the token."""
    if not 0 < reference.top_p < 1:
        return False
    nearby = replace(reference, top_p=reference.top_p + 3e-6)
    return bool(nearby.distribution(logits, recent)[token] > 0)


@pytest.mark.parametrize("kind", kinds(SMALL))
@pytest.mark.parametrize("n_vocab", [SMALL, MEDIUM])
def test_every_combination(models: dict[int, _lib.ModelHandle], n_vocab: int, kind: str) -> None:
    logits = kinds(n_vocab)[kind]
    for seed, reference in enumerate(COMBINATIONS if n_vocab == SMALL else COMBINATIONS[::5]):
        agrees(reference, logits, handle(models[n_vocab], reference, seed=seed), uniform(seed))


@pytest.mark.parametrize("kind", kinds(SMALL))
def test_a_large_vocabulary(models: dict[int, _lib.ModelHandle], kind: str) -> None:
    logits = kinds(LARGE)[kind]
    for seed, reference in enumerate(COMBINATIONS[::11]):
        agrees(reference, logits, handle(models[LARGE], reference, seed=seed), uniform(seed))


@pytest.mark.parametrize("n_vocab", [SMALL, MEDIUM, LARGE])
@pytest.mark.parametrize("kind", ["Gaussian", "flat", "alike", "ties", "one high", "one low", "ascending"])
def test_exactly_the_kept_are_drawn(models: dict[int, _lib.ModelHandle], n_vocab: int, kind: str) -> None:
    """top_k at a temperature that makes all alike: the first and last of the list are where the reference has them."""
    logits = kinds(n_vocab)[kind]
    for top_k in (1, 2, 7, 100, 257, n_vocab - 1, n_vocab, n_vocab + 5):
        reference = Reference(temperature=1e30 if kind != "one low" else 1e35, top_k=top_k)
        kept = np.flatnonzero(reference.distribution(logits))
        assert len(kept) == min(top_k, n_vocab)
        for seed in range(4):
            sampler = handle(models[n_vocab], reference, seed=seed)
            share = next(uniform(seed))
            assert abs(np.searchsorted(kept, sampler.sample(logits).id) - int(share * len(kept))) <= 1


@pytest.mark.parametrize("top_p", [0.0, 1e-6, 0.1, 0.5, 0.9, 0.999, 1 - 6e-8])
@pytest.mark.parametrize("n_vocab", [SMALL, LARGE])
def test_ties_at_the_cut_of_top_p(models: dict[int, _lib.ModelHandle], n_vocab: int, top_p: float) -> None:
    """Where all are alike the list ends by ids."""
    sampler = SamplerHandle(models[n_vocab], temperature=1.0, top_p=top_p, seed=1)
    need = max(1, int(np.ceil(np.float64(np.float32(top_p)) * n_vocab)))
    draws = uniform(1)
    for _ in range(10):
        assert abs(sampler.sample(np.zeros(n_vocab, np.float32)).id - int(next(draws) * need)) <= 1


# -------------------------------------------------------------------------------------------- many draws


def counts(model: _lib.ModelHandle, logits: Logits, seed: int = 11, **params: Any) -> npt.NDArray[np.int64]:
    sampler = SamplerHandle(model, repeat_penalty=1.0, seed=seed, **params)
    return np.bincount([sampler.sample(logits).id for _ in range(N)], minlength=len(logits))


PARAMS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.5},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.5, "top_k": 1000},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 2.0, "top_p": 0.5},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 3.0, "min_p": 0.3},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_distribution(small: _lib.ModelHandle, params: dict[str, Any]) -> None:
    p, found = Reference(**params).distribution(LOGITS), counts(small, LOGITS, **params)
    assert not found[p == 0].any(), "a token that was cut off"
    expected = N * p[p > 0]
    likely = expected >= 5
    chi = ((found[p > 0] - expected)[likely] ** 2 / expected[likely]).sum()
    df = likely.sum() - 1
    assert chi < df + 5 * np.sqrt(2 * max(df, 1)), f"chi-square {chi:.1f} of {df} degrees of freedom"
    assert abs(found[p > 0][~likely].sum() - expected[~likely].sum()) < 40


def test_the_test_can_fail(small: _lib.ModelHandle) -> None:
    p, found = Reference(1.0).distribution(LOGITS), counts(small, LOGITS, temperature=1.1)
    assert ((found - N * p)[p > 0] ** 2 / (N * p)[p > 0]).sum() > 200


@pytest.mark.parametrize("kind", ["Gaussian", "flat"])
def test_a_large_vocabulary_is_drawn_evenly(models: dict[int, _lib.ModelHandle], kind: str) -> None:
    """Chi-square over 100 stretches of ids of equal probability."""
    logits, n = kinds(LARGE)[kind], 4000
    sampler = SamplerHandle(models[LARGE], temperature=1.5, top_p=0.999, seed=4)
    running = np.cumsum(Reference(1.5, top_p=0.999).distribution(logits))
    found = np.bincount([int(running[sampler.sample(logits).id] * 99.999) for _ in range(n)], minlength=100)
    expected = np.bincount((running * 99.999).astype(int), np.diff(running, prepend=0), minlength=100) * n
    assert ((found - expected) ** 2 / expected).sum() < 99 + 5 * np.sqrt(2 * 99)


# ------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    "params",
    [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-4}, {"temperature": 1e-40}],
    ids=str,
)
def test_one_candidate(small: _lib.ModelHandle, params: dict[str, Any]) -> None:
    sampler = SamplerHandle(small, **{"temperature": 5.0, **params})
    assert {sampler.sample(LOGITS).id for _ in range(200)} == {int(LOGITS.argmax())}


def test_greedy_ties_go_to_the_lowest_id(small: _lib.ModelHandle) -> None:
    logits = padded([0, 3, 1, 3, 3])
    assert {SamplerHandle(small, seed=seed).sample(logits).id for seed in range(5)} == {1}
    assert SamplerHandle(small, temperature=1.0, top_k=1).sample(logits).id == 1
    assert SamplerHandle(small, temperature=-1.0).sample(logits).id == 1
    two = {SamplerHandle(small, temperature=1.0, top_k=2, seed=s).sample(logits).id for s in range(40)}
    assert two == {1, 3}


def test_zeros_of_both_signs_are_equal(small: _lib.ModelHandle) -> None:
    logits = padded([-0.0, 0.0, -0.0, 0.0])
    choice = SamplerHandle(small).sample(logits, n_alternatives=4)
    assert [choice.id, *(id for id, _ in choice.alternatives)] == [0, 0, 1, 2, 3]


def test_greedy_ignores_the_cuts(small: _lib.ModelHandle) -> None:
    sampler = SamplerHandle(small, temperature=0.0, top_k=5, top_p=0.3, min_p=0.5, repeat_penalty=2.0)
    plain = SamplerHandle(small, repeat_penalty=2.0)
    assert [sampler.sample(LOGITS) for _ in range(20)] == [plain.sample(LOGITS) for _ in range(20)]


def test_seeds(small: _lib.ModelHandle) -> None:
    def draws(seed: int) -> list[int]:
        sampler = SamplerHandle(small, temperature=1.0, seed=seed)
        return [sampler.sample(LOGITS).id for _ in range(50)]

    assert draws(3) == draws(3)
    assert len({tuple(draws(seed)) for seed in range(20)}) == 20
    assert draws(2**64 - 1) == draws(-1)


def test_a_seed_s_tokens_never_change(small: _lib.ModelHandle) -> None:
    """On any platform. Other tokens here are a change that users see: it belongs into the changelog."""
    sampler = SamplerHandle(small, temperature=0.9, top_k=30, top_p=0.95, repeat_penalty=1.1, seed=2024)
    assert [sampler.sample(LOGITS).id for _ in range(16)] == SEEDED


SEEDED = [24, 2, 3, 2, 28, 16, 3, 16, 3, 4, 9, 28, 28, 24, 3, 24]


@pytest.mark.parametrize("kind", kinds(SMALL))
@pytest.mark.parametrize("n_vocab", [SMALL, MEDIUM, LARGE])
def test_log_probabilities_and_alternatives(
    models: dict[int, _lib.ModelHandle], n_vocab: int, kind: str
) -> None:
    """Of the model's own distribution, whatever mask and options make of it."""
    logits = kinds(n_vocab)[kind]
    expected = log_softmax(logits)
    best = np.lexsort((np.arange(n_vocab), -logits.astype(np.float64)))
    allowed = np.arange(n_vocab) % 3 == 1
    options = {"temperature": 2.0, "top_k": 50, "top_p": 0.8, "repeat_penalty": 1.5, "seed": 3}
    for n in (0, 1, 5, 20, 300):
        sampler = SamplerHandle(models[n_vocab], **options)
        for _ in range(2):
            choice = sampler.sample(logits, mask=bits(allowed), n_alternatives=n)
            assert allowed[choice.id]
            assert choice.log_prob == pytest.approx(expected[choice.id], rel=1.2e-7, abs=3e-6)
            ids, found = [id for id, _ in choice.alternatives], [p for _, p in choice.alternatives]
            assert ids == best[:n].tolist()
            np.testing.assert_allclose(found, expected[best[:n]], rtol=1.2e-7, atol=3e-6)


def test_alternatives_change_no_choice(small: _lib.ModelHandle) -> None:
    one, other = (SamplerHandle(small, temperature=1.0, repeat_penalty=1.2, seed=5) for _ in range(2))
    asked = [one.sample(LOGITS, n_alternatives=i % 4) for i in range(30)]
    assert [choice.id for choice in asked] == [other.sample(LOGITS).id for _ in range(30)]
    with pytest.raises(ValueError, match=r"n_alternatives: found -1, need 0\.\.300"):
        one.sample(LOGITS, n_alternatives=-1)
    with pytest.raises(ValueError, match="n_alternatives: found 301"):
        one.sample(LOGITS, n_alternatives=SMALL + 1)
    assert [id for id, _ in one.sample(LOGITS, n_alternatives=SMALL).alternatives[:40]] == np.argsort(
        -LOGITS
    )[:40].tolist()


# ---------------------------------------------------------------------------------------------- the mask


@pytest.mark.parametrize("reference", COMBINATIONS[::7], ids=str)
@pytest.mark.parametrize("left", [1, 5, 250])
def test_masks(small: _lib.ModelHandle, reference: Reference, left: int) -> None:
    """A vocabulary of 5, among others; and the penalty finds its tokens among those that are left."""
    logits, allowed = kinds(SMALL)["Gaussian"], np.zeros(SMALL, bool)
    allowed[np.random.RandomState(left).choice(SMALL, left, replace=False)] = True
    sampler, draws = handle(small, reference, seed=9), uniform(9)
    recent: tuple[int, ...] = ()
    for _ in range(20):
        choice, share = sampler.sample(logits, mask=bits(allowed)), next(draws)
        p = reference.distribution(logits, recent, allowed)
        running = np.cumsum(p)
        assert running[choice.id] - p[choice.id] - 1e-5 <= share <= running[choice.id] + 1e-5
        recent = (*recent, choice.id)


def test_a_mask_that_leaves_nothing(small: _lib.ModelHandle) -> None:
    sampler = SamplerHandle(small, repeat_penalty=2.0)
    nothing = bits(np.zeros(SMALL, bool))
    nothing[-1] = 0xFFFFFFFF << (SMALL % 32) & 0xFFFFFFFF  # bits of no token
    with pytest.raises(ValueError, match="mask: no token of 300 is left"):
        sampler.sample(LOGITS, mask=nothing)
    assert sampler.sample(LOGITS).id == int(LOGITS.argmax()), "nothing was remembered"
    with pytest.raises(ValueError, match=r"mask: shape \(9,\), need \(10,\)"):
        sampler.sample(LOGITS, mask=nothing[1:])


def test_a_whole_mask_changes_nothing(small: _lib.ModelHandle) -> None:
    options = {"temperature": 1.0, "top_p": 0.9, "repeat_penalty": 1.2, "seed": 5}
    masked, plain = SamplerHandle(small, **options), SamplerHandle(small, **options)
    everything = bits(np.ones(SMALL, bool))
    for _ in range(50):
        assert masked.sample(LOGITS, mask=everything) == plain.sample(LOGITS)


# ------------------------------------------------------------------------------------------- the penalty


@pytest.mark.parametrize("penalty", [1.3, 5.0, 0.5])
def test_repeat_penalty(small: _lib.ModelHandle, penalty: float) -> None:
    """Greedy with a penalty: each token of the window once, divided above zero, multiplied below."""
    window = 4
    logits = padded([2.0, 1.9, 1.8, -0.1, -0.11, -0.3, -3.0, 1.0])
    sampler = SamplerHandle(small, repeat_penalty=penalty, repeat_last_n=window)
    chosen: list[int] = []
    for _ in range(30):
        p = Reference(repeat_penalty=penalty, repeat_last_n=window).distribution(logits, tuple(chosen))
        chosen.append(sampler.sample(logits).id)
        assert chosen[-1] == int(p.argmax())


def test_repeat_penalty_off(small: _lib.ModelHandle) -> None:
    sampler = SamplerHandle(small, repeat_penalty=3.0, repeat_last_n=0)
    assert [sampler.sample(LOGITS).id for _ in range(5)] == [int(LOGITS.argmax())] * 5


def test_penalty_comes_before_the_cuts(small: _lib.ModelHandle) -> None:
    """The likeliest token, penalised, falls out of the best two."""
    logits = padded([5.0, 4.0, 3.9, 0.0])
    sampler = SamplerHandle(small, temperature=1.0, top_k=2, repeat_penalty=10.0, repeat_last_n=1, seed=1)
    first = sampler.sample(logits).id
    second = [sampler.sample(logits).id for _ in range(100)]
    pairs = zip([first, *second], second, strict=False)
    assert all(a != b for a, b in pairs if a in (0, 1))


@pytest.mark.parametrize("penalty", [1e30, 1e-30])
def test_a_penalty_beyond_float32(small: _lib.ModelHandle, penalty: float) -> None:
    for temperature in (0.0, 1.0):
        sampler = SamplerHandle(small, temperature=temperature, repeat_penalty=penalty, seed=2)
        assert all(0 <= sampler.sample(LOGITS * np.float32(1e3)).id < SMALL for _ in range(100))


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("params", "pattern"),
    [
        ({"temperature": np.nan}, "temperature"),
        ({"temperature": np.inf}, "temperature"),
        ({"top_k": -1}, "top_k: found -1"),
        ({"top_p": 1.5}, "top_p: found 1.5"),
        ({"top_p": np.nan}, "top_p"),
        ({"min_p": -0.1}, "min_p: found -0.1"),
        ({"repeat_penalty": 0.0}, "repeat_penalty: found 0"),
        ({"repeat_penalty": np.inf}, "repeat_penalty"),
        ({"repeat_last_n": -1}, "repeat_last_n: found -1"),
    ],
)
def test_parameters_out_of_range(small: _lib.ModelHandle, params: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        SamplerHandle(small, **params)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("at", [7, SMALL - 1])
def test_logits_that_are_not_finite(
    small: _lib.ModelHandle, value: float, temperature: float, at: int
) -> None:
    sampler = SamplerHandle(small, temperature=temperature)
    bad = LOGITS.copy()
    bad[at] = value
    with pytest.raises(RuntimeError, match=f"entry {at} is not finite"):
        sampler.sample(bad)
    sampler.sample(LOGITS)


def test_logits_of_another_vocabulary(small: _lib.ModelHandle) -> None:
    with pytest.raises(ValueError, match=r"logits: shape \(40,\), need \(300,\)"):
        SamplerHandle(small).sample(LOGITS[:40])


def test_extreme_logits(small: _lib.ModelHandle) -> None:
    """No overflow on the way: as far apart as float32 goes, or all alike there."""
    ends = padded([-3e38, 3e38, 0])
    for options in ({}, {"top_p": 0.9}, {"top_k": 2}, {"top_k": 299, "top_p": 0.5, "min_p": 0.1}):
        assert SamplerHandle(small, temperature=0.01, **options).sample(ends).id == 1
    alike = np.full(SMALL, -1e30, np.float32)
    found = {SamplerHandle(small, temperature=1.0, top_k=4, seed=s).sample(alike).id for s in range(60)}
    assert found == {0, 1, 2, 3}
    tiny = np.linspace(0, 1e-38, SMALL, dtype=np.float32)
    choice = SamplerHandle(small, temperature=1.0, top_k=2, seed=1).sample(tiny, n_alternatives=3)
    assert choice.id in (SMALL - 1, SMALL - 2)
    assert [id for id, _ in choice.alternatives] == [SMALL - 1, SMALL - 2, SMALL - 3]


def test_a_sampler_may_outlive_its_model(tmp_path: Path) -> None:
    model = _lib.ModelHandle(write_model(tmp_path / "model.gguf", SMALL), None)
    sampler = SamplerHandle(model)
    model.close()
    assert sampler.sample(LOGITS).id == int(LOGITS.argmax())
    with pytest.raises(RuntimeError, match="closed"):
        SamplerHandle(model)


def test_the_bench_runs() -> None:
    command = [sys.executable, str(ROOT / "bench" / "sampler.py"), "--calls", "3", "--vocabularies", "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "| greedy |" in done.stdout
