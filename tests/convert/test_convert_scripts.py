"""The scripts as a user runs them: from the source tree, installed, without the extra, on a large
checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import pty
import struct
import subprocess
import sys
import termios
import tokenize
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from layouts import config_16
from tiny import (
    TinySpec,
    language_config,
    vision_tensors,
    write_clip_folder,
    write_llava_checkpoint,
    write_tokenizer,
)

from pyllava.convert import convert_image_encoder_to_gguf, convert_legacy_llama, llava_surgery

SCRIPTS = (
    *("llava_surgery", "llava_surgery_v2", "convert_image_encoder_to_gguf", "convert_legacy_llama"),
    "convert_llava",
)


def test_the_three_steps_from_another_folder(tmp_path: Path, script) -> None:
    """Relative paths, run from elsewhere: the commands of the README."""
    write_llava_checkpoint(tmp_path / "llava-v1.5-tiny", TinySpec(dtype="bf16"), shards=2)
    write_clip_folder(tmp_path / "clip", TinySpec())
    steps = [
        ("llava_surgery", "-m", "llava-v1.5-tiny"),
        ("convert_image_encoder_to_gguf", "-m", "clip", "--llava-projector", "llava-v1.5-tiny/llava.projector",
         "--output-dir", "llava-v1.5-tiny"),
        ("convert_legacy_llama", "llava-v1.5-tiny", "--skip-unknown"),
    ]  # fmt: skip
    outputs = []
    for name, *arguments in steps:
        result = script(name, *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    folder = "llava-v1.5-tiny/"
    wanted = ("llava.projector", "mmproj-model-f16.gguf", "ggml-model-f16.gguf")
    assert outputs == [f"{folder}{name}\n" for name in wanted]


STRANGE = (
    None,
    True,
    -1,
    0,
    2**70,
    1e400,
    float("nan"),
    "",
    "x\ud800",
    "9" * 30,
    [],
    [1],
    [[]],
    {},
    {"a": [1]},
)


@pytest.mark.parametrize("share", [16, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "clip/config.json", "clip/preprocessor_config.json"]
)
def test_any_value_in_any_setting(
    tmp_path: Path, name: str, share: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands in a settings file: a file or one line, never a traceback. (A sixteenth of the cases,
    or all.)
    """
    monkeypatch.setattr(os, "fsync", lambda _: None)
    write_llava_checkpoint(tmp_path, TinySpec(n_layer=1), added={"<image>": 384})
    write_clip_folder(tmp_path / "clip", TinySpec(), layout="vision")
    assert llava_surgery.main(["-m", str(tmp_path)]) == 0
    table = json.loads((tmp_path / name).read_text())
    extra = (
        "rope_scaling",
        "rope_parameters",
        "text_config",
        "vision_config",
        "head_dim",
        "added_tokens_decoder",
    )
    extra += ("chat_template", "mm_patch_merge_type", "image_crop_resolution", "sep_token", "num_experts")
    cases: list[tuple[str, object]] = [(key, value) for key in (*table, *extra) for value in STRANGE]
    cases += [(key, {"type": x, "factor": x}) for key in ("rope_scaling", "rope_parameters") for x in STRANGE]
    codes = []
    for key, value in cases[::share]:
        (tmp_path / name).write_text(json.dumps({**table, key: value}))
        if name.startswith("clip") or key.startswith(("mm_", "image_")):
            clip, projector = str(tmp_path / "clip"), str(tmp_path / "llava.projector")
            codes.append(convert_image_encoder_to_gguf.main(["-m", clip, "--llava-projector", projector]))
        else:
            codes.append(convert_legacy_llama.main([str(tmp_path), "--skip-unknown"]))
        errors = capfd.readouterr().err
        assert "Traceback" not in errors, (key, value)
        n_errors = len([line for line in errors.splitlines() if ": error:" in line])
        assert n_errors == codes[-1], (key, value, errors)
    assert 0 in codes


