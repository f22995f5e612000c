"""Models for asyncio: the same answers, tasks that are cancelled, a loop that is never held up, threads that end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from PIL import Image

import pyllava
from pyllava import AsyncLlava

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
SCENE, DUCK = str(ROOT / "examples" / "scene.png"), str(ROOT / "examples" / "duck.png")
DESCRIBE, COUNT = "What is in the picture?", "How many shapes are there?"
FOREVER: Any = {"ignore_eos": True, "max_tokens": 10**6}
LONG: Any = {"n_ctx": 8192}  # so that it takes seconds to fill
PATIENCE = 60  # seconds


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, PATIENCE))


def with_demo(work: Callable[[AsyncLlava], Awaitable[T]], **options: Any) -> T:
    async def main() -> T:
        async with AsyncLlava(n_threads=1, **options) as m:
            return await work(m)

    return run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def no_thread_is_left() -> bool:
    end = time.monotonic() + PATIENCE
    while (
        left := [t for t in threading.enumerate() if t.name.startswith("pyllava-")]
    ) and time.monotonic() < end:
        time.sleep(0.005)
    return not left


def is_free(m: AsyncLlava) -> bool:
    stats = m.stats()
    return stats.running == stats.waiting == 0


@pytest.fixture(scope="module")
def demo() -> Any:
    with pyllava.Llava(n_threads=1) as model:
        yield model


# --- the same answers ---


def test_questions(demo: pyllava.Llava) -> None:
    async def work(m: AsyncLlava) -> None:
        answer = await m.ask(SCENE, DESCRIBE, logprobs=1)
        expected = demo.ask(SCENE, DESCRIBE, logprobs=1)
        assert (answer.text, answer.tokens) == (expected.text, expected.tokens)
        assert answer.logprobs == expected.logprobs
        stream = await m.ask(SCENE, DESCRIBE, stream=True)
        assert stream.usage.image_tokens == 64
        with pytest.raises(ValueError, match="the answer is not finished"):
            _ = stream.answer
        pieces = [piece async for piece in stream]
        assert len(pieces) > 10
        assert "".join(pieces) == stream.answer.text == expected.text
        assert (await (await m.ask(DUCK, COUNT, stream=True)).whole()).text == demo.ask(DUCK, COUNT).text

    with_demo(work)


def test_a_conversation(demo: pyllava.Llava) -> None:
    async def work(m: AsyncLlava) -> None:
        chat, expected = m.chat("You see shapes."), demo.chat("You see shapes.")
        assert chat.messages == []
        await chat.add(COUNT, "None.")
        expected.add(COUNT, "None.")
        assert str(await chat.ask(DESCRIBE, images=SCENE)) == str(expected.ask(DESCRIBE, images=SCENE))
        stream = await chat.ask(COUNT, stream=True)
        assert (await stream.whole()).tokens == expected.ask(COUNT).tokens
        assert chat.messages == expected.messages
        chat.clear()
        assert chat.messages == []
        assert str(await chat.ask(DESCRIBE, images=DUCK)) == str(
            demo.ask(DUCK, DESCRIBE, system="You see shapes.")
        )

    with_demo(work)


def test_chat_completions(demo: pyllava.Llava) -> None:
    url = {"type": "image_url", "image_url": {"url": SCENE}}
    messages = [{"role": "user", "content": [{"type": "text", "text": DESCRIBE}, url]}]

    async def work(m: AsyncLlava) -> None:
        whole = await m.create_chat_completion(messages, temperature=0)
        text = demo.create_chat_completion(messages, temperature=0)["choices"][0]["message"]["content"]
        assert whole["choices"][0]["message"]["content"] == text
        chunks = await m.create_chat_completion(messages, temperature=0, stream=True)
        deltas = [chunk["choices"][0]["delta"] async for chunk in chunks]
        assert (deltas[0], deltas[-1]) == ({"role": "assistant"}, {})
        assert "".join(delta["content"] for delta in deltas[1:-1]) == text
        with pytest.raises(ValueError, match="messages: found 0"):
            await m.create_chat_completion([], stream=True)

    with_demo(work)


def test_batches(demo: pyllava.Llava) -> None:
    sources = [SCENE, DUCK, "no such file", SCENE]

    async def work(m: AsyncLlava) -> None:
        results = [result async for result in m.batch(sources, DESCRIBE)]
        assert [result.source for result in results] == sources
        assert [isinstance(result.error, FileNotFoundError) for result in results] == [
            False,
            False,
            True,
            False,
        ]
        assert [str(result.answer) for result in results if result.answer] == [
            str(demo.ask(source, DESCRIBE)) for source in (SCENE, DUCK, SCENE)
        ]

    with_demo(work)


def test_the_rest(demo: pyllava.Llava) -> None:
    async def work(m: AsyncLlava) -> None:
        embedding = await m.encode_image(SCENE)
        assert embedding.key == demo.encode_image(SCENE).key
        assert str(await m.ask(embedding, DESCRIBE)) == str(demo.ask(SCENE, DESCRIBE))
        prompt = await m.prompt_tokens(SCENE, COUNT)
        assert prompt == demo.prompt_tokens(SCENE, COUNT)
        assert (await m.logits(SCENE, prompt)).tobytes() == demo.logits(SCENE, prompt).tobytes()
        assert (await m.load()).tokenize("red") == demo.tokenize("red")

    with_demo(work)


def test_errors_are_those_of_the_model() -> None:
    async def work(m: AsyncLlava) -> None:
        with pytest.raises(FileNotFoundError):
            await m.ask("missing.png", DESCRIBE)
        with pytest.raises(ValueError, match="max_tokens"):
            await m.ask(SCENE, DESCRIBE, max_tokens=0)
        with pytest.raises(ValueError, match="top_p"):  # in the engine
            await m.ask(SCENE, DESCRIBE, top_p=2.0)
        await until(lambda: is_free(m))

    with_demo(work)


# --- many at once ---


def test_tasks_share_the_steps(demo: pyllava.Llava) -> None:
    async def work(m: AsyncLlava) -> None:
        most = 0

        async def one(number: int) -> str:
            nonlocal most
            text = ""
            async for piece in await m.ask((SCENE, DUCK)[number % 2], DESCRIBE, stream=True):
                most = max(most, m.stats().running)
                text += piece
            return text

        texts = await asyncio.gather(*map(one, range(60)))
        expected = [str(demo.ask(path, DESCRIBE)) for path in (SCENE, DUCK)]
        assert texts == expected * 30
        assert most == 4  # n_parallel

    with_demo(work)
    assert no_thread_is_left()


def test_few_questions_are_in_memory_at_a_time() -> None:
    async def work(m: AsyncLlava) -> None:
        tasks = [asyncio.create_task(m.ask((SCENE, DUCK)[i % 2], DESCRIBE)) for i in range(60)]
        most = 0
        while not all(task.done() for task in tasks):
            most = max(most, m.stats().running + m.stats().waiting)
            await asyncio.sleep(0.001)
        assert 4 <= most <= 8  # twice n_parallel
        assert len({str(task.result()) for task in tasks}) == 2

    with_demo(work)


def test_streams_that_nobody_reads_hold_nobody_up() -> None:
    async def work(m: AsyncLlava) -> None:
        idle = []
        for _ in range(20):
            stream = await m.ask(None, "a", stream=True, **FOREVER)
            await anext_of(stream)
            idle.append(stream)
        assert str(await m.ask(SCENE, DESCRIBE)).startswith("There")
        for stream in idle:
            await stream.aclose()
        await until(lambda: is_free(m))

    with_demo(work, **LONG)


async def anext_of(stream: Any) -> Any:
    return await stream.__anext__()


# --- cancelling ---


def test_a_cancelled_task_takes_its_answer_with_it() -> None:
    async def work(m: AsyncLlava) -> None:
        chunks_of = m.create_chat_completion
        endless = [{"role": "user", "content": "a"}]
        bias = {(await m.load()).info.eos_id: -1e9}

        async def read() -> None:
            async for _ in await m.ask(SCENE, COUNT, stream=True, **FOREVER):
                pass

        async def read_chunks() -> None:
            async for _ in await chunks_of(endless, stream=True, logit_bias=bias):
                pass

        for start in (
            lambda: m.ask(SCENE, COUNT, **FOREVER),
            lambda: m.chat().ask("a", **FOREVER),
            lambda: chunks_of(endless, logit_bias=bias),
            read,
            read_chunks,
        ):
            task = asyncio.create_task(start())
            await until(lambda: m.stats().running == 1)
            await asyncio.sleep(0.03)  # in the midst of its steps
            began = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: is_free(m))
            assert time.monotonic() - began < 2
        assert str(await m.ask(SCENE, DESCRIBE)).startswith("There")

    with_demo(work, **LONG)


def test_a_timeout_of_asyncio_ends_an_answer() -> None:
    async def work(m: AsyncLlava) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(m.ask(None, "a", **FOREVER), 0.1)
        await until(lambda: is_free(m))

    with_demo(work, **LONG)


def test_a_task_that_waits_for_its_turn_is_cancelled() -> None:
    async def work(m: AsyncLlava) -> None:
        first = asyncio.create_task(m.ask(None, "a", **FOREVER))
        await until(lambda: m.stats().running == 1)
        second = asyncio.create_task(m.ask(None, "b", **FOREVER))
        await until(lambda: m.stats().waiting == 1)
        second.cancel()
        await until(lambda: m.stats().waiting == 0)
        assert not first.done()
        first.cancel()
        await asyncio.wait([first, second])
        await until(lambda: is_free(m))

    with_demo(work, n_parallel=1, **LONG)


def test_a_picture_that_is_being_encoded_is_given_up() -> None:
    stages: list[str] = []

    async def work(m: AsyncLlava) -> None:
        stages.clear()
        large = Image.effect_noise((1344, 1344), 50).convert("RGB")
        task = asyncio.create_task(m.encode_image(large))
        await until(lambda: "encode" in stages)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine = (await m.load())._engine
        await until(lambda: not (engine._scheduler and engine._scheduler.jobs))
        assert engine.known(pyllava.images.content_hash(large) + b"anyres") is None

    def progress(stage: str, fraction: float) -> None:
        stages.append(stage)
        if stage == "encode":
            time.sleep(0.02)

    async def main() -> None:
        async with AsyncLlava("demo-1.6", n_threads=1, progress=progress) as m:
            await work(m)

    run(main())


def test_a_batch_that_is_left_ends() -> None:
    def of_batches() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "pyllava-batch"]

    async def work(m: AsyncLlava) -> None:
        results = m.batch([SCENE] * 1000, DESCRIBE, n_ahead=4)
        async for _ in results:
            break
        await results.aclose()
        await until(lambda: is_free(m) and not of_batches())

        async def read() -> None:
            async for _ in m.batch([None] * 1000, "a", **FOREVER):
                pass

        task = asyncio.create_task(read())
        await until(lambda: m.stats().running == 4)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: is_free(m) and not of_batches())
        assert str(await m.ask(SCENE, DESCRIBE)).startswith("There")

    with_demo(work, **LONG)


def test_cancel_and_close_end_the_tasks() -> None:
    async def work(m: AsyncLlava) -> None:
        task = asyncio.create_task(m.ask(None, "a", **FOREVER))
        await until(lambda: m.stats().running == 1)
        m.cancel()
        with pytest.raises(pyllava.GenerationCancelled):
            await task
        task = asyncio.create_task(m.ask(None, "a", **FOREVER))
        await until(lambda: m.stats().running == 1)
        await m.close()
        with pytest.raises(pyllava.ClosedError):
            await task
        with pytest.raises(pyllava.ClosedError):
            await m.ask(None, "a")
        await m.close()

    with_demo(work, **LONG)


# --- loading ---


def test_the_loop_goes_on_meanwhile() -> None:
    """Whatever takes time waits for a beat of the loop, which does not come while the loop waits for it."""
    beat, stages = threading.Event(), set[str]()

    def for_a_beat(stage: str, _: float = 0.0) -> None:
        stages.add(stage)
        beat.clear()
        assert beat.wait(PATIENCE), stage

    class Slow(io.BytesIO):
        def read(self, n: int | None = -1) -> bytes:
            for_a_beat("read")
            return super().read(n)

    async def main() -> str:
        async def go_on() -> None:
            while True:
                beat.set()
                await asyncio.sleep(0.001)

        heart = asyncio.create_task(go_on())
        async with AsyncLlava("demo-1.6", n_threads=1, progress=for_a_beat) as m:
            text = str(await m.ask(Slow(Path(SCENE).read_bytes()), DESCRIBE, max_tokens=20))
        heart.cancel()
        return text

    assert run(main()).startswith("There")
    assert stages >= {"load", "read", "encode", "prefill"}


def test_it_is_loaded_once_by_the_first_call() -> None:
    async def main() -> None:
        m = AsyncLlava(n_threads=1)
        with pytest.raises(ValueError, match="not loaded"):
            m.stats()
        m.cancel()
        first, second = await asyncio.gather(m.load(), m.load())
        assert first is second
        assert str(await m.ask(SCENE, DESCRIBE)).startswith("There")
        await m.close()

    run(main())
    assert no_thread_is_left()


def test_loading_fails_as_that_of_a_model() -> None:
    async def main() -> None:
        with pytest.raises(FileNotFoundError):
            async with AsyncLlava("no such file"):
                pass
        with pytest.raises(TypeError):
            async with AsyncLlava(no_such_option=1):
                pass
        m = AsyncLlava("no such file")
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                await m.ask(None, "a")
        await m.close()

    run(main())
    assert no_thread_is_left()


def test_loading_is_cancelled() -> None:
    reports: list[str] = []

    def slow(stage: str, fraction: float) -> None:
        reports.append(stage)
        time.sleep(0.01)

    async def main() -> None:
        async def work() -> None:
            async with AsyncLlava(n_threads=1, progress=slow):
                raise AssertionError("it was loaded")

        task = asyncio.create_task(work())
        await until(lambda: bool(reports))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    n_reports = len(reports)
    time.sleep(0.1)
    assert len(reports) == n_reports  # nothing goes on behind it
    assert no_thread_is_left()


def test_a_loop_that_ends_early_harms_nobody() -> None:
    """The engine's events find no loop any more; the model is freed when nobody refers to it."""
    held: list[Any] = []

    async def main() -> None:
        m = AsyncLlava(n_threads=1)
        stream = await m.ask(None, "a", stream=True, **FOREVER)
        await anext_of(stream)
        held.extend([m, stream, (await m.load())._engine])

    run(main())
    engine = held.pop()
    held.clear()
    gc.collect()
    end = time.monotonic() + PATIENCE
    while not engine.has_ended and time.monotonic() < end:
        time.sleep(0.01)
    assert engine.has_ended
    with contextlib.suppress(AttributeError):
        assert not engine._scheduler.jobs


