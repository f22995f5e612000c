"""What a session promises: the same numbers however a computation is cut up, and a usable object after every failure.

"The same" is a matter of precision: `close`. Only the exact one promises the same tokens, too, so the tests of whole
answers ask for it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from reference import gates
from reference.cases import Array, picture, text
from tiny import TinySpec

import pyllava
from pyllava import _lib
from pyllava._lib import Rows, Span, Tokens

SPEC = TinySpec(seed=40, n_ctx=4096)
N_CTX = 256


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tiny_gguf.Files:
    return tiny_gguf.convert(tmp_path_factory.mktemp("session"), SPEC)


@pytest.fixture(scope="module", params=["exact", "fast"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of the sessions that are opened, and of what is close."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYLLAVA_PRECISION", request.param)
        yield request.param


@pytest.fixture(scope="module")
def model(files: tiny_gguf.Files, precision: str) -> _lib.ModelHandle:
    return _lib.ModelHandle(files.model, files.mmproj)


def open_session(model: _lib.ModelHandle, **options: Any) -> _lib.SessionHandle:
    precision = os.environ["PYLLAVA_PRECISION"]
    return _lib.SessionHandle(model, **{"n_ctx": N_CTX, "n_threads": 1, "precision": precision, **options})


@pytest.fixture
def session(model: _lib.ModelHandle) -> Iterator[_lib.SessionHandle]:
    session = open_session(model, n_seq=4)
    yield session
    session.close()


def views(n: int) -> Array:
    shape = (n, 3, SPEC.image_size, SPEC.image_size)
    return np.random.RandomState(1).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def rows(model: _lib.ModelHandle) -> Array:
    """Embeddings of two pictures."""
    session = open_session(model)
    found = session.encode(views(2))
    session.close()
    return found


def ids(seed: int, n: int) -> list[int]:
    return text(seed, n, SPEC.n_vocab)


def prompt(rows: Array) -> list[Span]:
    """117 positions: text and two pictures."""
    parts: list[Span] = [Tokens([1, *ids(1, 30)]), Rows(rows[0], 100), Tokens(ids(2, 41))]
    return [*parts, Rows(rows[1], 200), Tokens(ids(3, 13))]


def greedy(session: _lib.SessionHandle, first: Array, n: int, seq: int = 0) -> list[int]:
    found = [int(first.argmax())]
    while len(found) < n:
        found.append(int(session.decode(found[-1:], seqs=[seq])[0].argmax()))
    return found


def close(expected: Array, found: Array) -> None:
    precision = os.environ["PYLLAVA_PRECISION"]
    gates.check("logits", gates.LOGITS_REGROUPED[precision], expected, found)
    if precision == "exact":
        assert np.array_equal(expected.argmax(-1), found.argmax(-1))


# The same bytes for any number of threads


def everything(model: _lib.ModelHandle, rows: Array, **options: Any) -> list[Array]:
    """Encode two views at once, prefill, decode two sequences in one step, and all logits."""
    session = open_session(model, n_seq=2, n_views=2, **options)
    found = [session.encode(views(2))]
    found += [session.prefill(prompt(rows)[: 1 + 2 * seq], seq=seq)[0] for seq in range(2)]
    found += [session.decode([10, 20]), session.logits(prompt(rows)[:2], seq=1)]
    session.close()
    return found


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_thread_count_changes_no_byte(model: _lib.ModelHandle, rows: Array, kind: str) -> None:
    expected = everything(model, rows, n_threads=1, type_k=kind, type_v=kind)
    for n_threads in (2, 3, 4):
        found = everything(model, rows, n_threads=n_threads, type_k=kind, type_v=kind)
        for a, b in zip(expected, found, strict=True):
            assert a.tobytes() == b.tobytes(), n_threads


def test_views_at_once(model: _lib.ModelHandle) -> None:
    expected = np.concatenate([open_session(model).encode(views(5)[i : i + 1]) for i in range(5)])
    for n_views in (1, 2, 3, 5, 8):
        session = open_session(model, n_views=n_views)
        assert np.array_equal(session.encode(views(5)), expected), n_views
        session.close()


# Nearly the same numbers however rows are grouped


@pytest.mark.parametrize("n_batch", [1, 3, 7, 64, 512])
def test_batch_size(
    model: _lib.ModelHandle, session: _lib.SessionHandle, rows: Array, n_batch: int, precision: str
) -> None:
    other = open_session(model, n_batch=n_batch)
    close(session.logits(prompt(rows)), other.logits(prompt(rows)))
    expected, found = session.prefill(prompt(rows))[0], other.prefill(prompt(rows))[0]
    assert other.seq_length() == 117
    close(expected, found)
    if precision == "exact":
        assert greedy(session, expected, 24) == greedy(other, found, 24)
    other.close()


def test_prefill_and_logits_agree(session: _lib.SessionHandle, rows: Array) -> None:
    every = session.logits(prompt(rows), seq=1)
    for n in (1, 2, 5):
        parts = prompt(rows)[:n]
        last, _ = session.prefill(parts)
        close(every[sum(map(len, parts)) - 1], last)


def test_decode_continues_like_prefill(session: _lib.SessionHandle, rows: Array) -> None:
    tail = ids(9, 12)
    every = session.logits([*prompt(rows), Tokens(tail)], seq=1)
    session.prefill(prompt(rows))
    for i, token in enumerate(tail):
        close(every[117 + i], session.decode([token])[0])


def test_prefix_reuse(session: _lib.SessionHandle, rows: Array) -> None:
    whole = prompt(rows)
    fresh, n_reused = session.prefill(whole, seq=1)
    assert n_reused == 0
    for n in range(1, 6):
        session.seq_trim(0, 0)
        session.prefill(whole[:n])
        found, n_reused = session.prefill(whole)
        assert n_reused == (116 if n == 5 else sum(map(len, whole[:n])))  # the last row is always computed
        close(fresh, found)
        assert session.seq_length() == 117


@pytest.mark.parametrize("at", [0, 5, 30, 31, 39, 47, 60, 100, 116])
def test_prefix_reuse_after_trimming(session: _lib.SessionHandle, rows: Array, at: int) -> None:
    """Also inside a picture."""
    expected, _ = session.prefill(prompt(rows))
    session.seq_trim(0, at)
    assert session.seq_length() == at
    found, n_reused = session.prefill(prompt(rows))
    assert n_reused == at
    close(expected, found)


def test_reuse_ends_where_prompts_differ(session: _lib.SessionHandle, rows: Array) -> None:
    a, picture_1, b, picture_2, c = prompt(rows)
    whole = [a, picture_1, b, picture_2, c]
    other_text = Tokens([*b.ids[:7], (b.ids[7] + 1) % 380, *b.ids[8:]])  # type: ignore[union-attr]
    cases: list[tuple[list[Span], int]] = [
        ([Tokens([1, 2]), *whole[1:]], 1),
        ([a, Rows(rows[1], 200), b, picture_2, c], 31),  # another picture of the same length
        ([a, Rows(rows[0][:9], 100), b], 40),  # fewer rows of the same picture
        ([a, picture_1, other_text, picture_2, c], 54),
        ([a, picture_1, b, Rows(rows[1], 201), c], 88),
        ([a, Rows(rows[0][:8], 100), Rows(rows[0][:8], 100), b], 39),  # the same rows, not the next
        ([a, picture_1, b], 87),  # shorter: its last row is computed
        ([a, picture_1, Tokens(b.ids[:3]), Tokens(b.ids[3:]), picture_2, c], 116),  # cut up in another way
    ]
    for parts, n in cases:
        fresh, _ = session.prefill(parts, seq=1)
        session.prefill(whole)
        found, n_reused = session.prefill(parts)
        assert n_reused == n
        close(fresh, found)
        assert session.seq_length() == sum(map(len, parts))
        session.seq_trim(1, 0)


def test_token_ids_are_not_rows(session: _lib.SessionHandle, rows: Array) -> None:
    """A picture whose key is a small number is no run of tokens."""
    table = Rows(rows[0], 5)
    session.prefill([Tokens([5] * 16), Tokens([9])])
    _, n_reused = session.prefill([table, Tokens([9])])
    assert n_reused == 0


def test_sequence_slot(session: _lib.SessionHandle, rows: Array, precision: str) -> None:
    expected, _ = session.prefill(prompt(rows), seq=0)
    continued = greedy(session, expected, 16)
    for seq in (1, 2, 3):
        session.prefill(
            [Tokens(ids(50 + seq, 20 * seq))], seq=seq
        )  # then something else from the first row on
        found, _ = session.prefill(prompt(rows), seq=seq)
        close(expected, found)
        if precision == "exact":
            assert greedy(session, found, 16, seq) == continued


def test_scattered_cells(session: _lib.SessionHandle, rows: Array) -> None:
    """Sequences that grow in turns own cells that lie apart and out of order."""
    expected, _ = session.prefill(prompt(rows), seq=3)
    session.seq_trim(3, 0)
    tails = {seq: ids(60 + seq, 80) for seq in range(3)}
    for n in range(10, 81, 10):
        for seq in range(3):
            session.prefill([Tokens(tails[seq][: n if seq else max(n - 35, 1)])], seq=seq)
    session.seq_trim(1, 0)
    found, _ = session.prefill(prompt(rows), seq=1)
    close(expected, found)


def test_shared_cells(session: _lib.SessionHandle, rows: Array) -> None:
    """A copy goes its own way, and so does the original, even when it is gone."""
    tails = [ids(70 + i, 9) for i in range(4)]
    expected = []
    for tail in tails:
        session.seq_trim(0, 0)
        expected.append(session.prefill([*prompt(rows), Tokens(tail)])[0])
    session.prefill(prompt(rows), seq=2)
    for target in (0, 1, 3):
        session.seq_copy(2, target, 117)
        assert session.seq_length(target) == 117
    for i in range(9):
        found = session.decode([tail[i] for tail in tails], seqs=[0, 1, 2, 3])
    for a, b in zip(expected, found, strict=True):
        close(a, b)
    session.prefill([Tokens(ids(75, N_CTX))], seq=2)  # lets go of what it shared
    for seq in (0, 1, 3):
        again, n_reused = session.prefill([*prompt(rows), Tokens(tails[seq])], seq=seq)
        assert n_reused == 117  # rows of an answer are no rows of a prompt
        close(expected[seq], again)


def test_copy_of_a_part(session: _lib.SessionHandle, rows: Array) -> None:
    fresh, _ = session.prefill([*prompt(rows)[:2], Tokens(ids(80, 10))])
    session.prefill(prompt(rows), seq=1)
    session.seq_copy(1, 2, 40)  # ends inside the picture
    found, n_reused = session.prefill([*prompt(rows)[:2], Tokens(ids(80, 10))], seq=2)
    assert n_reused == 40
    close(fresh, found)
    session.seq_copy(1, 1, 20)  # onto itself: a trim
    assert session.seq_length(1) == 20
    session.seq_copy(1, 2, 0)
    assert session.seq_length(2) == 0


def test_random_operations(model: _lib.ModelHandle) -> None:
    """Trims, copies and prefills in any order: each sequence holds what a list of its tokens says, and nothing else."""
    session, fresh = open_session(model, n_seq=3, n_ctx=64), open_session(model, n_ctx=64)
    random, held = np.random.RandomState(5), [list[int]() for _ in range(3)]
    for _ in range(200):
        a, b, kind = (int(i) for i in random.randint(0, 3, 3))
        n = int(random.randint(0, len(held[a]) + 1))
        if kind == 0:
            session.seq_trim(a, n)
            held[a] = held[a][:n]
        elif kind == 1:
            session.seq_copy(a, b, n)
            held[b] = held[a][:n]
        else:
            held[a] = held[a][:n] + ids(int(random.randint(0, 1000)), int(random.randint(1, 65 - n)))
            found, n_reused = session.prefill([Tokens(held[a])], seq=a)
            assert n_reused >= min(n, len(held[a]) - 1)
            fresh.seq_trim(0, 0)
            close(fresh.prefill([Tokens(held[a])])[0], found)
        assert [session.seq_length(seq) for seq in range(3)] == [len(tokens) for tokens in held]
    for seq in range(3):
        session.prefill([Tokens(ids(90 + seq, 64))], seq=seq)  # no cell was lost: all are full
    session.close()
    fresh.close()


def test_many_sequences_in_one_step(model: _lib.ModelHandle) -> None:
    """More than one graph's rows of logits, of different lengths, in any order."""
    n_seq = 70
    session = open_session(model, n_seq=n_seq, n_ctx=16)
    alone = []
    for seq in range(n_seq):
        session.prefill([Tokens(ids(seq, 1 + seq % 9))], seq=seq)
        alone.append(session.decode([5 + seq], seqs=[seq])[0])
        session.seq_trim(seq, 1 + seq % 9)
    order = np.random.RandomState(3).permutation(n_seq)
    together = session.decode([5 + int(seq) for seq in order], seqs=[int(seq) for seq in order])
    for seq, found in zip(order, together, strict=True):
        close(alone[seq], found)
        assert session.seq_length(int(seq)) == 2 + int(seq) % 9
    session.close()


