"""Many pictures through one model: `Llava.batch`, and what ends an answer early."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from PIL import Image
from tiny import TinySpec

import pyllava
import pyllava._embeddings
from pyllava import models
from pyllava._loops import LoopDetector
from pyllava._room import KvCells, rooms

QUESTION = "Describe the image."
COLORS = ("red", "green", "blue", "orange", "purple", "black", "white", "yellow")


@pytest.fixture(scope="module")
def demo() -> Iterator[pyllava.Llava]:
    with pyllava.Llava(n_parallel=4, kv_cells="pictures", n_threads=2) as model:
        yield model


def picture(number: int) -> Image.Image:
    """No two are alike."""
    image = Image.new("RGB", (112, 112), COLORS[number % 8])
    image.paste((number, 255 - number, 90), (10, 10, 30 + number, 60))
    return image


# --- results ---


def test_results_are_those_of_ask_in_order(demo: pyllava.Llava) -> None:
    pictures = [picture(number) for number in range(20)]
    results = list(demo.batch(pictures, QUESTION))
    assert [result.source for result in results] == pictures
    for result in results[::5]:
        assert result.answer is not None
        assert result.answer.tokens == demo.ask(result.source, QUESTION).tokens
        assert result.answer.timings.encode > 0


def test_as_they_come_all_come_once(demo: pyllava.Llava) -> None:
    results = list(demo.batch(range(20), QUESTION, load=picture, in_order=False))
    assert sorted(result.source for result in results) == list(range(20))
    assert all(result.answer is not None for result in results)


def test_what_fails_is_in_its_place(demo: pyllava.Llava, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    results = list(demo.batch([picture(0), damaged, tmp_path / "none.png", picture(1)], QUESTION))
    errors = [type(result.error) for result in results]
    assert errors == [type(None), pyllava.ImageError, FileNotFoundError, type(None)]
    assert [len(result.answers) for result in results] == [1, 0, 0, 1]


def test_a_question_for_each_source(demo: pyllava.Llava) -> None:
    questions = {0: QUESTION, 1: "What color is the background?"}
    results = list(demo.batch([0, 1, 0], lambda number: questions[number], load=lambda _: picture(3)))
    texts = [str(result.answer) for result in results]
    assert texts[0] == texts[2] != texts[1]


def test_samples_have_seeds_of_their_own(demo: pyllava.Llava) -> None:
    (result,) = demo.batch([picture(5)], QUESTION, samples=3, temperature=2.0, seed=7)
    alone = [demo.ask(picture(5), QUESTION, temperature=2.0, seed=seed).tokens for seed in (7, 8, 9)]
    assert [answer.tokens for answer in result.answers] == alone
    assert len(set(alone)) > 1


def test_no_more_is_taken_than_there_is_room_for(demo: pyllava.Llava) -> None:
    taken = []

    def sources() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = demo.batch(sources(), QUESTION, load=picture_of_few, n_ahead=6)
    assert not taken
    next(results)
    time.sleep(0.5)
    assert len(taken) == 6
    next(results)
    results.close()
    time.sleep(0.2)
    assert len(taken) <= 8
    assert demo.stats().running == 0


def picture_of_few(number: int) -> Image.Image:
    return picture(number % 40)


def test_leaving_it_gives_up_what_is_under_way(demo: pyllava.Llava) -> None:
    before = threading.active_count()
    for _ in demo.batch(range(1000), QUESTION, load=picture_of_few):
        break
    end = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == before
    assert demo.ask(picture(0), QUESTION).text


def test_what_the_sources_raise_is_raised(demo: pyllava.Llava) -> None:
    def sources() -> Iterator[Image.Image]:
        yield picture(0)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        list(demo.batch(sources(), QUESTION))


@pytest.mark.parametrize("end", [pyllava.Llava.cancel, pyllava.Llava.close])
def test_what_ends_the_model_ends_the_batch(end: object) -> None:
    assert callable(end)
    with pyllava.Llava(n_parallel=2) as model:
        results = model.batch(range(100), QUESTION, load=picture_of_few)
        next(results)
        end(model)
        with pytest.raises((pyllava.GenerationCancelled, pyllava.ClosedError)):
            list(results)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"n_ahead": 0}, {"max_tokens": 0}, {"timeout": 0}])
def test_wrong_arguments_are_told_at_once(demo: pyllava.Llava, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: found 0"):
        demo.batch([], QUESTION, **wrong)  # type: ignore[arg-type]


def test_pictures_of_a_batch_are_not_kept(demo: pyllava.Llava) -> None:
    scheduler = demo._engine._scheduler
    assert scheduler is not None
    n_before = len(scheduler.embeddings)
    list(demo.batch(range(60, 70), QUESTION, load=picture))
    assert len(scheduler.embeddings) == n_before


def test_what_is_kept_is_used_and_nothing_else_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that was asked about before is not encoded again; without any, no picture is hashed."""
    with pyllava.Llava(n_parallel=2, kv_cells="pictures", n_threads=1) as model:
        n_encoded, n_hashed = 0, 0
        encode, hashed = model._session.encode, pyllava._embeddings.content_hash

        def counted(pixels: Any) -> Any:
            nonlocal n_encoded
            n_encoded += 1
            return encode(pixels)

        def counted_hash(image: Any) -> bytes:
            nonlocal n_hashed
            n_hashed += 1
            return hashed(image)

        monkeypatch.setattr(model._session, "encode", counted)
        monkeypatch.setattr(pyllava._embeddings, "content_hash", counted_hash)
        first = list(model.batch([picture(0), picture(1)], QUESTION))
        assert (n_encoded, n_hashed) == (2, 0)
        model.ask(picture(0), QUESTION)
        assert (n_encoded, n_hashed) == (3, 1)
        again = list(model.batch([picture(0), picture(1)], QUESTION))
        assert (n_encoded, n_hashed) == (4, 3)
        assert [str(result.answer) for result in again] == [str(result.answer) for result in first]


