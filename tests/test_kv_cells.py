"""The pool of cells that the sequences of a session share: sizes of its own, what is left when it is empty, and
resident memory that follows use. The account of single cells is checked in `tests/c/test_kv_cache.c`.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from reference.cases import Array, text
from tiny import TinySpec

import pyllava
from pyllava import _lib
from pyllava._lib import Run, Tokens

ROOT = Path(__file__).resolve().parents[1]
SPEC = TinySpec(seed=41, n_ctx=1024)
N_CTX, N_SEQ, N_CELLS = 64, 4, 100
LEFT = re.compile(
    r"KV cache: (\d+) cells needed, (\d+) of (\d+) are free \(.*\): trim a sequence or raise kv_cells$"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> _lib.ModelHandle:
    return _lib.ModelHandle(tiny_gguf.convert(tmp_path_factory.mktemp("kv"), SPEC).model, None)


def open_session(model: _lib.ModelHandle, **options: Any) -> _lib.SessionHandle:
    usual = {"n_ctx": N_CTX, "n_seq": N_SEQ, "kv_cells": N_CELLS, "n_threads": 1, "precision": "fast"}
    return _lib.SessionHandle(model, **(usual | options))


@pytest.fixture
def session(model: _lib.ModelHandle) -> Iterator[_lib.SessionHandle]:
    session = open_session(model)
    yield session
    session.close()


def ids(seed: int, n: int) -> list[int]:
    return text(seed, n, SPEC.n_vocab)


def fill(session: _lib.SessionHandle, seq: int, n: int) -> Array:
    return session.prefill([Tokens(ids(seq, n))], seq=seq)[0]


def lengths(session: _lib.SessionHandle) -> list[int]:
    return [session.seq_length(seq) for seq in range(N_SEQ)]


# Sizes


@pytest.mark.parametrize("kv_cells", [-1, 1, N_CTX - 1, N_CTX * N_SEQ + 1, 2**31 - 1])
def test_sizes_that_are_refused(model: _lib.ModelHandle, kv_cells: int) -> None:
    with pytest.raises(ValueError, match=f"kv_cells: found {kv_cells}, need 0 or 64..256 "):
        open_session(model, kv_cells=kv_cells)


def test_size_that_is_no_32_bit_number(model: _lib.ModelHandle) -> None:
    with pytest.raises(ValueError, match="kv_cells"):
        open_session(model, kv_cells=2**31)


def test_plan_counts_the_whole_pool(model: _lib.ModelHandle) -> None:
    a_cell = 2 * SPEC.n_layer * SPEC.n_head_kv * SPEC.head_dim * 2
    for kv_cells, n in (
        (0, N_CTX * N_SEQ),
        (N_CTX, N_CTX),
        (N_CELLS, N_CELLS),
        (N_CTX * N_SEQ, N_CTX * N_SEQ),
    ):
        session = open_session(model, kv_cells=kv_cells)
        assert session.memory()[0] == n * a_cell
        session.close()


def test_a_pool_that_does_not_fit_is_refused_with_numbers(model: _lib.ModelHandle) -> None:
    """Also where n_ctx alone would, and where n_ctx for each sequence is no number of cells."""
    most = {"n_ctx": 1 << 24, "n_seq": 256}
    with pytest.raises(
        pyllava.ModelMemoryError, match=r"need .* GiB .*kv_cells 2000000000.* try a smaller kv_cells"
    ):
        open_session(model, kv_cells=2_000_000_000, **most)
    with pytest.raises(ValueError, match="n_ctx 16777216 times n_seq 256 is too large"):
        open_session(model, kv_cells=0, **most)


# Sharing


def test_sequences_grow_where_others_are_short(model: _lib.ModelHandle, session: _lib.SessionHandle) -> None:
    """Each up to n_ctx, though the pool holds 25 cells for each, and with the bytes of a pool without limits."""
    roomy = open_session(model, kv_cells=0)
    for long in range(N_SEQ):
        for seq in range(N_SEQ):
            session.seq_trim(seq, 0)
        for seq in range(N_SEQ):
            n = N_CTX if seq == long else 12
            assert np.array_equal(fill(session, seq, n), fill(roomy, seq, n))
        assert sum(lengths(session)) == N_CELLS
    roomy.close()


def test_shared_cells_count_once(session: _lib.SessionHandle) -> None:
    """Four sequences of 64 positions in 100 cells."""
    fill(session, 0, 52)
    for seq in (1, 2, 3):
        session.seq_copy(0, seq, 52)
    for i in range(12):
        session.decode([5 + i] * N_SEQ)
    assert lengths(session) == [64] * 4
    for seq in range(3):
        session.seq_trim(seq, 0)
    fill(session, 0, 36)  # the last one holds the 52 alone
    with pytest.raises(pyllava.ContextOverflowError, match="1 cells needed, 0 of 100 are free"):
        fill(session, 1, 1)


# When none is left


@contextlib.contextmanager
def refused(n: int, free: int) -> Iterator[None]:
    """Too few cells, with these numbers."""
    with pytest.raises(pyllava.ContextOverflowError) as failed:
        yield
    found = LEFT.match(str(failed.value))
    assert found is not None, failed.value
    assert tuple(map(int, found.groups())) == (n, free, N_CELLS)


def test_an_empty_pool_leaves_all_as_it_was(model: _lib.ModelHandle, session: _lib.SessionHandle) -> None:
    alone = open_session(model, kv_cells=0)
    for seq, n in ((0, 60), (1, 20), (2, 15)):
        fill(session, seq, n), fill(alone, seq, n)
    rest = "(sequence 0 holds 60, sequence 1 holds 20, sequence 2 holds 15)"
    calls = {
        6: lambda: fill(session, 3, 6),
        30: lambda: session.logits([Tokens(ids(9, 30))], seq=3),
        40: lambda: session.prefill([Tokens(ids(2, 15) + ids(8, 40))], seq=2),
    }
    for n, call in calls.items():
        with pytest.raises(pyllava.ContextOverflowError) as failed:
            call()
        assert str(failed.value) == (
            f"KV cache: {n} cells needed, 5 of 100 are free {rest}: trim a sequence or raise kv_cells"
        )
        assert lengths(session) == [60, 20, 15, 0]
    fill(session, 3, 3), fill(alone, 3, 3)
    with pytest.raises(pyllava.ContextOverflowError, match="4 cells needed, 2 of 100 are free"):
        session.decode([5, 6, 7, 8])  # all or none
    assert lengths(session) == [60, 20, 15, 3]
    assert np.array_equal(session.decode([6, 8], seqs=[1, 3]), alone.decode([6, 8], seqs=[1, 3]))
    with pytest.raises(pyllava.ContextOverflowError, match="1 cells needed, 0 of 100 are free"):
        session.decode([5], seqs=[2])
    session.seq_trim(1, 20)  # one cell is enough
    assert np.array_equal(session.decode([5], seqs=[2]), alone.decode([5], seqs=[2]))
    assert np.array_equal(fill(session, 0, 61 - 21), fill(alone, 0, 61 - 21))  # shorter: gives cells back
    assert np.array_equal(fill(session, 3, 20), fill(alone, 3, 20))
    alone.close()


def test_the_runs_of_a_step_share_what_is_free(model: _lib.ModelHandle, session: _lib.SessionHandle) -> None:
    """Cells that several of them let go of together are free; all are computed or none is."""
    alone = open_session(model, kv_cells=0)
    for s in (session, alone):
        fill(s, 0, 50)
        s.seq_copy(0, 1, 50)
        fill(s, 2, 20)
    common, answer = ids(0, 50)[:10], Run([Tokens([7])], seq=2, append=True, answer=True)

    def step(s: _lib.SessionHandle, n: int, m: int) -> list[Array]:
        prompts = [Run([Tokens(common + ids(60 + seq, k))], seq=seq) for seq, k in ((0, n), (1, m))]
        return [ran.logits for ran in s.step([*prompts, answer])]

    with refused(71, 70):
        step(session, 40, 30)
    assert lengths(session) == [50, 50, 20, 0]
    for expected, found in zip(step(alone, 40, 29), step(session, 40, 29), strict=True):
        assert np.array_equal(expected, found)
    assert lengths(session) == [50, 39, 21, 0]
    with refused(1, 0):
        fill(session, 3, 1)
    alone.close()


def test_a_prompt_takes_what_it_lets_go_of(session: _lib.SessionHandle) -> None:
    """The cells of a sequence count as free for its own next prompt, those that it shares do not."""
    fill(session, 0, 60)
    fill(session, 1, 40)
    session.prefill([Tokens(ids(50, 60))], seq=0)
    session.seq_copy(0, 2, 30)
    with pytest.raises(
        pyllava.ContextOverflowError, match=r"60 cells needed, 30 of 100 .*\(sequence 1 holds 40, "
    ):
        session.prefill([Tokens(ids(51, 60))], seq=0)
    assert lengths(session) == [60, 40, 30, 0]


# Any operations


class Pool:
    """What sequences hold: positions that a copy shares are the same (number, token, whether of an answer)."""

    def __init__(self) -> None:
        self.held: list[list[tuple[int, int, bool]]] = [[] for _ in range(N_SEQ)]
        self.numbers = itertools.count()

    def tokens(self, seq: int) -> list[int]:
        return [token for _, token, _ in self.held[seq]]

    def free_without(self, seq: int, keep: int) -> int:
        """Cells that are free once a sequence keeps its first `keep` positions."""
        others = [held[:keep] if i == seq else held for i, held in enumerate(self.held)]
        return N_CELLS - len({number for held in others for number, *_ in held})

    def append(self, seq: int, tokens: list[int], *, answer: bool = False) -> None:
        self.held[seq] += [(next(self.numbers), token, answer) for token in tokens]

    def of_prompt(self, seq: int) -> list[int | None]:
        """Its tokens, None where they were computed as rows of an answer."""
        return [None if answer else token for _, token, answer in self.held[seq]]


@pytest.mark.parametrize("seed", range(4))
def test_random_operations(model: _lib.ModelHandle, session: _lib.SessionHandle, seed: int) -> None:
    """Lengths, reuse, errors with their numbers, and the bytes of prompts computed alone."""
    random, pool, n_refused = np.random.RandomState(seed), Pool(), 0
    alone = open_session(model, n_seq=1, kv_cells=0)
    for step in range(250):
        a, b, kind = (int(i) for i in random.randint(0, (N_SEQ, N_SEQ, 5)))
        n = int(random.randint(0, len(pool.held[a]) + 1))
        if kind == 0:
            session.seq_trim(a, n)
            del pool.held[a][n:]
        elif kind == 1:
            session.seq_copy(a, b, n)
            pool.held[b] = pool.held[a][:n]
        elif kind == 2:
            seqs = [seq for seq in range(N_SEQ) if random.randint(2) and len(pool.held[seq]) < N_CTX]
            free = pool.free_without(0, N_CTX)
            if not seqs:
                continue
            if len(seqs) > free:
                n_refused += 1
                with refused(len(seqs), free):
                    session.decode([5] * len(seqs), seqs=seqs)
                continue
            tokens = [int(token) for token in random.randint(4, SPEC.n_vocab, len(seqs))]
            session.decode(tokens, seqs=seqs)
            for seq, token in zip(seqs, tokens, strict=True):
                pool.append(seq, [token], answer=True)
        else:
            new = [int(token) for token in random.randint(4, SPEC.n_vocab, random.randint(1, N_CTX + 1 - n))]
            whole = pool.tokens(a)[:n] + new
            same = (x == y for x, y in zip(whole, pool.of_prompt(a), strict=False))
            keep = min(sum(itertools.takewhile(bool, same)), len(whole) - 1)
            free = pool.free_without(a, keep)
            if len(whole) - keep > free:
                n_refused += 1
                with refused(len(whole) - keep, free):
                    session.prefill([Tokens(whole)], seq=a)
            else:
                found, n_reused = session.prefill([Tokens(whole)], seq=a)
                assert n_reused == keep
                del pool.held[a][keep:]
                pool.append(a, whole[keep:])
                assert np.isfinite(found).all()
                if keep == 0:
                    alone.seq_trim(0, 0)
                    assert np.array_equal(found, alone.prefill([Tokens(whole)])[0]), step
        assert lengths(session) == [len(held) for held in pool.held], step
    assert n_refused > 20
    for seq in range(N_SEQ):
        session.seq_trim(seq, 0)
    fill(session, 0, N_CTX)
    fill(session, 1, N_CELLS - N_CTX)  # no cell was lost
    with refused(1, 0):
        fill(session, 2, 1)
    alone.close()


# Memory

RESIDENT = """
import sys
from pyllava import _lib
from pyllava._lib import Tokens

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon"))

