"""``pyllava-cli chat``: its commands, what is on stdout, exit codes, and a person at a terminal, with the demo model."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import pyllava
from pyllava import cli
from pyllava._terminal import DEMO_NOTE
from pyllava.cli import chat_file
from pyllava.cli.chat import COMMANDS, Conversation, completions, parse, split_paths
from pyllava.cli.chat_file import Record, Turn
from pyllava.cli.dropped import dropped
from pyllava.cli.lines import _readline, history_path
from pyllava.cli.options import ask_parser

ROOT = Path(__file__).resolve().parents[1]
SCENE = str(ROOT / "examples" / "scene.png")
DUCK = str(ROOT / "examples" / "duck.png")
DESCRIBE = "What is in the picture?"
COUNT = "How many shapes are there?"
N_ROWS = 64  # of an image, in the demo model


@pytest.fixture(scope="module")
def demo() -> Iterator[pyllava.Llava]:
    with pyllava.Llava(n_threads=1) as model:
        yield model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: ``red.png``, ``two words.PNG``, ``notes.md``, ``.hidden.png`` and a folder ``my pictures``."""
    (tmp_path / "my pictures").mkdir()
    for name in ("red.png", "two words.PNG", ".hidden.png", "my pictures/it's.jpg"):
        Image.new("RGB", (8, 6), "red").save(tmp_path / name)
    (tmp_path / "notes.md").write_text("mine\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- messages ---


def test_questions_and_commands() -> None:
    assert parse("What is this?") == (None, "What is this?")
    assert parse("  What\n/is this? ") == (None, "What\n/is this?")
    assert parse("//etc is a folder?") == (None, "/etc is a folder?")
    assert parse("") == (None, "")
    assert parse("/image  a b.png ") == (COMMANDS["/image"], "a b.png")
    assert parse("/save\tx.md") == (COMMANDS["/save"], "x.md")
    for message in ("/exit", "/bye", "/q", "/quit", "exit", "quit", "bye"):
        assert parse(message) == (COMMANDS["/quit"], "")
    assert parse("exit signs?") == (None, "exit signs?")
    assert parse("/reset") == (COMMANDS["/clear"], "")
    for message, told in (
        ("/foo", "no such command; /help lists them"),
        ("/", "no such command; /help lists them"),
        ("/Image x", "no such command; did you mean /image?"),
        ("/home/me/cat.png", "no such command, and no such picture; /help lists them"),
        ("/show info", "no such command; /system shows the system message"),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            parse(message)


@pytest.mark.parametrize(
    ("argument", "paths"),
    [
        ("red.png", ["red.png"]),
        ("two words.PNG", ["two words.PNG"]),
        ('"two words.PNG"', ["two words.PNG"]),
        ("'two words.PNG' red.png", ["two words.PNG", "red.png"]),
        ("my pictures/it's.jpg", ["my pictures/it's.jpg"]),
        ("red.png no.png", ["red.png", "no.png"]),
        ("no such.png", ["no such.png"]),
        ("it's gone.png", ["it's gone.png"]),
        ("#1.png", ["#1.png"]),
        ("~/red.png", ["{home}/red.png"]),
        ('"~/two words.PNG"', ["{home}/two words.PNG"]),
        ('""', []),
        ("data:image/png;base64,QUJD", ["data:image/png;base64,QUJD"]),
    ],
)
def test_paths(folder: Path, monkeypatch: pytest.MonkeyPatch, argument: str, paths: list[str]) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    assert split_paths(argument) == [path.replace("{home}", str(folder)) for path in paths]


@pytest.mark.skipif(os.name == "nt", reason="there a backslash separates folders")
def test_escaped_paths(folder: Path) -> None:
    assert split_paths(r"two\ words.PNG my\ pictures/it\'s.jpg") == ["two words.PNG", "my pictures/it's.jpg"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/", [f"{name} " if command.argument else name for name, command in COMMANDS.items()]),
        ("/im", ["/image "]),
        ("/q", ["/quit"]),
        ("/x", []),
        ("", []),
        ("What", []),
        ("/image ", ["/image my pictures/", "/image red.png", "/image two words.PNG"]),
        ("/image r", ["/image red.png"]),
        ("/image .h", ["/image .hidden.png"]),
        ("/image two w", ["/image two words.PNG"]),
        ("/image  my pictures/", ["/image  my pictures/it's.jpg"]),
        ("/image 'two", ["/image 'two words.PNG"]),
        ("/image no/", []),
        ("/image ~/r", ["/image ~/red.png"]),
        ("/save n", ["/save notes.md"]),
        ("/clear r", []),
        ("/foo r", []),
    ],
)
def test_completions(folder: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: list[str]) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    assert [found.replace(os.sep, "/") for found in completions(line)] == expected


@pytest.mark.parametrize(
    ("line", "paths", "rest"),
    [
        ("red.png", ["red.png"], ""),
        ("{at}/red.png", ["{at}/red.png"], ""),
        ("'{at}/two words.PNG' ", ["{at}/two words.PNG"], ""),
        ("{at}/two words.PNG", ["{at}/two words.PNG"], ""),
        ("file://{at}/two%20words.PNG", ["{at}/two words.PNG"], ""),
        ("red.png 'two words.PNG'", ["red.png", "two words.PNG"], ""),
        ("./red.png What's this?", ["./red.png"], "What's this?"),
        ("What's  this? ./red.png", ["./red.png"], "What's  this?"),
        ("{at}/red.png Which? './two words.PNG'", ["{at}/red.png", "./two words.PNG"], "Which?"),
        ("~/red.png", ["{at}/red.png"], ""),
        ("What is red.png", [], "What is red.png"),
        ("red.png is a file", [], "red.png is a file"),
        ("./no.png", [], "./no.png"),
        ("notes.md", [], "notes.md"),
        ("/image {at}/red.png", [], "/image {at}/red.png"),
        ("/save ./red.png", [], "/save ./red.png"),
        ("https://example.org/red.png", [], "https://example.org/red.png"),
        ("", [], ""),
    ],
)
def test_dropped_pictures(
    folder: Path, monkeypatch: pytest.MonkeyPatch, line: str, paths: list[str], rest: str
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))

    def here(text: str) -> str:
        return text.replace("{at}", folder.as_posix())

    assert dropped(here(line)) == ([here(path) for path in paths], here(rest))


