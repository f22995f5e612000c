"""Heat maps: where rows of a picture lie, what a window covers, and whether the peak is where the question points."""

from __future__ import annotations

import io
import json
import math
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_anyres import PINPOINTS, anyres_file, newline_of

import pyllava
from pyllava import _explain, cli, models
from pyllava.views import preprocess

ROOT = Path(__file__).parent.parent
SCENE = ROOT / "examples" / "scene.png"
QUESTION = "Where is the star?"
SIZES = [(300, 300), (300, 120), (90, 310), (64, 40), (500, 499)]


@pytest.fixture(scope="module")
def demo() -> Iterator[pyllava.Llava]:
    with pyllava.Llava() as model:
        yield model


@pytest.fixture(scope="module")
def tiled() -> Iterator[pyllava.Llava]:
    with pyllava.Llava("demo-1.6") as model:
        yield model


# --- where the rows lie ---


def changed_rows(model: pyllava.Llava, size: tuple[int, int], spot: tuple[float, float]) -> np.ndarray:
    """How much a dot in a picture changes the pixels behind each of its rows: float [n_rows]."""
    plain = Image.new("RGB", size)
    dotted = plain.copy()
    x, y = spot[0] * size[0], spot[1] * size[1]
    radius = max(size) / 40
    ImageDraw.Draw(dotted).ellipse((x - radius, y - radius, x + radius, y + radius), fill="white")
    picture = model._pictures.look_at(dotted)
    assert not isinstance(picture, pyllava.ImageEmbedding)
    views = [preprocess(image, picture.spec).pixels for image in (plain, dotted)]
    change = np.abs(views[1] - views[0]).mean(axis=1)
    side = math.isqrt(model.info.n_image_tokens)
    patches = change.reshape(len(change), side, -1, side, change.shape[-1] // side).mean(axis=(2, 4))
    features = np.repeat(patches.reshape(len(change), -1, 1), model.info.n_embd, axis=2)
    rows = model._model.merge(picture.layout, features.astype(np.float32))
    rows[np.ptp(rows, axis=1) > 0] = 0  # the learned newline
    return rows[:, 0]


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pyllava.Llava]:
    """A model that shows many tiles on a smaller grid, as LLaVA-OneVision does."""
    files = models.find(None, None)
    with pyllava.Llava() as demo:
        newline = newline_of(demo.n_embd)
    path = tmp_path_factory.mktemp("reduced") / "mmproj.gguf"
    anyres_file(path, PINPOINTS, newline, image_aspect_ratio="anyres_max_2")
    with pyllava.Llava(files.model, path) as model:
        yield model


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["demo", "demo-1.6"])
def test_a_dot_changes_the_rows_whose_place_it_has(name: str, size: tuple[int, int]) -> None:
    for merge in ("unpad", "flat"):
        with pyllava.Llava(name, image_merge=merge) as model:  # type: ignore[arg-type]
            check_places(model, size)


@pytest.mark.parametrize("size", SIZES)
def test_places_on_a_reduced_grid(reduced: pyllava.Llava, size: tuple[int, int]) -> None:
    check_places(reduced, size)


def check_places(model: pyllava.Llava, size: tuple[int, int]) -> None:
    picture = model._pictures.look_at(Image.new("RGB", size))
    assert not isinstance(picture, pyllava.ImageEmbedding)
    where = _explain.places(model._model, picture)
    assert len(where.x) == len(picture)
    for spot in ((0.1, 0.15), (0.5, 0.5), (0.85, 0.3), (0.4, 0.9)):
        change = changed_rows(model, size, spot)
        distance = np.hypot((where.x - spot[0]) * size[0], (where.y - spot[1]) * size[1])
        for part in (~where.is_tile, where.is_tile):
            if part.any():
                found = np.flatnonzero(part)[change[part].argmax()]
                assert distance[found] <= np.nanmin(distance[part]) + max(size) / 20


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("most", [1, 5, 30, 64, 400])
def test_cells_divide_the_picture(tiled: pyllava.Llava, size: tuple[int, int], most: int) -> None:
    picture = tiled._pictures.look_at(Image.new("RGB", size))
    assert not isinstance(picture, pyllava.ImageEmbedding)
    where = _explain.places(tiled._model, picture)
    rows, columns = grid = _explain.grid_of(where, size, most)
    assert 1 <= rows * columns <= most
    if most >= 30:
        assert 0.4 < (size[0] / columns) / (size[1] / rows) < 2.5
        assert rows * columns >= most / 2 or most == 400
    masks = np.array(_explain.windows(where, grid, "all"))
    assert (masks.any(axis=0) == ~np.isnan(where.x)).all()
    assert masks.any(axis=1).all()
    tiles, overview = (np.array(_explain.windows(where, grid, part)) for part in ("tiles", "overview"))
    assert (tiles | overview == masks).all()
    assert not (tiles & overview).any()


