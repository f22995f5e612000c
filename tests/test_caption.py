"""``pyllava-cli caption``: what it finds, writes and remembers, and what kills, full disks and second runs do to that."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import io
import json
import os
import pty
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import termios
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import pyllava.llava
import pyllava.models
from pyllava import cli
from pyllava.bulk import inputs, tables
from pyllava.bulk.inputs import Entry
from pyllava.bulk.ledger import Ledger
from pyllava.bulk.merge import Merged
from pyllava.bulk.plan import plan
from pyllava.bulk.side_files import SideFiles
from pyllava.bulk.texts import Texts
from pyllava.errors import ImageError

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "Describe the image."
COLORS = ("red", "green", "blue", "orange", "purple", "black", "white", "yellow")
COMMAND = [sys.executable, "-c", "import sys; from pyllava.cli import main; sys.exit(main())", "caption"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def draw(path: Path, number: int) -> Path:
    """A picture; no two numbers give the same."""
    image = Image.new("RGB", (112, 112), COLORS[number % 8])
    image.paste((number % 256, number // 256, 90), (10, 10, 30 + number % 60, 60))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        draw(tmp_path / "pictures" / f"p{number}.png", number)
    return tmp_path / "pictures"


def caption(*arguments: object) -> int:
    return cli.main(["caption", *map(str, arguments)])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def by_path(path: Path) -> dict[str, dict[str, Any]]:
    rows = rows_of(path)
    found = {row["path"]: row for row in rows}
    assert len(found) == len(rows)  # no picture twice
    return found


# --- inputs ---


def paths(names: Sequence[object], column: str | None = None) -> list[str]:
    return [entry.path for entry in inputs.found(map(str, names), column)]


def test_folders_patterns_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "a/p10.png",
        "a/p2.PNG",
        "a/deep/er/x.jpg",
        "a/.hidden.png",
        "a/.h/y.png",
        "a/notes.txt",
        "b.png",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert paths(["a"]) == ["a/deep/er/x.jpg", "a/p2.PNG", "a/p10.png"]
    assert paths(["b.png", "./b.png", "a/*.png"]) == ["b.png", "a/p10.png"]
    assert paths(["a/**/*.jpg"]) == ["a/deep/er/x.jpg"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.png", "No such file"), ("*.nothing", "no file fits"), ("empty", "a folder without pictures")],
)
def test_names_of_nothing_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises((OSError, ImageError), match=message):
        paths([name])


def test_lists_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative to the list's folder, else to the working folder; what is not there stays, for its row."""
    monkeypatch.chdir(tmp_path)
    draw(Path("data/a.png"), 1)
    draw(Path("b.png"), 2)
    Path("data/list.txt").write_bytes("\ufeffa.png\r\n\r\nb.png\r\nnone.png\r\n".encode())
    wanted = ["data/a.png", "b.png", "data/none.png"]
    assert paths(["@data/list.txt"]) == wanted
    names = ("a.png", "b.png", "none.png")
    Path("data/t.jsonl").write_text(
        "".join(json.dumps({"id": 1, "file_name": name}) + "\n" for name in names)
    )
    Path("data/t.csv").write_text("n,file_name\n" + "".join(f'1,"{name}"\n' for name in names))
    Path("data/t.tsv").write_text("n\twhere\n" + "".join(f"1\t{name}\n" for name in names))
    assert paths(["data/t.jsonl"]) == paths(["data/t.csv"]) == paths(["data/t.tsv"], "where") == wanted
    for name, column, message in (
        ("data/t.tsv", None, "row 1 has the columns n, where: need one of the columns path"),
        ("data/t.csv", "where", "row 1 has the columns n, file_name: need a column 'where'"),
        ("data/t.csv", "n", None),
    ):
        if message is None:
            assert paths([name], column) == ["data/1"]
        else:
            with pytest.raises(ValueError, match=message):
                paths([name], column)
    Path("bad.jsonl").write_text('{"path": "a"}\n[1]\n')
    with pytest.raises(ValueError, match=r"bad.jsonl: line 2: found list"):
        paths(["bad.jsonl"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"b.png\n")))
    assert paths(["@-"]) == ["b.png"]


