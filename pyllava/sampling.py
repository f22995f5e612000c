"""The options of an answer: one row for each, in the order of ``pyllava_sampler_params``."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

from . import _lib
from ._defaults import MAX_TOKENS
from ._habits import arguments_of, check_names
from ._lib.values import number_text

DRY_BREAKERS = ("\n", ":", '"', "*")
STRUCTURES = ("schema", "regex", "choices", "grammar")  # options that say what the answer is


class Options(TypedDict, total=False):
    """The keyword arguments of ``ask`` that say how an answer is made; defaults and meaning in `Sampling`."""

    max_tokens: int
    temperature: float
    dynatemp_range: float
    dynatemp_exponent: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    top_n_sigma: float
    xtc_probability: float
    xtc_threshold: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    repeat_last_n: int
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breakers: Sequence[str]
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    adaptive_target: float
    adaptive_decay: float
    logit_bias: Mapping[int | str, float]
    ignore_eos: bool
    samplers: Sequence[str] | None
    seed: int | None
    stop: Sequence[str]
    reuse: bool
    start_with: str
    timeout: float | None
    stop_loops: bool
    logprobs: int | None
    schema: Any
    regex: str | None
    choices: Sequence[str] | None
    grammar: str | None


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, when an answer ends, and whether rows that the model still holds are reused.

    Names and formulas are llama.cpp's. The stages act in the order of `samplers`, after `logit_bias`; by default:

    - "penalties": tokens among the last `repeat_last_n` lose `presence_penalty` and, as often as they stand there,
      `frequency_penalty`, after their logits were divided by `repeat_penalty` (multiplied below 0).
    - "dry": a token that would go on with a repeat of n tokens, `dry_allowed_length` or more, loses `dry_multiplier`
      ``* dry_base ** (n - dry_allowed_length)``. Repeats do not reach over one of `dry_sequence_breakers`.
    - "top_n_sigma": logits within so many standard deviations of the largest.
    - "top_k": so many of the likeliest.
    - "typ_p": those whose surprise is nearest to the entropy, up to `typical_p` of all.
    - "top_p": the likeliest, up to `top_p` of all.
    - "min_p": those at least `min_p` times as likely as the likeliest.
    - "xtc": with `xtc_probability`, none of those as likely as `xtc_threshold` but for the least likely of these.
    - "temperature": 0 takes the likeliest. With `dynatemp_range` it goes from ``temperature - range`` to
      ``temperature + range`` with the entropy, as a share of the largest, to the power of `dynatemp_exponent`.
    - "adaptive_p", always the last: prefers tokens about as likely as `adaptive_target` (below 0: off), and remembers
      about ``1 / (1 - adaptive_decay)`` of them.

    `mirostat` 1 or 2 instead of these, after `logit_bias` and `temperature`: cuts the unlikely off so that tokens have
    a surprise of `mirostat_tau` bits, and learns from each at the rate `mirostat_eta`.

    Only tokens of the answer count for the penalties and for DRY, not those of the prompt. A window of -1 is all of
    them. At `temperature` 0 only what changes which token is the likeliest has an effect.
    """

    max_tokens: int = MAX_TOKENS
    temperature: float = 0.0
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    """0 or less: off."""
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: Sequence[str] = DRY_BREAKERS
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    adaptive_target: float = -1.0
    adaptive_decay: float = 0.9
    logit_bias: Mapping[int | str, float] = field(default_factory=dict)
    """What is added to the logit of a token, by its id, or of each token of a text; ``-math.inf`` forbids it."""
    ignore_eos: bool = False
    """Tokens that end an answer are not chosen: it goes on to `max_tokens`, or to one of `stop`."""
    samplers: Sequence[str] | None = None
    """Which stages there are, in this order; one that is not named is off. None: all, as above."""
    seed: int | None = None
    stop: Sequence[str] = ()
    reuse: bool = True
    start_with: str = ""
    timeout: float | None = None
    stop_loops: bool = False
    logprobs: int | None = None
    """How many alternatives ``Answer.logprobs`` tells of each token; None: there are no entries."""
    schema: Any = None
    """A JSON schema as a dict or a text, True for any JSON, or a pydantic model: what the answer is."""
    regex: str | None = None
    """An expression that the whole answer matches."""
    choices: Sequence[str] | None = None
    """The answer is one of these."""
    grammar: str | None = None
    """A grammar of the answer, in GBNF or in Lark as llguidance has it."""

    def __new__(cls, *_: object, **named: object) -> Sampling:
        if not named.keys() <= cls.__dataclass_fields__.keys():
            from .llava import Llava

            check_names("ask()", named, cls.__dataclass_fields__, {"Llava()": arguments_of(Llava.__init__)})
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for option in fields(self):
            check_number(option.name, getattr(self, option.name), str(option.type))
        for name in ("stop", "dry_sequence_breakers", "samplers", "choices"):
            texts = getattr(self, name)
            if texts is not None or name in ("stop", "dry_sequence_breakers"):
                check_texts(name, texts)
        if not isinstance(self.logit_bias, Mapping):
            raise TypeError(f"logit_bias: found {self.logit_bias!r:.80}, need a dict of token ids or texts")
        if self.temperature < 0:
            raise ValueError(
                f"temperature: found {number_text(self.temperature)}, need a number of at least 0"
            )
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: found {number_text(self.max_tokens)}, need 1 or more")
        if not isinstance(self.start_with, str):
            raise TypeError(f"start_with: found {type(self.start_with).__name__}, need a text")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout: found {number_text(self.timeout)}, need seconds above 0, or None")
        if self.logprobs is not None and operator.index(self.logprobs) < 0:
            raise ValueError(f"logprobs: found {number_text(self.logprobs)}, need 0 or more, or None")
        self._check_structure()

    def _check_structure(self) -> None:
        """Refuses what a structured answer contradicts: it begins, goes on and ends as its grammar says."""
        given = [name for name in STRUCTURES if getattr(self, name) is not None]
        given += [name for name in ("stop", "ignore_eos") if given and getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: need one of them")

    @property
    def start(self) -> str:
        """`start_with` without spaces at its end: the token that follows brings its own."""
        return self.start_with.rstrip(" ")

    def sampler(self, model: _lib.ModelHandle, n_ctx: int) -> _lib.SamplerHandle:
        """The sampler of one answer, from the fields of the same names."""
        options = {name: getattr(self, name) for name in _lib.SAMPLER_FIELDS}
        for window in ("repeat_last_n", "dry_penalty_last_n"):
            if options[window] < 0:
                options[window] = min(self.max_tokens, n_ctx)  # no answer is longer
        options["logit_bias"] = [
            (token, bias) for key, bias in self.logit_bias.items() for token in _tokens(model, key)
        ]
        if self.seed is None:
            options["seed"] = secrets.randbits(64)
        return _lib.SamplerHandle(model, **options)


def check_texts(name: str, texts: object) -> None:
    """TypeError for what is no list of texts; an iterator would be empty when it is looked at again."""
    if isinstance(texts, str):
        raise TypeError(f"{name}: found a text, need a list of texts")
    if not isinstance(texts, Collection) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name}: found {texts!r:.80}, need a list of texts")


def check_number(name: str, value: object, annotation: str) -> None:
    """TypeError, with the name, for what is no number where one is needed."""
    kind, _, or_none = annotation.partition(" | ")
    if or_none and value is None:
        return
    if kind == "int":
        try:
            operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"{name}: found {value!r:.80}, need an integer") from None
    elif kind == "float" and (isinstance(value, str | bytes) or not hasattr(value, "__float__")):
        raise TypeError(f"{name}: found {value!r:.80}, need a number")


def _tokens(model: _lib.ModelHandle, key: int | str) -> list[int]:
    return model.tokenize(key) if isinstance(key, str) else [key]
