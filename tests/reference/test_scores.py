"""Scores of given answers against transformers: log-probabilities of tokens, and the probabilities of choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pyllava

from . import gates
from .cases import picture
from .test_networks import through_llava

pytestmark = pytest.mark.reference

# An error of the logits counts at most twice: in the token's own, and in the logarithm of their sum.
LOGPROBS = 2 * gates.LOGITS.max_abs
CHOICES = ("Yes", "No", "It is blue.", "A large red square, at the top left")


def log_softmax(logits: Any) -> np.ndarray:
    values = np.asarray(logits, np.float64)
    values = values - values.max(-1, keepdims=True)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", ["gqa", "tied", "heads of 20", "qwen2", "granite"])
def test_scores(name: str, pairs: Callable[[str], Any]) -> None:
    pair, source, question = pairs(name), picture(5, 90, 50), "What is in the picture?"
    with pyllava.Llava(pair.files.model, pair.files.mmproj, n_threads=2) as llava:
        parts = through_llava(llava, pair.exact, source, question)
        totals, means = [], []
        for choice in CHOICES:
            found = llava.loglikelihood(source, question, choice, with_end=True)
            ids = [entry.id for entry in found.logprobs]
            rows = log_softmax(pair.exact.logits([*parts[:-1], [*parts[-1], *ids]]))[-len(ids) - 1 :]
            expected = [rows[i, token] for i, token in enumerate(ids)]
            assert [entry.logprob for entry in found.logprobs] == pytest.approx(expected, abs=LOGPROBS)
            assert found.end_logprob == pytest.approx(rows[-1, llava.info.eos_id], abs=LOGPROBS)
            totals.append(sum(expected) + rows[-1, llava.info.eos_id])
            means.append(totals[-1] / (len(ids) + 1))
        for normalize, values, n in (("sum", totals, 20), ("mean", means, 1)):
            scores = llava.score(source, question, CHOICES, normalize=normalize)  # type: ignore[arg-type]
            shares = np.exp(values) / np.exp(values).sum()
            # each logarithm is off by LOGPROBS for each of its tokens at most
            assert list(scores.values()) == pytest.approx(list(shares), rel=2 * n * LOGPROBS)