# --- room ---


@pytest.mark.parametrize("name", models.DEMOS)
def test_all_pictures_of_a_batch_fit(name: str) -> None:
    with pyllava.Llava(name, n_parallel=3, kv_cells="pictures") as model:
        assert model.n_ctx == 1024  # more than the demo was trained for is no use
        assert model.kv_cells == model.stats().kv_cells == 3 * 1024


def rooms_of(n_ctx: int | None, kv_cells: KvCells, **more: Any) -> list[tuple[int, int, int]]:
    limits: dict[str, Any] = {"trained": 32768, "on_host": True, "n_parallel": 8, "n_picture": 576, **more}
    found = list(rooms(n_ctx, kv_cells, **limits))
    assert [room.is_least for room in found] == [False] * (len(found) - 1) + [True]
    return [(room.n_ctx, room.kv_cells, room.n_cells) for room in found]


def test_the_room_is_halved_while_memory_does_not_hold_it() -> None:
    assert rooms_of(None, None) == [(n, 4096, n) for n in (32768, 16384, 8192, 4096)]
    assert rooms_of(None, "pictures") == [
        (32768, 12800, 32768),
        (16384, 6400, 16384),
        (8192, 4096, 8192),
        (4096, 4096, 4096),
    ]
    assert rooms_of(None, "pictures", on_host=False) == [
        (4096, 12800, 12800),
        (4096, 6400, 6400),
        (4096, 4096, 4096),
    ]
    large = rooms_of(None, "pictures", on_host=False, n_picture=7000)
    assert large == [(8024, 64192, 64192), (4096, 32096, 32096), *((4096, n, n) for n in (16048, 8024, 4096))]
    assert rooms_of(2048, "pictures") == [(2048, n, n) for n in (12800, 6400, 3200, 2048)]


def test_what_is_given_is_kept() -> None:
    assert rooms_of(2048, None) == [(2048, 2048, 2048)]
    assert rooms_of(2048, 5000) == [(2048, 5000, 5000)]
    assert rooms_of(None, 5000) == [(4096, 5000, 5000)]
    with pytest.raises(ValueError, match="kv_cells: found 'many', need a number or 'pictures'"):
        pyllava.Llava(kv_cells="many")  # type: ignore[arg-type]


# --- the beginning and the end of an answer ---


def test_an_answer_begins_as_told(demo: pyllava.Llava) -> None:
    plain = demo.ask(picture(2), QUESTION)
    words = plain.text.split(" ")
    start = " ".join(words[:3])
    begun = demo.ask(picture(2), QUESTION, start_with=start + " ")
    assert begun.text == plain.text
    assert len(begun.tokens) < len(plain.tokens)
    pieces = list(demo.ask(picture(2), QUESTION, start_with=start, stream=True))
    assert pieces[0] == start
    assert "".join(pieces) == plain.text
    assert demo.chat().ask(QUESTION, images=picture(2), start_with=start).text == plain.text
    prompt = "<image>\nUSER: Describe the image. ASSISTANT:"
    raw = demo.ask(picture(2), prompt, raw=True, start_with=" There is").text
    assert raw.startswith("There is ")


@pytest.mark.parametrize(
    ("tokens", "loops_at"),
    [
        ([1, 2, 3] * 40, 48),
        ([5] * 100, 48),
        ([9, 9, 8, *range(10, 30)] * 5, 4 * 23),
        ([1] * 47 + list(range(2, 60)), None),
        (list(range(500)), None),
        ([token for number in range(40) for token in (1, 2, 3, 4, 100 + number)], None),  # lines of a list
        (list(range(65)) * 6, None),  # longer than what is looked for
    ],
)
def test_loops_are_found(tokens: list[int], loops_at: int | None) -> None:
    detector = LoopDetector()
    found = [n for n in range(1, len(tokens) + 1) if detector.push(tokens[:n])]
    assert (found[0] if found else None) == loops_at


def test_an_answer_that_repeats_itself_ends(tmp_path: Path) -> None:
    """Greedy answers of random weights soon do."""
    files = tiny_gguf.convert(tmp_path, TinySpec(n_ctx=1024, seed=6))
    with pyllava.Llava(files.model, files.mmproj, template="vicuna_v1") as model:
        endless = model.ask(None, "count to ten", max_tokens=600)
        assert endless.finish_reason == "length"
        cut = model.ask(None, "count to ten", max_tokens=600, stop_loops=True)
        assert cut.finish_reason == "loop"
        assert len(cut.tokens) < 200
        assert endless.tokens[: len(cut.tokens)] == cut.tokens


def test_seconds_end_an_answer(demo: pyllava.Llava) -> None:
    cut = demo.ask(picture(1), QUESTION, timeout=1e-6)
    assert cut.finish_reason == "timeout"
    assert len(cut.tokens) == 1
    assert demo.ask(picture(1), QUESTION, timeout=60).finish_reason == "stop"