# --- the map ---


def test_values_are_falls_of_the_log_probability(demo: pyllava.Llava) -> None:
    """Each by itself, through the public interface: a picture whose rows were replaced by hand."""
    heat = demo.explain(SCENE, QUESTION)
    assert heat.answer == str(demo.ask(SCENE, QUESTION))
    whole = demo.loglikelihood(SCENE, QUESTION, heat.answer).logprob
    assert heat.logprob == whole
    assert heat.array.shape == (8, 8)
    seen = demo.encode_image(SCENE)
    for row, column in ((0, 0), (4, 3), heat.peak):
        array = seen.array.copy().reshape(8, 8, -1)
        array[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = seen.array.mean(
            0, dtype=np.float64
        )
        covered = pyllava.ImageEmbedding(array.reshape(64, -1), seen.size, key=1000 + 8 * row + column)
        found = demo.loglikelihood(covered, QUESTION, heat.answer).logprob
        assert heat.array[row, column] == pytest.approx(whole - found, abs=1e-5)


def test_a_window_costs_the_prompt_from_its_first_row_on() -> None:
    with pyllava.Llava(n_parallel=1) as model:
        ids = model.ask(SCENE, QUESTION).tokens
        before = model.stats().prompt_tokens
        told: list[pyllava.Cost] = []
        model.explain(SCENE, QUESTION, ids, announce=told.append)
        computed = model.stats().prompt_tokens - before
    assert told[0].n_windows == 64
    assert computed <= told[0].n_rows  # each finds its beginning computed, whatever had to go meanwhile
    assert told[0].n_rows < 0.75 * 64 * told[0].n_prompt
    assert re.fullmatch(
        r"64 windows, \d+ rows to compute \(\d+ times the prompt\), about \d+ s", str(told[0])
    )


def test_the_answer_that_is_asked_about(demo: pyllava.Llava) -> None:
    """Another answer depends on another place."""
    scene = demo.explain(SCENE, "What color is the shape at the bottom left?", "Yellow")
    assert scene.peak[0] >= 4
    assert scene.peak[1] <= 3
    ids = [entry.id for entry in demo.loglikelihood(SCENE, QUESTION, "At the top").logprobs]
    by_ids, by_text = (demo.explain(SCENE, QUESTION, answer) for answer in (ids, "At the top"))
    assert (by_ids.array == by_text.array).all()
    assert by_ids.answer == "At the top"


def test_one_of_two_pictures(demo: pyllava.Llava) -> None:
    pictures = [Image.new("RGB", (200, 200), "white"), SCENE]
    first, second = (demo.explain(pictures, QUESTION, "At the bottom left", index=index) for index in (0, 1))
    assert first.picture.size == (200, 200)
    assert second.logprob == first.logprob
    assert not np.allclose(first.array, second.array)


def test_overview_and_tiles_apart(tiled: pyllava.Llava) -> None:
    """Of a small word only the tiles tell, and the map of the tiles has its peak there."""
    poster = ROOT / "examples" / "poster.png"
    heats = {
        part: tiled.explain(poster, "What words are there?", covered=part, windows=30)  # type: ignore[arg-type]
        for part in ("all", "overview", "tiles")
    }
    assert heats["tiles"].array.max() > 5 * max(0.1, heats["overview"].array.max())
    assert "the tiles' rows" in heats["tiles"].method
    assert "image rows" in heats["all"].method


@pytest.mark.parametrize("size", [(300, 20), (4000, 1), (1, 4000)])
def test_a_picture_thinner_than_a_patch(
    demo: pyllava.Llava, tiled: pyllava.Llava, size: tuple[int, int]
) -> None:
    for model in (demo, tiled):
        heat = model.explain(Image.new("RGB", size, "red"), QUESTION, "Red", windows=8)
        rows, columns = heat.array.shape
        assert (rows > 1, columns > 1) == (size[0] < size[1], size[0] > size[1])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"index": 0.5}, TypeError, "integer"),
        ({"index": 1}, ValueError, "index: found 1, there are 1 images"),
        ({"windows": 0}, ValueError, "windows: found 0, need 1 or more"),
        ({"covered": "half"}, ValueError, "covered: found 'half', need one of all, overview, tiles"),
        ({"covered": "tiles"}, ValueError, "this picture has none"),
        ({"answer": ""}, ValueError, "the answer is empty"),
    ],
)
def test_what_is_refused(
    demo: pyllava.Llava, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        demo.explain(SCENE, QUESTION, **{"answer": "Red", **options})


def test_an_embedding_is_no_picture_to_draw_over(demo: pyllava.Llava) -> None:
    with pytest.raises(TypeError, match="need the picture itself"):
        demo.explain(demo.encode_image(SCENE), QUESTION)


def test_an_exception_of_the_announcement_ends_it(demo: pyllava.Llava) -> None:
    def refuse(cost: pyllava.Cost) -> None:
        raise TimeoutError(f"{cost.n_windows} are too many")

    with pytest.raises(TimeoutError, match="64 are too many"):
        demo.explain(SCENE, QUESTION, announce=refuse)


class Interrupt(BaseException):
    pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that raise on Windows")
@pytest.mark.parametrize("seconds", [0.01, 0.05, 0.1, 0.2])
def test_an_interrupt_gives_up_all_windows(demo: pyllava.Llava, seconds: float) -> None:
    """Whenever it comes, nothing is left waiting, and the next map is the same as ever."""
    expected = demo.explain(SCENE, QUESTION, windows=9).array

    def interrupt(*_: object) -> None:
        raise Interrupt

    def go_on() -> None:
        while True:
            demo.explain(SCENE, QUESTION)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with pytest.raises(Interrupt):
            go_on()
    finally:
        signal.signal(signal.SIGALRM, before)
    deadline = time.monotonic() + 30
    while demo.stats().waiting + demo.stats().running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert demo.stats().waiting + demo.stats().running == 0
    assert (demo.explain(SCENE, QUESTION, windows=9).array == expected).all()


# --- the drawing ---


def heat_map(array: Any, size: tuple[int, int] = (100, 50), question: str = "Where?") -> pyllava.HeatMap:
    picture = Image.new("RGB", size, "white")
    return pyllava.HeatMap(np.array(array, np.float64), picture, question, "There", -0.1, "a method in words")


def test_the_hottest_place_has_the_strongest_colour() -> None:
    heat = heat_map([[0, 0, 0, 0], [0, 0, 9, 0]])
    assert heat.peak == (1, 2)
    assert heat.peak_box == (50, 25, 75, 50)
    drawn = np.asarray(heat.image().crop((0, 0, 384, 192))).astype(int)
    assert heat.image().width == 384
    redness = drawn[..., 0] - drawn[..., 2]
    y, x = np.unravel_index(redness.argmax(), redness.shape)
    assert 192 <= x < 288
    assert 96 <= y < 192
    assert redness[:90, :180].max() < 0.3 * redness.max()


def test_text_below_the_picture_grows_with_the_question() -> None:
    short, long = (heat_map([[1, 2]], question="Where is it? " * n).image().height for n in (1, 12))
    assert long > short
    assert heat_map([[1, 2]], question="Where? " * 10_000).image().height < 2 * long


@pytest.mark.parametrize("array", [[[0.0]], [[-1.0, -2.0]], [[1e-9, 5e8]]])
def test_any_values_can_be_drawn(array: Any) -> None:
    assert heat_map(array, size=(3, 900)).image().height > 768


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    heat = heat_map([[0, 1]])
    heat.save(tmp_path / "heat.jpg")
    assert Image.open(tmp_path / "heat.jpg").format == "JPEG"
    with pytest.raises(ValueError, match=r"'heat\.txt': need a name that ends in \.png"):
        heat.save(tmp_path / "heat.txt")
    with pytest.raises(FileNotFoundError):
        heat.save(tmp_path / "none" / "heat.png")
    assert [path.name for path in tmp_path.iterdir()] == ["heat.jpg"]


def test_a_notebook_shows_it() -> None:
    heat = heat_map([[0, 1]])
    shown = Image.open(io.BytesIO(heat._repr_png_()))
    assert (shown.format, shown.size) == ("PNG", heat.image().size)
    assert "picture=" not in repr(heat)


# --- the command line ---


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["explain", *map(str, arguments)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_command(demo: pyllava.Llava, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, SCENE, QUESTION, "-o", tmp_path / "heat.png")
    heat = demo.explain(SCENE, QUESTION)
    assert (code, out) == (0, f"{heat.answer}\n")
    assert "heat map: 64 windows, " in err
    drawn = Image.open(tmp_path / "heat.png")
    assert (np.asarray(drawn) == np.asarray(heat.image())).all()
    assert err.endswith(f"heat.png: {drawn.width} x {drawn.height} pixels\n")


def test_command_with_numbers_alone(demo: pyllava.Llava, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        capsys, SCENE, QUESTION, "-a", "At the top", "--windows", 9, "--json", "--log-disable"
    )
    found, heat = json.loads(out), demo.explain(SCENE, QUESTION, "At the top", windows=9)
    assert (code, err) == (0, "")
    assert found["array"] == heat.array.tolist()
    assert (found["answer"], found["logprob"]) == ("At the top", heat.logprob)
    assert tuple(found["peak"]) == heat.peak


@pytest.mark.parametrize(
    ("arguments", "wanted", "text"),
    [
        ((SCENE, QUESTION), 2, "need -o FILE"),
        ((SCENE,), 2, "QUESTION"),
        ((SCENE, QUESTION, "--json", "--windows", "0"), 2, "need an integer of at least 1"),
        ((SCENE, QUESTION, "-o", "heat.none"), 1, "'heat.none': need a name that ends in .png"),
        ((SCENE, QUESTION, "-o", "/nowhere/heat.png"), 1, "no such folder"),
        ((SCENE, QUESTION, "-o", SCENE), 1, "is both input and output"),
        (("none.png", QUESTION, "-o", "heat.png"), 1, "none.png: No such file"),
    ],
)
def test_command_errors(
    arguments: tuple[object, ...],
    wanted: int,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (wanted, "")
    assert text in err
    assert not list(tmp_path.iterdir())


# --- the pointing game ---


def test_the_peak_lies_on_the_object_asked_about(demo: pyllava.Llava) -> None:
    """A sample of the table in docs/scores.md."""
    assert_points(demo, 30)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "demo-1.6"])
def test_the_peak_lies_on_the_object_asked_about_in_85_of_100(name: str) -> None:
    with pyllava.Llava(name) as model:
        assert_points(model, 300)


def assert_points(model: pyllava.Llava, n_questions: int) -> None:
    pytest.importorskip("matplotlib")
    from examples.demo_model import pointing

    found = pointing.play(model, 6, n_questions)
    hits = [hit for kind in found.values() for hit in kind]
    assert len(hits) == n_questions
    assert sum(hit.touches for hit in hits) >= 0.85 * n_questions, pointing.table(found)
    assert sum(hit.chance for hit in hits) <= 0.2 * n_questions
