"""Captions on a Ray cluster. How workers are replaced is tested on a stand-in for Ray; the real one is local, with two workers."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pyllava
from examples.demo_model import scenes
from pyllava import cli
from pyllava.bulk.asking import Asking
from pyllava.bulk.inputs import Entry
from pyllava.bulk.rows import Rows
from pyllava.bulk.tables import Row
from pyllava.bulk.texts import Texts
from pyllava.cli.caption_options import caption_parser
from pyllava.cli.options import model_arguments
from pyllava.ray import Captioner, cluster
from pyllava.ray.captioner import ADDED
from pyllava.ray.workers import Demand, Workers

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "Describe the image."
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
COMMAND = [sys.executable, "-c", "import sys; from pyllava.cli import main; sys.exit(main())", "caption"]


def draw(folder: Path, n: int) -> Path:
    folder.mkdir()
    rng = random.Random("ray")
    for number in range(n):
        scenes.draw(scenes.random_scene(rng)).save(folder / f"s{number:04}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("ray") / "scenes", 24)


@pytest.fixture(scope="module")
def captions(folder: Path) -> dict[str, str]:
    """What the model says without Ray, by file name."""
    paths = sorted(folder.iterdir())
    with pyllava.Llava(n_parallel=8, kv_cells="pictures") as model:
        results = list(model.batch(paths, QUESTION))
    return {result.source.name: str(result.answer) for result in results}


# --- Captioner, which needs no Ray ---


@pytest.fixture(scope="module")
def captioner() -> Iterator[Captioner]:
    made = Captioner(prompt=QUESTION, n_threads=1)
    yield made
    made.model.close()


def objects(values: list[Any]) -> np.ndarray[Any, Any]:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def test_batches_of_paths_bytes_and_pixels(
    captioner: Captioner, folder: Path, captions: dict[str, str]
) -> None:
    paths = sorted(folder.iterdir())[:5]
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    batches = {
        "path": objects([*map(str, paths)]),
        "bytes": objects([path.read_bytes() for path in paths]),
        "image": np.stack(pixels),
    }
    for name, values in batches.items():
        found = captioner({name: values, "id": np.arange(5)})
        assert list(found) == [name, "id", *ADDED]
        assert found[name] is values
        assert list(found["caption"]) == [captions[path.name] for path in paths]
        assert set(found["status"]) == {"ok"}
        assert set(found["error"]) == {None}
        assert found["tokens"].dtype == np.int32
        assert min(found["tokens"]) > 3
        assert min(found["seconds"]) > 0
        assert set(found["finish_reason"]) == {"stop"}


def test_errors_are_columns(captioner: Captioner, folder: Path) -> None:
    good = str(folder / "s0000.png")
    found = captioner({"path": objects([good, str(folder / "none.png"), None])})
    assert [text is None for text in found["caption"]] == [False, True, True]
    assert list(found["status"]) == ["ok", "error", "error"]
    assert list(found["error"]) == [None, "No such file or directory", "no picture: the cell is null"]
    assert list(found["tokens"][1:]) == [0, 0]


def test_columns_of_tables_have_types(captioner: Captioner, folder: Path, captions: dict[str, str]) -> None:
    """Batches without an error and batches without a caption are written as the same kind of file."""
    arrow = pytest.importorskip("pyarrow")
    data = (folder / "s0001.png").read_bytes()
    pairs = arrow.table(
        {"image": [{"bytes": data, "path": "a.png"}, {"bytes": None, "path": str(folder / "s0002.png")}]}
    )
    broken = arrow.table({"image": [{"bytes": b"nothing at all", "path": None}]})
    found, not_found = captioner(pairs), captioner(broken)
    assert found.column("caption").to_pylist() == [captions["s0001.png"], captions["s0002.png"]]
    assert found.column("error").null_count == 2
    assert not_found.column("caption").null_count == 1
    assert "not a JPEG, PNG" in not_found.column("error")[0].as_py()
    types = {name: str(found.schema.field(name).type) for name in ADDED}
    assert types == {name: str(not_found.schema.field(name).type) for name in ADDED}
    assert set(types.values()) == {"string", "int32", "double"}


def test_columns_of_the_same_names_are_replaced(
    captioner: Captioner, folder: Path, captions: dict[str, str]
) -> None:
    arrow = pytest.importorskip("pyarrow")
    path = str(folder / "s0001.png")
    table = captioner(arrow.table({"caption": ["by hand"], "path": [path], "error": [3]}))
    assert sorted(table.column_names) == sorted(["path", *ADDED])
    assert table.column("caption").to_pylist() == [captions["s0001.png"]]
    assert table.column("error").to_pylist() == [None]


def test_a_batch_without_pictures_is_told(captioner: Captioner) -> None:
    with pytest.raises(ValueError, match="has the columns id, text, need one of bytes, image, path"):
        captioner({"id": np.arange(2), "text": objects(["a", "b"])})


def test_structured_captions(folder: Path) -> None:
    pytest.importorskip("llguidance")
    paths = objects([str(path) for path in sorted(folder.iterdir())[:2]])
    schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    whole = Captioner(prompt="Describe it.", schema=schema, max_tokens=60)({"path": paths})
    assert [set(json.loads(caption)) for caption in whole["caption"]] == [{"text"}] * 2
    cut = Captioner(prompt="Describe it.", schema=schema, max_tokens=1)({"path": paths})
    assert list(cut["status"]) == ["error"] * 2
    assert "before it was whole" in cut["error"][0]


def test_options_of_model_and_question(folder: Path, captions: dict[str, str]) -> None:
    made = Captioner("demo", prompt=QUESTION, column="file", n_parallel=2, n_threads=1, max_tokens=3)
    with made.model as model:
        assert model.n_parallel == 2
        found = made({"file": objects([str(folder / "s0003.png")]), "path": objects([None])})
        with pytest.raises(ValueError, match="need a column 'file'"):
            made({"path": objects([None])})
    assert found["finish_reason"][0] == "length"
    assert captions["s0003.png"].startswith(found["caption"][0])
    with pytest.raises(TypeError, match="colour"):
        Captioner(prompt=QUESTION, colour="red")


@pytest.mark.parametrize(
    ("nodes", "n_workers", "n_cpus", "found"),
    [
        ([64, 32], None, None, (3, 32)),  # as many as there is room for
        ([0, 64, 64], None, None, (2, 64)),  # the head computes nothing
        ([64, 64], None, 16, (8, 16)),
        ([64, 64], 4, None, (4, 32)),
        ([2], 2, None, (2, 1)),
        ([2], 5, None, (5, 1)),  # three of them wait
        ([8], 3, 2, (3, 2)),
        ([4], None, 8, (1, 8)),
        ([], None, None, (1, 1)),  # nodes that are yet to come
    ],
)
def test_sizes(nodes: list[int], n_workers: int | None, n_cpus: int | None, found: tuple[int, int]) -> None:
    assert cluster.sizes(nodes, n_workers, n_cpus) == found


def test_models_are_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    given = [None, "demo-1.6", "models:q4_k_m", Path("~") / "models"]
    wanted = [None, "demo-1.6", str(tmp_path / "models:q4_k_m"), str(tmp_path / "models")]
    assert [cluster.seen_by_workers(path) for path in given] == wanted


# --- workers that die, on a stand-in for Ray ---


class _Error(Exception):
    pass


class _TaskError(_Error):
    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class Errors:
    RayError, RayTaskError = _Error, _TaskError


@dataclass(eq=False)
class Task:
    """A reference to a result, and how it is computed when it is waited for."""

    actor: Actor
    name: str
    arguments: tuple[Any, ...]
    result: Any = None

    def compute(self) -> None:
        ray, entries = self.actor.ray, self.arguments[0] if self.arguments else ()
        names = [os.path.basename(entry.path) for entry in entries]
        ray.log.append((self.actor.number, self.name, names))
        self.actor.is_dead = self.actor.is_dead or ray.dies(self)
        if self.actor.is_dead:
            self.result = _Error("died")
            return
        try:
            self.result = getattr(self.actor.worker, self.name)(*self.arguments)
        except Exception as error:
            self.result = _TaskError(error)


class Actor:
    def __init__(self, ray: Ray, worker: Any) -> None:
        self.ray, self.worker, self.is_dead, self.number = ray, worker, False, ray.n_actors
        ray.n_actors += 1

    def __getattr__(self, name: str) -> Any:
        return Method(self, name)


@dataclass
class Method:
    actor: Actor
    name: str

    def remote(self, *arguments: Any) -> Task:
        return Task(self.actor, self.name, arguments)


@dataclass
class Class:
    ray: Ray
    kind: type

    def options(self, *, num_cpus: int, max_restarts: int, **_: Any) -> Class:
        assert (num_cpus, max_restarts) == (1, 0)
        return self

    def remote(self, *arguments: Any) -> Actor:
        return Actor(self.ray, self.kind(*arguments))


class Ray:
    """What `Workers` uses of Ray; `dies` says of a task whether its worker dies of it, with all that it has."""

    exceptions = Errors

    def __init__(self, dies: Callable[[Task], bool]) -> None:
        self.dies, self.n_actors = dies, 0
        self.log: list[tuple[int, str, list[str]]] = []
        self.killed: list[Actor] = []

    def remote(self, kind: type) -> Class:
        return Class(self, kind)

    def wait(self, tasks: list[Task], timeout: float) -> tuple[list[Task], list[Task]]:
        tasks[0].compute()
        done = [task for task in tasks if task is tasks[0] or task.actor.is_dead]
        for task in done[1:]:
            task.result = _Error("died")
        return done, [task for task in tasks if task not in done]

    def get(self, task: Task) -> Any:
        if isinstance(task.result, Exception):
            raise task.result
        return task.result

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor)


def asking(**model: Any) -> Asking:
    options = caption_parser().parse(["x", "-t", "1"])
    rows = Rows(Texts(QUESTION), "demo", "settings")
    return Asking({**model_arguments(options), "kv_cells": "pictures", **model}, rows, 1, False, None, {})


def run_on(
    ray: Ray, folder: Path, n_batch: int = 4, is_stopping: Callable[[], bool] = lambda: False, **model: Any
) -> tuple[dict[str, Row], list[str]]:
    """Rows by file name, and what was told."""
    told: list[str] = []
    workers = Workers(ray, Demand(2, 1, n_batch), asking(**model), told.append)
    entries = [Entry(os.path.relpath(path), os.path.relpath(path)) for path in sorted(folder.iterdir())]
    found = list(workers.answered(entries, is_stopping))
    assert all(row["path"] == entry.path for entry, row in found)
    rows = {os.path.basename(entry.path): row for entry, row in found}
    assert len(rows) == len(found)  # no picture twice
    assert len(ray.killed) >= 2
    return rows, told


def check(rows: dict[str, Row], captions: dict[str, str], *, but: str | None = None) -> None:
    assert {name: row["caption"] for name, row in rows.items() if name != but} == {
        name: caption for name, caption in captions.items() if name != but
    }


def test_each_picture_once(folder: Path, captions: dict[str, str]) -> None:
    ray = Ray(lambda task: False)
    rows, told = run_on(ray, folder)
    check(rows, captions)
    assert not told
    assert Counter(name for _, name, _ in ray.log) == {"load": 2, "rows": 6}


def test_a_worker_that_dies_is_replaced(folder: Path, captions: dict[str, str]) -> None:
    deaths: list[Task] = []

    def dies(task: Task) -> bool:
        deaths.extend([task] if task.name == "rows" and len(task.actor.ray.log) in (4, 9) else [])
        return task in deaths

    ray = Ray(dies)
    rows, told = run_on(ray, folder)
    check(rows, captions)
    assert len(deaths) == 2
    node = os.uname().nodename
    assert told == [f"a worker on {node} died: another one takes its {n} pictures" for n in (8, 4)]
    assert ray.n_actors == 4


def test_a_picture_that_kills_costs_its_own_caption(folder: Path, captions: dict[str, str]) -> None:
    def dies(task: Task) -> bool:
        return task.name == "rows" and any(entry.path.endswith("s0005.png") for entry in task.arguments[0])

    ray = Ray(dies)
    rows, _ = run_on(ray, folder)
    check(rows, captions, but="s0005.png")
    bad = rows["s0005.png"]
    assert (bad["status"], bad["error"]) == ("error", "3 workers died while they had this picture")
    asked = [len(names) for _, name, names in ray.log if name == "rows"]
    assert asked[-5:] == [4, 1, 1, 1, 1]  # those of its batch come last, each alone


def test_workers_that_never_start_end_it(folder: Path) -> None:
    ray = Ray(lambda task: task.name == "load")
    with pytest.raises(pyllava.PyllavaError, match="a worker did not start: died"):
        run_on(ray, folder)
    assert ray.n_actors == 4


def test_a_model_that_is_not_there_ends_it(folder: Path) -> None:
    with pytest.raises(pyllava.PyllavaError, match=r"none\.gguf: No such file"):
        run_on(Ray(lambda task: False), folder, model="none.gguf")


def test_those_under_way_are_finished(folder: Path) -> None:
    n_asked = 0

    def is_stopping() -> bool:
        nonlocal n_asked
        n_asked += 1
        return n_asked > 6

    ray = Ray(lambda task: False)
    rows, _ = run_on(ray, folder, n_batch=2, is_stopping=is_stopping)
    assert 0 < len(rows) < 24
    assert len(rows) == sum(len(names) for _, name, names in ray.log if name == "rows")


# --- the command ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--workers", "2"], "--workers: needs --engine ray"),
        (["x", "--address", "auto"], "--address: needs --engine ray"),
        (["-", "--engine", "ray"], "no worker sees standard input"),
        (["x", "--engine", "ray", "--workers", "0"], "need an integer of at least 1"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["caption", "-o", "c.jsonl", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_ray_it_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(["caption", str(folder), "-o", str(tmp_path / "c.jsonl"), "--engine", "ray"]) == 1
    assert "pip install 'pyllava[ray]'" in capsys.readouterr().err
    with pytest.raises(ImportError, match=r"pip install 'pyllava\[ray\]'"):
        pyllava.ray.caption_dataset(str(folder), QUESTION)


# --- the real one ---


@pytest.fixture
def real() -> None:
    """Skips where there is no Ray with its data sets."""
    for name in ("ray", "pandas", "pyarrow"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'pyllava[ray]'")


def start(*arguments: object) -> subprocess.Popen[bytes]:
    options = (
        "-p",
        QUESTION,
        "--engine",
        "ray",
        "--address",
        "local",
        "--workers",
        "2",
        "--worker-cpus",
        "1",
    )
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """The processes of workers among those that descend from `process`, by /proc."""
    parents, titles = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(path.name)] = (path / "cmdline").read_text()

    def descends(pid: int) -> bool:
        while pid > 1 and pid != process.pid:
            pid = parents.get(pid, 0)
        return pid == process.pid

    return [pid for pid, title in titles.items() if title.startswith("ray::Worker") and descends(pid)]


def wait_for_lines(path: Path, n: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and path.read_bytes().count(b"\n") >= n:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {n} rows after {seconds} s")


def rows_of(data: bytes) -> dict[str, Row]:
    rows = [json.loads(line) for line in data.splitlines()]
    found = {os.path.basename(row["path"]): row for row in rows}
    assert len(found) == len(rows)  # no picture twice
    return found


def test_rows_come_back_and_nothing_else(real: None, folder: Path, captions: dict[str, str]) -> None:
    """Two workers of a local cluster: rows on stdout, notes on stderr."""
    process = start(folder, folder / "s0001.png", "-o", "-")
    out, err = process.communicate(timeout=120)
    check(rows_of(out), captions)
    assert process.returncode == 0
    notes = err.decode().splitlines()
    assert len(notes) == 4, notes
    assert "Ray: workers: 2, CPUs of each: 1, nodes: 1" in notes


@pytest.mark.slow
def test_a_killed_worker_and_an_interrupt_cost_nothing(real: None, tmp_path: Path) -> None:
    """SIGKILL for one of two workers, SIGINT for the run, and a run without Ray goes on: each picture once."""
    folder, out = draw(tmp_path / "scenes", 400), tmp_path / "c.jsonl"
    (folder / "s0007.png").write_bytes(b"nothing")
    process = start(folder, "-o", out, "--write", "txt,csv")
    wait_for_lines(out, 40)
    victims = workers_of(process)
    assert len(victims) == 2
    os.kill(victims[0], signal.SIGKILL)
    wait_for_lines(out, 120)
    os.killpg(process.pid, signal.SIGINT)  # Ray's processes get it, too, as from a terminal
    _, err = process.communicate(timeout=120)
    rows = rows_of(out.read_bytes())
    n, error = len(rows), "not a JPEG, PNG, WebP, GIF, BMP or TIFF image"
    assert rows["s0007.png"]["error"] == f"{error} (on {os.uname().nodename})"
    assert process.returncode == 130
    assert 120 <= n < 400
    assert b"died: another one takes its" in err
    assert f"{400 - n} pictures are left: the same command goes on with them".encode() in err
    assert len(err.splitlines()) < 12, err
    assert cli.main(["caption", str(folder), "-p", QUESTION, "-o", str(out), "--write", "txt,csv"]) == 1
    rows = rows_of(out.read_bytes())
    assert sorted(rows) == sorted(path.name for path in folder.glob("*.png"))
    assert rows.pop("s0007.png")["error"] == error
    with pyllava.Llava(n_parallel=8, kv_cells="pictures") as model:
        for result in model.batch([folder / name for name in rows], QUESTION):
            assert rows[result.source.name]["caption"] == str(result.answer)
            assert result.source.with_suffix(".txt").read_text() == f"{result.answer}\n"
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 401


DATASETS = """
import os, pathlib, signal, sys, threading, time
import ray, ray.data
from pyllava.ray import Captioner, caption_dataset

