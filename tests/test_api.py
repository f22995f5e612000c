"""The Python API on a tiny random model: answers, streams, chats, embeddings, logits, finding files."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import shutil
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
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import TinySpec
from tiny_gguf import Files

import pyllava
from pyllava import _embeddings, _lib, models, templates
from pyllava._terminal import one_line
from pyllava.answer import Transcript

ROOT = Path(__file__).parent.parent
QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return tiny_gguf.convert(tmp_path_factory.mktemp("model"), TinySpec(n_ctx=1024))


@pytest.fixture(scope="module")
def m(files: Files) -> Iterator[pyllava.Llava]:
    with pyllava.Llava(files.model, files.mmproj, n_threads=2) as model:
        yield model


def picture(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    rng = np.random.RandomState(seed)
    return Image.fromarray(rng.randint(0, 256, (size[1], size[0], 3)).astype(np.uint8))


def test_every_kind_of_image_gives_the_same_embedding(m: pyllava.Llava, tmp_path: Path) -> None:
    image = picture(0)
    path = tmp_path / "a.png"
    image.save(path)
    found = [
        m.encode_image(source).array
        for source in (path, str(path), path.read_bytes(), image, np.asarray(image))
    ]
    assert found[0].shape == (m.info.n_image_tokens, m.n_embd)
    assert found[0].dtype == np.float32
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_answer(m: pyllava.Llava) -> None:
    answer = m.ask(picture(1), QUESTION, max_tokens=12)
    assert str(answer) == answer.text == answer.text.strip()
    assert answer.usage.image_tokens == m.info.n_image_tokens
    assert answer.usage.prompt_tokens == len(m.logits(picture(1), QUESTION))
    assert answer.usage.completion_tokens == len(answer.tokens) <= 12
    assert answer.finish_reason == ("length" if len(answer.tokens) == 12 else "stop")
    assert min(answer.timings.encode, answer.timings.prefill, answer.timings.decode, answer.timings.load) > 0


def test_the_answer_is_the_greedy_one(m: pyllava.Llava) -> None:
    """The first token is the likeliest after the prompt, the second after prompt and first token."""
    answer = m.ask(picture(1), QUESTION, max_tokens=2)
    rows = m.logits(picture(1), QUESTION)
    assert answer.tokens[0] == int(rows[-1].argmax())


def test_a_stream_can_be_given_up(m: pyllava.Llava) -> None:
    with m.ask(picture(1), QUESTION, stream=True) as stream:
        assert next(stream)
    assert list(stream) == []
    stream.close()
    with pytest.raises(ValueError, match="not finished"):
        _ = stream.answer


def test_a_stream_is_the_answer_in_pieces(m: pyllava.Llava) -> None:
    whole = m.ask(picture(2), QUESTION, max_tokens=24)
    stream = m.ask(picture(2), QUESTION, max_tokens=24, stream=True)
    assert stream.usage.image_tokens_each == (m.info.n_image_tokens,)
    with pytest.raises(ValueError, match="not finished"):
        _ = stream.answer
    assert "".join(stream) == whole.text == stream.answer.text
    assert stream.answer.tokens == whole.tokens


def test_two_streams_may_take_turns(m: pyllava.Llava) -> None:
    expected = [m.ask(picture(i), QUESTION, max_tokens=12).text for i in (3, 4)]
    streams = [m.ask(picture(i), QUESTION, max_tokens=12, stream=True) for i in (3, 4)]
    found = ["", ""]
    for _ in range(14):
        for i, stream in enumerate(streams):
            found[i] += next(stream, "")
    assert found == expected


def test_what_the_model_holds_is_used_again_unless_asked_not_to(m: pyllava.Llava) -> None:
    first = m.ask(picture(3), QUESTION, max_tokens=12)
    again, afresh = (m.ask(picture(3), QUESTION, max_tokens=12, reuse=reuse) for reuse in (True, False))
    assert again.usage.cached_tokens > 0
    assert afresh.usage.cached_tokens == 0
    assert first.tokens == again.tokens == afresh.tokens


def test_seeds_and_sampling(m: pyllava.Llava) -> None:
    def texts(seed: int | None) -> list[str]:
        return [
            m.ask(None, "Say.", max_tokens=16, temperature=1.5, top_k=50, seed=seed).text for _ in range(3)
        ]

    assert len(set(texts(7))) == 1
    assert texts(7) == texts(7)
    assert len({*texts(7), *texts(8), *texts(9)}) > 1
    assert len(set(texts(None))) > 1


def test_stop_strings_end_the_answer_before_them(m: pyllava.Llava) -> None:
    whole = m.ask(picture(5), QUESTION, max_tokens=32).text
    stop = whole[len(whole) // 2 :][:2]
    answer = m.ask(picture(5), QUESTION, max_tokens=32, stop=[stop])
    assert answer.text == whole[: whole.index(stop)].rstrip()
    assert answer.finish_reason == "stop"
    with pytest.raises(TypeError, match="list of texts"):
        m.ask(None, "x", stop="###")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: found 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k: found -1"),
        ({"top_p": 1.5}, "top_p: found 1.5"),
        ({"min_p": -0.1}, "min_p"),
        ({"repeat_penalty": 0.0}, "repeat_penalty: found 0"),
        ({"mirostat": 3}, "mirostat: found 3"),
        ({"samplers": ["top-k"]}, "samplers: found top-k, need some of penalties, dry"),
        ({"logit_bias": {-5: 1.0}}, "logit_bias: found token -5"),
    ],
)
def test_wrong_options_are_named(m: pyllava.Llava, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        m.ask(None, "x", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samplers": "top_k"}, "samplers: found a text, need a list of texts"),
        ({"dry_sequence_breakers": ":"}, "dry_sequence_breakers: found a text"),
        ({"logit_bias": [(5, 1.0)]}, "logit_bias: found .*, need a dict of token ids or texts"),
    ],
)
def test_options_of_another_type(m: pyllava.Llava, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        m.ask(None, "x", **options)


def test_biases_by_id_and_by_text(m: pyllava.Llava) -> None:
    first = m.ask(None, "Say.", max_tokens=1).tokens[0]
    assert m.ask(None, "Say.", max_tokens=1, logit_bias={first: -math.inf}).tokens != (first,)
    wanted = m.prompt_tokens(None, "cat", raw=True)[1:]
    assert set(m.ask(None, "Say.", max_tokens=4, logit_bias={"cat": 1e4}).tokens) <= set(wanted)


def test_ignore_eos(m: pyllava.Llava) -> None:
    eos = m.info.eos_id
    assert m.ask(None, "Say.", max_tokens=9, logit_bias={eos: 1e4}).finish_reason == "stop"
    answer = m.ask(None, "Say.", max_tokens=9, logit_bias={eos: 1e4}, ignore_eos=True)
    assert (len(answer.tokens), answer.finish_reason) == (9, "length")


EVERY_WAY: list[dict[str, Any]] = [
    {
        "temperature": 1.2,
        "dynatemp_range": 0.3,
        "top_k": 60,
        "top_p": 0.98,
        "min_p": 0.01,
        "typical_p": 0.95,
        "top_n_sigma": 3.0,
        "xtc_probability": 0.5,
        "repeat_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.1,
        "repeat_last_n": -1,
        "dry_multiplier": 0.8,
        "dry_penalty_last_n": -1,
        "adaptive_target": 0.3,
    },
    {"temperature": 1.0, "mirostat": 1},
    {"temperature": 1.0, "mirostat": 2},
]


@pytest.mark.parametrize("options", EVERY_WAY, ids=["stages", "mirostat 1", "mirostat 2"])
def test_a_seed_fixes_the_text_whatever_runs_beside_it(m: pyllava.Llava, options: dict[str, Any]) -> None:
    options = options | {"max_tokens": 24, "ignore_eos": True}
    alone = m.ask(None, "Say.", seed=3, **options)
    streams = [m.ask(None, "Say.", seed=seed, stream=True, **options) for seed in (3, 4)]
    for _ in itertools.zip_longest(*streams):
        pass
    assert streams[0].answer.text == alone.text
    assert streams[1].answer.text != alone.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [0, 1, 5, 260])
def test_logprobs(m: pyllava.Llava, n: int, stream: bool) -> None:
    """Of the model's own distribution, whatever the options make of it; in float64, from the logits of all rows."""
    options: dict[str, Any] = {
        "temperature": 1.7,
        "top_k": 40,
        "presence_penalty": 1.0,
        "seed": 2,
        "max_tokens": 6,
    }
    asked = m.ask(picture(1), QUESTION, stream=stream, logprobs=n, **options)
    if isinstance(asked, pyllava.Stream):
        list(asked)
    answer = asked.answer if isinstance(asked, pyllava.Stream) else asked
    rows = m.logits(picture(1), QUESTION, answer=answer.tokens).astype(np.float64)[
        -len(answer.tokens) - 1 : -1
    ]
    expected = log_softmax(rows)
    assert tuple(entry.id for entry in answer.logprobs) == answer.tokens
    assert tuple(entry.logprob for entry in answer.logprobs) == answer.log_probs
    for entry, row in zip(answer.logprobs, expected, strict=True):
        assert entry.logprob == pytest.approx(row[entry.id], abs=1e-5)
        found = [other.logprob for other in entry.alternatives]
        assert found == sorted(found, reverse=True)
        np.testing.assert_allclose(found, np.sort(row)[::-1][:n], atol=1e-5)
        np.testing.assert_allclose(found, row[[other.id for other in entry.alternatives]], atol=1e-5)
        assert all(other.alternatives == () for other in entry.alternatives)
        assert entry.token == entry.bytes.decode(errors="replace")
    assert b"".join(entry.bytes for entry in answer.logprobs).decode(errors="replace").strip() == answer.text
    plain = m.ask(picture(1), QUESTION, **options)
    assert (plain.tokens, plain.logprobs) == (answer.tokens, ())