def prompt(seq, n):
    session.prefill([Tokens([5 + (i * 7 + seq) % 300 for i in range(n)])], seq=seq)

model = _lib.ModelHandle(sys.argv[1], None)
before = resident()
session = _lib.SessionHandle(
    model, n_ctx=8192, n_seq=3, kv_cells=16384, n_batch=64, n_threads=1, precision="fast", type_k="f32", type_v="f32"
)
print(session.memory()[0] / 2**20)
print(resident() - before)
prompt(0, 64)  # the compute buffer is used, too
session.seq_trim(0, 0)
rest = resident()
for seq, n in ((0, 512), (1, 2048), (2, 1024), (1, 4), (2, 4), (0, 4)):
    prompt(seq, n)
    print(resident() - rest)
session.seq_trim(0, 0)
prompt(1, 1024)
session.close()
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_resident_memory_follows_use(tmp_path: Path) -> None:
    """16 KiB for each cell of 16,384: those that were used are there, and those above the last in use go back."""
    spec = TinySpec(seed=42, n_embd=512, n_head=8, n_head_kv=8, n_layer=4, n_ff=512)
    files = tiny_gguf.convert(tmp_path, spec, outtype="f16")
    command = [sys.executable, "-c", RESIDENT, str(files.model)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    planned, created, *used, closed = map(float, done.stdout.split())
    assert planned == 256
    assert created < 8
    # The second and third let go of all but 4 cells: between others those stay, above them they go.
    wanted = [8, 40, 56, 56, 40, 40]
    assert used == pytest.approx(wanted, abs=3)
    assert closed < 24
