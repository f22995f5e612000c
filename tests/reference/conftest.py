"""Models converted once for all comparisons."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_gguf

from .cases import CASES, Case
from .subject import Subject


@dataclass(frozen=True)
class Pair:
    """pyllava and the reference with the same checkpoint; `exact`: with the numbers that the files hold."""

    case: Case
    files: tiny_gguf.Files
    subject: Subject
    reference: Any
    exact: Any


def make_pair(folder: Any, case: Case) -> Pair:
    from .reference import Reference, Weights

    files = tiny_gguf.convert(folder, case.spec, outtype=case.outtype, run=tiny_gguf.run_script)
    reference = Reference(case.spec)
    exact = reference
    if case.lossless and case.spec.dtype != "f16":
        exact = Reference(case.spec, Weights.of(case.spec).with_f16_patches())
    return Pair(case, files, Subject(files), reference, exact)


@pytest.fixture(scope="package", autouse=True)
def exact_precision() -> Iterator[None]:
    """The one that promises the reference's numbers, also for `Llava` and the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYLLAVA_PRECISION", "exact")
        yield


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Pair]]:
    """Pairs by the names of CASES, made when first asked for."""

    @functools.cache
    def make(name: str) -> Pair:
        made.append(make_pair(tmp_path_factory.mktemp("pair"), CASES[name]))
        return made[-1]

    made: list[Pair] = []
    yield make
    for pair in made:
        pair.subject.close()


@pytest.fixture(params=list(CASES))
def pair(request: pytest.FixtureRequest, pairs: Callable[[str], Pair]) -> Pair:
    return pairs(request.param)


@pytest.fixture(params=[name for name, case in CASES.items() if case.lossless])
def exact_pair(request: pytest.FixtureRequest, pairs: Callable[[str], Pair]) -> Pair:
    """Of files that hold the checkpoint's numbers."""
    return pairs(request.param)