def log_softmax(rows: np.ndarray) -> np.ndarray:
    rows = rows - rows.max(1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(1, keepdims=True))


def test_logprobs_of_a_chat_and_of_answers_side_by_side(m: pyllava.Llava) -> None:
    first = m.chat().ask("Hello.", logprobs=2, max_tokens=4)
    assert [len(entry.alternatives) for entry in first.logprobs] == [2] * 4
    streams = [m.ask(None, "Hello.", stream=True, logprobs=n, max_tokens=12) for n in (3, None, 0)]
    for _ in itertools.zip_longest(*streams):
        pass
    alone = m.ask(None, "Hello.", logprobs=3, max_tokens=12)
    assert streams[0].answer.logprobs == alone.logprobs
    assert streams[1].answer.logprobs == ()
    assert [entry.alternatives for entry in streams[2].answer.logprobs] == [()] * len(alone.tokens)


@pytest.mark.parametrize("n", [-1, 10**9, 10**400])
def test_logprobs_out_of_range(m: pyllava.Llava, n: int) -> None:
    with pytest.raises(ValueError, match=r"logprobs: found -?1.*, need 0"):
        m.ask(None, "x", logprobs=n)
    with pytest.raises(TypeError):
        m.ask(None, "x", logprobs=1.5)


def test_several_images_and_raw_prompts(m: pyllava.Llava) -> None:
    both = m.ask([picture(6), picture(7)], "Compare.", max_tokens=4)
    assert both.usage.image_tokens_each == (m.info.n_image_tokens,) * 2
    raw = "USER: <image> and <image>\nASSISTANT:"
    assert (
        m.ask([picture(6), picture(7)], raw, raw=True, max_tokens=4).usage.image_tokens
        == both.usage.image_tokens
    )
    with pytest.raises(ValueError, match="2 <image> marks, images given: 1"):
        m.ask(picture(6), raw, raw=True)
    ids = m.prompt_tokens(None, "what is <image> ?")
    assert not any(isinstance(i, templates.ImageMark) for i in ids), "an <image> without an image is text"


