"""The engine: answers that advance together, whose bytes depend on nothing beside them; cancelling, waiting, room."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from PIL import Image
from tiny import TinySpec
from tiny_gguf import Files

import pyllava
from pyllava import _engine, _lib, _request, _scheduler, _sequences
from pyllava._lib import Rows, Tokens
from pyllava._script import Script, Stretch

ROOT = Path(__file__).resolve().parents[1]
SCENE, DUCK = str(ROOT / "examples" / "scene.png"), str(ROOT / "examples" / "duck.png")
DESCRIBE, COUNT = "What is in the picture?", "How many shapes are there?"
PATIENCE = 60  # seconds


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return tiny_gguf.convert(tmp_path_factory.mktemp("model"), TinySpec(n_ctx=1024, seed=4))


@pytest.fixture
def demo() -> Iterator[pyllava.Llava]:
    with pyllava.Llava(n_threads=2) as model:
        yield model


def picture(seed: int) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (40, 60, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


def in_threads(calls: Sequence[Callable[[], object]]) -> list[Any]:
    """What each call gave, all made at the same time; an exception is what it gave, too."""
    found: list[Any] = [None] * len(calls)

    def run(i: int) -> None:
        try:
            found[i] = calls[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a call hangs"
    return found


def is_quiet(model: pyllava.Llava) -> bool:
    """Soon nothing is under way, and no cell is lost: without what is kept, all of them are free."""
    engine = model._engine

    def look() -> bool:
        assert engine._scheduler
        everyone = range(2 * model.n_parallel)
        idle = list(engine._scheduler.sequences._idle)
        return (
            not engine._scheduler.jobs
            and sorted(idle) == [*everyone]
            and (engine.session.cells_free(everyone) == model.kv_cells)
        )

    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if engine.run(_request.Call(look)):
            return True
        time.sleep(0.01)
    return False


# --- scripts ---


def test_a_script_is_cut_into_pieces_of_one_kind() -> None:
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    script = Script(
        [Stretch(Tokens([1, 2, 3])), Stretch(Rows(rows, 77)), Stretch(Tokens([4, 5]), answer=True)]
    )
    assert len(script) == 11
    at, found = 0, []
    while at < len(script):
        piece = script.piece(at, 4)
        found.append((piece.n, piece.answer))
        assert piece.n == sum(map(len, piece.spans))
        contents = np.concatenate([span.contents() for span in piece.spans])
        assert contents.tolist() == script.contents()[at : at + piece.n].tolist()
        at += piece.n
    assert found == [(4, False), (4, False), (1, False), (2, True)]
    assert script.piece(0, 100).n == 9
    assert script.shared_with(script) == 11
    assert script.shared_with(Script(script.stretches[:2])) == 9
    assert script.shared_with(Script([Stretch(Tokens([1, 2, 3])), Stretch(Rows(rows, 78))])) == 3


def test_the_kinds_of_a_conversation() -> None:
    """What was an answer stays one, up to where the next prompt says something else."""
    before = Script([Stretch(Tokens([1, 2]))]).followed_by([5, 6, 7])
    same = Script([Stretch(Tokens([1, 2, 5, 6, 7, 9]))]).after(before)
    assert [(s.span, s.answer) for s in same.stretches] == [
        (Tokens([1, 2]), False),
        (Tokens([5, 6, 7]), True),
        (Tokens([9]), False),
    ]
    other = Script([Stretch(Tokens([1, 2, 5])), Stretch(Tokens([8, 7, 9]))]).after(before)
    assert other.answered().tolist() == [False, False, True, False, False, False]
    assert (
        not Script([Stretch(Tokens([1, 2, 5]))]).after(before).answered()[-1]
    )  # the last row is always a prompt's
    nothing = Script([Stretch(Tokens([3, 2]))])
    assert nothing.after(before).answered().tolist() == [False, False]


# --- together ---


def test_two_streams_in_turns_compute_nothing_twice(demo: pyllava.Llava) -> None:
    alone = [demo.ask(image, DESCRIBE, reuse=False) for image in (SCENE, DUCK)]
    before = demo.stats()
    streams = [demo.ask(image, DESCRIBE, stream=True, reuse=False) for image in (SCENE, DUCK)]
    texts = ["", ""]
    open_ones = [0, 1]
    while open_ones:
        for i in list(open_ones):
            piece = next(streams[i], None)
            if piece is None:
                open_ones.remove(i)
            else:
                texts[i] += piece
    after = demo.stats()
    assert texts == [answer.text for answer in alone]
    assert [stream.answer.tokens for stream in streams] == [answer.tokens for answer in alone]
    assert after.prompt_tokens - before.prompt_tokens == sum(a.usage.prompt_tokens for a in alone)
    assert after.completion_tokens - before.completion_tokens == sum(len(a.tokens) for a in alone)
    assert (after.set_aside, after.cached_tokens) == (0, 0)


def test_one_picture_many_questions_at_once(demo: pyllava.Llava) -> None:
    """Who comes while the picture is being computed waits for it instead of computing it again."""
    questions = [DESCRIBE, COUNT, "What is on the left?", "Which colour is the background?"]
    found = in_threads([lambda q=q: demo.ask(SCENE, q, max_tokens=8) for q in questions])  # type: ignore[misc]
    n_text = sum(answer.usage.text_tokens for answer in found)
    assert demo.stats().prompt_tokens < 64 + n_text
    with pyllava.Llava(n_threads=2, n_parallel=1) as other:
        for question, answer in zip(questions, found, strict=True):
            expected = other.ask(SCENE, question, max_tokens=8, reuse=False)
            assert (answer.text, answer.log_probs) == (expected.text, expected.log_probs)


def test_two_conversations_in_turns_compute_nothing_twice(demo: pyllava.Llava) -> None:
    chats = [demo.chat(), demo.chat()]
    first = [chat.ask(DESCRIBE, images=image) for chat, image in zip(chats, (SCENE, DUCK), strict=True)]
    for _ in range(3):
        for i, chat in enumerate(chats):
            answer = chat.ask(COUNT)
            assert answer.usage.cached_tokens >= first[i].usage.prompt_tokens + len(first[i].tokens) - 1
    assert demo.stats().set_aside == 0


# --- the same bytes in any company ---

Case = tuple[int, str, dict[str, Any]]


def cases(n: int) -> list[Case]:
    options: list[dict[str, Any]] = [
        {},
        {"temperature": 1.2, "seed": 5},
        {"temperature": 0.9, "top_p": 0.8, "seed": 6},
    ]
    words = ["What is this?", "And the background, which colour has it?", "Count.", "Tell me a story " * 12]
    return [(i % 3, words[i % len(words)], options[i % len(options)]) for i in range(n)]


def what_counts(answer: pyllava.Answer) -> tuple[object, ...]:
    return answer.text, answer.tokens, answer.log_probs, answer.finish_reason


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_eight_threads_and_each_alone(files: Files, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers, streams, conversations and scores beside cancelled ones, in so little room that answers are set aside."""
    options: dict[str, Any] = {"n_ctx": 400, "n_threads": 2, "precision": precision}
    everything = cases(24)

    def conversation(model: pyllava.Llava, seed: int) -> list[object]:
        chat = model.chat()
        first = chat.ask("What is this?", images=picture(seed), max_tokens=30)
        more = [
            chat.ask(f"And {word}?", max_tokens=20, temperature=1.0, seed=seed) for word in ("left", "right")
        ]
        return [what_counts(answer) for answer in (first, *more)]

    with pyllava.Llava(files.model, files.mmproj, n_parallel=1, **options) as model:
        alone = [
            what_counts(model.ask(picture(i), q, max_tokens=60, reuse=False, **sampling))
            for i, q, sampling in everything
        ]
        talks = [conversation(model, seed) for seed in range(3)]
        logits = model.logits(picture(1), "Count.", answer=[7, 8, 9]).tobytes()

    Slow(monkeypatch, generate=0.001)  # so that they are under way at the same time
    monkeypatch.setattr(_scheduler, "_MARGIN", 0)  # and more of them than there is room for
    with pyllava.Llava(files.model, files.mmproj, n_parallel=6, kv_cells=400, **options) as model:

        def some(thread: int) -> list[tuple[int, object]]:
            found: list[tuple[int, object]] = []
            for k in range(thread, len(everything), 8):
                i, question, sampling = everything[k]
                with model.ask(picture(i), "given up", stream=True, max_tokens=50) as given_up:
                    next(given_up, None)
                if k % 2:
                    found.append((k, what_counts(model.ask(picture(i), question, max_tokens=60, **sampling))))
                else:
                    stream = model.ask(picture(i), question, max_tokens=60, stream=True, **sampling)
                    assert "".join(stream) == stream.answer.text
                    found.append((k, what_counts(stream.answer)))
            return found

        calls: list[Callable[[], object]] = [lambda t=t: some(t) for t in range(8)]  # type: ignore[misc]
        calls += [lambda s=s: conversation(model, s) for s in range(3)]  # type: ignore[misc]
        calls.append(lambda: model.logits(picture(1), "Count.", answer=[7, 8, 9]).tobytes())
        found = in_threads(calls)
        for each in found[:8]:
            assert isinstance(each, list), each
            for k, counts in each:
                assert counts == alone[k], everything[k]
        assert found[8:11] == talks
        assert found[11] == logits
        assert model.stats().set_aside > 0
        assert is_quiet(model)