def test_folder_with_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/mod\xe9l \xff"
    write_llava_checkpoint(Path(os.fsdecode(folder)), TinySpec())
    command = [sys.executable, ROOT / "convert" / "convert_legacy_llama.py", folder, "--skip-unknown"]
    result = subprocess.run(command, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == folder + b"/ggml-model-f16.gguf\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name: str, script) -> None:
    result = script(name, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: {name}")
    assert result.stderr == ""


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_run_where_no_library_is_built(tmp_path: Path, name: str, script) -> None:
    """A fresh clone, in which nothing was compiled: as a script, and as a module."""
    clone = {**os.environ, "PYLLAVA_LIBRARY": str(tmp_path / "libpyllava.so")}
    result = script(name, "--help", cwd=tmp_path, env=clone)
    assert (result.returncode, result.stderr) == (0, "")
    module = [sys.executable, "-m", f"pyllava.convert.{name}", "--help"]
    assert subprocess.check_output(module, cwd=ROOT, env=clone, text=True) == result.stdout


def test_the_scripts_are_all_that_lies_in_convert() -> None:
    assert sorted(path.stem for path in (ROOT / "convert").glob("*.py")) == sorted(SCRIPTS)
    texts = {(ROOT / "convert" / f"{name}.py").read_text().split('"""')[2] for name in SCRIPTS}
    assert len(texts) == 1


def test_without_the_extra(tmp_path: Path) -> None:
    """One line that names it, where gguf is not installed."""
    write_llava_checkpoint(tmp_path, TinySpec())
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['gguf'] = None\n"
        f"from pyllava.convert.convert_legacy_llama import main; sys.exit(main([{str(tmp_path)!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert (
        result.stderr
        == "convert_legacy_llama: error: the converters need gguf: pip install 'pyllava[convert]'\n"
    )


def test_torch_is_never_imported(tmp_path: Path) -> None:
    write_llava_checkpoint(tmp_path / "m", TinySpec(), fmt="bin")
    write_clip_folder(tmp_path / "c", TinySpec(), fmt="bin")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "for name in ('torch', 'transformers', 'sentencepiece', 'safetensors'): sys.modules[name] = None\n"
        "from pyllava.convert import convert_image_encoder_to_gguf as e, convert_legacy_llama as l\n"
        "from pyllava.convert import convert_llava, llava_surgery\n"
        "assert llava_surgery.main(['-m', 'm']) == 0\n"
        "assert e.main(['-m', 'c', '--llava-projector', 'm/llava.projector', '-o', '.']) == 0\n"
        "assert l.main(['m', '--skip-unknown', '--outtype', 'q8_0']) == 0\n"
        "assert convert_llava.main(['m', '--vision-tower', 'c', '-o', 'out']) == 0\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_sources_name_no_unpickler() -> None:
    """House rule: no converter may call pickle, torch or eval."""
    sources = sorted((ROOT / "pyllava" / "convert").rglob("*.py"))
    assert len(sources) > 20
    for path in sources:
        with tokenize.open(path) as source:
            names = {
                token.string
                for token in tokenize.generate_tokens(source.readline)
                if token.type == tokenize.NAME
            }
        assert not names & {"pickle", "torch", "transformers", "eval", "exec", "marshal", "__import__"}, path


def test_progress_on_a_terminal(tmp_path: Path) -> None:
    """A bar where stderr is a terminal, none in a pipe; stdout stays clean either way."""
    write_llava_checkpoint(tmp_path, TinySpec())
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [
        sys.executable,
        str(ROOT / "convert" / "convert_legacy_llama.py"),
        str(tmp_path),
        "--skip-unknown",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    output, _ = process.communicate()
    os.close(ours)
    assert process.returncode == 0
    assert output == f"{tmp_path / 'ggml-model-f16.gguf'}\n"
    assert b"writing" in shown
    assert b"checking" in shown


def sparse_checkpoint(folder: Path, spec: TinySpec, *, llava: bool = False) -> int:
    """One safetensors file of zeros, several GB by its size and nothing on disk; returns its size.

    `llava`: LLaVA-1.6's, with projector, newline and the tower of `openai/clip-vit-large-patch14-336`.
    """
    folder.mkdir()
    config = {**config_16(spec), **KNOWN_16} if llava else language_config(spec)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, TinySpec())
    d, k, f = spec.n_embd, spec.n_head_kv * spec.head_dim, spec.n_ff
    shapes: dict[str, list[int]] = {
        "model.embed_tokens.weight": [spec.n_vocab, d],
        "lm_head.weight": [spec.n_vocab, d],
    }
    shapes["model.norm.weight"] = [d]
    for i in range(spec.n_layer):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": [d], p + "post_attention_layernorm.weight": [d]}
        shapes |= {p + f"self_attn.{n}_proj.weight": [d if n == "q" else k, d] for n in "qkv"}
        shapes |= {p + "self_attn.o_proj.weight": [d, d], p + "mlp.down_proj.weight": [d, f]}
        shapes |= {p + "mlp.gate_proj.weight": [f, d], p + "mlp.up_proj.weight": [f, d]}
    if llava:
        shapes |= {"model.image_newline": [d], "model.mm_projector.0.weight": [d, 1024]}
        shapes |= {"model.mm_projector.2.weight": [d, d]}
        shapes |= {f"model.mm_projector.{i}.bias": [d] for i in (0, 2)}
        tower = vision_tensors(TinySpec(v_embd=1, v_ff=2, v_layer=24, v_head=1, image_size=336))
        sides = {1: 1024, 2: 4096}
        for name, x in tower.items():
            shape = [sides.get(n, n) for n in x.shape]
            shapes["model.vision_tower.vision_tower." + name] = shape
    header: dict[str, Any] = {}
    position = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + position)
    return position


KNOWN_16 = {
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}
BIG = TinySpec(n_vocab=32000, n_embd=4096, n_head=32, n_head_kv=32, n_ff=11008, n_layer=3)


def peak_memory(command: str) -> int:
    """The most bytes that a process held which runs this Python expression, a `main`, to the exit code 0."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pyllava.convert import convert_legacy_llama, convert_llava\n"
        f"assert {command} == 0\n"
        "print(open('/proc/self/status').read())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (peak,) = [int(line.split()[1]) << 10 for line in result.stdout.splitlines() if line.startswith("VmHWM:")]
    return peak


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_memory_stays_below_2_gib(tmp_path: Path, outtype: str) -> None:
    """3 GB in float32, an embedding of 0.5 GB among it. (Measured: under 0.3 GB.)"""
    assert sparse_checkpoint(tmp_path / "big", BIG) > 3e9
    arguments = [str(tmp_path / "big"), "--pad-vocab", "--outtype", outtype]
    peak = peak_memory(f"convert_legacy_llama.main({arguments})")
    assert peak < 2 << 30
    print(f"{outtype}: peak {peak / 1e6:.0f} MB")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("outtype", ["f16", "q4_k_m"])
def test_memory_of_the_one_step_stays_below_2_gib(tmp_path: Path, outtype: str) -> None:
    """The same with a tower of 1.2 GB: both files written, read back and opened with pyllava. (Measured: 0.15
    GB.)
    """
    assert sparse_checkpoint(tmp_path / "big", BIG, llava=True) > 4e9
    arguments = [str(tmp_path / "big"), "--pad-vocab", "--outtype", outtype]
    peak = peak_memory(f"convert_llava.main({arguments})")
    assert peak < 2 << 30
    print(f"{outtype}: peak {peak / 1e6:.0f} MB")
