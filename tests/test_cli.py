"""The command line: what reaches the model, what reaches stdout and stderr, and the exit codes."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import pyllava.llava
from pyllava import _progress, cli
from pyllava._facts import layers_run
from pyllava._named_pictures import expanded
from pyllava._terminal import DEMO_NOTE
from pyllava.answer import Answer, Stream, Timings, Usage
from pyllava.cli.caption_options import caption_parser
from pyllava.cli.main import COMMANDS
from pyllava.cli.options import ask_parser, model_arguments, sampling_arguments
from pyllava.errors import ModelMismatchError
from pyllava.templates import TEMPLATES, ImageMark

ROOT = Path(__file__).resolve().parents[1]
ENCODED = "encode_image_with_clip: image embedding created: 576 tokens\n"
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


class FakeLlava:
    """Keeps what it is told and answers with `pieces`."""

    pieces: tuple[str, ...] = ("It is", " a red", " square.")
    is_demo = False
    fails: BaseException | None = None
    built: list[FakeLlava]

    def __init__(self, model: Any = None, mmproj: Any = None, **options: Any) -> None:
        self.options = {"model": model, "mmproj": mmproj, **options}
        self.asked: list[dict[str, Any]] = []
        self.template = TEMPLATES["vicuna_v1"]
        self.devices = ["cpu"]
        self.closed = False
        self.built.append(self)

    def __enter__(self) -> FakeLlava:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def ask(self, images: list[Image.Image], prompt: str, **options: Any) -> Stream:
        colors = [image.getpixel((0, 0)) for image in images]
        self.asked.append({"images": colors, "prompt": prompt, **options})
        usage = Usage(576 * len(images), 45, 0, 0, (576,) * len(images))

        def pieces() -> Generator[str, None, Answer]:
            yield from self.pieces
            if self.fails is not None:
                raise self.fails
            done = Usage(usage.image_tokens, 45, 21, 3, usage.image_tokens_each)
            return Answer("".join(self.pieces), done, Timings(1.5, 0.5, 2.0, 0.25), "stop")

        return Stream(usage, pieces())

    def prompt_tokens(self, images: Any, prompt: str, **options: Any) -> list[int | ImageMark]:
        return [1, ImageMark(0), 29871]

    def token_text(self, token: int) -> str:
        return f"t{token}"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeLlava]:
    class Fake(FakeLlava):
        built: list[FakeLlava] = []  # noqa: RUF012

    monkeypatch.setattr(pyllava.llava, "Llava", Fake)
    return Fake


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, str]:
    paths = {}
    for name, color in (("red", RED), ("green", GREEN), ("blue", BLUE)):
        paths[name] = str(tmp_path / f"{name}.png")
        Image.new("RGB", (8, 6), color).save(paths[name])
    return paths


@pytest.fixture
def red(pictures: dict[str, str]) -> str:
    return pictures["red"]


def tag(color: tuple[int, int, int]) -> str:
    file = io.BytesIO()
    Image.new("RGB", (3, 3), color).save(file, "PNG")
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


# --- the answer and what goes beside it ---


def test_answer_alone_on_stdout(fake: type[FakeLlava], red: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-m", "m.gguf", "--image", red, "-p", "What is this?"]) == 0
    out, err = capsys.readouterr()
    assert out == "It is a red square.\n"
    assert err == (
        ENCODED + "\n\n"
        "    load    1500.00 ms\n"
        "  encode     500.00 ms /   576 image tokens (  1152.00 tokens per second)\n"
        " prefill    2000.00 ms /   600 tokens (   300.00 tokens per second)\n"
        "  decode     250.00 ms /     3 tokens (    12.00 tokens per second)\n"
        "   total    4250.00 ms\n"
    )
    (model,) = fake.built
    assert model.closed
    assert model.asked == [
        {
            "images": [RED],
            "prompt": "What is this?",
            "raw": False,
            "system": None,
            "stream": True,
            "max_tokens": 512,
        }
    ]


@pytest.mark.parametrize("pieces", [(), ("",), ("one\n",), ("two\n", "lines\n"), ("né", "\u4e2d")])
def test_one_newline_at_the_end(
    fake: type[FakeLlava], red: str, capsys: pytest.CaptureFixture[str], pieces: tuple[str, ...]
) -> None:
    fake.pieces = pieces
    assert cli.main(["--image", red]) == 0
    assert capsys.readouterr().out == "".join(pieces).removesuffix("\n") + "\n"


def test_every_piece_is_flushed(fake: type[FakeLlava], red: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder(io.StringIO):
        flushed: list[str] = []  # noqa: RUF012

        def flush(self) -> None:
            self.flushed.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Recorder())
    assert cli.main(["--image", red]) == 0
    assert Recorder.flushed[:3] == ["It is", "It is a red", "It is a red square."]


def test_no_perf(fake: type[FakeLlava], red: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--image", red, "--no-perf"]) == 0
    assert capsys.readouterr().err == ENCODED + "\n"


def test_log_disable(fake: type[FakeLlava], red: str, capsys: pytest.CaptureFixture[str]) -> None:
    fake.is_demo = True
    assert cli.main(["--image", red, "--log-disable", "--top-k", "5"]) == 0
    assert capsys.readouterr() == ("It is a red square.\n", "")


def test_demo_model_says_so(fake: type[FakeLlava], red: str, capsys: pytest.CaptureFixture[str]) -> None:
    fake.is_demo = True
    assert cli.main(["--image", red]) == 0
    out, err = capsys.readouterr()
    assert out == "It is a red square.\n"
    assert err.startswith(DEMO_NOTE + "\n")
    assert fake.built[0].options["model"] is None


def test_verbose_prompt(fake: type[FakeLlava], red: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--image", red, "-p", "Why\\n?", "--verbose-prompt"]) == 0
    err = capsys.readouterr().err
    assert "prompt: 'Why\\n?'\n" in err
    assert "     1 -> 't1'\n image -> 0\n 29871 -> 't29871'\n" in err


# --- options ---


def options_of(*argv: str) -> Any:
    return ask_parser().parse(argv)


def test_options_reach_the_model(fake: type[FakeLlava], red: str) -> None:
    argv = ["-m", "dir", "--mmproj", "p.gguf", "-c", "2048", "-b", "64", "-t", "3", "-ngl", "0", "--no-mmap"]
    argv += ["-ctk", "q8_0", "-ctv", "f16", "--precision", "fast", "--template", "mistral_instruct"]
    argv += ["-n", "7", "--temp", "0.1", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.05", "-s", "42"]
    argv += ["--repeat-penalty", "1.1", "--repeat-last-n", "-1", "--system", "Be brief."]
    argv += ["--image-max-tiles", "3", "--image-merge", "flat", "-np", "2", "--kv-cells", "3000"]
    assert cli.main([*argv, "--image", red]) == 0
    (model,) = fake.built
    assert model.options == {
        "model": "dir",
        "mmproj": "p.gguf",
        "n_ctx": 2048,
        "n_batch": 64,
        "n_parallel": 2,
        "kv_cells": 3000,
        "n_threads": 3,
        "n_gpu_layers": 0,
        "use_mmap": False,
        "type_k": "q8_0",
        "type_v": "f16",
        "precision": "fast",
        "template": "mistral_instruct",
        "image_max_tiles": 3,
        "image_merge": "flat",
        "progress": None,
    }
    (asked,) = model.asked
    expected = {
        "max_tokens": 7,
        "temperature": 0.1,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "seed": 42,
        "repeat_penalty": 1.1,
        "repeat_last_n": -1,
        "system": "Be brief.",
    }
    assert {key: asked[key] for key in expected} == expected


def test_every_way_of_sampling_reaches_the_model() -> None:
    argv = "--dynatemp-range .5 --dynatemp-exp 2 --typical .9 --top-nsigma 1.5 --xtc-probability .5 --xtc-threshold .2"
    argv += " --presence-penalty -1 --frequency-penalty .25 --dry-multiplier .8 --dry-base 2 --dry-allowed-length 3"
    argv += (
        " --dry-penalty-last-n -1 --dry-sequence-breaker none --mirostat 2 --mirostat-ent 4 --mirostat-lr .2"
    )
    argv += " --adaptive-target .3 --adaptive-decay .5 -l 15+1.5 -l 15-1e-1 --logit-bias 7-inf -l ab-1+2 --ignore-eos"
    argv += " --samplers top-k;temp;typical"
    assert sampling_arguments(options_of(*argv.split())) == {
        "max_tokens": 512,
        "dynatemp_range": 0.5,
        "dynatemp_exponent": 2.0,
        "typical_p": 0.9,
        "top_n_sigma": 1.5,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.2,
        "presence_penalty": -1.0,
        "frequency_penalty": 0.25,
        "dry_multiplier": 0.8,
        "dry_base": 2.0,
        "dry_allowed_length": 3,
        "dry_penalty_last_n": -1,
        "dry_sequence_breakers": [],
        "mirostat": 2,
        "mirostat_tau": 4.0,
        "mirostat_eta": 0.2,
        "adaptive_target": 0.3,
        "adaptive_decay": 0.5,
        "logit_bias": {15: 1.4, 7: -math.inf, "ab-1": 2.0},
        "ignore_eos": True,
        "samplers": ["top_k", "temperature", "typ_p"],
    }


def test_every_option_of_an_answer_is_one_of_the_command_line() -> None:
    """But for what a command line has no use for."""
    known = {action.dest for action in ask_parser()._actions}
    of_many = {"start_with", "timeout", "stop_loops"}  # of those that one waits for overnight
    assert set(pyllava.Options.__annotations__) - known == {"reuse", *of_many}
    known = {action.dest for action in caption_parser()._actions}
    assert known >= {"start_with", "timeout", "no_loop_detector"}


def test_the_order_of_stages_and_the_breakers() -> None:
    letters = sampling_arguments(options_of("--sampling-seq", "edskypmxta"))["samplers"]
    shown = re.sub(r"\s", "", ask_parser().format_help())
    assert f"(default:{';'.join(letters)})" in shown
    assert options_of("--samplers", ";".join(letters)).samplers == letters
    assert options_of("--samplers", "").samplers == options_of("--sampler-seq", "").samplers == []
    argv = ["--dry-sequence-breaker", r"\n\n", "--dry-sequence-breaker", "-"]
    assert options_of(*argv).dry_sequence_breakers == ["\n\n", "-"]


@pytest.mark.parametrize(
    ("names", "value"),
    [
        (["--typical", "--typical-p", "--typical_p"], ".5"),
        (["--top-nsigma", "--top-n-sigma"], ".5"),
        (["-l", "--logit-bias"], "5+1"),
        (["--sampling-seq", "--sampler-seq"], "kt"),
        (["-n", "--predict", "--n-predict", "--n_predict"], "5"),
        (["-c", "--ctx-size", "--ctx_size"], "5"),
        (["-ngl", "--gpu-layers", "--n-gpu-layers", "--n_gpu_layers"], "5"),
        (["-p", "--prompt"], "a_b-c"),
        (["-ctk", "--cache-type-k", "--cache_type_k"], "f16"),
    ],
)
def test_aliases(names: list[str], value: str) -> None:
    expected = options_of(names[0], value)
    for name in names:
        assert options_of(name, value) == expected
    assert options_of(f"{names[-1]}={value}") == expected


def test_values_may_start_with_a_dash() -> None:
    assert options_of("-p", "--image").prompt == "--image"
    assert options_of("-p", "- one\n- two").prompt == "- one\n- two"
    assert options_of("-n", "-1", "-s", "-1", "--temp", "-0.5").temperature == 0.0


@pytest.mark.parametrize("argv", [[], ["-n", "-1"]])
def test_as_many_tokens_as_in_python_unless_told_otherwise(argv: list[str]) -> None:
    assert sampling_arguments(options_of(*argv))["max_tokens"] == pyllava.Sampling().max_tokens == 512


@pytest.mark.parametrize("seed", ["-1", "4294967295"])
def test_random_seeds(seed: str) -> None:
    assert "seed" not in sampling_arguments(options_of("-s", seed))


def test_defaults_of_the_library_stay() -> None:
    arguments = model_arguments(options_of("-t", "-1", "-c", "0"))
    assert arguments["n_ctx"] is None
    assert arguments["n_threads"] is None
    assert arguments["template"] == "auto"
    assert "n_gpu_layers" not in arguments


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bad"], "--bad: no such option ("),
        (["info", "a", "b"], "'b': too many words, need FILE alone ("),
        (["--imag", "cat.jpg"], "--imag: no such option; did you mean --image?"),
        (["-n"], "argument -n: needs a value"),
        (["-n", "x"], "argument -n/--predict/--n-predict: 'x', need an integer of at least 1, or -1"),
        (["-n", "0"], "need an integer of at least 1"),
        (["--temp", "nan"], "need a number"),
        (["--top-p", "1.5"], "need a number in 0..1"),
        (["--repeat-penalty", "0"], "need a number above 0"),
        (["--samplers", "top_k;infill"], "'infill', need names with semicolons between them: penalties, dry"),
        (["--sampling-seq", "ki"], "'i', need letters of: e penalties, d dry"),
        (["-l", "15"], "-l/--logit-bias: '15', need a token's id or a text, + or -, and a number or inf"),
        (["-l", "+5"], "'+5', need a token's id"),
        (["--mirostat", "3"], "'3', need 0, 1 or 2"),
        (["--dry-base", "0.5"], "need a number of at least 1"),
        (["--adaptive-target", "2"], "need a number of at most 1"),
        (["--adaptive-decay", "1"], "need a number in 0..0.99"),
        (["-b", "0"], "need an integer of at least 1"),
        (["-ctk", "q9"], "argument -ctk/--cache-type-k: 'q9', need one of f32, f16"),
        (["--template", "gpt9"], "argument --template: 'gpt9', need one of auto, vicuna"),
        (["--no-mmap=1"], "--no-mmap: takes no value, found '1'"),
        (["--mmproj", "p.gguf"], "--mmproj: needs -m"),
        (["-p", "a", "-f", "b"], "-p and -f: need one of them"),
        (["--image", "RED", "-p", "<image>", "--system", "x"], "no --template, no --system"),
        (["--image", "RED", "-p", "<image>", "--template", "mpt"], "no --template, no --system"),
        (["info"], "needs FILE"),
    ],
)
def test_usage_errors(
    fake: type[FakeLlava], red: str, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert cli.main([red if word == "RED" else word for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pyllava-cli: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert fake.built == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-hff", "x.gguf"], "-hff: no such option; -hf REPO[:QUANT] fetches a model"),
        (["-hffoo"], "-hffoo: no such option ("),
        (["-vh"], "-vh: no such option ("),
        (["-hv"], "-hv: no such option ("),
        (["-n5"], "-n5: no such option; did you mean -n 5?"),
        (["-image", "cat.jpg"], "-image: no such option; did you mean --image?"),
        (["--bad", "--help"], "--bad: no such option ("),
        (["--help", "--bad"], "--bad: no such option ("),
        (["--version", "-x"], "-x: no such option ("),
        (["--promt=hello", "-h"], "--promt: no such option; did you mean --prompt?"),
        (["-i"], "-i: no such option; pyllava-cli chat has a conversation"),
        (["chat", "-mu", "https://a/b"], "-mu: no such option; -hf REPO[:QUANT] fetches"),
        (["chat", "-hf", "a/b", "-m", "b"], "-m and -hf: need one of them"),
        (["info", "-hf", "a/b"], "-hf: no such option"),
        (["info", "-help=1"], "-help: no such option"),
        (["quantize", "-th"], "-th: no such option"),
        (["bench", "-hm"], "-hm: no such option"),
        (["convert", "-hf", "a/b"], "-hf: no such option"),
        (["convert", "dir", "-oh"], "-oh: no such option"),
    ],
)
def test_a_word_with_one_dash_is_one_option(
    fake: type[FakeLlava], capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pyllava-cli: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "same"),
    [
        (["-mm", "p.gguf"], ["--mmproj", "p.gguf"]),
        (["-sys", "-h or not"], ["--system", "-h or not"]),
        (["--system-prompt", "x"], ["--system", "x"]),
        (["--system_prompt=x"], ["--system", "x"]),
        (["--temperature", "0.5"], ["--temp", "0.5"]),
        (["--chat-template", "vicuna"], ["--template", "vicuna_v1"]),
        (["--chat-template", "mistral-v7"], ["--template", "mistral_instruct"]),
        (["--log-verbose"], ["-v"]),
    ],
)
def test_aliases_of_llama_cpp(argv: list[str], same: list[str]) -> None:
    assert options_of(*argv) == options_of(*same) != options_of()


def test_inert_sampling_options_are_named(
    fake: type[FakeLlava], red: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--image", red, "--top-k", "5", "-s", "1"]) == 0
    assert "--top-k, --seed: no effect without --temp above 0" in capsys.readouterr().err
    assert cli.main(["--image", red, "--top-k", "5", "-s", "1", "--temp", "0.5"]) == 0
    assert "no effect" not in capsys.readouterr().err
    for drawn in (["--dynatemp-range", "1"], ["--sampling-seq", "k"], ["--xtc-probability", "0.5"]):
        assert cli.main(["--image", red, "--top-k", "5", "--mirostat", "2", *drawn]) == 0
        assert "no effect" not in capsys.readouterr().err


def test_help_and_version(fake: type[FakeLlava], capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("-h", "--help", "--usage", "-help"):
        assert cli.main([flag]) == 0
        out = capsys.readouterr().out
        for word in ("--image", "--mmproj", "-ngl", "examples:", "chatml_direct", "info FILE"):
            assert word in out
    assert cli.main(["info", "-h"]) == 0
    assert "--tensors" in capsys.readouterr().out
    for flag in ("--version", "-version"):
        assert cli.main([flag]) == 0
        assert capsys.readouterr().out == f"pyllava {pyllava.__version__}\n"
    for command in COMMANDS:
        assert cli.main([command, "-help"]) == 0
        assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    assert f"pyllava-cli {name}" in capsys.readouterr().out
    assert f"pyllava-cli {name} " in ask_parser().format_help()


# --- prompts and pictures ---


@pytest.mark.parametrize("argv", [[], ["-p", ""], ["-p", " \\n"]])
def test_default_prompt(fake: type[FakeLlava], red: str, argv: list[str]) -> None:
    assert cli.main(["--image", red, *argv]) == 0
    assert fake.built[0].asked[0]["prompt"] == "Provide a full description."


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["-p", r"a\nb"], "a\nb"),
        (["-e", "-p", r"a\nb"], "a\nb"),
        (["--no-escape", "-p", r"a\nb"], r"a\nb"),
    ],
)
def test_escapes(fake: type[FakeLlava], red: str, argv: list[str], expected: str) -> None:
    assert cli.main(["--image", red, *argv]) == 0
    assert fake.built[0].asked[0]["prompt"] == expected


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        ("Was ist\\tdäs?\n\n".encode(), "Was ist\tdäs?\n"),
        ("Was ist\\tdäs?\r\n\r\n".encode(), "Was ist\tdäs?\n"),
        (b"\xef\xbb\xbfa\r\nb\rc\r\n", "a\nb\rc"),
        (b"\xef\xbb\xbf", "Provide a full description."),
        ("\ufeffa\ufeffb".encode(), "a\ufeffb"),
        (b"USER:\r\n<image>\r\nASSISTANT:\r\n", "USER:\n<image>\nASSISTANT:"),
    ],
)
def test_prompt_file(fake: type[FakeLlava], red: str, tmp_path: Path, data: bytes, prompt: str) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(data)
    assert cli.main(["--image", red, "-f", str(path)]) == 0
    assert fake.built[0].asked[0]["prompt"] == prompt


def test_files_below_the_home_folder(
    fake: type[FakeLlava], red: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no shell sees the ``~``: behind an equals sign, or in quotes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "q.txt").write_text("What is this?")
    for argv in (["--image=~/red.png"], ["~/red.png"]):
        assert cli.main([*argv, "--file=~/q.txt"]) == 0
        assert fake.built[-1].asked[0]["images"] == [RED]
        assert fake.built[-1].asked[0]["prompt"] == "What is this?"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("What?".encode("utf-16"), "prompt.txt: UTF-16 text, need UTF-8"),
        (b"\xfe\xff" + "What?".encode("utf-16-be"), "prompt.txt: UTF-16 text, need UTF-8"),
        ("What?".encode("utf-16-le"), "prompt.txt: zero bytes, as in UTF-16 text, need UTF-8"),
        ("What?".encode("utf-32"), "prompt.txt: UTF-16 text, need UTF-8"),
        (b"caf\xe9", "prompt.txt: not UTF-8 text (byte 0xe9 at offset 3)"),
    ],
)
def test_prompt_file_of_another_encoding(
    fake: type[FakeLlava],
    red: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    data: bytes,
    message: str,
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(data)
    assert cli.main(["--image", red, "-f", str(path)]) == 1
    assert message in capsys.readouterr().err
    assert fake.built == []


def test_several_images_several_answers(
    fake: type[FakeLlava], pictures: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--image", pictures["red"], "--image", pictures["blue"], "-p", "Q"]) == 0
    (model,) = fake.built
    assert [asked["images"] for asked in model.asked] == [[RED], [BLUE]]
    out, err = capsys.readouterr()
    assert out == "It is a red square.\n" * 2
    assert err.index(pictures["red"]) < err.index(pictures["blue"])
    assert err.count(ENCODED) == 2
    assert err.count("total") == 1


@pytest.mark.parametrize("bad", ["missing.png", "text.png", "empty.png", "nothing", "no*.jpg", "nul\0.png"])
def test_one_bad_picture_of_several(
    fake: type[FakeLlava],
    pictures: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    bad: str,
) -> None:
    """The others are answered, each at its place, whichever place the bad one has."""
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    (tmp_path / "nothing").mkdir()
    good = [pictures["red"], pictures["blue"]]
    for place in range(3):
        several = [*good[:place], str(tmp_path / bad), *good[place:]]
        assert cli.main([*(word for name in several for word in ("--image", name)), "--no-perf"]) == 1
        assert [asked["images"] for asked in fake.built[-1].asked] == [[RED], [BLUE]]
        out, err = capsys.readouterr()
        lines = ["It is a red square.\n"] * 2
        assert out == "".join([*lines[:place], "\n", *lines[place:]])
        before, error, after = err.partition("pyllava-cli: error: ")
        assert error
        assert (before.count(ENCODED), after.count(ENCODED)) == (place, 2 - place)
        assert bad.partition("\0")[0] in after.partition("\n")[0]


def test_no_model_for_bad_pictures(
    fake: type[FakeLlava], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--image", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--log-disable"]) == 1
    out, err = capsys.readouterr()
    assert out == "\n\n"
    assert [line.rsplit("/", 1)[-1] for line in err.splitlines()] == [
        "a.png: No such file or directory",
        "b.png: No such file or directory",
    ]
    assert fake.built == []


def test_a_picture_that_does_not_fit_costs_no_other(
    fake: type[FakeLlava], pictures: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(self: Any, images: Any, prompt: str, **options: Any) -> Stream:
        if images[0].getpixel((0, 0)) == GREEN:
            raise pyllava.ContextOverflowError("too large")
        return FakeLlava.ask(self, images, prompt, **options)

    fake.ask = ask  # type: ignore[method-assign]
    assert cli.main(["--image", pictures["red"], pictures["green"], pictures["blue"]]) == 1
    out, err = capsys.readouterr()
    assert out == "It is a red square.\n\nIt is a red square.\n"
    assert "pyllava-cli: error: too large\n" in err


@pytest.fixture
def album(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "album"
    (folder / "deeper").mkdir(parents=True)
    for name in (
        "b10.png",
        "b9.PNG",
        "A.jpg",
        "c.webp",
        ".hidden.png",
        "notes.txt",
        "deeper/d.png",
        "x[1].png",
    ):
        (folder / name).touch()
    (folder / "one,two.png").touch()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["*.png"], ["b10.png", "one,two.png", "x[1].png"]),
        (["b*"], ["b9.PNG", "b10.png"]),
        (["b?.PNG", "[Ac].*"], ["b9.PNG", "A.jpg", "c.webp"]),
        (["**/d.png"], ["deeper/d.png"]),
        (["x[1].png"], ["x[1].png"]),
        (["deeper"], ["deeper/d.png"]),
        (["~/deeper/"], ["{folder}/deeper/d.png"]),
        (["b10.png", "b9.PNG"], ["b10.png", "b9.PNG"]),
        (["b10.png,A.jpg"], ["b10.png", "A.jpg"]),
        (["one,two.png"], ["one,two.png"]),
        (["b10.png,no.png"], ["b10.png,no.png"]),
        (["zz*", "A.jpg"], ["zz*", "A.jpg"]),
        (["data:image/png;base64,[*]"], ["data:image/png;base64,[*]"]),
        (["-"], ["-"]),
    ],
)
def test_names_of_pictures(album: Path, names: list[str], expected: list[str]) -> None:
    assert expanded(names) == [name.format(folder=album) for name in expected]


def test_a_folder_of_pictures(album: Path) -> None:
    found = [os.path.basename(path) for path in expanded([str(album)])]
    assert found == ["A.jpg", "b9.PNG", "b10.png", "c.webp", "one,two.png", "x[1].png"]


def test_pictures_that_not_every_pillow_reads_are_not_passed_over(tmp_path: Path) -> None:
    for name in ("a.avif", "b.HEIC", "c.heif", "d.txt"):
        (tmp_path / name).touch()
    assert [os.path.basename(path) for path in expanded([str(tmp_path)])] == ["a.avif", "b.HEIC", "c.heif"]


def test_a_pattern_that_a_shell_expanded() -> None:
    for argv in (
        ["--image", "a", "b", "-p", "Q"],
        ["-p", "Q", "--image", "a", "b"],
        ["--image=a", "b", "-p", "Q"],
    ):
        assert options_of(*argv).image == ["a", "b"]
    assert options_of("--image", "a", "b", "--image", "c", "d", "-n", "5").image == ["a", "b", "c", "d"]
    assert options_of("--image", "-x", "b").image == ["-x", "b"]


def test_a_prompt_from_standard_input(
    fake: type[FakeLlava], red: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Was ist das für ein Bild?\r\n".encode())))
    assert cli.main(["--image", red, "-f", "-"]) == 0
    assert fake.built[0].asked[0]["prompt"] == "Was ist das für ein Bild?"
    assert cli.main(["--image", "-", "-f", "-"]) == 1
    assert "standard input is one of them" in capsys.readouterr().err


def test_raw_prompt(fake: type[FakeLlava], pictures: dict[str, str]) -> None:
    both = ["--image", pictures["red"], "--image", pictures["blue"]]
    assert cli.main([*both, "-p", r"<image>\nUSER:\nHi\nASSISTANT:\n"]) == 0
    assert [asked["images"] for asked in fake.built[0].asked] == [[RED], [BLUE]]
    assert all(asked["raw"] for asked in fake.built[0].asked)
    assert cli.main([*both, "-p", "<image> and <image>"]) == 0
    (asked,) = fake.built[1].asked
    assert asked["images"] == [RED, BLUE]
    assert asked["raw"]


def test_image_in_the_prompt(fake: type[FakeLlava], capsys: pytest.CaptureFixture[str], red: str) -> None:
    assert cli.main(["-p", f"{tag(GREEN)}What is this?"]) == 0
    assert fake.built[0].asked[0]["images"] == [GREEN]
    assert fake.built[0].asked[0]["prompt"] == "What is this?"
    assert "base64" not in capsys.readouterr().err
    assert cli.main(["--image", red, "-p", f"{tag(BLUE)} Hi"]) == 1
    assert "an image in the prompt and as a file: need one of them\n" in capsys.readouterr().err
    assert cli.main(["-p", f"USER: <image>{tag(BLUE)} Hi"]) == 0
    assert fake.built[1].asked[0]["images"] == [BLUE]
    assert fake.built[1].asked[0]["prompt"] == "USER: <image> Hi"
    assert fake.built[1].asked[0]["raw"]
    assert cli.main(["-p", tag(BLUE)]) == 0
    assert fake.built[2].asked[0]["prompt"] == "Provide a full description."


def test_an_image_from_everywhere(
    fake: type[FakeLlava],
    red: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """--image takes what `load_image` takes as a text, and "-"."""
    data = Path(red).read_bytes()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "home.png").write_bytes(data)
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    words = ["-", url, Path(red).as_uri(), "~/home.png"]
    stdin = io.TextIOWrapper(io.BytesIO(data))
    monkeypatch.setattr("sys.stdin", stdin)
    assert cli.main([argument for word in words for argument in ("--image", word)]) == 0
    assert [asked["images"] for asked in fake.built[0].asked] == [[RED]] * 4
    err = capsys.readouterr().err
    assert "standard input:" in err
    assert "image in a data: URL:" in err
    assert url not in err
    assert cli.main(["--image", "-"]) == 1  # it was read
    assert "standard input: empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--no-perf"], "no image: need its FILE"),
        (["--image", "https://example.org/a.png"], "a web address: fetch it first"),
        (["-p", "What is in <image>?"], "no image: need its FILE"),
        (["--image", "MISSING"], "missing.png: No such file or directory"),
        (["--image", "NOTHING"], "nothing: a folder without pictures (.jpg"),
        (["--image", "NOTHING", "-p", "<image>"], "nothing: a folder without pictures (.jpg"),
        (["--image", "no*.jpg"], "no*.jpg: no file fits this pattern"),
        (["--image", "RED", "--image", "MISSING", "-p", "<image><image>"], "missing.png: No such file"),
        (["--image", "TEXT"], "text.png: not a JPEG, PNG, WebP, GIF, BMP or TIFF image"),
        (["--image", "EMPTY"], "empty.png: empty"),
        (["--image", "RED", "-p", "<image><image>"], "the prompt has 2 <image> marks, images given: 1"),
        (["--image", "RED", "-f", "MISSING"], "missing.png: No such file or directory"),
        (["--image", "RED", "-p", "\\xff"], "\\xff is not UTF-8"),
        (["--image", "RED", "-p", "\udce9"], "the prompt is not UTF-8"),
        (["-p", '<img src="data:image/jpeg;base64,QUJD'], "image tag in the prompt: no end of it"),
        (["-p", '<img src="data:image/png;base64,QU=D">'], "invalid base64"),
        (["-p", '<img src="data:image/png,QUJD">'], "not a base64 data: URL"),
        (["-p", '<img src="data:image/png;base64,QUJD">'], "image bytes: not a JPEG"),
        (["-p", tag(RED) + tag(RED)], "image tag in the prompt: 2 of them"),
    ],
)
def test_bad_pictures_and_prompts(
    fake: type[FakeLlava],
    red: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    paths = {"MISSING": "missing.png", "TEXT": "text.png", "EMPTY": "empty.png", "NOTHING": "nothing"}
    (tmp_path / "nothing").mkdir()
    words = {"RED": red, **{word: str(tmp_path / name) for word, name in paths.items()}}
    assert cli.main([words.get(word, word) for word in argv]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pyllava-cli: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert fake.built == []


# --- failures and signals ---


def test_error_of_the_model(
    monkeypatch: pytest.MonkeyPatch, red: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise ModelMismatchError("p.gguf: projector gives 64,\nmodel needs 4096")

    monkeypatch.setattr(pyllava.llava, "Llava", refuse)
    assert cli.main(["--image", red]) == 1
    assert capsys.readouterr().err == "pyllava-cli: error: p.gguf: projector gives 64, model needs 4096\n"


def test_interrupt_while_answering(
    fake: type[FakeLlava], red: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.fails = KeyboardInterrupt()
    assert cli.main(["--image", red]) == 130
    out, err = capsys.readouterr()
    assert out == "It is a red square."
    assert "Traceback" not in err
    assert fake.built[0].closed


def test_broken_pipe(fake: type[FakeLlava], red: str, capsys: pytest.CaptureFixture[str]) -> None:
    fake.fails = BrokenPipeError(32, "Broken pipe")
    assert cli.main(["--image", red]) == 1
    assert "error" not in capsys.readouterr().err


def test_stdout_of_another_encoding(fake: type[FakeLlava], red: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.pieces = ("caf\u00e9 \u4e2d",)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert cli.main(["--image", red]) == 0
    assert raw.getvalue() == b"caf\\xe9 \\u4e2d\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_closed_streams(
    fake: type[FakeLlava], red: str, monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    monkeypatch.setattr(sys, stream, None)
    assert cli.main(["--image", red]) == 0


def test_progress_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(_progress, "_DELAY_S", 0)
    bars = _progress.StageBars()
    for stage in ("load", "encode", "prefill"):
        for fraction in (0.0, 0.5, 1.0):
            bars(stage, fraction)
    bars.close()
    shown = terminal.getvalue()
    assert all(stage in shown for stage in ("load", "encode", "prefill"))
    assert "\n" not in shown
    assert shown.rsplit("\r", 2)[-2].strip() == ""


def test_a_bar_only_on_a_terminal(fake: type[FakeLlava], red: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert cli.main(["--image", red]) == 0
    assert isinstance(fake.built[0].options["progress"], _progress.StageBars)
    assert cli.main(["--image", red, "--log-disable"]) == 0
    assert fake.built[1].options["progress"] is None


# --- with a real model, tiny and random ---


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    pytest.importorskip("gguf")
    pytest.importorskip("sentencepiece")
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import TinySpec, write_clip_folder, write_llava_checkpoint

    folder = tmp_path_factory.mktemp("tiny")
    llava, clip, out = folder / "llava", folder / "clip", folder / "out"
    write_llava_checkpoint(llava, TinySpec())
    write_clip_folder(clip, TinySpec())
    out.mkdir()
    convert("llava_surgery", "-m", llava)
    projector = ("--llava-projector", llava / "llava.projector", "--output-dir", out)
    convert("convert_image_encoder_to_gguf", "-m", clip, *projector)
    convert("convert_legacy_llama", llava, "--skip-unknown", "--outfile", out / "ggml-model-f16.gguf")
    wide = folder / "wide"
    write_llava_checkpoint(wide, TinySpec(n_embd=128))
    convert("llava_surgery", "-m", wide)
    projector = ("--llava-projector", wide / "llava.projector", "--output-dir", wide)
    convert("convert_image_encoder_to_gguf", "-m", clip, *projector)
    return {
        "wide": str(wide / "mmproj-model-f16.gguf"),
        "folder": str(out),
        "model": str(out / "ggml-model-f16.gguf"),
        "mmproj": str(out / "mmproj-model-f16.gguf"),
    }


def convert(script: str, *arguments: object) -> None:
    command = [sys.executable, str(ROOT / "convert" / f"{script}.py"), *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyllava", *arguments]
    defaults = {"capture_output": True, "encoding": "utf-8", "cwd": ROOT, "timeout": 120, "check": False}
    return subprocess.run(command, **{**defaults, **options})


def test_real_answer(tiny: dict[str, str], red: str) -> None:
    done = run("-m", tiny["folder"], "--image", red, "-p", "Hi", "-n", "12")
    assert done.returncode == 0, done.stderr
    with pyllava.Llava(tiny["model"], tiny["mmproj"]) as model:
        answer = model.ask(red, "Hi", max_tokens=12)
    assert done.stdout == f"{answer}\n"
    assert "encode_image_with_clip: image embedding created: 16 tokens\n" in done.stderr
    assert f"/ {answer.usage.prompt_tokens:5d} tokens" in done.stderr


def test_real_sampling_and_raw(tiny: dict[str, str], red: str) -> None:
    sampled = ("--temp", "0.9", "--top-k", "20", "--top-p", "0.9", "-s", "7", "-n", "12")
    done = run("-m", tiny["model"], "--mmproj", tiny["mmproj"], "--image", red, "-p", "a<image>b", *sampled)
    assert done.returncode == 0, done.stderr
    with pyllava.Llava(tiny["model"], tiny["mmproj"]) as model:
        answer = model.ask(
            red, "a<image>b", raw=True, max_tokens=12, temperature=0.9, top_k=20, top_p=0.9, seed=7
        )
    assert done.stdout == f"{answer}\n"


def test_real_gpu_layers_warn_once(tiny: dict[str, str], red: str) -> None:
    done = run("-m", tiny["folder"], "--image", red, "-n", "1", "-ngl", "99")
    assert done.returncode == 0
    assert done.stderr.count("n_gpu_layers") == 1
    assert "no GPU back end" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-m", "missing.gguf"), "missing.gguf: No such file or directory"),
        (("-m", "{mmproj}", "--mmproj", "{mmproj}"), "mmproj"),
        (("-m", "{model}", "--mmproj", "{model}"), "ggml-model"),
        (("-m", "{model}", "--mmproj", "{wide}"), "128"),
        (("-m", "{red}"), "a picture, need a GGUF model"),
        (("-m", "{model}", "-c", "64"), "n_ctx=64"),
    ],
)
def test_real_errors(tiny: dict[str, str], red: str, arguments: tuple[str, ...], message: str) -> None:
    done = run(*(word.format(red=red, **tiny) for word in arguments), "--image", red)
    assert done.returncode == 1
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("pyllava-cli: error: ")
    assert message in last
    assert "Traceback" not in done.stderr


def test_real_missing_projector(tiny: dict[str, str], red: str, tmp_path: Path) -> None:
    lonely = tmp_path / "model.gguf"
    lonely.write_bytes(Path(tiny["model"]).read_bytes())
    done = run("-m", str(lonely), "--image", red)
    assert done.returncode == 1
    *_, error = done.stderr.splitlines()
    assert error.startswith("pyllava-cli: error: ")
    assert "projector" in error


@pytest.mark.skipif(os.name != "posix", reason="pipes and signals of POSIX")
def test_real_pipes_and_full_disks(tiny: dict[str, str], red: str) -> None:
    asking = ("-m", tiny["folder"], "--image", red, "-n", "40", "--no-perf")
    command = [sys.executable, "-m", "pyllava", *asking]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 1
    assert "error" not in err.lower()
    assert "Traceback" not in err
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            done = run(*asking, capture_output=False, stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 1
        assert done.stderr.endswith("pyllava-cli: error: No space left on device\n")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_real_interrupt(tiny: dict[str, str], red: str) -> None:
    many = [word for _ in range(400) for word in ("--image", red)]
    command = [sys.executable, "-m", "pyllava", "-m", tiny["folder"], "-n", "200", *many]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err


# --- info ---


def test_info_of_a_model(tiny: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", tiny["model"]]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[:3] == [
        tiny["model"],
        f"GGUF version 3, {os.path.getsize(tiny['model']) / 1024:.2f} KiB, alignment 32",
        "language model: architecture llama, layers 2, width 64, heads 4, KV heads 2, context 512, vocabulary 384",
    ]
    assert out.splitlines()[3].startswith("a language model of the LLaMA family")
    assert "['<unk>', '<s>', '</s>', '<0x00>', ...] (384)" in out
    assert "tensors (21)\n" in out
    assert "blk.0.attn_q.weight" not in out


def test_info_of_a_projector(tiny: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", tiny["mmproj"], "--tensors"]) == 0
    out = capsys.readouterr().out
    facts = (
        "projector mlp, tower clip, image size 56, patch size 14, patches 16, layers stored 3, layers run 2"
    )
    assert facts in out
    assert "CLIP that sees pictures padded to a square of 56 x 56, and an MLP (LLaVA-1.5 and later)" in out
    assert "output width 64" in out
    assert "v.blk.2.ffn_down.weight" in out


def test_info_says_whether_a_pair_fits(
    tiny: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the files in one folder; what cannot be read there is passed over."""
    shutil.copy(tiny["model"], tmp_path / "model.gguf")
    shutil.copy(tiny["mmproj"], tmp_path / "mmproj.gguf")
    shutil.copy("pyllava/models/demo-mmproj-q8_0.gguf", tmp_path / "other.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    for name, expected in (
        (
            "model.gguf",
            [
                "mmproj.gguf beside it fits",
                "other.gguf beside it does not fit: its width is 256, this one's 64",
            ],
        ),
        ("mmproj.gguf", ["model.gguf beside it fits"]),
        ("other.gguf", ["model.gguf beside it does not fit: its width is 64, this one's 256"]),
    ):
        assert cli.main(["info", str(tmp_path / name)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if " beside it " in line] == expected


def test_info_as_json(tiny: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", tiny["model"], "--json", "--tensors"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["metadata"]["general.architecture"] == "llama"
    assert len(info["metadata"]["tokenizer.ggml.tokens"]) == 384
    assert info["bytes"] == os.path.getsize(tiny["model"])
    assert sum(of_type["tensors"] for of_type in info["types"].values()) == len(info["tensors"]) == 21
    shapes = {tensor["name"]: tensor["shape"] for tensor in info["tensors"]}
    assert shapes["blk.0.ffn_down.weight"] == [64, 160]


def test_info_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(tmp_path / "missing.gguf")]) == 1
    path = tmp_path / "cut.gguf"
    path.write_bytes(b"GGUF\3\0\0\0")
    assert cli.main(["info", str(path)]) == 1
    missing, cut = capsys.readouterr().err.splitlines()
    assert missing.endswith("missing.gguf: No such file or directory")
    assert cut.startswith(f"pyllava-cli: error: {path}: ")


@pytest.mark.parametrize(
    ("metadata", "n_stored", "run"),
    [
        ({}, 23, 23),
        ({}, 24, 23),
        ({}, 32, 31),
        ({"clip.vision.feature_layer": [23]}, 24, 23),
        ({"clip.vision.feature_layer": [-1]}, 24, 24),
        ({"clip.vision.feature_layer": []}, 6, 6),
        ({"clip.vision.feature_layer": [4, 27, 8]}, 27, 27),
        ({"clip.vision.feature_layer": [4, 8]}, 27, 8),
    ],
)
def testlayers_run(metadata: dict[str, Any], n_stored: int, run: int) -> None:
    assert layers_run(metadata, n_stored) == run


def test_layers_run_of_siglip() -> None:
    stored = {24: 24, 26: 26, 27: 26, 32: 32}
    assert {n: layers_run({}, n, is_siglip=True) for n in stored} == stored