# Answers


def open_llava(files: tiny_gguf.Files, n_ctx: int = 512) -> pyllava.Llava:
    return pyllava.Llava(files.model, files.mmproj, n_threads=1, n_ctx=n_ctx, precision="exact")


@pytest.fixture(scope="module")
def llava(files: tiny_gguf.Files) -> Iterator[pyllava.Llava]:
    with open_llava(files) as llava:
        yield llava


def answer(llava: pyllava.Llava, image: int, question: str = "What is this?", **options: Any) -> str:
    return str(llava.ask(picture(image, 60, 40), question, **{"max_tokens": 16, **options}).tokens)


def test_images_in_turns(llava: pyllava.Llava, files: tiny_gguf.Files) -> None:
    with open_llava(files) as fresh:
        alone = {1: answer(fresh, 1)}
    with open_llava(files) as fresh:
        alone[2] = answer(fresh, 2)
    assert alone[1] != alone[2]
    for image in (1, 1, 1, 2, 2, 1, 2, 1):
        assert answer(llava, image) == alone[image]


def test_two_threads_on_one_model(llava: pyllava.Llava) -> None:
    """Calls and streams from several threads: each gives what it gives alone."""
    questions = [(image, question) for image in (1, 2) for question in ("What?", "Where is the cat?")]
    expected = {key: answer(llava, *key) for key in questions}
    wrong: list[object] = []

    def whole(key: tuple[int, str]) -> None:
        for _ in range(3):
            if (found := answer(llava, *key)) != expected[key]:
                wrong.append((key, found))

    def streamed(key: tuple[int, str]) -> None:
        stream = llava.ask(picture(key[0], 60, 40), key[1], max_tokens=16, stream=True)
        for _ in stream:
            time.sleep(0.001)
        if str(stream.answer.tokens) != expected[key]:
            wrong.append((key, stream.answer))

    jobs = [threading.Thread(target=f, args=(key,)) for key in questions for f in (whole, streamed)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert not wrong


def test_seeds(llava: pyllava.Llava) -> None:
    hot: dict[str, Any] = {"temperature": 1.5, "max_tokens": 24}
    assert answer(llava, 1, seed=7, **hot) == answer(llava, 1, seed=7, **hot)
    assert len({answer(llava, 1, seed=seed, **hot) for seed in range(4)}) > 1
    assert len({answer(llava, 1, **hot) for _ in range(3)}) > 1
    assert answer(llava, 1, temperature=0.0, seed=1) == answer(llava, 1, temperature=0.0, seed=2)


# Failures


Call = Callable[[_lib.SessionHandle, Array], object]
FAILURES: dict[str, tuple[Call, type[Exception], str]] = {
    "no parts": (lambda s, r: s.prefill([]), ValueError, "n_spans|span|empty"),
    "no rows": (lambda s, r: s.prefill([Tokens([])]), ValueError, "empty prompt"),
    "token -1": (lambda s, r: s.prefill([Tokens([1, -1])]), ValueError, r"-1, need 0\.\.383"),
    "token 384": (lambda s, r: s.logits([Tokens([384])]), ValueError, r"384, need 0\.\.383"),
    "sequence -1": (lambda s, r: s.prefill([Tokens([1])], seq=-1), ValueError, r"-1, need 0\.\.3"),
    "sequence 4": (lambda s, r: s.logits([Tokens([1])], seq=4), ValueError, r"4, need 0\.\.3"),
    "rows too narrow": (lambda s, r: s.prefill([Rows(r[0][:, :63], 1)]), ValueError, "63.*64"),
    "rows in one dimension": (lambda s, r: s.prefill([Rows(r[0][0], 1)]), ValueError, "shape"),
    "rows that are not finite": (
        lambda s, r: s.prefill([Rows(r[0] * np.nan, 1)], seq=3),
        pyllava.NumericError,
        "not finite",
    ),
    "prompt too long": (
        lambda s, r: s.prefill([Tokens([1] * 250), Rows(r[0], 1)]),
        pyllava.ContextOverflowError,
        "266 positions.*256",
    ),
    "pixels too small": (lambda s, r: s.encode(views(1)[:, :, 1:]), ValueError, "shape.*56, 56"),
    "pixels of one view": (lambda s, r: s.encode(views(1)[0]), ValueError, "shape"),
    "no views": (lambda s, r: s.encode(views(1)[:0]), ValueError, "n_views"),
    "pixels that are not finite": (
        lambda s, r: s.encode(views(1) * np.inf),
        pyllava.NumericError,
        "not finite",
    ),
    "no tokens": (lambda s, r: s.decode([]), ValueError, "n > 0"),
    "token in a step": (lambda s, r: s.decode([5, 400]), ValueError, r"400, need 0\.\.383"),
    "sequence in a step": (lambda s, r: s.decode([5, 5], seqs=[0, 4]), ValueError, r"4, need 0\.\.3"),
    "sequence twice": (lambda s, r: s.decode([5, 6], seqs=[1, 1]), ValueError, "sequence 1 stands twice"),
    "ids without sequences": (lambda s, r: s.decode([5, 6], seqs=[1]), ValueError, "2 ids for 1"),
    "trim too long": (lambda s, r: s.seq_trim(0, 118), ValueError, "118.*117"),
    "trim negative": (lambda s, r: s.seq_trim(0, -1), ValueError, "-1.*117"),
    "trim of no sequence": (lambda s, r: s.seq_trim(9, 0), ValueError, r"9, need 0\.\.3"),
    "copy too long": (lambda s, r: s.seq_copy(0, 1, 118), ValueError, "118.*117"),
    "copy to nowhere": (lambda s, r: s.seq_copy(0, 4, 1), ValueError, r"4, need 0\.\.3"),
    "length of no sequence": (lambda s, r: s.seq_length(-1), ValueError, r"-1, need 0\.\.3"),
}


@pytest.mark.parametrize("name", list(FAILURES))
def test_failure(session: _lib.SessionHandle, rows: Array, name: str) -> None:
    """The exception that fits, with numbers, and nothing changed."""
    call, error, pattern = FAILURES[name]
    expected, _ = session.prefill(prompt(rows))
    after = session.decode([7])[0]
    session.seq_trim(0, 117)
    with pytest.raises(error, match=pattern):
        call(session, rows)
    assert session.seq_length() == 117
    assert np.array_equal(session.decode([7])[0], after)
    session.seq_trim(0, 0)
    assert np.array_equal(session.prefill(prompt(rows))[0], expected)
    assert np.array_equal(session.encode(views(2)), rows)


@pytest.mark.parametrize("n_batch", [8, 512])
def test_bad_rows_are_not_remembered(model: _lib.ModelHandle, rows: Array, n_batch: int) -> None:
    """What gave no finite numbers is no prefix for the next prompt, not even under the same key."""
    session, parts = open_session(model, n_batch=n_batch), prompt(rows)
    expected, _ = session.prefill(parts)
    session.seq_trim(0, 0)
    with pytest.raises(pyllava.NumericError, match="not finite"):
        session.prefill([parts[0], Rows(rows[0] * np.nan, 100), parts[2], Tokens(ids(5, 90))])
    close(expected, session.prefill(parts)[0])
    session.close()


def test_a_full_sequence(session: _lib.SessionHandle) -> None:
    tokens = ids(4, N_CTX)
    every = session.logits([Tokens(tokens)], seq=1)
    assert session.seq_length(1) == N_CTX
    session.prefill([Tokens(tokens[:-1])])
    close(every[-1], session.decode(tokens[-1:], seqs=[0])[0])
    for seqs in ([0], [2, 0]):
        with pytest.raises(pyllava.ContextOverflowError, match="sequence 0 is full: n_ctx is 256"):
            session.decode([5] * len(seqs), seqs=seqs)
    assert session.seq_length(2) == 0
    session.seq_trim(0, N_CTX - 1)
    close(every[-1], session.decode(tokens[-1:], seqs=[0])[0])


def test_context_overflow_of_an_answer(llava: pyllava.Llava, files: tiny_gguf.Files) -> None:
    with pytest.raises(pyllava.ContextOverflowError, match="n_ctx=512"):
        llava.ask(picture(1, 9, 9), "the cat " * 600)
    n_prompt = llava.ask(picture(1, 60, 40), "What?", max_tokens=1).usage.prompt_tokens
    with open_llava(files, n_ctx=n_prompt + 5) as small:
        found = small.ask(picture(1, 60, 40), "What?", max_tokens=50)
        assert found.finish_reason == "length" or found.usage.completion_tokens < 5
        assert found.usage.completion_tokens <= 5
        expected = llava.ask(picture(1, 60, 40), "What?", max_tokens=5)
        assert found.tokens == expected.tokens[: len(found.tokens)]


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"n_ctx": 0}, "n_ctx: found 0"),
        ({"n_batch": 0}, "n_batch: found 0"),
        ({"n_batch": 4096}, r"n_batch: found 4096, need 1\.\.2048"),
        ({"n_seq": 0}, "n_seq: found 0"),
        ({"n_seq": 257}, "n_seq: found 257"),
        ({"n_threads": -1}, "n_threads: found -1"),
        ({"n_views": 0}, "n_views: found 0"),
        ({"type_k": "q9_9"}, "type_k: found 'q9_9'"),
        ({"type_v": "q8_0"}, "type_v: q8_0 needs heads of a multiple of 32, the model's are 16"),
    ],
)
def test_parameters_out_of_range(model: _lib.ModelHandle, options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        open_session(model, **options)


def test_a_cache_that_does_not_fit(model: _lib.ModelHandle) -> None:
    with pytest.raises(pyllava.ModelMemoryError, match=r"need .* GiB"):
        open_session(model, n_ctx=1 << 24, n_seq=100)


# Cancelling


def big_prompt() -> list[Span]:
    return [Tokens(ids(6, 4000))]


def cancelled(session: _lib.SessionHandle, after: float, call: Callable[[], object]) -> float:
    """Seconds from cancel() in another thread until `call` has ended with GenerationCancelled."""
    at: list[float] = []

    def cancel() -> None:
        time.sleep(after)
        at.append(time.perf_counter())
        session.cancel()

    other = threading.Thread(target=cancel)
    other.start()
    with pytest.raises(pyllava.GenerationCancelled):
        call()
    ended = time.perf_counter()
    other.join()
    return ended - at[0]


@pytest.mark.parametrize("n_batch", [64, 2048])
def test_cancel_of_a_prefill(model: _lib.ModelHandle, n_batch: int) -> None:
    session = open_session(model, n_ctx=4096, n_batch=n_batch)
    short = [Tokens(ids(7, 50))]
    expected, _ = session.prefill(short)
    started = time.perf_counter()
    whole, _ = session.prefill(big_prompt())
    seconds = time.perf_counter() - started
    session.seq_trim(0, 0)
    waited = cancelled(session, seconds / 10, lambda: session.prefill(big_prompt()))
    assert waited < max(seconds / 2, 0.3), "it was not ended, it just ended"
    assert session.seq_length() < 4000
    with pytest.raises(pyllava.GenerationCancelled):  # until it is taken back
        session.decode([5])
    session.cancel(False)
    found, _ = session.prefill(big_prompt())
    close(whole, found)
    close(expected, session.prefill(short)[0])
    session.close()


def test_cancel_of_an_encode(model: _lib.ModelHandle, rows: Array) -> None:
    session = open_session(model, n_views=4)
    pixels = np.tile(views(1), (600, 1, 1, 1))
    started = time.perf_counter()
    session.encode(pixels)
    seconds = time.perf_counter() - started
    assert cancelled(session, seconds / 10, lambda: session.encode(pixels)) < max(seconds / 2, 0.3)
    session.cancel(False)
    assert np.array_equal(session.encode(views(2)), rows)
    session.close()


def test_a_cancel_that_is_taken_back_is_no_wrong_result(model: _lib.ModelHandle) -> None:
    """Who sees the flag skips work, so that a run in which it was set has no result, even if it is down again."""
    with_flag = open_session(model, n_threads=2)
    prompt: list[Span] = [Tokens([1, *(5 + i % 20 for i in range(60))])]
    expected = with_flag.prefill(prompt)[0]
    done = threading.Event()

    def toggle() -> None:
        while not done.is_set():
            with_flag.cancel(True)
            with_flag.cancel(False)
            time.sleep(0.0002)

    thread = threading.Thread(target=toggle)
    thread.start()
    n_cancelled = 0
    try:
        for _ in range(300):
            with_flag.seq_trim(0, 0)
            try:
                assert np.array_equal(with_flag.prefill(prompt)[0], expected)
            except pyllava.GenerationCancelled:
                n_cancelled += 1
    finally:
        done.set()
        thread.join()
    assert n_cancelled > 0
    with_flag.seq_trim(0, 0)
    assert np.array_equal(with_flag.prefill(prompt)[0], expected)
    with_flag.close()


def test_cancel_by_progress(model: _lib.ModelHandle) -> None:
    session = open_session(model, n_batch=8)
    seen: list[tuple[str, float]] = []

    def progress(stage: str, fraction: float) -> bool:
        seen.append((stage, fraction))
        return fraction < 0.5

    session.set_progress(progress)
    with pytest.raises(pyllava.GenerationCancelled):
        session.prefill([Tokens(ids(8, 100))])
    assert 40 <= session.seq_length() <= 60
    assert {stage for stage, _ in seen} == {"prefill"}
    assert [f for _, f in seen] == sorted(f for _, f in seen)
    session.set_progress(None)
    kept = session.seq_length()
    assert session.prefill([Tokens(ids(8, 100))])[1] == kept
    session.close()


def test_an_error_in_progress_comes_through(model: _lib.ModelHandle) -> None:
    session = open_session(model)

    def progress(stage: str, fraction: float) -> bool:
        raise KeyError(stage)

    session.set_progress(progress)
    with pytest.raises(KeyError, match="prefill"):
        session.prefill([Tokens([1, 2, 3])])
    session.set_progress(None)
    session.prefill([Tokens([1, 2, 3])])
    session.close()


def test_cancel_of_an_answer(files: tiny_gguf.Files) -> None:
    with open_llava(files, n_ctx=4096) as llava:
        expected = answer(llava, 1)
        llava.cancel()  # nothing runs: no effect
        assert answer(llava, 1) == expected
        ended = threading.Event()

        def cancel() -> None:
            while not ended.wait(0.02):
                llava.cancel()

        other = threading.Thread(target=cancel)
        other.start()
        with pytest.raises(pyllava.GenerationCancelled):
            llava.logits(None, "the cat " * 450)
        ended.set()
        other.join()
        assert answer(llava, 1) == expected


SETUP = """
import os, signal, sys, time
import numpy as np
import pyllava
beats = []
def progress(stage, fraction):
    beats.append(stage)
    if wanted and stage == wanted[0]:
        os.kill(os.getpid(), signal.SIGINT)
        wanted.clear()
        time.sleep(0.3)  # this is the model's thread: time for the main one, however busy the machine is
    return True
wanted = []
options = {"n_threads": 1, "n_ctx": 4096, "n_batch": 64, "precision": "exact"}
llava = pyllava.Llava(sys.argv[1], sys.argv[2], progress=progress, **options)
picture = np.arange(60 * 40 * 3).reshape(60, 40, 3).astype(np.uint8)
ask = lambda: llava.ask(picture, "What?", max_tokens=8).tokens
"""
INTERRUPTED = """
expected = ask()
wanted.append("prefill")
beats.clear()
try:
    llava.ask(None, "the cat " * 600)
except KeyboardInterrupt:
    print("interrupted", beats.count("prefill") < 40)
assert ask() == expected
print("usable")
"""
UNCAUGHT = """
wanted.append("prefill")
llava.ask(None, "the cat " * 600)
"""
FORKED = """
expected = ask()
child = os.fork()
if child == 0:
    for call in (ask, lambda: llava.logits(None, "x"), lambda: llava.tokenize("x"), lambda: llava.encode_image(picture[::2])):
        try:
            call()
        except pyllava.ForkError as error:
            print("ForkError", flush=True)
    llava.close()
    del llava
    os._exit(7)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
assert ask() == expected
print("usable")
"""


def run_python(files: tiny_gguf.Files, script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SETUP + script, str(files.model), str(files.mmproj)]
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=root)


