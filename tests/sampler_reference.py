"""The sampler's stages in NumPy and float64, as CONTRIBUTING.md asks: plain, slow, one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Logits: TypeAlias = npt.NDArray[np.float32]
Numbers: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]

ORDER = (
    "penalties",
    "dry",
    "top_n_sigma",
    "top_k",
    "typ_p",
    "top_p",
    "min_p",
    "xtc",
    "temperature",
    "adaptive_p",
)
_GAMMA, _LOW = 0x9E3779B97F4A7C15, 2**64 - 1


@dataclass(frozen=True)
class Reference:
    """The options of a sampler, by the names that it has for them."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: tuple[str, ...] = ()
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    adaptive_target: float = -1.0
    adaptive_decay: float = 0.9
    logit_bias: tuple[tuple[int, float], ...] = ()
    ignore_eos: bool = False
    samplers: tuple[str, ...] | None = None

    @property
    def order(self) -> tuple[str, ...]:
        if self.mirostat:
            return ("temperature",)
        return ORDER if self.samplers is None else self.samplers

    @property
    def adaptive(self) -> bool:
        return self.adaptive_target >= 0 and "adaptive_p" in self.order

    @property
    def n_lots(self) -> int:
        """How many random numbers a token takes before the one that it is drawn with."""
        on = self.xtc_probability > 0 and self.xtc_threshold <= 0.5
        return self.order.count("xtc") if on else 0

    def distribution(self, logits: Logits, chosen: tuple[int, ...] = (), mask: Mask | None = None) -> Numbers:
        """[n_vocab] after these tokens, for options that remember nothing else and leave nothing to chance."""
        chain = Chain(self)
        for token in chosen:
            chain.chosen.append(token)
        return chain.next(logits, mask)[0]


def softmax(x: Numbers) -> Numbers:
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())


def log_softmax(logits: Logits) -> Numbers:
    x = logits.astype(np.float64)
    return np.asarray(x - x.max() - np.log(np.exp(x - x.max()).sum()))


# ------------------------------------------------------------------------------------- random numbers


def uniform(seed: int) -> Iterator[float]:
    """SplitMix64."""
    state = seed
    while True:
        state = (state + _GAMMA) & _LOW
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _LOW
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _LOW
        yield ((z ^ (z >> 31)) >> 11) * 2.0**-53