def test_history_is_in_the_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", os.path.abspath("state"))
    assert history_path() == os.path.join(os.path.abspath("state"), "pyllava", "history")
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", unset)
        home = os.path.expanduser("~")
        assert history_path() == os.path.join(home, ".local", "state", "pyllava", "history")


# --- files ---

RECORD = Record(
    "models/m.gguf",
    None,
    "vicuna_v1",
    None,
    [
        Turn("What?\nAnd why?", ("/a b/<1>.png", "/c.png"), "Größe: 中", "stop"),
        Turn("More?", (), "It is", "interrupted"),
    ],
)


def test_markdown(tmp_path: Path) -> None:
    path = tmp_path / "x.MD"
    chat_file.write(str(path), RECORD, replace=False)
    assert path.read_text("utf-8") == (
        "# A conversation with m.gguf\n\n"
        "![<1>.png](</a b/\\<1\\>.png>)\n\n![c.png](</c.png>)\n\n"
        "> What?\n> And why?\n\nGröße: 中\n\n> More?\n\nIt is\n\n*(stopped here)*\n"
    )


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    chat_file.write(str(path), RECORD, replace=False)
    saved = json.loads(path.read_text("utf-8"))
    assert saved["pyllava"] == pyllava.__version__
    assert [saved[name] for name in ("model", "mmproj", "template", "system")] == [
        "models/m.gguf",
        None,
        "vicuna_v1",
        None,
    ]
    assert saved["turns"][0]["images"] == ["/a b/<1>.png", "/c.png"]
    assert [turn["finish_reason"] for turn in saved["turns"]] == ["stop", "interrupted"]