def test_keyboard_interrupt(files: tiny_gguf.Files) -> None:
    result = run_python(files, INTERRUPTED)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "interrupted True\nusable\n"


def test_keyboard_interrupt_that_nobody_catches(files: tiny_gguf.Files) -> None:
    result = run_python(files, UNCAUGHT)
    assert result.returncode == -signal.SIGINT
    assert result.stderr.rstrip().endswith("KeyboardInterrupt")


def test_fork(files: tiny_gguf.Files) -> None:
    result = run_python(files, FORKED)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "ForkError\n" * 4 + "7\nusable\n"


def test_closed(files: tiny_gguf.Files) -> None:
    llava = open_llava(files)
    embedding, stream = (
        llava.encode_image(picture(1, 9, 9)),
        llava.ask(None, "the cat", stream=True, max_tokens=9),
    )
    next(stream, None)
    llava.close()
    llava.close()
    for call in (
        lambda: llava.ask(None, "the cat"),
        lambda: llava.encode_image(picture(2, 9, 9)),
        lambda: llava.logits(None, "the cat"),
        lambda: llava.tokenize("the cat"),
        lambda: llava.detokenize([5]),
        lambda: list(stream),
    ):
        with pytest.raises(pyllava.ClosedError):
            call()
    assert np.isfinite(embedding.array).all()