def test_an_evicted_conversation_is_computed_again_as_it_was() -> None:
    """An answer's rows as rows of an answer, though nothing of them was left."""

    def talk(model: pyllava.Llava, between: Callable[[], object]) -> list[pyllava.Answer]:
        chat, answers = model.chat(), []
        for question in (DESCRIBE, COUNT, "What is on the left?"):
            images = SCENE if not answers else None
            answers.append(chat.ask(question, images=images, max_tokens=40))
            between()
        return answers

    with pyllava.Llava(n_ctx=400, n_threads=1) as model:
        kept = talk(model, lambda: None)
        n_first = kept[0].usage.prompt_tokens + len(kept[0].tokens)
        assert kept[1].usage.cached_tokens == n_first - 1
        before = model.stats()
        evicted = talk(model, lambda: model.ask(None, "x " * 160, max_tokens=40, reuse=False))
        assert evicted[1].usage.cached_tokens < 60  # what all prompts begin with
        assert model.stats().prompt_tokens > before.prompt_tokens
    assert [what_counts(a) for a in kept] == [what_counts(a) for a in evicted]


# --- ends ---


def parked(model: pyllava.Llava) -> list[Any]:
    """Answers whose readers are slow."""
    assert model._engine._scheduler
    return model._engine._scheduler._parked