def test_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_text("before")
    with pytest.raises(FileExistsError):
        chat_file.write(str(path), RECORD, replace=False)
    with pytest.raises(ValueError, match=r"x\.txt: need a name that ends in \.md or \.json"):
        chat_file.write(str(tmp_path / "x.txt"), RECORD, replace=True)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as full_disk:
            chat_file.write(str(path), RECORD, replace=True)
        assert full_disk.value.filename == str(path)
    assert os.listdir(tmp_path) == ["x.json"]
    assert path.read_text() == "before"
    chat_file.write(str(path), RECORD, replace=True)
    assert json.loads(path.read_text("utf-8"))["template"] == "vicuna_v1"


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.md").write_text("before")
    (tmp_path / "link.md").symlink_to("real.md")
    chat_file.write(str(tmp_path / "link.md"), RECORD, replace=True)
    assert (tmp_path / "link.md").is_symlink()
    assert (tmp_path / "real.md").read_text("utf-8").startswith("# A conversation")


# --- the library's conversation ---


def test_nothing_is_computed_twice(demo: pyllava.Llava) -> None:
    chat = demo.chat()
    first = chat.ask(DESCRIBE, images=SCENE)
    second = chat.ask(COUNT)
    assert first.usage.image_tokens == second.usage.image_tokens == N_ROWS
    assert second.usage.cached_tokens >= first.usage.prompt_tokens > N_ROWS
    assert second.timings.encode < 0.001
    third = chat.ask("And here?", images=[DUCK, SCENE])  # one of them was seen before
    assert third.usage.image_tokens_each == (N_ROWS,) * 3
    assert third.usage.cached_tokens >= second.usage.prompt_tokens
    assert [(message.role, message.images) for message in chat.messages] == [
        ("user", 1),
        ("assistant", 0),
        ("user", 0),
        ("assistant", 0),
        ("user", 2),
        ("assistant", 0),
    ]