def seed_of(share: float, draw: int = 1) -> int:
    """The seed whose number `draw` is this one: SplitMix64 backwards."""

    def unshift(z: int, n: int) -> int:
        found = z
        for _ in range(64 // n + 1):
            found = z ^ (found >> n)
        return found

    z = unshift((int(share * 2**53) << 11) & _LOW, 31)
    z = unshift((z * pow(0x94D049BB133111EB, -1, 2**64)) & _LOW, 27)
    z = unshift((z * pow(0xBF58476D1CE4E5B9, -1, 2**64)) & _LOW, 30)
    return (z - draw * _GAMMA) & _LOW


# --------------------------------------------------------------------------------------- DRY, naively


def last_breaker(texts: list[bytes], breakers: tuple[str, ...]) -> int:
    """How many tokens follow the last one in which a breaker ends."""
    text, ends = b"".join(texts), np.cumsum([len(text) for text in texts])
    last = max((text.rfind(b.encode()) + len(b.encode()) for b in breakers if b.encode() in text), default=0)
    return len(texts) if last == 0 else len(texts) - 1 - int(np.searchsorted(ends, last))


def repeats(tokens: list[int], limit: int, allowed: int) -> dict[int, int]:
    """For each token that would go on with a repeat: the longest one's length, `limit` at most."""
    found: dict[int, int] = {}
    for end in range(1, len(tokens)):
        n = 0
        while n < end and tokens[end - 1 - n] == tokens[-1 - n]:
            n += 1
        if (n := min(n, limit)) >= allowed:
            found[tokens[end]] = max(found.get(tokens[end], 0), n)
    return found if limit >= allowed else {}


# ------------------------------------------------------------------------------------------- the chain


def f32(x: float) -> float:
    return float(np.float32(x))


class Chain:
    """What a sampler does for one answer. `nudge` moves the thresholds of cuts a little, `pieces` are tokens' texts."""

    def __init__(
        self,
        reference: Reference,
        seed: int = 0,
        *,
        pieces: Callable[[int], bytes] = lambda _: b"",
        ends: tuple[int, ...] = (),
    ) -> None:
        self.options, self.draws, self.pieces, self.ends = reference, uniform(seed), pieces, ends
        self.chosen: list[int] = []
        self.mu = 2 * f32(reference.mirostat_tau)
        decay = f32(reference.adaptive_decay)
        self.sum, self.weight = f32(reference.adaptive_target) / (1 - decay), 1 / (1 - decay)
        self.original: Numbers = np.zeros(0)
        self.lots: list[float] = []

    def next(self, logits: Logits, mask: Mask | None = None) -> tuple[Numbers, float]:
        """The distribution of the next token, [n_vocab], and the random number that it is drawn with."""
        self.lots = [next(self.draws) for _ in range(self.options.n_lots)]
        return self.distribution(logits, mask), next(self.draws)

    def distribution(self, logits: Logits, mask: Mask | None = None, nudge: float = 0.0) -> Numbers:
        self.nudge, self.n_vocab, self.xtc_lots = nudge, len(logits), iter(self.lots)
        self.ids = np.arange(len(logits)) if mask is None else np.flatnonzero(mask)
        self.x = logits[self.ids].astype(np.float64)
        self._bias()
        for name in self.options.order:
            getattr(self, f"_{name}")()
        if self.options.mirostat:
            self._mirostat()
        p = np.zeros(len(logits))
        p[self.ids] = softmax(self.x)
        self.original = p.copy()
        if self.options.adaptive:
            p[self.ids] = softmax(self._nearer(p[self.ids]))
        return p

    def accept(self, token: int) -> None:
        self.chosen.append(token)
        o, p = self.options, float(self.original[token])
        if p > 0:
            self.mu -= f32(o.mirostat_eta) * (-math.log2(p) - f32(o.mirostat_tau))
        self.sum = p + f32(o.adaptive_decay) * self.sum
        self.weight = 1 + f32(o.adaptive_decay) * self.weight

    def _keep(self, which: Mask) -> None:
        self.ids, self.x = self.ids[which], self.x[which]

    def _first(self, order: npt.NDArray[np.intp], n: int) -> None:
        which = np.zeros(len(self.ids), bool)
        which[order[:n]] = True
        self._keep(which)

    def _order(self) -> npt.NDArray[np.intp]:
        return np.lexsort((self.ids, -self.x))

    def _bias(self) -> None:
        o = self.options
        for token, bias in o.logit_bias:
            if bias != -math.inf:
                self.x[self.ids == token] += f32(bias)
        banned = [token for token, bias in o.logit_bias if bias == -math.inf]
        allowed = ~np.isin(self.ids, banned + (list(self.ends) if o.ignore_eos else []))
        if allowed.any():
            self._keep(allowed)

    def _penalties(self) -> None:
        o = self.options
        window = self.chosen[-o.repeat_last_n :] if o.repeat_last_n else []
        for token in set(window):
            at = self.ids == token
            penalty = f32(o.repeat_penalty)
            self.x[at] = np.where(self.x[at] <= 0, self.x[at] * penalty, self.x[at] / penalty)
            self.x[at] -= window.count(token) * f32(o.frequency_penalty) + f32(o.presence_penalty)

    def _dry(self) -> None:
        o = self.options
        if o.dry_multiplier == 0 or o.dry_penalty_last_n == 0:
            return
        texts = [self.pieces(token) for token in self.chosen]
        limit = last_breaker(texts, o.dry_sequence_breakers) if o.dry_sequence_breakers else len(texts)
        for token, n in repeats(self.chosen[-o.dry_penalty_last_n :], limit, o.dry_allowed_length).items():
            if not any(b.encode() in self.pieces(token) for b in o.dry_sequence_breakers):
                exponent = n - o.dry_allowed_length
                if o.dry_base > 1.000001:
                    exponent = min(exponent, int(88.7228391 / math.log(f32(o.dry_base))))
                self.x[self.ids == token] -= f32(o.dry_multiplier) * f32(o.dry_base) ** exponent

    def _top_n_sigma(self) -> None:
        if (n := f32(self.options.top_n_sigma)) > 0:
            self._keep(self.x >= self.x.max() - n * self.x.std() * (1 + self.nudge))

    def _top_k(self) -> None:
        if self.options.top_k:
            self._first(self._order(), self.options.top_k)

    def _typ_p(self) -> None:
        if (share := f32(self.options.typical_p)) < 1:
            p = softmax(self.x)
            surprise = -np.log(np.maximum(p, 1e-300))
            distance = np.abs(surprise - (p * surprise).sum())
            self._share(np.lexsort((self.ids, distance)), p, np.nextafter(share, 2))

    def _top_p(self) -> None:
        if (share := f32(self.options.top_p)) < 1:
            self._share(self._order(), softmax(self.x), share)

    def _share(self, order: npt.NDArray[np.intp], p: Numbers, share: float) -> None:
        before = np.round(np.cumsum(p[order]) - p[order], 12)
        self._first(order, max(1, int((before < share * (1 + self.nudge)).sum())))

    def _min_p(self) -> None:
        if (p := f32(self.options.min_p)) > 0:
            self._keep(self.x >= self.x.max() + np.log(p) - 10 * self.nudge)

    def _xtc(self) -> None:
        o = self.options
        if o.n_lots and next(self.xtc_lots) < f32(o.xtc_probability):
            order, p = self._order(), softmax(self.x)
            n = int((p >= f32(o.xtc_threshold) * (1 + self.nudge)).sum())
            if n >= 2:
                which = np.ones(len(order), bool)
                which[order[: n - 1]] = False
                self._keep(which)

    def _temperature(self) -> None:
        o, n = self.options, len(self.ids)
        t, spread = f32(o.temperature), 0.0 if o.mirostat else f32(o.dynatemp_range)
        if spread > 0 and n > 1:
            p = softmax(self.x)
            entropy = -(p * np.log(np.maximum(p, 1e-300))).sum()
            share = min(max(entropy / math.log(n), 0.0), 1.0) ** f32(o.dynatemp_exponent)
            least = max(0.0, t - spread)
            t = least + (t + spread - least) * share
        if t > 0:
            self.x = self.x / t
        else:
            self._first(self._order(), 1)

    def _adaptive_p(self) -> None:
        """The last step, whatever its place."""

    def _mirostat(self) -> None:
        order, p = self._order(), softmax(self.x)
        if self.options.mirostat == 2:
            kept = int((-np.log2(np.maximum(p, 1e-300)) <= self.mu * (1 + self.nudge)).sum())
        else:
            kept = self._zipf(self.x[order[:100]], len(p))
        self._first(order, max(1, kept))

    def _zipf(self, x: Numbers, n: int) -> int:
        if n == 1:
            return 1
        t = np.log(np.arange(2, len(x) + 1) / np.arange(1, len(x)))
        s = (t * -np.diff(x)).sum() / (t * t).sum()
        e = s - 1
        k = (e * 2**self.mu / (1 - float(self.n_vocab) ** -e)) ** (1 / s)
        return n if k >= n else int(k * (1 + self.nudge))

    def _nearer(self, p: Numbers) -> Numbers:
        target = 2 * f32(self.options.adaptive_target) - self.sum / self.weight
        away = np.abs(p - min(max(target, 0.0), 1.0)) / 0.3
        return np.asarray(5 - 10 * away**2 / (1 + away))