def test_special_tokens_of_a_user_are_plain_text(m: pyllava.Llava) -> None:
    eos = m.info.eos_id
    assert eos not in m.prompt_tokens(None, "say </s> now")
    assert eos not in m.prompt_tokens(picture(0), "what does </s> mean in <image> ?")
    assert eos in m.prompt_tokens(None, "say </s> now", raw=True)
    assert m.tokenize("a</s>")[-1] == eos
    assert eos not in m.tokenize("a</s>", parse_special=False)
    assert m.tokenize("a", add_bos=True)[0] == m.info.bos_id


def test_chat_computes_only_what_is_new(m: pyllava.Llava) -> None:
    chat = m.chat()
    first = chat.ask("What is this?", images=picture(8), max_tokens=6)
    second = chat.ask("And the background?", max_tokens=6)
    assert second.usage.image_tokens == m.info.n_image_tokens
    assert second.usage.cached_tokens >= first.usage.prompt_tokens
    assert first.timings.encode > 0
    stream = chat.ask("Again?", max_tokens=6, stream=True)
    text = "".join(stream)
    assert [message.role for message in chat.messages] == ["user", "assistant"] * 3
    assert chat.messages[-1].text == text == stream.answer.text
    chat.clear()
    assert chat.messages == []


def test_asking_again_reuses_the_prompt(m: pyllava.Llava) -> None:
    m.ask(picture(9), QUESTION, max_tokens=2)
    again = m.ask(picture(9), "What is in front?", max_tokens=2)
    assert again.usage.cached_tokens > m.info.n_image_tokens


def test_context_overflow_comes_before_any_computing(files: Files) -> None:
    with pyllava.Llava(files.model, files.mmproj, n_ctx=100) as small:
        with pytest.raises(pyllava.ContextOverflowError, match=r"16 of images.*n_ctx=100"):
            small.ask(picture(0), "x " * 100)
        answer = small.ask(picture(0), "x", raw=False, system="", max_tokens=500)
        assert answer.usage.prompt_tokens + answer.usage.completion_tokens <= 100


def test_files_are_found_beside_each_other(files: Files, tmp_path: Path) -> None:
    shutil.copy(files.model, tmp_path / "model.gguf")
    shutil.copy(files.mmproj, tmp_path / "mmproj.gguf")
    for model in (tmp_path, tmp_path / "model.gguf"):
        with pyllava.Llava(model) as found:
            assert found.info.has_vision
    shutil.copy(files.mmproj, tmp_path / "mmproj-2.gguf")
    with pytest.raises(pyllava.ModelMismatchError, match="2 projector"):
        pyllava.Llava(tmp_path)
    (tmp_path / "mmproj-2.gguf").unlink()
    shutil.copy(files.model, tmp_path / "other.gguf")
    with pytest.raises(pyllava.ModelMismatchError, match="2 language models"):
        pyllava.Llava(tmp_path)