def test_scores_heat_maps_and_views() -> None:
    async def work(m: AsyncLlava) -> None:
        choices = ["2", "4"]
        scores, said = await asyncio.gather(
            m.score(SCENE, COUNT, choices), m.loglikelihood(SCENE, COUNT, "4", with_end=True)
        )
        heat, view = await asyncio.gather(m.explain(DUCK, DESCRIBE, windows=4), m.view(DUCK))
        llava = await m.load()
        assert scores == llava.score(SCENE, COUNT, choices)
        assert said == llava.loglikelihood(SCENE, COUNT, "4", with_end=True)
        assert (heat.array == llava.explain(DUCK, DESCRIBE, windows=4).array).all()
        assert view.image().size == llava.view(DUCK).image().size

    with_demo(work)


def test_a_task_that_scores_is_cancelled() -> None:
    async def work(m: AsyncLlava) -> None:
        task = asyncio.create_task(m.explain(SCENE, DESCRIBE, "no " * 300))
        await until(lambda: m.stats().running > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: is_free(m))

    with_demo(work)


def test_what_waits_has_the_names_of_llava() -> None:
    at_once = {"detokenize", "n_embd", "token_text", "tokenize"}  # of the model that load() gives
    names = {name for name in dir(pyllava.Llava) if not name.startswith("_")}
    assert names - at_once <= set(dir(AsyncLlava))