class Slow:
    """A session whose calls take a while."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
        self.calls: list[str] = []
        for name, pause in seconds.items():
            monkeypatch.setattr(_lib.SessionHandle, name, self._slow(name, pause))

    def _slow(self, name: str, pause: float) -> Callable[..., object]:
        usual = getattr(_lib.SessionHandle, name)

        def slowly(*args: Any, **options: Any) -> object:
            self.calls.append(name)
            time.sleep(pause)
            return usual(*args, **options)

        return slowly


def test_each_can_be_cancelled_alone(demo: pyllava.Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_scheduler, "_STEPS_SHOWN", 0)
    Slow(monkeypatch, generate=0.002)
    streams = [demo.ask(SCENE, DESCRIBE, stream=True), demo.ask(DUCK, DESCRIBE, stream=True)]
    assert [next(stream) for stream in streams]
    streams[0].close()
    assert list(streams[0]) == []
    with pytest.raises(ValueError, match="not finished"):
        _ = streams[0].answer
    rest = "".join(streams[1])
    assert streams[1].answer.text.endswith(rest)
    assert is_quiet(demo)


def test_an_error_is_that_answers_alone(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of several fails: all but the one that is the cause go on, to the same bytes."""
    with pyllava.Llava(files.model, files.mmproj, n_threads=2) as model:
        expected = [what_counts(model.ask(picture(i), "x", max_tokens=60, reuse=False)) for i in range(4)]
        usual, poisoned = _lib.SessionHandle.step, []

        def step(self: _lib.SessionHandle, runs: Sequence[_lib.Run]) -> list[_lib.Ran]:
            if any([*getattr(span, "ids", ())][-3:] == [7, 8, 9] for run in runs for span in run.parts):
                poisoned.append(len(runs))
                raise pyllava.NumericError("row 3 is not a number")
            return usual(self, runs)

        monkeypatch.setattr(_lib.SessionHandle, "step", step)
        calls: list[Callable[[], object]] = [
            lambda i=i: what_counts(model.ask(picture(i), "x", max_tokens=60, reuse=False))  # type: ignore[misc]
            for i in range(4)
        ]
        calls.insert(2, lambda: model.logits(None, [5, 6, 7, 8, 9]))
        found = in_threads(calls)
        assert isinstance(found.pop(2), pyllava.NumericError)
        assert found == expected
        assert poisoned
        assert is_quiet(model)


def test_a_token_that_does_not_exist_is_that_calls_error(files: Files) -> None:
    with pyllava.Llava(files.model, files.mmproj, n_threads=1) as model:
        for ids in ([99999], [-1], [5, 2**40]):
            with pytest.raises((ValueError, OverflowError)):
                model.logits(None, ids)
        with pytest.raises(ValueError, match="temperature"):
            model.ask(None, "x", temperature=float("nan"))
        assert model.ask(None, "x", max_tokens=2).tokens
        assert is_quiet(model)


BAD_OPTIONS: list[dict[str, Any]] = [
    {"temperature": float("nan")},
    {"top_k": -1},
    {"top_p": 2.0},
    {"repeat_penalty": 0.0},
    {"repeat_last_n": 2**21},
    {"seed": "x"},
]


