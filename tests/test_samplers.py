"""Every way of sampling against the reference: one by one, in any order and combination, and what they share.

A seed can be found for any random number (`seed_of`), so that a sampler can be asked which token lies at any share of
its distribution. That shows the candidates and their probabilities through the public call alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_reference import ORDER, Chain, Logits, Mask, Numbers, Reference, seed_of

from pyllava import _lib
from pyllava._lib import SamplerHandle

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
write_model = pytest.importorskip("bench.sampler").write_model

N = 300
END = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_lib.ModelHandle]:
    """Its token 3 + b is the byte b, 259 and those above are the texts t259, t260, ..."""
    handle = _lib.ModelHandle(write_model(tmp_path_factory.mktemp("samplers") / "model.gguf", N), None)
    yield handle
    handle.close()


def byte(letter: str) -> int:
    return 3 + ord(letter)


def sampler(model: _lib.ModelHandle, reference: Reference, **options: Any) -> SamplerHandle:
    return SamplerHandle(model, **{**asdict(reference), **options})


def bits(allowed: Mask) -> npt.NDArray[np.uint32]:
    filled = np.zeros((len(allowed) + 31) // 32 * 32, bool)
    filled[: len(allowed)] = allowed
    return np.packbits(filled, bitorder="little").view("<u4").astype(np.uint32)


def only(token: int) -> npt.NDArray[np.uint32]:
    return bits(np.arange(N) == token)


def gaussian(seed: int = 0, scale: float = 2.0) -> Logits:
    return np.asarray(np.random.RandomState(seed).standard_normal(N) * scale, np.float32)


# ------------------------------------------------------------------------------------ one distribution


def chain_of(model: _lib.ModelHandle, reference: Reference, seed: int = 0) -> Chain:
    return Chain(reference, seed, pieces=lambda token: model.piece(token, with_special=True), ends=(END,))


def ask_at(
    model: _lib.ModelHandle, reference: Reference, logits: Logits, share: float, history: Sequence[int]
) -> int:
    """The token at this share of the distribution that the sampler makes after these tokens."""
    handle = sampler(model, reference, seed=seed_of(share, (reference.n_lots + 1) * (len(history) + 1)))
    for token in history:
        assert handle.sample(logits, mask=only(token)).id == token
    return handle.sample(logits).id


def same_distribution(
    model: _lib.ModelHandle,
    reference: Reference,
    logits: Logits,
    history: Sequence[int] = (),
    near: float = 1e-6,
) -> Numbers:
    """Each token lies where the reference has it: 1e-6 inside the two ends of its share."""
    chain = chain_of(model, reference)
    for token in history:
        chain.next(logits, np.arange(N) == token)
        chain.accept(token)
    p = chain.next(logits)[0]
    ends = np.cumsum(p)
    found = 0
    for token in np.flatnonzero(p > 3 * near):
        begin = ends[token] - p[token]
        for share in (begin + near, begin + p[token] / 2, min(ends[token], 1) - near):
            assert ask_at(model, reference, logits, share, history) == token, (
                f"{share} of {begin} to {ends[token]}"
            )
        found += 1
    assert found
    return p


def same_candidates(
    model: _lib.ModelHandle, reference: Reference, logits: Logits, kept: int | None = None
) -> None:
    """The same, with a last temperature that makes all that are left alike."""
    order = tuple(name for name in reference.order if name != "temperature")
    alike = replace(reference, temperature=1e30, samplers=(*order, "temperature"))
    p = same_distribution(model, alike, logits)
    left = p[p > 0]
    assert np.allclose(left, 1 / len(left), rtol=1e-9)
    assert kept is None or len(left) == kept
    assert len(left) < N, "a test of nothing"


CUTS = {
    "top_n_sigma": Reference(1.0, top_n_sigma=1.0),
    "top_n_sigma 0.5": Reference(0.7, top_n_sigma=0.5),
    "top_k": Reference(1.0, top_k=7),
    "typical": Reference(1.0, typical_p=0.5),
    "typical 0.05": Reference(1.0, typical_p=0.05),
    "typical 0.95": Reference(1.3, typical_p=0.95),
    "top_p": Reference(1.0, top_p=0.8),
    "min_p": Reference(1.0, min_p=0.2),
    "xtc": Reference(1.0, xtc_probability=1.0, xtc_threshold=0.02),
    "xtc and top_k": Reference(1.0, top_k=20, xtc_probability=1.0, xtc_threshold=0.05),
    "all": Reference(
        0.9, 60, 0.97, 0.01, typical_p=0.9, top_n_sigma=2.5, xtc_probability=1.0, xtc_threshold=0.05
    ),
}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("scale", [0.5, 2.0, 4.0])
def test_cuts(model: _lib.ModelHandle, name: str, scale: float) -> None:
    for seed in range(2):
        logits = gaussian(seed, scale)
        same_distribution(model, CUTS[name], logits)
        if not (name.startswith("xtc") and scale == 0.5):  # nothing is as probable as its threshold
            same_candidates(model, CUTS[name], logits)


def test_what_the_cuts_keep(model: _lib.ModelHandle) -> None:
    """Counted by hand."""
    logits = np.full(N, -1e4, np.float32)
    logits[:5] = np.log([0.4, 0.3, 0.15, 0.1, 0.05])

    def kept(**options: Any) -> list[int]:
        p = same_distribution(model, Reference(1.0, **options), logits)
        return np.flatnonzero(p > 1e-9).tolist()

    assert kept(typical_p=0.2) == [1]  # -ln p: 0.92 1.20 1.90 2.30 3.00, entropy 1.39
    assert kept(typical_p=0.5) == [0, 1]
    assert kept(typical_p=0.71) == [0, 1, 2]
    assert kept(xtc_probability=1.0, xtc_threshold=0.09) == [3, 4]
    assert kept(xtc_probability=1.0, xtc_threshold=0.12) == [2, 3, 4]
    assert kept(xtc_probability=1.0, xtc_threshold=0.35) == [0, 1, 2, 3, 4], "one alone is no choice"
    assert kept(xtc_probability=1.0, xtc_threshold=0.51) == [0, 1, 2, 3, 4]
    few = np.zeros(N, np.float32)
    few[[10, 20, 30]] = [math.sqrt(N), math.sqrt(N) * 0.9, -math.sqrt(N) * 0.2]
    std = float(few.astype(np.float64).std())
    for n, left in ((1.0, 1), (2.0, 2), (13.0, N - 1), (20.0, N)):
        p = same_distribution(model, Reference(1.0, top_n_sigma=n), few)
        assert (p > 0).sum() == left, f"{n} times {std}"


@pytest.mark.parametrize("kind", ["alike", "ties", "one high", "far apart", "offset"])
@pytest.mark.parametrize("name", ["top_n_sigma", "typical", "xtc", "all"])
def test_unusual_logits(model: _lib.ModelHandle, name: str, kind: str) -> None:
    normal = gaussian(7, 1.0)
    logits = {
        "alike": np.full(N, -7.25, np.float32),
        "ties": np.round(normal),
        "one high": np.where(np.arange(N) == 77, np.float32(10), normal),
        "far apart": normal * np.float32(1e30),
        "offset": 1000 + np.round(normal * 64) / 64,
    }[kind]
    same_distribution(model, CUTS[name], np.asarray(logits, np.float32))


# ---------------------------------------------------------------------------------- logits are changed

HISTORY = [5, 9, 5, 30, 31, 5, 9, 5, 30, 31]
PENALTIES = {
    "repeat": Reference(1.0, repeat_penalty=1.3),
    "repeat less": Reference(1.0, repeat_penalty=0.6),
    "presence": Reference(1.0, presence_penalty=0.7),
    "frequency": Reference(1.0, frequency_penalty=0.4),
    "frequency wanted": Reference(1.0, frequency_penalty=-0.4),
    "all": Reference(0.8, repeat_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2),
    "all of the last 3": Reference(
        0.8, repeat_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2, repeat_last_n=3
    ),
    "none": Reference(0.8, repeat_penalty=1.2, presence_penalty=0.3, repeat_last_n=0),
    "with cuts": Reference(0.8, 30, 0.95, 0.02, 1.2, presence_penalty=0.5, typical_p=0.9),
    "after the temperature": Reference(
        0.5, repeat_penalty=1.2, presence_penalty=0.5, samplers=("temperature", "penalties")
    ),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties(model: _lib.ModelHandle, name: str) -> None:
    logits = gaussian(1)
    logits[[5, 9, 30, 31]] = [4, 4.5, 5, 5.5]
    p = same_distribution(model, PENALTIES[name], logits, HISTORY)
    plain = replace(PENALTIES[name], repeat_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0)
    assert (np.abs(p - plain.distribution(logits)).max() > 1e-3) == (name != "none")


DRY = {
    "usual": Reference(1.0, dry_multiplier=0.8),
    "short": Reference(1.0, dry_multiplier=0.8, dry_allowed_length=1),
    "zero": Reference(1.0, dry_multiplier=0.5, dry_allowed_length=0),
    "long": Reference(1.0, dry_multiplier=0.8, dry_allowed_length=5),
    "base 1": Reference(1.0, dry_multiplier=0.8, dry_base=1.0),
    "base 1e9": Reference(1.0, dry_multiplier=1e-30, dry_base=1e9),
    "the last 6": Reference(1.0, dry_multiplier=0.8, dry_penalty_last_n=6),
    "after the temperature": Reference(0.5, dry_multiplier=0.8, samplers=("temperature", "dry")),
    "with cuts": Reference(0.8, 30, 0.95, dry_multiplier=0.8, xtc_probability=1.0, xtc_threshold=0.1),
}


@pytest.mark.parametrize("name", DRY)
def test_dry(model: _lib.ModelHandle, name: str) -> None:
    logits = gaussian(2)
    logits[HISTORY] += np.float32(1)
    logits[[5, 9, 30, 31]] = 6
    same_distribution(model, DRY[name], logits, HISTORY)
    same_distribution(model, DRY[name], logits, [*HISTORY, 5])
    same_distribution(model, DRY[name], logits, [5, 5, 5, 5, 5])


A, B, COLON = byte("a"), byte("b"), byte(":")


@pytest.mark.parametrize(
    ("history", "breakers", "found"),
    [
        ([A, B, 260, A, B], (), {260: 2}),
        ([A, B, 260, A, B], ("x",), {260: 2}),
        ([A, B, 260, A, B], ("b",), {}),
        ([A, COLON, B, 260, 261, A, COLON, B, 260], (":",), {261: 2}),  # and not 4
        ([A, B, COLON, 260, A, B], (":",), {}),  # a breaker is never punished
        ([B, A, B, 260, 261, A, B, 260], ("ab",), {}),  # one of two tokens, one token ago
        ([B, A, B, 260, 270, 261, A, B, 260, 270], ("ab",), {261: 2}),
        ([260, 261, 262, 260, 261], ("t26",), {}),  # within each
        ([byte("1"), 260, 261, 262, 260, 261], ("1t2",), {262: 2}),  # ends in the first 260
        ([270, 271, 261, 270, 271], ("1t2", "0t2"), {}),
    ],
)
def test_breakers(
    model: _lib.ModelHandle, history: list[int], breakers: tuple[str, ...], found: dict[int, int]
) -> None:
    reference = Reference(1.0, dry_multiplier=0.7, dry_base=2.0, dry_sequence_breakers=breakers)
    logits = np.full(N, -30, np.float32)
    logits[sorted(set(history))] = np.linspace(0, 1, len(set(history)))
    same_distribution(model, reference, logits, history)
    expected = logits.astype(np.float64)
    for token, n in found.items():
        expected[token] -= np.float32(0.7) * 2.0 ** (n - 2)
    chain = chain_of(model, reference)
    chain.chosen = list(history)
    chain.distribution(logits)
    assert np.allclose(chain.x, expected, atol=1e-6)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_dry_of_anything(model: _lib.ModelHandle, data: st.DataObject) -> None:
    """Long runs of few tokens and a small memory, so that it wraps around; greedy, so that every one can tell."""
    tokens = [A, B, COLON, 260, 261]
    history = data.draw(st.lists(st.sampled_from(tokens), min_size=1, max_size=60))
    reference = Reference(
        dry_multiplier=1.0,
        dry_allowed_length=data.draw(st.integers(0, 3)),
        dry_penalty_last_n=data.draw(st.integers(1, 20)),
        dry_sequence_breakers=data.draw(st.sampled_from([(), (":",), ("ab",), ("0t", "::"), ("t26",)])),
    )
    logits = np.full(N, -1e6, np.float32)
    logits[tokens] = np.linspace(0, 0.1, len(tokens))
    handle, chain = sampler(model, reference), chain_of(model, reference)
    for token in history:
        handle.sample(logits, mask=only(token))
        chain.chosen.append(token)
    assert handle.sample(logits).id == int(chain.distribution(logits).argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logit_bias(model: _lib.ModelHandle, temperature: float) -> None:
    logits = gaussian(3)
    best = int(logits.argmax())
    for bias in (((7, 9.0), (9, 8.5)), ((best, -math.inf),), ((7, 4.0), (7, 5.0), (best, -1e38), (0, 3e38))):
        same_distribution(model, Reference(temperature, logit_bias=bias), logits)
    forbidden = tuple((token, -math.inf) for token in range(0, N, 2))
    p = same_distribution(model, Reference(temperature, logit_bias=forbidden, top_k=40), logits)
    assert not p[::2].any()


def test_a_bias_comes_before_the_penalties(model: _lib.ModelHandle) -> None:
    """A logit below zero that a bias raises above it is divided."""
    logits = np.full(N, -20, np.float32)
    logits[[4, 5]] = [-1, 1.0]
    reference = Reference(1.0, repeat_penalty=2.0, logit_bias=((4, 3.0),))
    p = same_distribution(model, reference, logits, [4])
    assert p[4] == pytest.approx(p[5], rel=1e-6)


def test_ignore_eos(model: _lib.ModelHandle) -> None:
    logits = gaussian(4)
    logits[END] = 50
    assert SamplerHandle(model).sample(logits).id == END
    handle = SamplerHandle(model, ignore_eos=True)
    assert handle.sample(logits).id == int(np.delete(logits, END).argmax()) + 1
    same_distribution(model, Reference(1.0, ignore_eos=True), logits)
    assert handle.sample(logits, mask=only(END)).id == END, "a mask that leaves nothing else goes first"


def test_a_mask_goes_first(model: _lib.ModelHandle) -> None:
    """What a mask leaves is never taken away altogether, whatever the stages."""
    logits = gaussian(5)
    options = asdict(CUTS["all"]) | {"logit_bias": [(8, -math.inf), (9, -math.inf)], "dry_multiplier": 5.0}
    handle = SamplerHandle(model, seed=1, **options)
    allowed = np.isin(np.arange(N), [8, 9])
    assert {handle.sample(logits, mask=bits(allowed)).id for _ in range(60)} == {8, 9}


# ----------------------------------------------------------------------------------------- temperature


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_dynamic_temperature(model: _lib.ModelHandle, exponent: float, scale: float) -> None:
    for temperature, spread in ((1.0, 0.5), (0.7, 1.5), (0.0, 1.0)):
        for rest in (
            {},
            {"top_k": 9},
            {"samplers": ("temperature", "top_p", "min_p"), "top_p": 0.9, "min_p": 0.02},
        ):
            reference = Reference(temperature, dynatemp_range=spread, dynatemp_exponent=exponent)
            same_distribution(model, replace(reference, **rest), gaussian(6, scale))


def test_no_entropy_is_the_least_temperature(model: _lib.ModelHandle) -> None:
    logits = np.full(N, -1e30, np.float32)
    logits[3] = 1
    for temperature in (0.5, 1.0):
        handle = SamplerHandle(model, temperature=temperature, dynatemp_range=1.0, seed=1)
        assert {handle.sample(logits).id for _ in range(20)} == {3}
    logits[5] = 1
    p = same_distribution(model, Reference(0.5, dynatemp_range=0.5, top_k=2), logits)
    assert p[3] == p[5] == 0.5


# ------------------------------------------------------------------------------ mirostat and adaptive-p


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tau", [0.5, 2.0, 5.0, 40.0])
def test_mirostat(model: _lib.ModelHandle, version: int, tau: float) -> None:
    """And that no other stage acts beside it."""
    for scale in (0.3, 2.0, 5.0):
        reference = Reference(0.9, 3, 0.1, mirostat=version, mirostat_tau=tau, xtc_probability=0.0)
        agrees(model, replace(reference, logit_bias=((5, 3.0),)), [gaussian(s, scale) for s in range(30)])


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_s_candidates(model: _lib.ModelHandle, version: int) -> None:
    for scale, tau in ((1.0, 2.0), (3.0, 1.5), (3.0, 3.0)):
        reference = Reference(1.0, mirostat=version, mirostat_tau=tau)
        p = same_distribution(model, reference, gaussian(8, scale))
        assert 0 < (p > 0).sum() < N


@pytest.mark.parametrize("logits", [np.zeros(N), np.where(np.arange(N) == 4, 0, -1e30), np.arange(N) * 1e30])
@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_of_unusual_logits(model: _lib.ModelHandle, version: int, logits: Numbers) -> None:
    for temperature in (0.0, 1.0):
        handle = SamplerHandle(model, temperature=temperature, mirostat=version, seed=3)
        assert all(0 <= handle.sample(logits.astype(np.float32)).id < N for _ in range(20))


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_holds_its_surprise(model: _lib.ModelHandle, version: int) -> None:
    """Of the distribution that it draws from, which is what it measures; of version 2, near to the target."""
    reference = Reference(1.0, mirostat=version, mirostat_tau=3.0, mirostat_eta=0.05)
    handle, chain, surprises = sampler(model, reference, seed=5), chain_of(model, reference, 5), []
    for i in range(600):
        logits = gaussian(i, 3.0)
        p = chain.next(logits)[0]
        token = handle.sample(logits).id
        surprises.append(-math.log2(p[token]))
        chain.accept(token)
    assert np.mean(surprises[100:]) == pytest.approx(3.0, abs=0.15)


@pytest.mark.parametrize("target", [0.0, 0.3, 0.55, 1.0])
def test_adaptive_p(model: _lib.ModelHandle, target: float) -> None:
    for decay in (0.0, 0.9, 0.99):
        reference = Reference(0.8, min_p=0.02, adaptive_target=target, adaptive_decay=decay)
        same_distribution(model, reference, gaussian(9, 2.0))
        agrees(model, reference, [gaussian(seed, 2.0) for seed in range(30)])


def test_adaptive_p_finds_its_target(model: _lib.ModelHandle) -> None:
    """The probabilities of what is drawn have the target as their mean, where tokens of such probabilities are."""
    for target in (0.15, 0.3):
        reference = Reference(1.0, min_p=0.05, adaptive_target=target)
        handle, chain, found = sampler(model, reference, seed=2), chain_of(model, reference, 2), []
        for i in range(600):
            chain.next(gaussian(i, 3.0))
            token = handle.sample(gaussian(i, 3.0)).id
            found.append(chain.original[token])
            chain.accept(token)
        assert np.mean(found[50:]) == pytest.approx(target, abs=0.05)


def test_adaptive_p_that_is_not_named_is_off(model: _lib.ModelHandle) -> None:
    named = Reference(1.0, adaptive_target=0.2, samplers=("adaptive_p", "min_p"), min_p=0.01)
    unnamed = replace(named, samplers=("min_p",))
    p, q = (same_distribution(model, reference, gaussian(1)) for reference in (named, unnamed))
    assert np.abs(p - q).max() > 0.01


# --------------------------------------------------------------------------------- order, combinations


def agrees(model: _lib.ModelHandle, reference: Reference, rows: Sequence[Logits], seed: int = 1) -> None:
    """A token of each row. Where a cut lies within rounding of a token, either side of it will do."""
    handle, chain = sampler(model, reference, seed=seed), chain_of(model, reference, seed)
    for logits in rows:
        p, share = chain.next(logits)
        token, original = handle.sample(logits).id, chain.original
        nearby = [p, *(chain.distribution(logits, nudge=nudge) for nudge in (3e-6, -3e-6))]
        assert any(drawn(q, token, share) for q in nearby)
        chain.original = original
        chain.accept(token)


def drawn(p: Numbers, token: int, share: float) -> bool:
    end = np.cumsum(p)[token]
    return bool(p[token] > 0 and end - p[token] - 1e-5 <= share <= end + 1e-5)


def options() -> st.SearchStrategy[Reference]:
    def some(*values: Any) -> st.SearchStrategy[Any]:
        return st.sampled_from(values)

    return st.builds(
        Reference,
        temperature=some(0.0, 0.5, 0.8, 1.0, 1.7),
        top_k=some(0, 1, 5, 40),
        top_p=some(1.0, 0.95, 0.5),
        min_p=some(0.0, 0.05, 0.3),
        repeat_penalty=some(1.0, 1.2, 0.7),
        dynatemp_range=some(0.0, 0.0, 0.4, 2.0),
        dynatemp_exponent=some(1.0, 0.6),
        typical_p=some(1.0, 0.9, 0.4),
        top_n_sigma=some(0.0, 1.0, 3.0),
        xtc_probability=some(0.0, 0.5, 1.0),
        xtc_threshold=some(0.0, 0.1, 0.3),
        presence_penalty=some(0.0, 0.5),
        frequency_penalty=some(0.0, 0.3),
        repeat_last_n=some(0, 2, 64),
        dry_multiplier=some(0.0, 0.8),
        dry_allowed_length=some(1, 2),
        dry_sequence_breakers=some((), (":",)),
        mirostat=some(0, 0, 0, 0, 1, 2),
        adaptive_target=some(-1.0, -1.0, 0.3),
        logit_bias=some((), ((7, 2.0), (11, -math.inf))),
        ignore_eos=st.booleans(),
        samplers=st.none() | st.lists(some(*ORDER), max_size=12).map(tuple),
    )


@given(reference=options(), seed=st.integers(0, 2**64 - 1), scale=st.sampled_from([0.5, 2.0, 5.0]))
@settings(max_examples=300, deadline=None)
def test_any_order_and_combination(
    model: _lib.ModelHandle, reference: Reference, seed: int, scale: float
) -> None:
    """With few likely tokens, so that they recur and the penalties have something to do."""
    rows = [gaussian(i, scale) for i in range(12)]
    for row in rows:
        row[7:15] += np.float32(2 * scale)
    agrees(model, reference, rows, seed)


@pytest.mark.parametrize("first", ORDER[:-1])
@pytest.mark.parametrize("second", ORDER[:-1])
def test_pairs_in_both_orders(model: _lib.ModelHandle, first: str, second: str) -> None:
    reference = Reference(
        0.6,
        40,
        0.9,
        0.02,
        1.3,
        typical_p=0.9,
        top_n_sigma=2.0,
        xtc_probability=1.0,
        xtc_threshold=0.03,
        presence_penalty=0.4,
        dry_multiplier=1.0,
        samplers=(first, second),
    )
    logits = gaussian(11)
    logits[[5, 9]] += np.float32(3)
    same_distribution(model, reference, logits, [5, 9, 5, 5, 9, 5], near=1e-5)


def test_an_empty_order_is_the_model_s_distribution(model: _lib.ModelHandle) -> None:
    reference = replace(CUTS["all"], temperature=0.3, samplers=(), repeat_penalty=2.0)
    p = same_distribution(model, reference, gaussian(12))
    assert np.allclose(p, Reference(1.0).distribution(gaussian(12)))


def test_greedy(model: _lib.ModelHandle) -> None:
    """Cuts of the tail change nothing, changes of logits do; so do typical_p and xtc, which drop the likeliest."""
    logits = gaussian(13)
    best = int(logits.argmax())
    tail = Reference(0.0, 40, 0.3, 0.5, top_n_sigma=0.1, mirostat=0, adaptive_target=0.1)
    same_distribution(model, tail, logits)
    assert sampler(model, tail).sample(logits).id == best
    for changed in ({"presence_penalty": 30.0}, {"repeat_penalty": 30.0}, {"frequency_penalty": 30.0}):
        handle = SamplerHandle(model, **changed)
        assert [handle.sample(logits).id for _ in range(3)] == np.argsort(-logits)[:3].tolist()
    top = Reference(0.0, xtc_probability=1.0, xtc_threshold=0.02)
    assert sampler(model, top).sample(logits).id != best
    same_distribution(model, top, logits)
    same_distribution(model, replace(top, top_k=3, typical_p=0.3), logits)


# ------------------------------------------------------------------------------------------- many draws


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_xtc_happens_as_often_as_it_should(model: _lib.ModelHandle, share: float) -> None:
    logits = np.full(N, -1e4, np.float32)
    logits[:3] = np.log([0.5, 0.3, 0.2])
    handle = SamplerHandle(model, temperature=1.0, xtc_probability=share, xtc_threshold=0.15, seed=8)
    n = 8000
    found = np.bincount([handle.sample(logits).id for _ in range(n)], minlength=N)[:3]
    expected = n * (share * np.array([0, 0, 1]) + (1 - share) * np.array([0.5, 0.3, 0.2]))
    assert (np.abs(found - expected) <= 5 * np.sqrt(np.maximum(expected, 0.01))).all()


DRAWN = {name: CUTS[name] for name in ("top_n_sigma", "typical", "xtc", "all")} | {
    "dynamic temperature": Reference(1.0, dynatemp_range=0.7),
    "adaptive_p, the first": Reference(1.0, adaptive_target=0.2),
    "mirostat 1, the first": Reference(1.0, mirostat=1, mirostat_tau=3.0),
    "mirostat 2, the first": Reference(1.0, mirostat=2, mirostat_tau=3.0),
}


@pytest.mark.parametrize("name", DRAWN)
def test_chi_square(model: _lib.ModelHandle, name: str) -> None:
    """A sampler for each draw: some of them go by what they drew before."""
    logits, n = gaussian(14), 8000
    p = chain_of(model, DRAWN[name]).next(logits)[0]
    found = np.bincount(
        [sampler(model, DRAWN[name], seed=seed).sample(logits).id for seed in range(n)], minlength=N
    )
    assert not found[p == 0].any()
    expected = n * p
    likely = expected >= 5
    df = int(likely.sum()) - 1
    chi = ((found - expected)[likely] ** 2 / expected[likely]).sum()
    assert df > 0
    assert chi < df + 5 * math.sqrt(2 * df), f"chi-square {chi:.1f} of {df} degrees of freedom"


# ---------------------------------------------------------------------------------------- what they share


def test_a_seed_fixes_the_tokens(model: _lib.ModelHandle) -> None:
    """Of all stages; and a sampler takes nothing from one beside it."""
    everything = replace(CUTS["all"], **EVERYTHING)
    for reference in (everything, replace(everything, mirostat=1), replace(everything, mirostat=2)):
        rows = [gaussian(i) for i in range(40)]
        alone = sampler(model, reference, seed=6)
        expected = [alone.sample(row).id for row in rows]
        pair = [sampler(model, reference, seed=seed) for seed in (6, 7)]
        found = [[handle.sample(row).id for handle in pair] for row in rows]
        assert [one for one, _ in found] == expected
        assert [other for _, other in found] != expected


EVERYTHING: dict[str, Any] = {
    "dynatemp_range": 0.3,
    "repeat_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.1,
    "dry_multiplier": 0.8,
    "dry_sequence_breakers": ("\n", ":", '"', "*"),
    "adaptive_target": 0.4,
    "logit_bias": ((5, 1.0), (6, -math.inf)),
    "ignore_eos": True,
}


def test_log_probabilities_stay_the_model_s(model: _lib.ModelHandle) -> None:
    logits = gaussian(15)
    x = logits.astype(np.float64)
    expected = x - x.max() - math.log(np.exp(x - x.max()).sum())
    for mirostat in (0, 1, 2):
        handle = sampler(model, replace(CUTS["all"], **EVERYTHING, mirostat=mirostat), seed=3)
        for _ in range(10):
            choice = handle.sample(logits, n_alternatives=4)
            assert choice.log_prob == pytest.approx(expected[choice.id], abs=3e-6)
            assert [token for token, _ in choice.alternatives] == np.argsort(-x)[:4].tolist()


def test_lists_are_copied(model: _lib.ModelHandle) -> None:
    words, biases, order = [":"], [(5, 100.0)], ["dry", "temperature"]
    handle = SamplerHandle(
        model, dry_multiplier=1.0, dry_sequence_breakers=words, logit_bias=biases, samplers=order
    )
    words.clear()
    biases.clear()
    order.clear()
    assert handle.sample(gaussian()).id == 5


BAD: list[tuple[dict[str, Any], str]] = [
    ({"dynatemp_range": -0.5}, r"dynatemp_range: found -0\.5, need 0 \(off\) or more"),
    ({"dynatemp_exponent": -1.0}, "dynatemp_exponent: found -1, need 0 or more"),
    ({"typical_p": 1.5}, r"typical_p: found 1\.5, need 0\.\.1"),
    ({"typical_p": math.nan}, "typical_p: found nan"),
    ({"top_n_sigma": math.inf}, "top_n_sigma: found inf, need a finite number"),
    ({"xtc_probability": -0.1}, r"xtc_probability: found -0\.1, need 0\.\.1"),
    ({"xtc_threshold": 2.0}, r"xtc_threshold: found 2, need 0\.\.1"),
    ({"presence_penalty": math.inf}, "presence_penalty: found inf"),
    ({"frequency_penalty": math.nan}, "frequency_penalty: found nan"),
    ({"dry_multiplier": -1.0}, r"dry_multiplier: found -1, need 0 \(off\) or more"),
    ({"dry_base": 0.5}, r"dry_base: found 0\.5, need 1 or more"),
    ({"dry_allowed_length": -1}, "dry_allowed_length: found -1, need 0 or more"),
    ({"dry_penalty_last_n": 2**20 + 1}, r"dry_penalty_last_n: found 1048577, need 0\.\.1048576"),
    ({"dry_multiplier": 1.0, "dry_sequence_breakers": [""]}, r"found one of 0 bytes, need 1\.\.40"),
    ({"dry_multiplier": 1.0, "dry_sequence_breakers": ["x" * 41]}, "found one of 41 bytes"),
    ({"dry_sequence_breakers": ["a\0b"]}, r"dry_sequence_breakers: found 'a\\x00b', need texts"),
    ({"dry_sequence_breakers": ["a"] * 1025}, r"n_dry_sequence_breakers: found 1025, need 0\.\.1024"),
    ({"mirostat": 3}, r"mirostat: found 3, need 0 \(off\), 1 or 2"),
    ({"mirostat_tau": -1.0}, "mirostat_tau: found -1, need 0 or more"),
    ({"mirostat_eta": math.inf}, "mirostat_eta: found inf"),
    ({"adaptive_target": 1.5}, r"adaptive_target: found 1\.5, need 0\.\.1 \(below 0: off\)"),
    ({"adaptive_decay": 1.0}, r"adaptive_decay: found 1, need 0\.\.0\.99"),
    ({"logit_bias": [(N, 1.0)]}, r"logit_bias: found token 300, need 0\.\.299"),
    ({"logit_bias": [(-1, 1.0)]}, "logit_bias: found token -1"),
    ({"logit_bias": [(5, math.inf)]}, "logit_bias: found inf for token 5, need a finite number or -inf"),
    ({"logit_bias": [(5, math.nan)]}, "logit_bias: found nan for token 5"),
    ({"logit_bias": [(i, -math.inf) for i in range(N)]}, "logit_bias: found all 300 tokens forbidden"),
    ({"samplers": ["top_k", "infill"]}, "samplers: found infill, need some of penalties, dry, top_n_sigma"),
    ({"samplers": ["top_k"] * 17}, r"samplers: found 17, need 0\.\.16"),
]


@pytest.mark.parametrize(("params", "pattern"), BAD, ids=[str(params)[:40] for params, _ in BAD])
def test_out_of_range(model: _lib.ModelHandle, params: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        SamplerHandle(model, **params)


def test_none_changes_nothing(model: _lib.ModelHandle) -> None:
    logits = gaussian()
    none = dict.fromkeys(set(_lib.SAMPLER_FIELDS) - {"temperature", "seed"})
    with_none = SamplerHandle(model, temperature=1.0, seed=3, **none)
    without = SamplerHandle(model, temperature=1.0, seed=3)
    found = [with_none.sample(logits).id for _ in range(20)]
    assert found == [without.sample(logits).id for _ in range(20)]
    assert len(set(found)) > 5


@pytest.mark.parametrize(
    "values", [[-3e38, 3e38, 0], [3e38, 3e38, 3e38], [1e-38, 0, -1e-38], [-1e30, -1e30, 5]]
)
def test_extremes(model: _lib.ModelHandle, values: list[float]) -> None:
    """Nothing overflows on the way to a token that may be chosen."""
    logits = np.full(N, values[0], np.float32)
    logits[: len(values)] = values
    for temperature in (0.0, 1e-30, 1.0, 1e30):
        for extra in (
            {},
            {"mirostat": 1},
            {"mirostat": 2},
            {"adaptive_target": -1.0},
            {"samplers": ORDER[::-1]},
        ):
            options = asdict(CUTS["all"]) | EVERYTHING | {"temperature": temperature} | extra
            handle = SamplerHandle(model, seed=1, **options)
            assert all(0 <= handle.sample(logits).id < N for _ in range(10))


@pytest.mark.parametrize("size", [3e38, -3e38])
@pytest.mark.parametrize(
    ("temperature", "order"),
    [(t, ("penalties", "temperature")) for t in (0.0, 1e-30, 1e30)]
    + [(1e30, ("temperature", "penalties", "dry"))],
)
def test_extreme_penalties(
    model: _lib.ModelHandle, size: float, temperature: float, order: tuple[str, ...]
) -> None:
    """Products beyond float32, of both signs at once: what is wanted beyond all measure comes, or never does."""
    penalties = {"repeat_penalty": 2.0, "presence_penalty": size, "frequency_penalty": size}
    options = {"dry_multiplier": 3e38, "temperature": temperature, "samplers": order, "seed": 1}
    handle = SamplerHandle(model, **penalties, **options)
    logits = np.full(N, -3e38, np.float32)
    assert handle.sample(logits, mask=only(7)).id == 7
    found = {handle.sample(logits).id for _ in range(5)}
    assert (7 in found) == (size < 0)