def test_added_turns_are_as_good_as_asked_ones(demo: pyllava.Llava) -> None:
    asked, added = demo.chat(), demo.chat()
    answer = asked.ask(DESCRIBE, images=SCENE)
    added.add(DESCRIBE, answer.text, SCENE)
    assert added.messages == asked.messages
    assert added.ask(COUNT).tokens == asked.ask(COUNT).tokens
    with pytest.raises(FileNotFoundError):
        added.add(DESCRIBE, "x", "missing.png")
    with pytest.raises(TypeError, match="prompt: found int"):
        added.add(1, "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="prompt: found NoneType"):
        added.ask(None)  # type: ignore[arg-type]
    assert len(added.messages) == 4


def test_a_failing_question_changes_nothing(demo: pyllava.Llava, tmp_path: Path) -> None:
    chat = demo.chat()
    chat.ask(COUNT, images=SCENE)
    before = list(chat.messages)
    with pytest.raises(pyllava.ContextOverflowError):
        chat.ask("why " * 2000, images=DUCK)
    with pytest.raises(FileNotFoundError):
        chat.ask(COUNT, images=str(tmp_path / "missing.png"))
    with pytest.raises(ValueError, match="max_tokens"):
        chat.ask(COUNT, images=DUCK, max_tokens=0)
    next(chat.ask(DESCRIBE, images=DUCK, stream=True))  # given up half-way
    assert chat.messages == before
    assert chat.ask(COUNT).usage.image_tokens_each == (N_ROWS,)


def test_answers_that_cross(demo: pyllava.Llava) -> None:
    """The one that is complete last becomes the last turn, with its own image."""
    chat = demo.chat()
    early = chat.ask(DESCRIBE, images=SCENE, stream=True)
    next(early)
    chat.ask(COUNT, images=DUCK)
    list(early)
    assert [message.text for message in chat.messages[::2]] == [COUNT, DESCRIBE]
    expected = demo.chat()
    expected.add(COUNT, chat.messages[1].text, DUCK)
    expected.add(DESCRIBE, chat.messages[3].text, SCENE)
    assert chat.ask(DESCRIBE).tokens == expected.ask(DESCRIBE).tokens


# --- from a pipe ---


def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, *argv: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code = cli.main(["chat", "-t", "1", *argv])
    return code, *capsys.readouterr()


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda text, *argv: talk(monkeypatch, capsys, text, *argv)


def test_a_dropped_picture_is_seen(demo: pyllava.Llava, say: Any) -> None:
    expected = f"{demo.ask(SCENE, DESCRIBE)}\n"
    note = "no picture is there yet: /image FILE shows one"
    for text in (f"{SCENE}\n{DESCRIBE}\n", f"{DESCRIBE} {SCENE}\n", f"{SCENE} {DESCRIBE}\nbye\n"):
        code, out, err = say(text)
        assert (code, out) == (0, expected)
        assert "with the next question: scene.png, 336 x 336\n" in err
        assert note not in err
    code, _, err = say("Hi\nHi\n")
    assert code == 0
    assert err.count(note) == 1


def test_answers_alone_on_stdout(demo: pyllava.Llava, say: Any) -> None:
    chat = demo.chat()
    expected = [chat.ask(DESCRIBE, images=SCENE), chat.ask(COUNT)]
    code, out, err = say(f"{DESCRIBE}\n\n  \n{COUNT}", "--image", SCENE)
    assert code == 0
    assert out == "".join(f"{answer}\n" for answer in expected)
    assert err.startswith(DEMO_NOTE + "\nwith the next question: scene.png, 336 x 336\n")
    assert err.count("encode_image_with_clip: image embedding created: 64 tokens\n") == 1
    n_known = expected[0].usage.prompt_tokens + len(expected[0].tokens) - 1
    assert f"[{expected[1].usage.prompt_tokens} tokens, {n_known} of them known; encode 0.00 s, " in err
    assert "> " not in err
    assert "/help" not in err


def test_a_bad_picture_in_a_folder(say: Any, tmp_path: Path) -> None:
    album = tmp_path / "album"
    album.mkdir()
    shutil.copy(SCENE, album / "b.png")
    for name in ("a.png", "c.png"):
        (album / name).write_text("no picture")
    code, out, err = say(f"{COUNT}\n", "--image", str(album))
    assert code == 0
    assert out.strip()
    assert [name for name in ("a.png", "b.png", "c.png") if f"{name}: not a" in err] == ["a.png", "c.png"]
    code, _, err = say(f"{COUNT}\n", "--image", str(album / "c.png"))
    assert code == 1
    (album / "b.png").unlink()
    code, _, err = say(f"{COUNT}\n", "--image", str(album))
    assert code == 1
    assert "c.png: not a" in err


def test_commands_from_a_pipe(say: Any, folder: Path) -> None:
    lines = [
        f"/image {SCENE}",
        "/image red.png",
        "/drop",
        f"/image {SCENE}",
        "/image two words.PNG",
        "Wie viele\\",
        "<image> und <image>?",
        "//etc?",
        "/save talk.json",
        "/save",
        "/save! notes.md",
        "/clear",
        "/system Be brief.",
        "/system",
        f"/image {DUCK}",
        COUNT,
        "/save! notes.md",
        "/help",
        "/exit",
        "/nonsense",
    ]
    code, out, err = say("\n".join(lines), "--no-perf")
    assert code == 0, err
    assert out.count("\n") == 3
    assert "with the next question: scene.png, 336 x 336; two words.PNG, 8 x 6\n" in err
    assert "tokens in" not in err
    assert "\nBe brief.\n" in err
    assert "/image FILE " in err
    first = json.loads(Path("talk.json").read_text("utf-8"))
    assert first["system"] is None
    assert [turn["question"] for turn in first["turns"]] == ["Wie viele\n<image> und <image>?", "/etc?"]
    assert first["turns"][0]["images"] == [SCENE, str(folder / "two words.PNG")]
    second = Path("notes.md").read_text("utf-8")
    assert "System message: Be brief.\n" in second
    assert f"![duck.png](<{DUCK}>)\n\n> {COUNT}\n" in second
    assert "Wie" not in second
    assert sorted(os.listdir()) == [
        ".hidden.png",
        "my pictures",
        "notes.md",
        "red.png",
        "talk.json",
        "two words.PNG",
    ]


def test_a_saved_file_is_kept_up_to_date(say: Any, folder: Path) -> None:
    code, _, err = say(
        f"{COUNT}\n/save a.json\n{COUNT}\n/save\n/clear\n{COUNT}\n/save a.json\n", "--image", SCENE
    )
    assert code == 1
    assert err.endswith("a.json: exists; /save! a.json replaces it\n")
    assert len(json.loads(Path("a.json").read_text("utf-8"))["turns"]) == 2


def test_a_name_for_a_file_without_one(say: Any, folder: Path) -> None:
    assert say("Hi\n/save\n")[0] == 0
    (saved,) = folder.glob("pyllava-chat-*.md")
    assert saved.read_text("utf-8").startswith("# A conversation with demo-q8_0.gguf\n\n> Hi\n\n")


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("/image no such.png\n", (), "no such.png: No such file or directory"),
        ("/image notes.md\n", (), "notes.md: not a JPEG"),
        ("/image https://example.org/a.png\n", (), "a web address: fetch it first"),
        ("/image -\n", (), "-: standard input brings the messages; name a file"),
        ("/image red.png no.png\nHi\n", (), "no.png: No such file or directory"),
        ("/image\n", (), "/image: need a FILE"),
        ("/foo\nHi\n", (), "/foo: no such command"),
        ("/save a.md\n", (), "/save: no answer yet"),
        ("a" * 3000, (), "does not fit in n_ctx=1024"),
        ("caf\udce9\n", (), "the question is not UTF-8"),
        ("Hi\n", ("--image", "no.png"), "no.png: No such file or directory"),
        ("Hi\n", ("-m", "missing.gguf"), "missing.gguf: No such file or directory"),
    ],
)
def test_the_first_failure_ends_it(say: Any, folder: Path, text: str, argv: Any, message: str) -> None:
    code, out, err = say(text, *argv)
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("pyllava-cli: error: ")
    assert message in last