def test_a_table_of_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    draw(tmp_path / "a.png", 1)
    table = arrow.table({"image": arrow.array([b"bytes"]), "path": ["a.png"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    assert paths([tmp_path / "t.parquet"]) == [str(tmp_path / "a.png")]


def test_parts_of_a_tar(tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w") as tar:
        for number in range(3):
            tar.add(draw(tmp_path / f"{number}.png", number), f"{number:04}.png")
            tar.addfile(tarfile.TarInfo(f"{number:04}.json"))
    entries = inputs.found([str(shard)])
    assert [entry.path for entry in entries] == [f"{shard}/{number:04}.png" for number in range(3)]
    assert [entry.read().getvalue() for entry in entries] == [
        (tmp_path / f"{number}.png").read_bytes() for number in range(3)
    ]
    shard.write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match="not a sound tar file"):
        inputs.found([str(shard)])


# --- texts ---


def test_prompts_know_their_picture(tmp_path: Path) -> None:
    texts = Texts('{"json": "{stem}"} {name} of {dir}, {other}')
    entry = Entry("cats/tom.jpg", "cats/tom.jpg")
    assert texts.prompt_of(entry) == '{"json": "tom"} tom.jpg of cats, {other}'


def test_captions_from_answers() -> None:
    texts = Texts("", ("i'm sorry",), ("The image shows", "a "), "photo, ", " (end)")
    assert texts.caption_of(" the image shows A cat. ") == "photo, cat. (end)"
    with pytest.raises(ValueError, match='the answer has "i\'m sorry" in it'):
        texts.caption_of("I'm sorry, no.")
    with pytest.raises(ValueError, match="empty"):
        texts.caption_of("The image shows")


@pytest.mark.parametrize(
    ("phrase", "answer", "left"),
    [
        ("STRASSE:", "Straße: grau", "grau"),
        ("straße", "STRASSE grau", "grau"),
        ("s", "ß", "ß"),
        ("ab", "a", "a"),
        ("", "a", "a"),
    ],
)
def test_a_phrase_is_taken_off_by_its_own_letters(phrase: str, answer: str, left: str) -> None:
    assert Texts("", strip=(phrase,)).caption_of(answer) == left


# --- the ledger ---


def row(path: str, status: str = "ok", **more: object) -> dict[str, Any]:
    return {"path": path, "status": status, "settings": "s", "caption": "c", **more}


def test_rows_are_remembered(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "c.jsonl")
    ledger.append(row("ä.png", bytes=5, mtime_ns=7, sha256="x"))
    ledger.append(row("\udcff.png", "error"))  # a name that is no text
    ledger.close()
    again = Ledger(tmp_path / "c.jsonl")
    assert again.known["ä.png"].is_ok
    assert again.known["ä.png"].stamp == (5, 7)
    assert not again.known["\udcff.png"].is_ok
    assert again.row("\udcff.png")["status"] == "error"
    again.forget({"ä.png"})
    again.append(row("b.png"))
    assert [found["path"] for found in again.rows()] == ["\udcff.png", "b.png"]
    again.close()


@pytest.mark.parametrize("torn", [b'{"path": "b', b"{", b"\0\0\0\0", b'{"path": "b.png", "status": "ok"}'])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "c.jsonl"
    whole = tables.line_of(row("a.png"))
    path.write_bytes(whole + torn)
    ledger = Ledger(path)
    assert path.read_bytes() == whole
    assert list(ledger.known) == ["a.png"]
    ledger.close()


NO_ROWS = [
    "hello",
    '{"a": 1}',
    "[]",
    '{"path": 1, "status": "ok", "caption": "c"}',
    '{"path": "a", "status": "ok"}',
    '{"path": "a", "status": "ok", "caption": null}',
    pytest.param("[" * 100_000, id="deep"),
]


@pytest.mark.parametrize("text", NO_ROWS)
def test_another_file_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(ValueError, match=r"c\.jsonl: line 1 is no row of captions"):
        Ledger(path)
    with pytest.raises(ValueError, match=r"c\.jsonl: line 1 is no row of captions"):
        Merged([path])
    assert path.read_text() == text + "\n"


def test_a_pipe_is_not_merged(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="need a file: it is read twice"):
        Merged([tmp_path / "pipe"])


def test_the_lock_moves_with_the_file(tmp_path: Path) -> None:
    """forget() renames a new file into place: that is locked, too, and before it has its name."""
    ledger = Ledger(tmp_path / "c.jsonl")
    ledger.append(row("a.png"))
    for _ in range(2):
        with pytest.raises(ValueError, match="another run is writing it"):
            Ledger(tmp_path / "c.jsonl")
        ledger.forget({"a.png"})
    ledger.close()
    Ledger(tmp_path / "c.jsonl").close()


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    path, real = tmp_path / "c.jsonl", tmp_path / "elsewhere" / "real.jsonl"
    real.touch()
    path.symlink_to(real)
    ledger = Ledger(path)
    for name in ("a", "b"):
        ledger.append(row(name))
    ledger.forget({"a"})
    ledger.close()
    assert path.is_symlink()
    assert [found["path"] for found in rows_of(real)] == ["b"]
    tables.write_jsonl(path, [row("c")])
    assert path.is_symlink()
    assert [found["path"] for found in rows_of(real)] == ["c"]


def test_a_picture_that_cannot_be_read_keeps_its_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(entry: Entry) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", entry.path)

    path = draw(tmp_path / "a.png", 1)
    ledger = Ledger(tmp_path / "c.jsonl")
    ledger.append(row(str(path), bytes=path.stat().st_size, mtime_ns=1, sha256="x"))
    monkeypatch.setattr(Entry, "read", fails)
    found = plan(inputs.found([str(path)]), ledger, None, "s")
    ledger.close()
    assert (found.n_done, found.todo) == (1, [])


def test_a_ledger_without_rows_leaves_no_file(tmp_path: Path) -> None:
    Ledger(tmp_path / "c.jsonl").close()
    assert not (tmp_path / "c.jsonl").exists()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a regular file"):
        Ledger(Path(os.devnull))
    with pytest.raises(FileNotFoundError):
        Ledger(tmp_path / "none" / "c.jsonl")


# --- side files ---


@pytest.mark.parametrize(
    ("existing", "there", "then"),
    [
        ("overwrite", "old\n", "new\n"),
        ("append", "old\n", "old new\n"),
        ("prepend", "old\n", "new old\n"),
        ("append", "", "new\n"),
        ("skip", "old\n", "old\n"),
    ],
)
def test_what_is_there_already(tmp_path: Path, existing: Any, there: str, then: str) -> None:
    side, entry = SideFiles(existing=existing), Entry(str(tmp_path / "a.png"), "")
    (tmp_path / "a.txt").write_text(there)
    if existing != "skip":
        assert not side.is_in_place(entry, "new")
        side.write(entry, "new")
    assert (tmp_path / "a.txt").read_text() == then
    assert side.is_in_place(entry, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_commas_join_without_a_space(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1girl")
    SideFiles(existing="append").write(Entry(str(tmp_path / "a.png"), ""), ", a hat")
    assert (tmp_path / "a.txt").read_text() == "1girl, a hat\n"


@pytest.mark.parametrize("extension", ["txt", ".png", ".a/b", ".{ext}", ""])
def test_extensions_that_are_refused(extension: str) -> None:
    with pytest.raises(ValueError, match="caption extension"):
        SideFiles(extension)


# --- runs ---


def test_rows_have_what_they_need(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "c.jsonl"
    assert caption(folder, "-p", QUESTION, "-o", out, "--write", "txt,csv") == 0
    rows = by_path(out)
    assert sorted(rows) == [str(folder / f"p{number}.png") for number in range(6)]
    found = rows[str(folder / "p3.png")]
    with pyllava.Llava() as model:
        assert found["caption"] == model.ask(folder / "p3.png", QUESTION).text
    assert (found["width"], found["height"], found["model"], found["prompt"]) == (112, 112, "demo", QUESTION)
    assert (found["status"], found["error"], found["finish_reason"]) == ("ok", None, "stop")
    assert found["tokens"] > 5
    assert found["seconds"] > 0
    assert len(found["sha256"]) == 64
    assert (folder / "p3.txt").read_text() == found["caption"] + "\n"
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 7
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "6 captions, 0 failed" in captured.err


def test_parquet_has_the_rows(folder: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    (folder / "p9.png").write_bytes(b"damaged")
    assert caption(folder, "-p", QUESTION, "-o", tmp_path / "c.parquet") == 1
    table = parquet.read_table(tmp_path / "c.parquet").to_pylist()
    empty = {"captions": None, "data": None}  # columns for what was not asked for
    assert table == [{**empty, **row} for row in rows_of(tmp_path / "c.jsonl")]


def test_without_pyarrow_it_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert caption(folder, "-p", QUESTION, "-o", tmp_path / "c.parquet") == 1
    assert "c.parquet: Parquet needs pyarrow: pip install 'pyllava[parquet]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]


def test_rows_on_stdout_and_nothing_else(folder: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert caption(folder, "-p", QUESTION, "-o", "-") == 0
    rows = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert len(rows) == 6


def test_it_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c.jsonl"
    (folder / "p1.png").write_bytes(b"damaged")
    assert caption(folder, "-p", QUESTION, "-o", out) == 1
    assert by_path(out)[str(folder / "p1.png")]["status"] == "error"
    first = by_path(out)
    draw(folder / "p1.png", 1)  # mended
    draw(folder / "p2.png", 40)  # changed
    draw(folder / "p7.png", 7)  # new
    os.utime(folder / "p3.png")  # touched
    capsys.readouterr()
    assert caption(folder, "-p", QUESTION, "-o", out) == 0
    assert "pictures: 3 to do, 4 done before" in capsys.readouterr().err
    rows = by_path(out)
    assert len(rows) == 7
    assert all(found["status"] == "ok" for found in rows.values())
    same = [str(folder / f"p{number}.png") for number in (0, 3, 4, 5)]
    assert [rows[path] for path in same] == [first[path] for path in same]
    assert rows[str(folder / "p2.png")]["sha256"] != first[str(folder / "p2.png")]["sha256"]

    def no_model(*_: object, **__: object) -> None:
        raise AssertionError("there was nothing to do")

    monkeypatch.setattr(pyllava.llava.Llava, "__init__", no_model)
    before = out.read_bytes()
    assert caption(folder, "-p", QUESTION, "-o", out) == 0
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "changed",
    [
        ["-p", "What is this?"],
        ["-p", QUESTION, "-n", "9"],
        ["-p", QUESTION, "-l", "15+1", "-l", "cat-1"],
        ["-p", QUESTION, "--prefix", "x"],
    ],
    ids=["prompt", "sampling", "biases", "texts"],
)
def test_other_settings_need_to_be_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: list[str]
) -> None:
    out = tmp_path / "c.jsonl"
    assert caption(folder, "-p", QUESTION, "-o", out, "--write", "txt") == 0
    before = out.read_bytes()
    assert caption(folder, *changed, "-o", out) == 1
    assert (
        "was written with other settings (prompt 'Describe the image.', model demo)"
        in capsys.readouterr().err
    )
    assert out.read_bytes() == before
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + bytes(100))
    assert caption(folder, "-m", tmp_path / "damaged.gguf", *changed, "-o", out, "--overwrite") == 1
    assert out.read_bytes() == before  # no model, no captions to put in the place of these
    assert caption(folder, *changed, "-o", out, "--overwrite", "--write", "txt") == 0
    rows = by_path(out)
    assert len(rows) == 6
    assert {found["prompt"] for found in rows.values()} == {changed[1]}
    for path, found in rows.items():
        assert Path(path).with_suffix(".txt").read_text() == found["caption"] + "\n"


def test_a_longer_timeout_is_no_other_setting(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    assert caption(folder, "-p", QUESTION, "-o", out, "--timeout", "0.000001") == 0
    assert {found["finish_reason"] for found in rows_of(out)} == {"timeout"}
    assert caption(folder, "-p", QUESTION, "-o", out, "--timeout", "60") == 0


def test_texts_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "p2.txt").write_text("mine")
    assert caption(folder, "-p", QUESTION, "--write", "txt") == 0
    assert (folder / "p2.txt").read_text() == "mine"
    assert "5 to do, 1 with a text beside them" in capsys.readouterr().err
    assert sorted(path.suffix for path in folder.iterdir()) == [".png"] * 6 + [".txt"] * 6


def test_pictures_of_one_stem(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(folder / "p1.jpg", 30)
    out = tmp_path / "c.jsonl"
    for _ in range(2):  # again: it is refused again, and the text stays that of the first
        assert caption(folder, "-p", QUESTION, "-o", out, "--write", "txt") == 1
        found = [found for found in by_path(out).values() if found["status"] == "error"]
        assert [Path(row["path"]).name for row in found] == ["p1.png"]
        assert f"its text would be that of {folder / 'p1.jpg'}" in found[0]["error"]
        text = (folder / "p1.txt").read_text()
        assert text == by_path(out)[str(folder / "p1.jpg")]["caption"] + "\n"
    assert caption(folder, "-p", QUESTION, "--write", "txt", "--caption-extension", ".{ext}.txt") == 0
    assert (folder / "p1.jpg.txt").exists()
    assert (folder / "p1.png.txt").exists()


def test_several_captions_of_a_picture(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c.jsonl"
    options = ("--samples", 3, "--temp", 2, "-s", 7, "-n", 9, "--write", "txt,csv")
    assert caption(folder / "p1.png", "-p", QUESTION, "-o", out, *options) == 0
    assert "1 caption, 0 failed" in capsys.readouterr().err
    (found,) = rows_of(out)
    assert len(set(found["captions"])) > 1
    assert found["caption"] == found["captions"][0]
    assert len(found["captions"]) == 3
    assert (folder / "p1.txt").read_text() == "\n".join(found["captions"]) + "\n"


def test_texts_of_a_run(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    texts = ("--start-with", "There is", "--strip", "there is ", "--prefix", "drawing: ", "--suffix", " !")
    assert caption(folder / "p1.png", "-p", QUESTION, "-o", out, *texts) == 0
    (found,) = rows_of(out)
    assert found["caption"].startswith("drawing: a ")
    assert found["caption"].endswith(" !")
    out = tmp_path / "d.jsonl"
    assert caption(folder / "p1.png", "-p", QUESTION, "-o", out, "--fail-phrases", "There IS") == 1
    assert rows_of(out)[0]["error"].startswith("the answer has 'There IS' in it")


def test_one_bad_file_does_not_stop_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "cut.png").write_bytes((folder / "p1.png").read_bytes()[:90])
    (folder / "page.jpg").write_text("<html>")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    (folder / "dir.png").mkdir()
    out = tmp_path / "c.jsonl"
    assert caption(folder, "-p", QUESTION, "-o", out) == 1
    failed = {Path(found["path"]).name: found for found in rows_of(out) if found["status"] == "error"}
    assert sorted(failed) == ["cut.png", "gone.png", "page.jpg"]
    assert failed["gone.png"]["error"] == "No such file or directory"
    assert "a web page" in failed["page.jpg"]["error"]
    assert failed["page.jpg"]["sha256"]
    assert failed["cut.png"]["caption"] is None
    assert len(by_path(out)) == 9
    err = capsys.readouterr().err
    assert f"pyllava-cli: error: {folder}/gone.png: No such file" in err
    assert "6 captions, 3 failed" in err
    assert "the same command tries those that failed again" in err


def test_too_many_bad_ones_do(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(200):
        (folder / f"a{number}.png").write_bytes(b"damaged")
    out = tmp_path / "c.jsonl"
    assert caption(folder, "-p", QUESTION, "-o", out, "--max-errors", 3) == 1
    assert 4 <= len(by_path(out)) < 100
    err = capsys.readouterr().err
    assert "more than 3 pictures failed (--max-errors)" in err
    assert "pictures are left: the same command goes on" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "need -o FILE, or --write txt"),
        (["--write", "csv"], "need -o FILE"),
        (["-o", "c.txt"], "need a name that ends in .jsonl, .csv or .parquet"),
        (["-o", "-", "--write", "csv"], "--write csv: needs -o FILE"),
        (["-o", "-", "--overwrite"], "--overwrite: needs -o FILE"),
        (["--write", "txt", "--existing", "append"], "--existing append: needs -o FILE"),
        (["-o", "c.jsonl", "--write", "doc"], "'doc', need some of txt, jsonl, csv, parquet"),
        (["-o", "c.jsonl", "--samples", "0"], "need an integer of at least 1"),
        (["-o", "c.jsonl", "--samples", "2"], "--samples: needs --temp above 0"),
        (["-o", "c.jsonl", "-p", "a", "-f", "b"], "-p and -f: need one of them"),
    ],
)
def test_wrong_usage(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert caption(folder, *arguments) == 2
    assert message in capsys.readouterr().err


def test_outputs_are_no_inputs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "c.jsonl"
    out.write_text(json.dumps({"path": str(folder / "p1.png"), "status": "ok"}) + "\n")
    before = out.read_bytes()
    for name in (out, f"@{out}", tmp_path / "*.jsonl"):
        assert caption(name, "-p", QUESTION, "-o", out, "--overwrite") == 1
        assert "is both input and output" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_tables_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (tmp_path / "large.csv").write_text("path,bytes\na.png," + "x" * 200_000 + "\n")
    for name, message in {"deep.jsonl": "line 1 is not JSON", "large.csv": "line 2 is not CSV"}.items():
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            paths([tmp_path / name])


def test_a_tar_has_no_place_for_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(draw(tmp_path / "a.png", 1), "a.png")
    assert caption(tmp_path / "s.tar", "-p", QUESTION, "--write", "txt") == 1
    assert "no place for a file beside it" in capsys.readouterr().err
    assert caption(tmp_path / "s.tar", "-p", QUESTION, "-o", tmp_path / "c.jsonl") == 0
    assert list(by_path(tmp_path / "c.jsonl")) == [f"{tmp_path}/s.tar/a.png"]
    assert caption(tmp_path / "s.tar", "-p", QUESTION, "-o", tmp_path / "c.jsonl") == 0


def test_a_picture_on_stdin(tmp_path: Path) -> None:
    """It is another one each time."""
    for number in (1, 2):
        data = draw(tmp_path / "a.png", number).read_bytes()
        arguments = [*COMMAND, "-", "-p", QUESTION, "-o", str(tmp_path / "c.jsonl")]
        subprocess.run(arguments, input=data, check=True, env=ENVIRONMENT, capture_output=True)
    (found,) = rows_of(tmp_path / "c.jsonl")
    assert found["path"] == "-"


def test_a_model_without_eyes_is_told_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    language = pyllava.models.find(None, None).model
    shutil.copy(language, tmp_path / "language.gguf")
    assert caption(folder, "-m", tmp_path / "language.gguf", "-o", tmp_path / "c.jsonl") == 1
    assert "language.gguf: no projector, it sees no pictures" in capsys.readouterr().err
    assert not (tmp_path / "c.jsonl").exists()


def test_a_terminal_shows_a_bar(folder: Path, tmp_path: Path) -> None:

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 110, 0, 0))
    (folder / "p1.png").write_bytes(b"damaged")
    arguments = [*COMMAND, str(folder), "-p", QUESTION, "-o", str(tmp_path / "c.jsonl")]
    process = subprocess.Popen(arguments, stderr=theirs, env=ENVIRONMENT)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while data := os.read(ours, 4096):
            shown += data
    assert process.wait() == 1
    assert b"0/6 [00:00<?, ? pictures/s]" in shown
    assert b"p1.png: not a JPEG" in shown.split(b"0/6", 1)[1]
    assert b"5 captions, 1 failed" in shown


def test_elsewhere_a_line_a_minute(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyllava.cli.caption._MINUTE", 0.0)
    assert caption(folder, "-p", QUESTION, "-o", tmp_path / "c.jsonl") == 0
    assert re.search(
        r"\n2 of 6 pictures, 0 failed, [\d.]+ per second, [\d.]+ s left\n", capsys.readouterr().err
    )


# --- several machines ---


def test_an_output_below_the_home_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no shell sees the ``~``: behind an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert caption(folder, "-p", QUESTION, "--output=~/c.jsonl") == 0
    assert rows_of(tmp_path / "c.jsonl")


def test_shards_are_parts_of_the_whole(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6, 20):
        draw(folder / f"p{number}.png", number)
    for number in (1, 2, 3):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number + 6))
        monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "7")
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
        shard = "slurm" if number == 2 else f"{number}/3"
        assert caption(folder, "-p", QUESTION, "-o", tmp_path / "c.jsonl", "--shard", shard) == 0
    shards = [tmp_path / f"c-{number:05}-of-00003.jsonl" for number in (1, 2, 3)]
    assert all(2 < len(rows_of(path)) < 14 for path in shards)
    assert caption("merge", tmp_path / "c.jsonl", *shards) == 0
    assert sorted(by_path(tmp_path / "c.jsonl")) == sorted(map(str, folder.glob("*.png")))
    draw(folder / "p30.png", 30)
    assert caption(folder, "-p", QUESTION, "-o", tmp_path / "c.jsonl") == 0  # goes on from there
    assert len(by_path(tmp_path / "c.jsonl")) == 21


def test_a_picture_keeps_its_shard() -> None:
    """Runs of other versions go on with their own pictures."""
    found = [inputs.Shard(number, 3).has(Entry("a/b.png", "")) for number in (1, 2, 3)]
    assert found == [True, False, False]
    assert inputs.Shard(2, 3).output("x/c.csv") == "x/c-00002-of-00003.csv"


def test_a_job_array_with_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MIN": "1", "COUNT": "3", "STEP": "2"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    shards = []
    for task in ("1", "3", "5"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        shards.append(inputs.shard_of("slurm"))
    assert shards == [inputs.Shard(number, 3) for number in (1, 2, 3)]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    with pytest.raises(ValueError, match="shard slurm: task 2 is not one of 1, 3"):
        inputs.shard_of("slurm")


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "-1/3", "slurm"])
def test_no_shards(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    with pytest.raises(ValueError, match="shard"):
        inputs.shard_of(text)


def test_merging_takes_what_succeeded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "a.jsonl": [row("1", "error", n=1), row("2", n=2), row("3", "error", n=3)],
        "b.jsonl": [row("1", n=4), row("2", "error", n=5), row("3", "error", n=6)],
    }
    for name, rows in files.items():
        (tmp_path / name).write_bytes(b"".join(map(tables.line_of, rows)) + b'{"torn')
    names = [tmp_path / name for name in files]
    assert caption("merge", tmp_path / "c.jsonl", *names) == 0
    assert {found["path"]: found["n"] for found in rows_of(tmp_path / "c.jsonl")} == {"1": 4, "2": 2, "3": 6}
    assert "3 pictures, 1 of them failed" in capsys.readouterr().err
    (tmp_path / "d.jsonl").write_bytes(tables.line_of({**row("9"), "settings": "other"}))
    assert caption("merge", tmp_path / "c.jsonl", *names, tmp_path / "d.jsonl") == 1
    assert "rows of different settings" in capsys.readouterr().err
    assert caption("merge", tmp_path / "c.txt", *names) == 2


# --- what goes wrong around it ---


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    """One who is not root, to whom permissions mean nothing."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


@pytest.mark.parametrize(
    "arguments", [["--write", "txt"], ["-o", "{folder}/c.jsonl"], ["-o", "{folder}/c.csv"]]
)
def test_a_read_only_folder_is_told_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    def no_model(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(pyllava.llava.Llava, "__init__", no_model)
    with contextlib.ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        top.chmod(0o755)
        folder = draw(top / "pictures" / "a.png", 1).parent
        importlib.import_module("pyllava.cli.caption")  # the package may lie where that user cannot read
        demo = pyllava.models.find(None, None)
        for file in (demo.model, demo.mmproj):
            shutil.copy(str(file), top)
        folder.chmod(0o555)
        stack.callback(folder.chmod, 0o755)
        with another_user():
            given = [argument.format(folder=folder) for argument in arguments]
            assert caption(folder, "-m", top, "-p", QUESTION, *given) == 1
        assert str(folder) in capsys.readouterr().err
        assert [path.name for path in folder.iterdir()] == ["a.png"]


def start(*arguments: object, most_bytes: int | None = None) -> subprocess.Popen[str]:
    def limit() -> None:
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    return subprocess.Popen(
        [*COMMAND, *map(str, arguments), "-p", QUESTION, "-t", "1"],
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        text=True,
        preexec_fn=limit,
    )


def wait_for_rows(path: Path, n: int, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):
            if path.read_bytes().count(b"\n") >= n:
                return
        time.sleep(0.002)
    raise AssertionError(f"no {n} rows after {seconds} s")


def many(folder: Path, n: int) -> Path:
    for number in range(n):
        draw(folder / f"p{number:05}.png", number)
    return folder


def check_all(out: Path, folder: Path) -> None:
    """Every picture has one row and one text, which agree."""
    rows = by_path(out)
    assert sorted(rows) == sorted(map(str, folder.glob("*.png")))
    for path, found in rows.items():
        assert found["status"] == "ok"
        assert Path(path).with_suffix(".txt").read_text() == found["caption"] + "\n"
    assert Counter(path.suffix for path in folder.iterdir()) == {".png": len(rows), ".txt": len(rows)}


def test_kills_cost_the_pictures_under_way_at_most(tmp_path: Path) -> None:
    folder, out = many(tmp_path / "pictures", 60), tmp_path / "c.jsonl"
    kept = 0
    for n in (1, 15, 40):
        process = start(folder, "-o", out, "--write", "txt")
        wait_for_rows(out, n)
        process.kill()
        process.communicate()
        rows = out.read_bytes().count(b"\n")
        assert rows >= max(n, kept)
        kept = rows
    assert start(folder, "-o", out, "--write", "txt").wait() == 0
    check_all(out, folder)


def test_a_text_lost_to_a_kill_is_made_from_its_row(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    for existing, there, then in (
        ("skip", None, "{}\n"),
        ("append", "tag,", "tag, {}\n"),
        ("prepend", "tag", "{} tag\n"),
    ):
        out.unlink(missing_ok=True)
        text = folder / "p1.txt"
        for path in folder.glob("*.txt"):
            path.unlink()
        if there is not None:
            text.write_text(there)
        options = ("-p", QUESTION, "-o", out, "--write", "txt", "--existing", existing)
        assert caption(folder, *options) == 0
        wanted = then.format(by_path(out)[str(folder / "p1.png")]["caption"])
        assert text.read_text() == wanted
        text.unlink() if there is None else text.write_text(there)  # as a kill after the row leaves it
        assert caption(folder, *options) == 0
        assert text.read_text() == wanted
        assert caption(folder, *options) == 0
        assert text.read_text() == wanted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_those_under_way_be_finished(tmp_path: Path, number: int) -> None:
    folder, out = many(tmp_path / "pictures", 400), tmp_path / "c.jsonl"
    process = start(folder, "-o", out, "--write", "txt,csv")
    wait_for_rows(out, 10)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    n = len(by_path(out))
    assert 10 <= n < 400
    assert all(Path(path).with_suffix(".txt").exists() for path in by_path(out))
    assert len((tmp_path / "c.csv").read_text().splitlines()) == n + 1
    assert "finishing the pictures under way" in err
    assert f"{400 - n} pictures are left: the same command goes on with them" in err


def test_a_second_run_is_refused_until_the_first_one_dies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = many(tmp_path / "pictures", 100), tmp_path / "c.jsonl"
    process = start(folder, "-o", out)
    wait_for_rows(out, 5)
    process.send_signal(signal.SIGSTOP)
    before = out.read_bytes()
    for arguments in ([], ["--overwrite"]):
        assert caption(folder, "-p", QUESTION, "-o", out, *arguments) == 1
        assert "another run is writing it" in capsys.readouterr().err
    assert out.read_bytes() == before
    process.kill()
    process.communicate()
    assert start(folder, "-o", out).wait() == 0
    assert len(by_path(out)) == 100


def test_a_second_run_on_the_same_texts_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = many(tmp_path / "pictures", 200), tmp_path / "c.jsonl"
    process = start(folder, "-o", out, "--write", "txt")
    wait_for_rows(out, 3)
    process.send_signal(signal.SIGSTOP)
    assert caption(folder, "-p", QUESTION, "--write", "txt") == 1
    assert f"{folder}: another run is writing it" in capsys.readouterr().err
    process.kill()
    process.communicate()
    assert caption(folder / "p00001.png", "-p", QUESTION, "--write", "txt") == 0


def test_without_locks_there_is_a_warning(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(fd: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert caption(folder, "-p", QUESTION, "-o", tmp_path / "c.jsonl") == 0
    assert "c.jsonl: no lock (Function not implemented)" in capsys.readouterr().err


@pytest.mark.parametrize("most_bytes", [1000, 2048, 3333])
def test_a_full_disk_ends_it_with_whole_rows(tmp_path: Path, most_bytes: int) -> None:
    """The limit of a file's size cuts a write short as a full disk does."""
    folder, out = many(tmp_path / "pictures", 20), tmp_path / "c.jsonl"
    process = start(folder, "-o", out, most_bytes=most_bytes)
    _, err = process.communicate()
    assert process.returncode == 1
    assert f"pyllava-cli: error: {out}: File too large" in err
    assert 0 < len(rows_of(out)) < 20
    assert out.read_bytes().endswith(b"\n")
    assert out.stat().st_size <= most_bytes
    assert caption(folder, "-p", QUESTION, "-o", out) == 0
    assert len(by_path(out)) == 20


def test_a_disk_without_space(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a small disk")
    try:
        folder, out = many(tmp_path / "pictures", 40), disk / "c.jsonl"
        process = start(folder, "-o", out)
        _, err = process.communicate()
        assert process.returncode == 1
        assert f"{out}: No space left on device" in err
        assert 0 < len(by_path(out)) < 40
        assert out.read_bytes().endswith(b"\n")
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        assert caption(folder, "-p", QUESTION, "-o", out) == 0
        assert len(by_path(out)) == 40
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# --- the proof ---


def scenes(folder: Path, n: int) -> Path:
    from examples.demo_model import scenes

    folder.mkdir()
    rng = random.Random("captions")
    for number in range(n):
        scenes.draw(scenes.random_scene(rng)).save(folder / f"s{number:05}.png")
    return folder


@pytest.mark.slow
def test_thirty_kills_at_random_moments(tmp_path: Path) -> None:
    folder, out = scenes(tmp_path / "scenes", 1500), tmp_path / "c.jsonl"
    rng, kept, n_cut, n_rows = random.Random(30), 0, 0, []
    for number in range(30):
        process = start(folder, "-o", out, "--write", "txt")
        if number % 3:  # else it may be while it starts
            wait_for_rows(out, kept + 1)
        time.sleep(rng.uniform(0.0, 1.5))
        process.kill()
        process.communicate()
        data = out.read_bytes() if out.exists() else b""
        n_cut += bool(data) and not data.endswith(b"\n")
        assert data.count(b"\n") >= kept
        kept = data.count(b"\n")
        n_rows.append(kept)
    print("rows after each kill:", n_rows, "torn lines:", n_cut)
    assert start(folder, "-o", out, "--write", "txt").wait() == 0
    check_all(out, folder)


@pytest.mark.slow
def test_five_thousand_scenes(tmp_path: Path) -> None:
    """1 % of them damaged; memory does not grow with their number."""
    folder, out = scenes(tmp_path / "scenes", 5000), tmp_path / "c.jsonl"
    damaged = random.Random(1).sample(sorted(folder.iterdir()), 50)
    for number, path in enumerate(damaged):
        data = path.read_bytes()
        path.write_bytes((b"", data[: len(data) // 2], bytes(len(data)), b"<html>")[number % 4])
    process = start(folder, "-o", out, "--write", "txt")
    resident = {}
    for n in (500, 1500, 3000, 4900):
        wait_for_rows(out, n, 600)
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident[n] = int(status.split("VmRSS:")[1].split()[0]) / 1024
    assert process.wait() == 1
    print("resident MiB after so many rows:", resident)
    assert resident[4900] - resident[500] < 24
    rows = by_path(out)
    assert len(rows) == 5000
    assert sorted(path for path, found in rows.items() if found["status"] == "error") == sorted(
        map(str, damaged)
    )