def test_an_image_that_cannot_reach_the_model_is_an_error(files: Files) -> None:
    with pyllava.Llava(files.model) as blind:
        assert blind.ask(None, "Hello.", max_tokens=2).usage.image_tokens == 0
        with pytest.raises(pyllava.PyllavaError, match="no projector"):
            blind.ask(picture(0), QUESTION)


def test_progress_and_cancel_from_its_callback(files: Files) -> None:
    seen: list[tuple[str, float]] = []
    wanted = [True]

    def progress(stage: str, fraction: float) -> bool:
        seen.append((stage, fraction))
        return wanted[0]

    with pyllava.Llava(files.model, files.mmproj, progress=progress, n_batch=16) as model:
        expected = model.ask(picture(0), QUESTION, max_tokens=4).text
        assert {stage for stage, _ in seen} == {"load", "encode", "prefill"}
        assert all(0 <= fraction <= 1 for _, fraction in seen)
        wanted[0] = False
        with pytest.raises(pyllava.GenerationCancelled):
            model.ask(picture(1), QUESTION)
        wanted[0] = True
        assert model.ask(picture(0), QUESTION, max_tokens=4).text == expected
    wanted[0] = False
    with pytest.raises(pyllava.GenerationCancelled):
        pyllava.Llava(files.model, files.mmproj, progress=progress)


def test_an_exception_of_the_callback_arrives(files: Files) -> None:
    fail = [False]

    def progress(stage: str, fraction: float) -> None:
        if fail[0]:
            raise KeyError("mine")

    with pyllava.Llava(files.model, files.mmproj, progress=progress) as model:
        fail[0] = True
        with pytest.raises(KeyError, match="mine"):
            model.ask(None, "x", max_tokens=2)
        fail[0] = False
        model.ask(None, "x", max_tokens=2)


def test_cancel_ends_a_stream(m: pyllava.Llava) -> None:
    stream = m.ask(picture(1), QUESTION, max_tokens=200, stream=True)
    next(stream)
    m.cancel()
    with pytest.raises(pyllava.GenerationCancelled):
        list(stream)
    m.ask(picture(1), QUESTION, max_tokens=2)