@pytest.mark.parametrize("bad", BAD_OPTIONS)
def test_a_wrong_option_ends_nobody_elses_answer(files: Files, bad: dict[str, Any]) -> None:
    good: dict[str, Any] = {"max_tokens": 300, "temperature": 1.5, "seed": 3}
    with pyllava.Llava(files.model, files.mmproj, n_threads=1) as model:
        expected = model.ask(None, "good", **good)
        stream = model.ask(None, "good", stream=True, **good)
        next(stream)
        with pytest.raises((ValueError, TypeError)):
            model.ask(None, "bad", **bad)
        assert list(stream) is not None
        assert what_counts(stream.answer) == what_counts(expected)
        assert is_quiet(model)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_embeddings_that_are_no_numbers_end_nobody_elses_answer(files: Files, precision: Any) -> None:
    """A prompt in the same steps is not cut short, wherever in the other one the cause is."""
    options: dict[str, Any] = {"n_threads": 1, "n_batch": 64, "precision": precision}
    text = "abc " * 110
    with pyllava.Llava(files.model, files.mmproj, n_parallel=1, **options) as model:
        expected = what_counts(model.ask(None, text, max_tokens=20, reuse=False))
    for trial in range(3):
        with pyllava.Llava(files.model, files.mmproj, **options) as model:
            rows = np.zeros((60, model.n_embd), np.float32)
            rows[20 * trial :] = np.nan
            broken = pyllava.ImageEmbedding(rows, (10, 10), 5 + trial)
            calls: list[Callable[[], object]] = [lambda: what_counts(model.ask(None, text, max_tokens=20))]
            calls += [lambda: model.ask(broken, "x", max_tokens=2)] * 3  # noqa: B023
            found = in_threads(calls)
            assert found[0] == expected
            assert all(isinstance(each, pyllava.NumericError) for each in found[1:])
            assert is_quiet(model)