def test_a_picture_for_a_model_that_sees_nothing(demo: pyllava.Llava, say: Any, tmp_path: Path) -> None:
    model = tmp_path / "text.gguf"
    model.write_bytes(demo.files.model.read_bytes())
    need = "text.gguf: a picture, but no projector: need --mmproj FILE\n"
    for text, argv in ((f"/image {SCENE}\nHi\n", ()), ("Hi\n", ("--image", SCENE))):
        code, out, err = say(text, "-m", str(model), *argv)
        assert (code, out) == (1, "")
        assert err.endswith(need)
    assert say("Hi\n", "-m", str(model))[0] == 0


@pytest.mark.parametrize("argv", [("-p", "Hi"), ("-f", "x"), ("--mmproj", "p.gguf"), ("-n", "0"), ("llava",)])
def test_wrong_usage(say: Any, argv: tuple[str, ...]) -> None:
    code, out, err = say("Hi\n", *argv)
    assert (code, out) == (2, "")
    assert "(pyllava-cli chat --help shows the options)" in err


def test_help(say: Any) -> None:
    code, out, _ = say("", "--help")
    assert code == 0
    for word in ("--image FILE", "-ngl", "--temp", "--system", "/help"):
        assert word in out
    assert "--verbose-prompt" not in out
    assert "pyllava-cli chat" in ask_parser().format_help()