folder, killed = sys.argv[1:]
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)

class Mortal(Captioner):
    def __call__(self, batch):
        if f"{folder}/s0100.png" in batch.column("path").to_pylist() and not os.path.exists(killed):
            pathlib.Path(killed).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)

def texts(dataset):
    rows = dataset.take_all()
    assert all(row["status"] == "ok" and row["error"] is None for row in rows), rows
    found = {os.path.basename(row["path"]): row["caption"] for row in rows}
    assert len(found) == len(rows)
    return found

question = "Describe the image."
some = [f"{folder}/s{number:04}.png" for number in range(16)]
plain = texts(caption_dataset(folder, question, n_actors=2, num_cpus=1, batch_size=16))
read = texts(caption_dataset(ray.data.read_binary_files(some, include_paths=True), question, n_actors=2, num_cpus=1))
seen = texts(caption_dataset(ray.data.read_images(some, include_paths=True), question, n_actors=1, num_cpus=1))
assert read == seen == {name: plain[name] for name in read} and len(read) == 16
names = ray.data.from_items([{"path": f"{folder}/{name}"} for name in plain])
options = {"fn_constructor_kwargs": {"prompt": question}, "concurrency": 2, "num_cpus": 1}
again = texts(names.map_batches(Mortal, **options, batch_size=16, batch_format="pyarrow"))
assert os.path.exists(killed)
assert again == plain
print(len(plain), len(set(plain.values())))
"""


@pytest.mark.slow
def test_datasets(real: None, tmp_path: Path) -> None:
    """Paths, bytes and pixels give the same captions, and an actor that is killed costs none."""
    folder = draw(tmp_path / "scenes", 200)
    script = tmp_path / "datasets.py"
    script.write_text(DATASETS)
    command = [sys.executable, str(script), str(folder), str(tmp_path / "killed")]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert process.returncode == 0, process.stderr[-3000:]
    n, n_different = map(int, process.stdout.split()[-2:])
    assert n == 200
    assert n_different > 150