def test_memory_that_runs_out_in_the_engine(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it does: who is concerned is told, nobody waits for ever, and the next call is right."""
    with pyllava.Llava(files.model, files.mmproj, n_ctx=300, n_threads=1) as model:
        expected = what_counts(model.ask(None, "x", max_tokens=5))
        random: dict[str, Any] = {"max_tokens": 200, "temperature": 1.3}
        rights = [what_counts(model.ask(None, f"text {i}", seed=i, **random)) for i in range(4)]
        Slow(monkeypatch, generate=0.002)
        monkeypatch.setattr(_scheduler, "_MARGIN", 0)  # more of them than there is room for
        places = [(_sequences.Sequences, name) for name in ("leave", "make_room", "take", "fits", "n_used")]
        places += [
            (_lib.sampler._Asked, "choice"),
            (_request.Answering, "next_run"),
            (_request.Answering, "set_aside"),
        ]
        for owner, name in places:
            usual = getattr(owner, name)
            left = [3]

            def failing(
                self: Any, *args: Any, usual: Any = usual, left: Any = left, **options: Any
            ) -> object:
                left[0] -= 1
                if left[0] == 0:
                    raise MemoryError("injected")
                return usual(self, *args, **options)

            monkeypatch.setattr(owner, name, failing)
            asks: list[Callable[[], object]] = [
                lambda i=i: model.ask(None, f"text {i}", seed=i, **random)  # type: ignore[misc]
                for i in range(4)
            ]
            found = in_threads(asks)
            monkeypatch.setattr(owner, name, usual)
            assert left[0] <= 0, name
            if name != "leave":  # where it may come behind the answer
                assert any(isinstance(each, MemoryError) for each in found), name
            for each, right in zip(found, rights, strict=True):
                assert isinstance(each, MemoryError) or what_counts(each) == right, (name, each)
            assert is_quiet(model)
            assert what_counts(model.ask(None, "x", max_tokens=5)) == expected


def test_others_that_give_up_do_not_stop_a_long_prompt(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a prompt interrupts a step only where it is the oldest in it."""
    interrupted: list[Sequence[Any]] = []
    usual = _engine.Engine._interrupt

    def interrupt(self: _engine.Engine) -> None:
        interrupted.append([job.number for job in self._scheduler.computing] if self._scheduler else [])
        usual(self)

    def give_up(stream: pyllava.Stream) -> None:
        with contextlib.suppress(pyllava.GenerationCancelled):
            next(stream, None)

    with pyllava.Llava(files.model, files.mmproj, n_threads=1) as model:
        Slow(monkeypatch, step=0.05)
        long = threading.Thread(target=lambda: model.ask(None, "word " * 200, max_tokens=1, reuse=False))
        long.start()
        time.sleep(0.02)
        monkeypatch.setattr(_engine.Engine, "_interrupt", interrupt)
        for _ in range(10):
            stream = model.ask(None, "short", stream=True)
            reader = threading.Thread(target=give_up, args=(stream,))
            reader.start()
            time.sleep(0.01)
            stream.close()
            reader.join(PATIENCE)
        long.join(PATIENCE)
        assert not long.is_alive()
        assert all(len(numbers) == 1 for numbers in interrupted)
        monkeypatch.undo()


def test_a_stream_closed_while_another_thread_reads_it(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    Slow(monkeypatch, generate=0.01)
    with pyllava.Llava(files.model, files.mmproj, n_threads=1) as model:
        stream = model.ask(None, "hello", max_tokens=900, stream=True)
        next(stream)
        found: list[object] = []

        def read() -> None:
            try:
                found.extend(stream)
            except pyllava.GenerationCancelled as error:
                found.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.05)
        stream.close()
        reader.join(PATIENCE)
        assert not reader.is_alive()
        assert isinstance(found[-1], pyllava.GenerationCancelled) or len(found) < 899
        assert is_quiet(model)


def test_a_slow_reader_costs_no_second_prompt(files: Files) -> None:
    with pyllava.Llava(files.model, files.mmproj, n_threads=1, n_parallel=2) as model:
        stream = model.ask(
            None, "hello " * 50, max_tokens=600, stream=True, reuse=False, temperature=1.5, seed=1
        )
        next(stream)
        deadline = time.monotonic() + PATIENCE
        while not parked(model) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert parked(model)
        assert list(stream)
        assert model.stats().prompt_tokens == stream.usage.prompt_tokens


def test_an_interrupt_in_the_memory_of_a_conversation(files: Files) -> None:
    """Pictures without their message are nothing that the next question trips over."""
    with pyllava.Llava(files.model, files.mmproj, n_threads=1) as model:
        chat = model.chat()
        chat.ask("What?", images=picture(1), max_tokens=3)
        chat._images = [
            *chat._images,
            model.encode_image(picture(2)),
        ]  # what was done when the interrupt came
        expected = model.chat()
        expected.ask("What?", images=picture(1), max_tokens=3)
        for each in (chat, expected):
            each.ask("And?", images=picture(3), max_tokens=3)
        assert chat.ask("So?", max_tokens=5).tokens == expected.ask("So?", max_tokens=5).tokens


def test_progress_raises_in_one_of_two(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    armed = [False]

    def progress(stage: str, fraction: float) -> None:
        if armed[0] and stage == "encode":
            raise RuntimeError("mine")

    Slow(monkeypatch, generate=0.002)
    with pyllava.Llava(files.model, files.mmproj, n_threads=1, progress=progress) as model:
        expected = model.ask(None, "x", max_tokens=100)
        stream = model.ask(None, "x", max_tokens=100, stream=True)
        next(stream)
        armed[0] = True
        with pytest.raises(RuntimeError, match="mine"):
            model.ask(picture(1), "x")
        assert list(stream) is not None
        assert what_counts(stream.answer) == what_counts(expected)


def test_progress_of_pieces_is_one_progress(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is computed in pieces beside an answer reports a fraction of the whole."""
    seen: list[tuple[str, float]] = []
    Slow(monkeypatch, generate=0.001)
    with pyllava.Llava(
        files.model, files.mmproj, n_threads=1, n_batch=64, progress=lambda *what: seen.append(what)
    ) as model:
        stream = model.ask(None, "x", max_tokens=400, stream=True)
        next(stream)
        seen.clear()
        model.ask(None, "word " * 250, max_tokens=1)
        fractions = [fraction for stage, fraction in seen if stage == "prefill"]
        assert len(fractions) > 4
        assert fractions == sorted(fractions)
        assert (fractions[0], fractions[-1]) == (0.0, 1.0)
        stream.close()


def test_first_come_first_served(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    with pyllava.Llava(files.model, files.mmproj, n_threads=1, n_parallel=1) as model:
        Slow(monkeypatch, step=0.02)
        order: list[int] = []

        def ask(i: int) -> None:
            time.sleep(0.03 * i)
            model.ask(None, f"question {i}", max_tokens=2)
            order.append(i)

        in_threads([lambda i=i: ask(i) for i in range(6)])  # type: ignore[misc]
        assert order == list(range(6))


def test_who_does_not_read_blocks_nobody(files: Files) -> None:
    """More streams than places, none of them read: the rest is answered, and then they are, to the same bytes."""
    with pyllava.Llava(files.model, files.mmproj, n_threads=1, n_ctx=500, n_parallel=2) as model:
        expected = [what_counts(model.ask(None, f"text {i}", max_tokens=300)) for i in range(5)]
        streams = [model.ask(None, f"text {i}", max_tokens=300, stream=True) for i in range(5)]
        begun = [next(stream) for stream in streams]
        for _ in range(3):
            model.ask(picture(2), "x", max_tokens=20)
        assert model.stats().running <= 2
        texts = [first + "".join(stream) for first, stream in zip(begun, reversed(streams), strict=True)]
        assert len(texts) == 5
        assert [what_counts(stream.answer) for stream in streams] == expected
        assert is_quiet(model)


def test_a_dropped_stream_frees_its_place(files: Files) -> None:
    with pyllava.Llava(files.model, files.mmproj, n_threads=1, n_parallel=1) as model:
        for i in range(20):
            stream = model.ask(picture(i), "x", max_tokens=500, stream=True)
            next(stream)
            del stream
        gc.collect()
        assert model.ask(None, "x", max_tokens=3).tokens
        assert is_quiet(model)


def test_a_client_that_lost_its_last_words(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an interrupt in the wrong place cuts off is the cancel() itself: the end of the call's frame does it, too."""
    with pyllava.Llava(files.model, files.mmproj, n_threads=1, n_parallel=1) as model:
        monkeypatch.setattr(_engine.Engine, "cancel", lambda self, job: None)
        stream = model.ask(picture(1), "x", max_tokens=1000, stream=True)
        next(stream)
        del stream
        gc.collect()
        assert is_quiet(model)


def test_an_error_keeps_nothing_of_its_caller(files: Files) -> None:
    """Not even until the garbage collector comes: a stream in the caller's frame would stay open."""

    class Large:
        pass

    def call(model: pyllava.Llava) -> weakref.ref[Large]:
        large = Large()
        seen = weakref.ref(large)
        with contextlib.suppress(ValueError):
            model.ask(None, "x", temperature=float("nan"))
        del large
        return seen

    def caught(model: pyllava.Llava) -> weakref.ref[Large]:
        large = Large()
        model.ask(None, str(large), temperature=float("nan"))
        return weakref.ref(large)

    with pyllava.Llava(files.model, files.mmproj, n_threads=1) as model:
        gc.disable()
        try:
            assert call(model)() is None
            before = sum(isinstance(each, Large) for each in gc.get_objects())
            with contextlib.suppress(ValueError):
                caught(model)
            assert sum(isinstance(each, Large) for each in gc.get_objects()) == before
        finally:
            gc.enable()


def test_a_model_that_nobody_holds_goes(files: Files) -> None:
    model = pyllava.Llava(files.model, files.mmproj, n_threads=1)
    engine = model._engine
    stream = model.ask(None, "x", max_tokens=3, stream=True)
    del model
    gc.collect()
    assert "".join(stream) == stream.answer.text  # a stream holds its model
    del stream
    gc.collect()
    deadline = time.monotonic() + PATIENCE
    while not engine.has_ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.has_ended


def test_a_refused_load_leaves_no_thread(files: Files, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(files.model.read_bytes()[:5000])
    tasks = Path("/proc/self/task")
    before = len(os.listdir(tasks)) if tasks.exists() else 0
    for _ in range(5):
        with pytest.raises(pyllava.ModelFileError):
            pyllava.Llava(broken)
        with pytest.raises(ValueError, match="template"):
            pyllava.Llava(files.model, template="none of them")
    if tasks.exists():
        deadline = time.monotonic() + 5
        while len(os.listdir(tasks)) > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(os.listdir(tasks)) <= before


# --- room ---


@pytest.mark.parametrize("n_parallel", [0, -1, 129])
def test_a_number_of_answers_that_cannot_be(files: Files, n_parallel: int) -> None:
    with pytest.raises(ValueError, match=r"n_parallel: found .*, need 1\.\.128"):
        pyllava.Llava(files.model, n_parallel=n_parallel)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Of a model trained for 16,384 positions."""
    return tiny_gguf.convert(tmp_path_factory.mktemp("long"), TinySpec(n_ctx=16384, seed=4))


def test_the_context_grows_by_need(long: Files) -> None:
    """A prompt of 5,100 positions is answered as with a context made for it; then 4,096 are in use again at most."""
    prompt = "word " * 1700
    with pyllava.Llava(long.model, long.mmproj, n_threads=1) as model:
        assert (model.n_ctx, model.kv_cells, model.stats().kv_cells) == (16384, 4096, 4096)
        answer = model.ask(None, prompt, max_tokens=4)
        assert model.stats().kv_cells_used > 5000
        others = [model.ask(None, f"{i} {'x ' * 700}", max_tokens=4) for i in range(4)]
        assert model.stats().kv_cells_used <= 4096
        with pytest.raises(pyllava.ContextOverflowError, match="n_ctx=16384"):
            model.ask(None, "word " * 6000)
    with pyllava.Llava(long.model, long.mmproj, n_threads=1, n_ctx=8192) as model:
        assert (model.n_ctx, model.kv_cells) == (8192, 8192)
        expected = model.ask(None, prompt, max_tokens=4)
        assert answer.log_probs == expected.log_probs
        for i, other in enumerate(others):
            assert other.log_probs == model.ask(None, f"{i} {'x ' * 700}", max_tokens=4).log_probs
    with pyllava.Llava(long.model, n_threads=1, kv_cells=5000) as model:
        assert (model.n_ctx, model.kv_cells) == (4096, 5000)


def test_a_long_prompt_beside_short_ones(long: Files) -> None:
    with pyllava.Llava(long.model, long.mmproj, n_threads=2) as model:
        prompts = ["a " * 700, "word " * 1700, "b " * 700, "c " * 700]
        answers = in_threads([lambda p=p: model.ask(None, p, max_tokens=20) for p in prompts])  # type: ignore[misc]
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.log_probs == model.ask(None, prompt, max_tokens=20).log_probs


def test_the_context_grows_as_far_as_memory_goes(long: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    create, tried = _lib.SessionHandle, []

    def short_of_memory(*args: Any, n_ctx: int, **options: Any) -> _lib.SessionHandle:
        tried.append(n_ctx)
        if n_ctx > 5000:
            raise pyllava.ModelMemoryError("need 3 GiB")
        return create(*args, n_ctx=n_ctx, **options)

    monkeypatch.setattr(_lib, "SessionHandle", short_of_memory)
    with pyllava.Llava(long.model, long.mmproj, n_threads=1) as model:
        assert (tried, model.n_ctx) == ([16384, 8192, 4096], 4096)
    with pytest.raises(pyllava.ModelMemoryError, match="need 3 GiB"):
        pyllava.Llava(long.model, long.mmproj, n_threads=1, n_ctx=6000)


@pytest.mark.parametrize("kv_cells", [1, 499, 2001])
def test_cells_that_cannot_be(files: Files, kv_cells: int) -> None:
    with pytest.raises(ValueError, match=r"kv_cells: found .*, need .*500\.\.2000"):
        pyllava.Llava(files.model, n_ctx=500, n_parallel=2, kv_cells=kv_cells)


def test_the_oldest_finishes_and_the_youngest_is_set_aside(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"n_threads": 1, "n_ctx": 300}
    with pyllava.Llava(files.model, files.mmproj, **options) as model:
        alone = [what_counts(model.ask(None, f"text {i}", max_tokens=200, reuse=False)) for i in range(4)]
    assert sum(len(each[1]) for each in alone) > 300  # type: ignore[arg-type, misc]
    Slow(monkeypatch, generate=0.002)
    with pyllava.Llava(files.model, files.mmproj, kv_cells=300, **options) as model:
        found = in_threads(
            [lambda i=i: model.ask(None, f"text {i}", max_tokens=200) for i in range(4)]  # type: ignore[misc]
        )
        assert [what_counts(answer) for answer in found] == alone
        assert model.stats().set_aside > 0
        assert is_quiet(model)


def test_an_answer_may_use_the_whole_context(files: Files) -> None:
    with pyllava.Llava(files.model, files.mmproj, n_threads=1, n_ctx=160, n_parallel=3) as model:
        for i in range(4):
            answer = model.ask(None, f"a{i}", max_tokens=1000, temperature=1.5, seed=i)
            full = answer.usage.prompt_tokens + answer.usage.completion_tokens == 160
            assert answer.finish_reason == "stop" or full
        assert is_quiet(model)


# --- what is told ---


def test_stats(demo: pyllava.Llava) -> None:
    assert demo.stats() == pyllava.Stats(0, 0, demo.n_ctx, 0, 0, 0, 0, 0, 0, 0, 0)
    answer = demo.ask(SCENE, DESCRIBE)
    n = answer.usage.prompt_tokens
    assert is_quiet(demo)
    stats = demo.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.completion_tokens) == (n, 0, len(answer.tokens))
    assert stats.kv_cells_used == n + len(answer.tokens) - 1
    again = demo.ask(SCENE, DESCRIBE)
    stats = demo.stats()
    assert (stats.prompt_tokens, stats.cached_tokens) == (n + 1, n - 1) == (n + 1, again.usage.cached_tokens)


def test_timings_and_the_log(demo: pyllava.Llava, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "pyllava"):
        started = time.perf_counter()
        answer = demo.ask(SCENE, DESCRIBE)
        seconds = time.perf_counter() - started
    timings = answer.timings
    spent = (timings.encode, timings.wait, timings.prefill, timings.decode)
    assert min(spent) > 0
    assert sum(spent) < seconds
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("answer:")]
    assert line.startswith(
        f"answer: {len(answer.tokens)} tokens (stop) to a prompt of {answer.usage.prompt_tokens} "
    )


def test_log_probs_are_those_of_the_model(files: Files) -> None:
    with pyllava.Llava(files.model, files.mmproj, n_threads=1) as model:
        answer = model.ask(picture(1), "x", max_tokens=5, temperature=1.3, seed=2, top_k=50)
        rows = model.logits(picture(1), "x", answer=answer.tokens).astype(np.float64)[
            -len(answer.tokens) - 1 : -1
        ]
        expected = (
            rows
            - np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True))
            - rows.max(1, keepdims=True)
        )
        found = [expected[i, token] for i, token in enumerate(answer.tokens)]
        np.testing.assert_allclose(answer.log_probs, found, atol=1e-5)


def test_images_of_a_chat_by_place_and_by_name(demo: pyllava.Llava) -> None:
    by_name = demo.chat().ask(DESCRIBE, images=SCENE, max_tokens=4)
    with pytest.warns(DeprecationWarning, match="images=") as caught:
        by_place = demo.chat().ask(DESCRIBE, SCENE, max_tokens=4)
    assert caught[0].filename == __file__
    assert by_place.tokens == by_name.tokens
    with pytest.raises(TypeError, match="by name"):
        demo.chat().ask(DESCRIBE, SCENE, images=SCENE)
    with pytest.raises(TypeError, match="by name"):
        demo.chat().ask(DESCRIBE, SCENE, DUCK)


def test_arguments_the_wrong_way_round(demo: pyllava.Llava) -> None:
    for prompt in (SCENE, Path(SCENE), Image.open(SCENE), Path(SCENE).read_bytes()):
        with pytest.raises(TypeError, match=r"ask\(images, prompt\): the images come first, found prompt"):
            demo.ask(DESCRIBE, prompt)  # type: ignore[arg-type, call-overload]
    with pytest.raises(FileNotFoundError):
        demo.ask("missing.png", DESCRIBE)


# --- speed that does not depend on others ---


def test_a_busy_thread_beside_it(demo: pyllava.Llava) -> None:
    """Several steps in one call: else each token would wait for the interpreter's lock (5 ms)."""
    answer = demo.ask(SCENE, DESCRIBE)
    ended = threading.Event()

    def busy() -> None:
        while not ended.is_set():
            sum(range(1000))

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        started = time.perf_counter()
        for _ in range(5):
            demo.ask(SCENE, DESCRIBE, reuse=False)
        seconds = (time.perf_counter() - started) / 5
    finally:
        ended.set()
        thread.join()
    assert seconds < 0.005 * len(answer.tokens)


# --- anything at any time ---


def storm(model: pyllava.Llava, n: int, seed: int) -> None:
    """Random calls, cancels and ends of streams."""
    rng = random.Random(seed)
    streams: list[pyllava.Stream] = []
    for _ in range(n):
        kind = rng.randrange(10)
        with contextlib.suppress(pyllava.GenerationCancelled):
            if kind < 3:
                model.ask(picture(rng.randrange(4)), f"q{rng.randrange(5)}", max_tokens=rng.randrange(1, 12))
            elif kind < 6:
                streams.append(model.ask(None, f"s{rng.randrange(9)}", max_tokens=90, stream=True))
                next(streams[-1], None)
            elif kind == 6 and streams:
                streams.pop(rng.randrange(len(streams))).close()
            elif kind == 7 and streams:
                for _ in zip(range(rng.randrange(30)), streams[rng.randrange(len(streams))], strict=False):
                    pass
            elif kind == 8 and streams:
                del streams[rng.randrange(len(streams))]
            elif kind == 9:
                if rng.randrange(6) == 0:
                    model.cancel()
                else:
                    model.logits(None, "x y z", answer=[4] * rng.randrange(3))


@pytest.mark.parametrize("n", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_calls_cancels_and_closes(files: Files, n: int) -> None:
    options: dict[str, Any] = {"n_ctx": 200, "n_parallel": 3, "kv_cells": 260, "n_threads": 1}
    with pyllava.Llava(files.model, files.mmproj, **options) as model:
        expected = what_counts(model.ask(picture(1), "q1", max_tokens=9, reuse=False))
        found = in_threads([lambda t=t: storm(model, n // 4, t) for t in range(4)])  # type: ignore[misc]
        assert found == [None] * 4
        gc.collect()
        assert is_quiet(model)
        assert what_counts(model.ask(picture(1), "q1", max_tokens=9)) == expected


INTERRUPTS = """
import gc, random, signal, sys, time
import pyllava
from pyllava import _request

class Mine(KeyboardInterrupt):
    pass

count = 0

def handler(*_):
    global count
    count += 1
    raise Mine

n = int(sys.argv[1])
model = pyllava.Llava(*sys.argv[2:], n_ctx=512, n_threads=1)
expected = model.ask(None, "x", max_tokens=8).tokens
signal.signal(signal.SIGALRM, handler)
rng = random.Random(1)
kinds = [
    lambda: model.ask(None, "x", max_tokens=8),
    lambda: list(model.ask(None, "y " * 30, max_tokens=30, stream=True)),
    lambda: model.logits(None, "z"),
    lambda: model.chat().ask("w", max_tokens=3),
]
while count < n:
    try:
        seen = count
        signal.setitimer(signal.ITIMER_REAL, rng.random() * 0.004 + 1e-6)
        while count == seen:  # Python drops what is raised in a destructor
            kinds[rng.randrange(len(kinds))]()
    except Mine:
        pass
signal.setitimer(signal.ITIMER_REAL, 0)
gc.collect()
assert model.ask(None, "x", max_tokens=8).tokens == expected
engine = model._engine

def look():
    return len(engine._scheduler.jobs), len(engine._scheduler.sequences._idle), engine.session.cells_free(range(8))

deadline = time.monotonic() + 20
while (found := engine.run(_request.Call(look))) != (0, 8, 512) and time.monotonic() < deadline:
    time.sleep(0.01)
assert found == (0, 8, 512), found
handles = [engine.session.handle, engine.model.handle]  # they are busy while somebody refers to them
model.close()
assert engine.has_ended and not any(handle.busy for handle in handles)
assert all(handle._object is None for handle in handles)
print(count)
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
@pytest.mark.parametrize(
    ("n", "which"),
    [
        (1500, "tiny"),
        pytest.param(100_000, "tiny", marks=pytest.mark.slow),
        pytest.param(20_000, "demo", marks=pytest.mark.slow),
    ],
)
def test_interrupts_at_any_moment(files: Files, n: int, which: str) -> None:
    """Nothing hangs, the model stays usable, and no handle is lost."""
    model = [str(files.model), str(files.mmproj)] if which == "tiny" else []
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTS, str(n), *model],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60 + n / 50,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= n