def test_closed_session(model: _lib.ModelHandle) -> None:
    session = open_session(model)
    session.close()
    session.close()
    session.cancel()
    with pytest.raises(pyllava.ClosedError):
        session.prefill([Tokens([1])])


def test_a_session_keeps_its_model_alive(files: tiny_gguf.Files, precision: str) -> None:
    """The order in which Python lets go of objects does not matter."""
    handle = _lib.ModelHandle(files.model, files.mmproj)
    session = open_session(handle)
    expected, _ = session.prefill([Tokens([1, 2, 3])])
    handle.metadata()
    del handle
    session.seq_trim(0, 0)
    assert np.array_equal(session.prefill([Tokens([1, 2, 3])])[0], expected)


# Sessions of one model take turns on the cores


def test_sessions_at_once_compute_what_each_computes_alone(model: _lib.ModelHandle) -> None:
    """Each asks for all cores; steps of several shapes alternate."""
    n_threads = os.cpu_count() or 1
    expected = {seed: shapes(open_session(model, n_threads=n_threads), seed) for seed in range(3)}
    found: dict[int, list[bytes]] = {}

    def work(seed: int) -> None:
        found[seed] = shapes(open_session(model, n_threads=n_threads), seed)

    jobs = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert found == expected


def shapes(session: _lib.SessionHandle, seed: int) -> list[bytes]:
    """Prefill, decode and encode in turns, so that graphs are kept, dropped and built again."""
    results = []
    for n in (5, 5, 20):
        session.seq_trim(0, 0)
        results.append(session.prefill([Tokens(ids(seed, n))])[0].tobytes())
        results += [session.decode([token]).tobytes() for token in ids(seed + n, 3)]
        results.append(session.encode(views(1)).tobytes())
        results.append(session.decode([7]).tobytes())
    session.close()
    return results


def test_cancel_while_another_session_has_the_cores(model: _lib.ModelHandle) -> None:
    """A session that waits for its turn hears a cancel, and those behind it are served."""
    all_cores = os.cpu_count() or 1
    busy, waiting, third = (open_session(model, n_ctx=4096, n_threads=all_cores) for _ in range(3))
    work = threading.Thread(target=lambda: busy.prefill(big_prompt()))
    work.start()
    time.sleep(0.05)
    waiting.cancel()
    with pytest.raises(pyllava.GenerationCancelled):
        waiting.decode([5])
    assert np.isfinite(third.decode([5])).all()
    work.join()
    for session in (busy, waiting, third):
        session.close()