def test_options_mean_the_same(demo: pyllava.Llava, say: Any) -> None:
    argv = ("-n", "5", "--temp", "0.9", "-s", "3", "--system", "Be brief.", "--log-disable")
    code, out, err = say(f"{DESCRIBE}\n", "--image", SCENE, *argv)
    answer = demo.chat("Be brief.").ask(DESCRIBE, images=SCENE, max_tokens=5, temperature=0.9, seed=3)
    assert (code, out, err) == (0, f"{answer}\n", "")
    _, _, err = say(f"{DESCRIBE}\n", "--image", SCENE, "-n", "5", "--top-k", "3")
    assert "the answer was cut after 5 tokens: -n N allows more\n" in err
    assert "--top-k: no effect without --temp above 0" in err
    _, _, err = say(f"{DESCRIBE}\n", "--image", SCENE, "-c", "112")
    assert "the context is full: /clear forgets the conversation, -c N has more room\n" in err


def test_text_from_windows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The mark in front of a file hides no command, and a line that ends in CRLF is one that ends in LF."""
    written = f"/image {SCENE}\n{DESCRIBE}\nA question \\\nof two lines\n"
    windows = codecs.BOM_UTF8 + written.replace("\n", "\r\n").encode()
    outs = []
    for data, encoding in ((written.encode(), "utf-8"), (windows, "utf-8"), (windows, "cp1252")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding, newline="\n"))
        assert cli.main(["chat", "-t", "1", "-n", "12", "--no-perf"]) == 0
        outs.append(capsys.readouterr())
    assert outs[0] == outs[1] == outs[2]
    assert outs[0].err.count("image embedding created") == 1
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeff/help\r\n/quit\r\n"))
    assert cli.main(["chat", "-t", "1"]) == 0
    assert "/image FILE" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_script_in_utf_16_is_named(tmp_path: Path, encoding: str) -> None:
    script = tmp_path / "talk.txt"
    script.write_bytes(f"/image {SCENE}\r\n".encode(encoding))
    command = [sys.executable, "-m", "pyllava", "chat", "-t", "1"]
    with script.open("rb") as stdin:
        done = subprocess.run(command, stdin=stdin, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    name = str(script) if sys.platform == "linux" else "stdin"
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"pyllava-cli: error: {name}: ")
    assert "UTF-16 text, need UTF-8" in last


def test_no_stdin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["chat", "-t", "1"]) == 0
    assert capsys.readouterr().out == ""


def test_interrupt_of_a_pipe(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "_turned", interrupted)
    code, out, err = say("Hi\nHi\n")
    assert code == 130
    assert out.count("\n") == 1
    assert "Traceback" not in err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_process_with_pipes(tmp_path: Path) -> None:
    """Bytes in, bytes out; no history of what no person typed."""
    done = subprocess.run(
        [sys.executable, "-m", "pyllava", "chat", "-t", "1", "--no-perf", "--image", SCENE],
        input=f"{COUNT}\r\n".encode() + b"caf\xe9\n",
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines() == [b"4"]
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == b"pyllava-cli: error: the question is not UTF-8"
    assert os.listdir(tmp_path) == []


# --- at a terminal ---

DRIVER = """
import sys, time
import pyllava._scheduler
from pyllava import _lib, cli

def slow(name, seconds):
    usual = getattr(_lib.SessionHandle, name)
    def slowly(*args, **options):
        time.sleep(seconds)
        return usual(*args, **options)
    setattr(_lib.SessionHandle, name, slowly)

slow("step", float(sys.argv[1]))
slow("generate", float(sys.argv[2]))
pyllava._scheduler._STEPS_SHOWN = 0  # each token when it is there, however fast they are
if sys.argv[3] == "plain":
    sys.modules["readline"] = None