def test_cancel_reaches_a_call_before_its_computing(
    m: pyllava.Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a picture is being prepared, nothing is computed yet."""

    def load(source: object) -> Image.Image:
        m.cancel()
        return picture(77)

    monkeypatch.setattr(_embeddings, "load_image", load)
    with pytest.raises(pyllava.GenerationCancelled):
        m.ask(picture(77), QUESTION)
    monkeypatch.undo()
    unstarted = m.ask(picture(1), QUESTION, stream=True)
    m.cancel()
    with pytest.raises(pyllava.GenerationCancelled):
        next(unstarted)


def test_the_model_may_not_be_called_from_its_own_callback(files: Files) -> None:
    inside: list[object] = []

    def progress(stage: str, fraction: float) -> None:
        if stage == "prefill" and fraction == 0:
            try:
                model.ask(None, "again")
            except pyllava.PyllavaError as error:
                inside.append(str(error))

    model = pyllava.Llava(files.model, progress=progress)
    expected = model.ask(None, "x", max_tokens=2).text
    thread = threading.Thread(target=lambda: inside.append(model.ask(None, "x", max_tokens=2).text))
    thread.start()
    thread.join()
    assert inside == ["the model was called from its own progress callback"] * 2 + [expected]
    model.close()


def test_closing_from_the_callback(files: Files) -> None:
    def progress(stage: str, fraction: float) -> None:
        if stage == "prefill":
            model.close()

    def ask() -> None:
        with pytest.raises(pyllava.ClosedError):
            model.ask(None, "x")
        done.append(True)

    done: list[bool] = []
    model = pyllava.Llava(files.model, progress=progress)
    ask()
    model = pyllava.Llava(files.model, progress=progress)
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert done == [True, True]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, TimeoutError])
def test_whatever_a_signal_handler_raises_ends_the_call(files: Files, error: type[BaseException]) -> None:
    def handler(*_: object) -> None:
        raise error("mine")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pyllava.Llava(files.model, files.mmproj, n_ctx=4096, n_batch=64) as model:
            signal.setitimer(signal.ITIMER_REAL, 0.05, 0.02)  # and again while the first is being handled
            with pytest.raises(error, match="mine"):
                list(map(lambda _: model.logits(None, "word " * 500), range(1000)))  # noqa: C417
            signal.setitimer(signal.ITIMER_REAL, 0)
            time.sleep(0.05)
            assert model.ask(None, "x", max_tokens=2).text is not None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_close_while_other_threads_use_the_model(files: Files) -> None:
    """Every call ends with an answer or ClosedError."""
    for delay in (0.0, 0.01, 0.03):
        model = pyllava.Llava(files.model, files.mmproj)
        unexpected: list[BaseException] = []

        def use(call: Callable[[], object], failed: list[BaseException] = unexpected) -> None:
            try:
                while True:
                    call()
            except pyllava.ClosedError:
                pass
            except BaseException as error:
                failed.append(error)

        calls: list[Callable[[], object]] = [
            lambda m=model: m.tokenize("some words " * 50),  # type: ignore[misc]
            lambda m=model: m.ask(None, "x", max_tokens=4),  # type: ignore[misc]
            lambda m=model: m.encode_image(picture(time.perf_counter_ns() % 1000)),  # type: ignore[misc]
        ]
        threads = [threading.Thread(target=use, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        time.sleep(delay)
        model.close()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert unexpected == []


def test_a_daemon_thread_may_compute_when_the_interpreter_ends(files: Files) -> None:
    script = (
        "import threading, time, pyllava\n"
        f"m = pyllava.Llava({str(files.model)!r}, n_ctx=2048)\n"
        "t = threading.Thread(target=lambda: [m.logits(None, 'word ' * 300) for _ in range(99)], daemon=True)\n"
        "t.start(); time.sleep(0.1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


ENDS_WITHIN = """
import sys, threading, time, pyllava
from pyllava import _lib

class Late:  # dies when threads may no longer enter the interpreter
    def __del__(self, sleep=time.sleep):
        sleep(0.4)

sys.late = Late()
reached = threading.Event()

def wait(*_):
    reached.set()
    time.sleep(0.2)
    return True

def load():
    {load}

threading.Thread(target=load, daemon=True).start()
assert reached.wait(30)
"""


@pytest.mark.parametrize(
    "load",
    [
        "_lib.ModelHandle({model}, {mmproj}, use_mmap=False, progress=wait)",
        "_lib.ModelHandle({model}, {mmproj}, progress=wait)",
        "_lib.ModelHandle({model}, {mmproj}, log=wait)",
        "pyllava.Llava({model}, {mmproj}, use_mmap=False, progress=wait)",
    ],
)
def test_a_daemon_thread_may_load_when_the_interpreter_ends(files: Files, load: str) -> None:
    """Python ends such a thread when it comes back from a callback, within all of our frames."""
    call = load.format(model=repr(str(files.model)), mmproj=repr(str(files.mmproj)))
    done = subprocess.run(
        [sys.executable, "-c", ENDS_WITHIN.replace("{load}", call)],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_is_refused_at_once(files: Files) -> None:
    with pyllava.Llava(files.model) as model:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                model.ask(None, "x")
            except pyllava.ForkError:
                model.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        model.ask(None, "x", max_tokens=1)


def test_a_word_in_a_question_is_no_mark(m: pyllava.Llava) -> None:
    """The picture stays where it was, and the word is read letter by letter."""
    question = "What does the tag <image> mean?"
    usual = m.prompt_tokens(picture(1), QUESTION)
    place = usual.index(templates.ImageMark(0))
    for images, text in ((picture(1), question), ([picture(1)], f"{question} And <image>?")):
        ids = m.prompt_tokens(images, text)
        assert ids[: place + 1] == usual[: place + 1]
        assert ids.count(templates.ImageMark(0)) == 1
        tail = [token for token in ids[place + 1 :] if not isinstance(token, templates.ImageMark)]
        assert text in m.detokenize(tail)
        assert m.ask(images, text, max_tokens=1).usage.image_tokens_each == (16,)
    placed = m.prompt_tokens(picture(1), "This one:\n<image>\nWhat is it?")
    assert placed.index(templates.ImageMark(0)) > place
    chat = m.chat()
    chat.ask(question, images=[picture(1), picture(2)], max_tokens=1)
    assert chat.messages[0].text == question


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000], ids=["large", "negative", "unwritable"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repeat_penalty", "top_k"])
def test_a_number_that_c_cannot_hold(m: pyllava.Llava, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}: found -?10\\*\\*20 or more, need a"):
        m.ask(None, "x", max_tokens=1, **{name: value})


def test_other_numbers_that_c_cannot_hold(files: Files) -> None:
    with pytest.raises(ValueError, match=r"tensor_split: found 10\*\*20 or more"):
        pyllava.Llava(files.model, tensor_split=[10**400])
    for name in ("n_ctx", "n_batch", "n_threads", "main_gpu", "n_gpu_layers", "kv_cells", "n_parallel"):
        with pytest.raises(ValueError, match=rf"{name}: found 10\*\*20 or more, need"):
            pyllava.Llava(files.model, **{name: 10**400})
    with pytest.raises(ValueError, match=r"max_tokens: found -10\*\*20 or more"):
        pyllava.Sampling(max_tokens=-(10**5000))


@pytest.mark.parametrize("no", [False, np.False_, np.float32(1) > 2])
def test_false_of_numpy_cancels_too(files: Files, no: object) -> None:
    with pytest.raises(pyllava.GenerationCancelled):
        pyllava.Llava(files.model, progress=lambda stage, fraction: no)
    for yes in (None, 0, True, np.True_):
        pyllava.Llava(files.model, progress=lambda stage, fraction, yes=yes: yes).close()


@pytest.mark.parametrize("bad", ["\x9b31m", "\x1b[31m", "\u202egnp.exe", "\u2066", "\u2028", "\x85"])
def test_what_a_terminal_obeys_does_not_reach_it(
    files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: str
) -> None:
    file = tiny_gguf.read(files.model)
    architecture = (f"a{bad}b", tiny_gguf.gguf.GGUFValueType.STRING, None)
    path = tmp_path / "model.gguf"
    tiny_gguf.write(path, dataclasses.replace(file, keys=file.keys | {"general.architecture": architecture}))
    with pytest.raises(pyllava.PyllavaError) as caught:
        pyllava.Llava(path)
    assert bad[0] not in str(caught.value)
    named = {"general.name": (f"mistral{bad}", tiny_gguf.gguf.GGUFValueType.STRING, None)}
    tiny_gguf.write(path, dataclasses.replace(file, keys=file.keys | named))
    with caplog.at_level("DEBUG"), pyllava.Llava(path):
        assert "mistral" in caplog.text
        assert all(bad[0] not in record.getMessage() for record in caplog.records)
    assert one_line(ValueError(f"a{bad}b")) in (f"a?{bad[1:]}b", f"a {bad[1:]}b")  # a space for a line's end


def test_a_stop_string_of_a_million_characters() -> None:
    for stop in ("a" * 1_000_000, "ab" * 500_000, "ba" + "a" * 1_000_000):
        transcript, started = Transcript([stop, "###"]), time.perf_counter()
        shown = "".join(transcript.push(b"aa") for _ in range(2000)) + transcript.finish()
        assert shown == "a" * 4000
        assert time.perf_counter() - started < 1


@given(st.text("ab#", max_size=12), st.lists(st.text("ab#", min_size=1, max_size=5), max_size=3))
def test_what_may_be_the_start_of_a_stop_string(text: str, stops: list[str]) -> None:
    """Held back is the longest end that begins a stop string, as an example in one line finds it."""
    held = max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    assert Transcript(stops)._uncertain(text) == held


def test_long_prompts_are_refused_before_they_are_tokenised(m: pyllava.Llava) -> None:
    started = time.perf_counter()
    with pytest.raises(pyllava.ContextOverflowError, match="bytes cannot fit"):
        m.ask(None, "x" * 20_000_000)
    assert time.perf_counter() - started < 2
    with pytest.raises(pyllava.ContextOverflowError):
        m.logits(None, "a b c " * 1000)


def test_templates_are_chosen(files: Files) -> None:
    with pyllava.Llava(files.model, template="mistral_instruct") as model:
        assert model.template.name == "mistral_instruct"
    with pytest.raises(ValueError, match="need one of"):
        pyllava.Llava(files.model, template="nonsense")


@pytest.mark.parametrize(
    ("keys", "folder", "expected", "warning"),
    [
        ({}, "neutral", "vicuna_v1", "nothing in it tells its prompt template; vicuna_v1 is used"),
        ({}, "llava-1.6-mistral-7b-gguf", "mistral_instruct", None),
        ({"general.basename": "llava-v1.6-34b"}, "neutral", "chatml_direct", None),
        (
            {"tokenizer.chat_template": "{{ '[INST] ' + m + ' [/INST]' }}"},
            "llava-v1.5-7b",
            "mistral_instruct",
            None,
        ),
        ({"tokenizer.chat_template": "{{ '<|im_start|>' + m + '<|im_end|>' }}"}, "x", "chatml_direct", None),
        (
            {"tokenizer.chat_template": "{{ 1 / 0 }}"},
            "x",
            "vicuna_v1",
            "is none of those known here; vicuna_v1",
        ),
        ({"tokenizer.chat_template": "[INST]", "pyllava.template": "llava_v0"}, "x", "llava_v0", None),
    ],
)
def test_a_model_tells_its_template(
    files: Files,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    keys: dict[str, str],
    folder: str,
    expected: str,
    warning: str | None,
) -> None:
    neutral = tiny_gguf.read(files.model).without_keys(
        "general.name", "pyllava.template", "tokenizer.chat_template"
    )
    told = {name: (value, tiny_gguf.gguf.GGUFValueType.STRING, None) for name, value in keys.items()}
    (tmp_path / folder).mkdir()
    path = tiny_gguf.write(
        tmp_path / folder / "ggml-model-q4_k.gguf", dataclasses.replace(neutral, keys=neutral.keys | told)
    )
    with pyllava.Llava(path) as model:
        assert model.template.name == expected
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (warning is not None)
    if warning is not None:
        assert warning in warnings[0]
        assert "template= or --template names another of vicuna_v1, " in warnings[0]
    caplog.clear()
    with pyllava.Llava(path, template="plain") as model:
        assert model.template.name == "plain"
    assert not caplog.records


def lora(path: Path) -> Path:
    """An adapter as llama.cpp's converter writes it."""
    writer = tiny_gguf.gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((32, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("names", "given", "error", "message"),
    [
        (
            ["config.json", "model.safetensors"],
            "",
            pyllava.ModelMismatchError,
            "a checkpoint, not GGUF files: `pyl",
        ),
        (
            ["pytorch_model-00001-of-00002.bin"],
            "",
            pyllava.ModelMismatchError,
            "`pyllava-cli convert {folder}`",
        ),
        (
            ["config.json", "model.safetensors"],
            "config.json",
            pyllava.ModelFileError,
            "a file of a checkpoint, not",
        ),
        (
            ["config.json", "model.safetensors"],
            "model.safetensors",
            pyllava.ModelFileError,
            "convert {folder}`",
        ),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "",
            pyllava.ModelMismatchError,
            "a LoRA adapter, not",
        ),
        (
            ["adapter_model.safetensors"],
            "adapter_model.safetensors",
            pyllava.ModelFileError,
            "a LoRA adapter, not",
        ),
        (
            ["lora.gguf"],
            "lora.gguf",
            pyllava.ModelMismatchError,
            "a LoRA adapter, not a model: merge it into",
        ),
        (
            ["lora.gguf"],
            "",
            pyllava.ModelMismatchError,
            "no language model in it; lora.gguf is a LoRA adapter",
        ),
        (
            ["mmproj.gguf"],
            "",
            pyllava.ModelMismatchError,
            "no language model in it; mmproj.gguf is a projector",
        ),
        (["notes.txt"], "", pyllava.ModelMismatchError, "no GGUF file in it$"),
        (
            ["q4/model.gguf"],
            "",
            pyllava.ModelMismatchError,
            "no GGUF file in it; q4 in it has some: name that",
        ),
    ],
)
def test_what_is_no_model_is_named(
    files: Files, tmp_path: Path, names: list[str], given: str, error: type[Exception], message: str
) -> None:
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if name == "lora.gguf":
            lora(path)
        elif name == "mmproj.gguf":
            shutil.copy(files.mmproj, path)
        else:
            path.write_text("{}          ")
    with pytest.raises(error, match=message.format(folder=re.escape(str(tmp_path)))):
        pyllava.Llava(tmp_path / given)


def test_an_adapter_beside_a_model_or_in_its_place(files: Files, tmp_path: Path) -> None:
    adapter = lora(tmp_path / "a-lora.gguf")
    shutil.copy(files.model, tmp_path / "model.gguf")
    with pyllava.Llava(tmp_path) as model:
        assert model.files.model.name == "model.gguf"
    with pytest.raises(pyllava.ModelMismatchError, match=r"a-lora\.gguf: a LoRA adapter, not a model"):
        pyllava.Llava(files.model, adapter)


@pytest.mark.parametrize("names", [("MODEL.GGUF", "MMPROJ-MODEL-F16.GGUF"), ("model.gguf", "mmproj.Gguf")])
def test_names_in_capitals(files: Files, tmp_path: Path, names: tuple[str, str]) -> None:
    model, mmproj = (tmp_path / name for name in names)
    shutil.copy(files.model, model)
    shutil.copy(files.mmproj, mmproj)
    for named in (model, tmp_path):
        found = models.find(named, None)
        assert (found.model, found.mmproj) == (model, mmproj)
    (tmp_path / "MODEL-00002-OF-00002.GGUF").touch()
    assert models.find(tmp_path, None).model == model


@pytest.mark.parametrize(
    ("n_images", "prompt", "ways"),
    [
        (100, "Hi", r"give fewer images \(100 given, \d+ fit\)$"),
        (100, "Hi " * 1000, r"give fewer images \(100 given\), or shorten the prompt$"),
        (3, "Hi " * 1000, "room for an answer: shorten the prompt$"),
        (1, "Hi " * 1000, "room for an answer: shorten the prompt$"),
        (0, "Hi " * 1000, "room for an answer: shorten the prompt$"),
    ],
)
def test_what_would_make_room(m: pyllava.Llava, n_images: int, prompt: str, ways: str) -> None:
    with pytest.raises(pyllava.ContextOverflowError, match=ways) as caught:
        m.ask([picture(0)] * n_images, prompt)
    if fits := re.search(r"(\d+) fit", str(caught.value)):
        m.ask([picture(0)] * int(fits[1]), prompt, max_tokens=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "wild"}, ValueError, "precision"),
        ({"device": "cuda"}, pyllava.DeviceError, "device: found 'cuda', there are: .*CPU"),
        ({"n_ctx": 0}, ValueError, "n_ctx: found 0"),
        ({"n_batch": 0}, ValueError, "n_batch: found 0"),
        ({"n_ctx": 1 << 32}, ValueError, "n_ctx: found 4294967296"),
        ({"n_threads": 10_000}, ValueError, "n_threads: found 10000"),
        ({"type_k": "q9"}, ValueError, "type_k: found 'q9'"),
        ({"type_v": "q8_0"}, ValueError, "heads of a multiple of 32"),
    ],
)
def test_wrong_parameters_are_named(
    files: Files, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pyllava.Llava(files.model, files.mmproj, **options)  # type: ignore[arg-type]


def test_a_plan_that_does_not_fit_is_refused_with_numbers(files: Files) -> None:
    with pytest.raises(pyllava.ModelMemoryError, match=r"need .* GiB .*n_ctx 16777216.* try"):
        _lib.SessionHandle(_lib.ModelHandle(files.model, None), n_ctx=1 << 24, n_seq=100, precision="fast")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.skipif(os.cpu_count() == 1, reason="a session has no more threads than there are cores")
def test_threads_that_cannot_start_are_an_error(files: Files) -> None:
    script = (
        "import resource, pyllava\n"
        "from pyllava import _lib\n"
        f"model = _lib.ModelHandle({str(files.model)!r}, None)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20),) * 2)\n"
        "try: _lib.SessionHandle(model, n_ctx=64, n_threads=2, precision='fast')\n"
        "except pyllava.DeviceError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout == "2 threads could not be started: try fewer\n", done.stderr


def test_precision_from_the_environment(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYLLAVA_PRECISION", "exact")
    with pyllava.Llava(files.model) as usual, pyllava.Llava(files.model, precision="fast") as asked:
        assert (usual.precision, asked.precision) == ("exact", "fast")
    monkeypatch.delenv("PYLLAVA_PRECISION")
    with pyllava.Llava(files.model) as usual:
        assert usual.precision == "fast"


def test_closed(files: Files) -> None:
    model = pyllava.Llava(files.model, files.mmproj)
    stream = model.ask(None, "x", max_tokens=50, stream=True)
    next(stream)
    model.close()
    model.close()
    with pytest.raises(pyllava.ClosedError):
        model.ask(None, "x")
    with pytest.raises(pyllava.ClosedError):
        list(stream)


def test_transcript_holds_back_what_is_uncertain() -> None:
    t = Transcript(["###", "USER:"])
    euro = "€".encode()
    pieces = [
        t.push(p) for p in (b" ", b" a", euro[:1], euro[1:], b" ", b"b#", b"#c US", b"ER", b" x ##", b"# y")
    ]
    assert pieces == ["", "a", "", "€", "", " b", "##c", "", " USER x", ""]
    assert t.stopped
    assert t.finish() == ""
    assert t.text == "a€ b##c USER x"


def test_transcript_replaces_broken_utf8_at_the_end() -> None:
    t = Transcript([])
    assert t.push(b"ok \xe2\x82") == "ok"
    assert t.finish() == " \ufffd"


def test_logits_of_token_ids(m: pyllava.Llava) -> None:
    """What prompt_tokens() gives is what a text becomes; rows of an answer come last and are those of decoding."""
    image = picture(1)
    ids = m.prompt_tokens(image, QUESTION)
    expected = m.logits(image, QUESTION)
    assert np.array_equal(m.logits(image, ids), expected)
    answer = m.ask(image, QUESTION, max_tokens=5)
    rows = m.logits(image, ids, answer=answer.tokens)
    assert len(rows) == len(expected) + len(answer.tokens)
    assert np.array_equal(rows[: len(expected)], expected)
    assert rows[len(expected) - 1 : -1].argmax(-1).tolist() == list(answer.tokens)


def test_token_ids_that_do_not_fit(m: pyllava.Llava) -> None:
    mark = templates.ImageMark(0)
    with pytest.raises(ValueError, match="1 images for 0 places"):
        m.logits(picture(1), [1, 2, 3])
    with pytest.raises(ValueError, match="1 images for 2 places"):
        m.logits(picture(1), [1, mark, 5, mark])
    with pytest.raises(ValueError, match="token"):
        m.logits(None, [1, 10**6])
    with pytest.raises(ValueError, match="token"):
        m.logits(None, [1, 2], answer=[10**6])
    with pytest.raises(pyllava.ContextOverflowError):
        m.logits(None, [1] * (m.n_ctx - 2), answer=[1] * 3)
    with pytest.raises(ValueError, match="empty prompt"):
        m.logits(None, [])
