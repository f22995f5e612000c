"""Sampling against an independent NumPy formula, by chi-square with fixed seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pyllava._lib import SamplerHandle

N = 20_000
LOGITS = np.random.RandomState(0).standard_normal(40).astype(np.float32) * 2


def softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    e = np.exp(x - x.max())
    return e / e.sum()


def distribution(
    logits: npt.NDArray[np.float32],
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> npt.NDArray[np.float64]:
    """top-k, then the shortest prefix that holds top_p, then p >= min_p * max p, then the temperature."""
    x = logits.astype(np.float64)
    order = np.argsort(-x, kind="stable")
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        before = np.cumsum(softmax(x[order])) - softmax(x[order])
        order = order[(before < top_p) | (np.arange(len(order)) == 0)]
    if min_p > 0:
        order = order[x[order] >= x[order[0]] + np.log(min_p)]
    out = np.zeros(len(x))
    out[order] = softmax(x[order] / temperature)
    return out


def counts(logits: npt.NDArray[np.float32], seed: int = 11, **params: Any) -> npt.NDArray[np.int64]:
    sampler = SamplerHandle(repeat_penalty=1.0, seed=seed, **params)
    return np.bincount([sampler.sample(logits) for _ in range(N)], minlength=len(logits))


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
def test_distribution(params: dict[str, Any]) -> None:
    p, found = distribution(LOGITS, **params), counts(LOGITS, **params)
    assert not found[p == 0].any(), "a token that was cut off"
    expected = N * p[p > 0]
    likely = expected >= 5
    chi = ((found[p > 0] - expected)[likely] ** 2 / expected[likely]).sum()
    df = likely.sum() - 1
    assert chi < df + 5 * np.sqrt(2 * max(df, 1)), f"chi-square {chi:.1f} of {df} degrees of freedom"
    assert abs(found[p > 0][~likely].sum() - expected[~likely].sum()) < 40


def test_the_test_can_fail() -> None:
    p, found = distribution(LOGITS, 1.0), counts(LOGITS, temperature=1.1)
    assert ((found - N * p) ** 2 / (N * p)).sum() > 200


@pytest.mark.parametrize(
    "params", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-4}], ids=str
)
def test_one_candidate(params: dict[str, Any]) -> None:
    sampler = SamplerHandle(**{"temperature": 5.0, **params})
    assert {sampler.sample(LOGITS) for _ in range(200)} == {int(LOGITS.argmax())}


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = np.array([0, 3, 1, 3, 3], np.float32)
    assert {SamplerHandle(seed=seed).sample(logits) for seed in range(5)} == {1}
    assert SamplerHandle(temperature=1.0, top_k=1).sample(logits) == 1
    assert SamplerHandle(temperature=-1.0).sample(logits) == 1
    assert {SamplerHandle(temperature=1.0, top_k=2, seed=s).sample(logits) for s in range(40)} == {1, 3}


def test_seeds() -> None:
    def draws(seed: int) -> list[int]:
        sampler = SamplerHandle(temperature=1.0, seed=seed)
        return [sampler.sample(LOGITS) for _ in range(50)]

    assert draws(3) == draws(3)
    assert len({tuple(draws(seed)) for seed in range(20)}) == 20
    assert draws(2**64 - 1) == draws(-1)


@pytest.mark.parametrize("penalty", [1.3, 5.0, 0.5])
def test_repeat_penalty(penalty: float) -> None:
    """Greedy with a penalty: each token of the window once, divided above zero, multiplied below."""
    window = 4
    logits = np.array([2.0, 1.9, 1.8, -0.1, -0.11, -0.3, -3.0, 1.0], np.float32)
    sampler = SamplerHandle(repeat_penalty=penalty, repeat_last_n=window)
    chosen: list[int] = []
    for _ in range(30):
        x = logits.astype(np.float64)
        for token in set(chosen[-window:]):
            x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
        chosen.append(sampler.sample(logits))
        assert chosen[-1] == int(x.argmax())


def test_repeat_penalty_off() -> None:
    sampler = SamplerHandle(repeat_penalty=3.0, repeat_last_n=0)
    assert [sampler.sample(LOGITS) for _ in range(5)] == [int(LOGITS.argmax())] * 5


def test_penalty_comes_before_the_cuts() -> None:
    """The likeliest token, penalised, falls out of the best two."""
    logits = np.array([5.0, 4.0, 3.9, 0.0], np.float32)
    sampler = SamplerHandle(temperature=1.0, top_k=2, repeat_penalty=10.0, repeat_last_n=1, seed=1)
    first = sampler.sample(logits)
    second = [sampler.sample(logits) for _ in range(100)]
    pairs = zip([first, *second], second, strict=False)
    assert all(a != b for a, b in pairs if a in (0, 1))


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
def test_parameters_out_of_range(params: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        SamplerHandle(**params)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(value: float, temperature: float) -> None:
    sampler = SamplerHandle(temperature=temperature)
    bad = LOGITS.copy()
    bad[7] = value
    with pytest.raises(RuntimeError, match="entry 7 is not finite"):
        sampler.sample(bad)
    sampler.sample(LOGITS)


def test_extreme_logits() -> None:
    """No overflow on the way: 1e30 apart, or all alike."""
    assert SamplerHandle(temperature=0.01).sample(np.array([-1e30, 1e30, 0], np.float32)) == 1
    found = {SamplerHandle(temperature=1.0, seed=s).sample(np.full(4, -1e30, np.float32)) for s in range(60)}
    assert found == {0, 1, 2, 3}


def test_a_larger_vocabulary_later() -> None:
    sampler = SamplerHandle(temperature=1.0, top_k=1)
    assert sampler.sample(np.array([0, 1], np.float32)) == 1
    big = np.zeros(50_000, np.float32)
    big[49_999] = 1
    assert sampler.sample(big) == 49_999