sys.exit(cli.main(["chat", "-t", "1", "--image", *sys.argv[4:]]))
"""


PATIENCE = 30  # seconds


class Terminal:
    """A chat about SCENE with a person at its terminal."""

    def __init__(
        self,
        state: Path,
        *argv: str,
        prefill: float = 0,
        decode: float = 0,
        editing: bool = True,
        **streams: Any,
    ) -> None:
        import fcntl
        import pty
        import termios

        self._main, other = pty.openpty()
        words = (str(prefill), str(decode), "editing" if editing else "plain", SCENE, *argv)
        self._process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *words],
            **{"stdin": other, "stdout": other, "stderr": other, **streams},
            cwd=ROOT,
            env={**os.environ, "XDG_STATE_HOME": str(state), "TERM": "xterm", "INPUTRC": os.devnull},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that ^C is a signal
        )
        os.close(other)
        self._shown = ""

    def type(self, keys: str) -> None:
        os.write(self._main, keys.encode())

    def interrupt(self) -> None:
        """Ctrl-C, a moment later: one that comes between readline's prompt and its select() waits for the next key."""
        time.sleep(0.3)
        self.type("\x03")

    def until(self, text: str) -> str:
        """What is shown up to and with `text`."""
        deadline = time.monotonic() + PATIENCE
        while text not in self._shown and self._read():
            self._check(deadline)
        before, found, self._shown = self._shown.partition(text)
        assert found, f"no {text!r} in {before!r}"
        return before + found

    def end(self) -> tuple[int, str]:
        """The exit code, and what was shown at last."""
        deadline = time.monotonic() + PATIENCE
        while self._read():
            self._check(deadline)
        code = self._process.wait(timeout=PATIENCE)
        os.close(self._main)
        return code, self._shown

    def _check(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            self._process.kill()
            pytest.fail(f"it hangs after {self._shown!r}")

    def _read(self) -> bool:
        if not select.select([self._main], [], [], 0.2)[0]:
            return self._process.poll() is None
        try:
            data = os.read(self._main, 4096)
        except OSError:  # Linux: the other side is closed
            return False
        self._shown += data.decode(errors="replace")
        return bool(data)


def a_history(state: Path) -> list[str]:
    return (state / "pyllava" / "history").read_text("utf-8").splitlines()


terminal = pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")
editing = pytest.mark.skipif(_readline() is None, reason="no readline in this Python")


@terminal
def test_an_answer_is_stopped_and_stays(tmp_path: Path) -> None:
    chat = Terminal(tmp_path, decode=0.05)
    assert "/help" in chat.until("> ")
    chat.type(f"{DESCRIBE}\n")
    chat.until("There is a large")
    chat.interrupt()
    assert chat.until("> ").endswith("stopped: what is there of the answer is part of the conversation\r\n> ")
    chat.type(f"{COUNT}\n")
    shown = chat.until("> ")
    assert "created" not in shown  # the image is still there
    assert int(shown.split(" of them known")[0].split()[-1]) > N_ROWS
    chat.type(f"/save {tmp_path / 'x.json'}\n")
    chat.until("> ")
    chat.interrupt()
    code, last = chat.end()
    assert code == 130
    assert "Traceback" not in last
    first, second = json.loads((tmp_path / "x.json").read_text("utf-8"))["turns"]
    assert first["finish_reason"] == "interrupted"
    assert first["answer"].startswith("There is a large")
    assert first["images"] == [SCENE]
    assert second["finish_reason"] == "stop"
    assert second["images"] == []


@terminal
def test_a_question_is_stopped_and_gone(tmp_path: Path) -> None:
    chat = Terminal(tmp_path, prefill=1)
    chat.until("> ")
    chat.type(f"{DESCRIBE}\n")
    chat.until("created: 64 tokens\r\n")
    chat.interrupt()
    shown = chat.until("> ")
    assert (
        "stopped: the question is not part of the conversation\r\nwith the next question: scene.png" in shown
    )
    chat.type(f"{COUNT}\n")
    chat.until("created: 64 tokens\r\n")
    assert chat.until("> ").startswith("4\r\n")
    chat.type("/quit\n")
    assert chat.end()[0] == 0


@terminal
@editing
def test_an_interrupt_drops_what_was_typed(tmp_path: Path) -> None:
    chat = Terminal(tmp_path)
    chat.until("> ")
    chat.type("not this")
    chat.until("not this")
    chat.interrupt()
    chat.until("> ")
    chat.type("nor this\\\n")
    chat.until("... ")
    chat.interrupt()
    chat.until("> ")
    chat.type("\x04")
    assert chat.end()[0] == 0
    chat = Terminal(tmp_path)
    chat.until("> ")
    chat.interrupt()
    assert chat.end()[0] == 130


@terminal
@editing
@pytest.mark.parametrize("redirected", [False, True])
def test_editing(tmp_path: Path, redirected: bool) -> None:
    """Completion, history and the prompt work; a stdout that is a file has the answers and nothing else."""
    (tmp_path / "two words.png").write_bytes(Path(DUCK).read_bytes())
    with open(tmp_path / "answers", "w+", encoding="utf-8") as file:
        streams = {"stdout": file} if redirected else {}
        chat = Terminal(tmp_path, **streams)
        chat.until("> ")
        chat.type(f"{COUNT}\n")
        answer = chat.until("> ")
        assert ("\r\n4\r\n" in answer) is not redirected
        chat.type(f"/im\t{tmp_path}/tw\t")
        chat.until("two words.png")
        chat.type("\n")
        assert "with the next question: two words.png, 336 x 336\r\n" in chat.until("> ")
        chat.type("\x1b[A\x1b[A")  # up, up
        chat.until(COUNT)
        chat.type("\n")
        chat.until("created")
        chat.until("> ")
        chat.type("\x04")
        assert chat.end()[0] == 0
        file.seek(0)
        answers = file.read().splitlines()
    assert len(answers) == (2 if redirected else 0)
    assert a_history(tmp_path) == [COUNT, f"/image {tmp_path}/two words.png", COUNT]
    assert os.stat(tmp_path / "pyllava" / "history").st_mode & 0o077 == 0
    again = Terminal(tmp_path)
    again.until("> ")
    again.type("\x1b[A")
    again.until(COUNT)
    again.type("\x15\x04")
    assert again.end()[0] == 0


@terminal
def test_without_readline(tmp_path: Path) -> None:
    chat = Terminal(tmp_path, editing=False)
    chat.until("> ")
    chat.type(f"{COUNT}\n")
    assert "\r\n4\r\n" in chat.until("> ")
    chat.type("\x04")
    assert chat.end()[0] == 0
    assert not (tmp_path / "pyllava").exists()


@terminal
def test_no_place_for_the_history(tmp_path: Path) -> None:
    (tmp_path / "pyllava").write_text("not a folder")
    chat = Terminal(tmp_path)
    chat.until("> ")
    chat.type(f"{COUNT}\n")
    assert "\r\n4\r\n" in chat.until("> ")
    chat.type("\x04")
    code, last = chat.end()
    assert code == 0
    assert "error" not in last


@terminal
def test_a_failure_is_told_and_the_conversation_goes_on(tmp_path: Path) -> None:
    chat = Terminal(tmp_path, "-c", "140")
    chat.until("> ")
    for typed, message in (
        ("/image missing.png", "error: missing.png: No such file or directory\r\n"),
        ("/foo", "error: /foo: no such command; /help lists them"),
        ("/save", "error: /save: no answer yet\r\n"),
        (
            "all of the shapes " * 9,
            "; /drop takes the pictures back, /clear forgets the conversation\r\nwith the next question: scene.png",
        ),
    ):
        chat.type(f"{typed}\n")
        assert message in chat.until("\n> ")
    chat.type(f"{COUNT}\n")
    assert "\r\n4\r\n" in chat.until("\n> ")
    chat.type("/clear\n")
    assert "forgotten" in chat.until("\n> ")
    chat.type("\x04")
    assert chat.end()[0] == 0


@terminal
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_ends_it(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        chat = Terminal(tmp_path, stdout=full)
        chat.until("> ")
        chat.type(f"{COUNT}\n")
        code, last = chat.end()
    assert code == 1
    assert last.endswith("pyllava-cli: error: No space left on device\r\n")
