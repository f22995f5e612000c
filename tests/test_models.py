"""Finding the files of a model: one rule for folders, whatever the files are called; and what ``info`` says of a folder."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import tiny
import tiny_gguf

import pyllava
from pyllava import _facts, _lib, _memory, _pace, cli, models
from pyllava._gguf_names import model_of, parts_of, quant_of, spelled
from pyllava.gguf import GgufFile
from pyllava.quantize import quantize

DEMO = models.find(None, None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model: its language model in three formats, each larger than the one before, and its projector."""
    folder = tmp_path_factory.mktemp("made")
    files = tiny_gguf.convert(folder, tiny.TinySpec(seed=7, n_embd=64, n_ff=160), outtype="f32")
    found = {"f32": files.model, "mmproj": files.mmproj}
    for quant in ("f16", "q8_0"):
        found[quant] = folder / f"m-{quant}.gguf"
        quantize(files.model, found[quant], quant)
    return found


def folder_of(tmp_path: Path, made: dict[str, Path], **names: str) -> Path:
    """A folder with copies of what was made, under these names (`__`: a dot)."""
    for what, name in names.items():
        shutil.copy(made[what.partition("__")[0]], tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "quant", "model"),
    [
        ("llava-v1.6-mistral-7b.Q4_K_M.gguf", "Q4_K_M", "llava-1.6-mistral-7b"),
        ("llava-1.6-mistral-7b.Q8_0.gguf", "Q8_0", "llava-1.6-mistral-7b"),
        ("ggml-model-q4_k.gguf", "Q4_K", "ggml-model"),
        ("ggml-mistral-7b-q_5_k.gguf", "Q5_K", "ggml-mistral-7b"),
        ("llava-llama-3-8b-v1_1-int4.gguf", "INT4", "llava-llama-3-8b-1_1"),
        (
            "llama-joycaption-beta-one-hf-llava.i1-IQ4_XS.gguf",
            "IQ4_XS",
            "llama-joycaption-beta-one-hf-llava.i1",
        ),
        ("mmproj-fp16.gguf", "F16", "mmproj"),
        ("a/b-BF16-00001-of-00003.gguf", "BF16", "b"),
        ("Q4_0_4_8.GGUF", "Q4_0_4_8", ""),
        ("model.gguf", "", "model"),
        ("qwen2-q4x.gguf", "", "qwen2-q4x"),
    ],
)
def test_what_names_tell(name: str, quant: str, model: str) -> None:
    assert (quant_of(name), model_of(name)) == (quant, model)


def test_names_of_parts() -> None:
    assert parts_of("a-00001-of-00002.gguf") == ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]
    assert parts_of("a.gguf") == ["a.gguf"]
    assert spelled(" q4-k-m ") == "Q4_K_M"


# --- one rule for folders ---


def test_a_projector_is_known_by_its_header(made: dict[str, Path], tmp_path: Path) -> None:
    folder = folder_of(tmp_path, made, q8_0="mmproj-lookalike.gguf", mmproj="vision.gguf")
    for named in (folder, folder / "mmproj-lookalike.gguf"):
        found = models.find(named, None)
        assert found.mmproj == folder / "vision.gguf"
        assert found.model == folder / "mmproj-lookalike.gguf"


def test_of_several_quantisations_the_best_that_fits(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(
        tmp_path, made, f32="m-f32.gguf", f16="m-f16.gguf", q8_0="m-Q8_0.gguf", mmproj="mmproj.gguf"
    )
    sizes = {name: (folder / f"m-{name}.gguf").stat().st_size for name in ("f16", "Q8_0")}
    facts = _facts.facts_of(GgufFile(folder / "m-f16.gguf"))
    n_projector = (folder / "mmproj.gguf").stat().st_size
    for free, chosen, why in (
        (1 << 40, "m-f16.gguf", "the best that fits in memory; there are f32, q8_0, too"),
        (
            _memory.needed(sizes["f16"] + n_projector, facts) - 1,
            "m-Q8_0.gguf",
            "the best that fits in memory",
        ),
        (1000, "m-Q8_0.gguf", "the smallest, and memory does not hold it; there are f16, f32, too"),
    ):
        monkeypatch.setattr(_memory, "free", lambda free=free: free)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "pyllava"):
            found = models.find(folder, None)
        assert found.model.name == chosen
        assert f"{chosen}: {why}" in caplog.text
        assert f"{folder}:QUANT names one" in caplog.text
        assert found.mmproj == folder / "mmproj.gguf"


def test_a_folder_with_a_quantisation(made: dict[str, Path], tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path, made, f32="m-f32.gguf", f16="m.f16.gguf", q8_0="m-q8_0.gguf", mmproj="p.gguf"
    )
    for quant, name in (("q8_0", "m-q8_0.gguf"), ("Q8_0", "m-q8_0.gguf"), ("fp16", "m.f16.gguf")):
        assert models.find(f"{folder}:{quant}", None).model.name == name
    with pytest.raises(pyllava.ModelMismatchError, match="no file of q4_k_m; there are: f16, f32, q8_0"):
        models.find(f"{folder}:q4_k_m", None)
    with pyllava.Llava(f"{folder}:q8_0", n_threads=1) as model:
        assert model.info.has_vision


def test_different_models_are_not_chosen_among(made: dict[str, Path], tmp_path: Path) -> None:
    folder = folder_of(tmp_path, made, f16="cat-f16.gguf", q8_0="dog-q8_0.gguf", mmproj="p.gguf")
    with pytest.raises(
        pyllava.ModelMismatchError, match=r"2 language models \(cat-f16\.gguf, dog-q8_0\.gguf\), need one"
    ):
        models.find(folder, None)
    assert models.find(f"{folder}:q8_0", None).model.name == "dog-q8_0.gguf"
    shutil.copy(DEMO.model, folder / "dog-f16.gguf")  # the name of one model, the layers of another
    (folder / "cat-f16.gguf").unlink()
    with pytest.raises(pyllava.ModelMismatchError, match="2 language models"):
        models.find(folder, None)


def test_a_message_names_a_few_of_many(made: dict[str, Path], tmp_path: Path) -> None:
    for number in range(11):
        (tmp_path / f"m{chr(97 + number)}.gguf").symlink_to(made["f16"])
    with pytest.raises(pyllava.ModelMismatchError, match=r"\(ma\.gguf, .*mh\.gguf and 3 more\), need one"):
        models.find(tmp_path, None)


def test_hidden_files_and_empty_names(made: dict[str, Path], tmp_path: Path) -> None:
    folder = folder_of(tmp_path, made, f16="m.gguf", mmproj="mmproj.gguf")
    (folder / "._m.gguf").write_bytes(b"\0\5\x16\7")  # as macOS leaves beside files on other disks
    assert models.find(folder, None).model == folder / "m.gguf"
    with pytest.raises(ValueError, match="mmproj: empty path"):
        models.find(folder / "m.gguf", "")


def test_of_several_projectors_the_one_that_fits(made: dict[str, Path], tmp_path: Path) -> None:
    folder = folder_of(tmp_path, made, q8_0="m.gguf", mmproj="mmproj-a.gguf")
    assert DEMO.mmproj is not None
    shutil.copy(DEMO.mmproj, folder / "mmproj-wide.gguf")
    for named in (folder, folder / "m.gguf"):
        assert models.find(named, None).mmproj == folder / "mmproj-a.gguf"
    shutil.copy(folder / "mmproj-a.gguf", folder / "mmproj-b.gguf")
    for named in (folder, folder / "m.gguf"):
        with pytest.raises(
            pyllava.ModelMismatchError, match=r"2 projector .*mmproj-a\.gguf, mmproj-b\.gguf\), need one"
        ):
            models.find(named, None)


def test_of_several_formats_of_a_projector(
    made: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = {"mmproj": "p-f32.gguf", "mmproj__2": "p-q8_0.gguf", "mmproj__3": "p-bf16.gguf"}
    folder = folder_of(tmp_path, made, q8_0="m.gguf", **names)
    assert models.find(folder, None).mmproj == folder / "p-bf16.gguf"
    shutil.copy(made["mmproj"], folder / "p-f16.gguf")
    with caplog.at_level(logging.WARNING, "pyllava"):
        assert models.find(folder / "m.gguf", None).mmproj == folder / "p-f16.gguf"
    assert "p-f16.gguf of 4 number formats of the projector" in caplog.text


def test_a_named_model_beside_what_cannot_be_read(made: dict[str, Path], tmp_path: Path) -> None:
    """A damaged projector is not passed over: loading it tells what it is."""
    folder = folder_of(tmp_path, made, q8_0="m.gguf", mmproj="p.gguf")
    (folder / "damaged.gguf").write_bytes(b"GGUF")
    assert models.find(folder / "m.gguf", None).mmproj == folder / "p.gguf"
    (folder / "p.gguf").rename(folder / "p.bin")
    (folder / "mmproj.gguf").write_bytes(b"GGUF")
    with pytest.raises(pyllava.ModelFileError, match=r"mmproj\.gguf"):
        pyllava.Llava(folder / "m.gguf")


def test_home_is_expanded(made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, made, q8_0="m-q8_0.gguf", mmproj="p.gguf")
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    name = f"~/{folder.name}"
    for named in (name, f"{name}:q8_0", f"{name}/m-q8_0.gguf"):
        assert models.find(named, None) == models.ModelFiles(folder / "m-q8_0.gguf", folder / "p.gguf")
    assert models.find(f"{name}/m-q8_0.gguf", f"{name}/p.gguf").mmproj == folder / "p.gguf"


def test_a_split_model_counts_whole(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first file alone would seem to fit."""
    folder = folder_of(tmp_path, made, q8_0="m-q8_0.gguf", mmproj="p.gguf")
    first = tiny_gguf.write(folder / "m-f16.gguf", tiny_gguf.read(made["f16"]), split=6)
    whole = sum(path.stat().st_size for path in folder.glob("m-f16-*.gguf"))
    facts = _facts.facts_of(GgufFile(first))
    n_projector = (folder / "p.gguf").stat().st_size
    for more, name in ((1, "m-q8_0.gguf"), (0, first.name)):
        monkeypatch.setattr(
            _memory, "free", lambda more=more: _memory.needed(whole + n_projector, facts) - more
        )
        assert models.find(folder, None).model.name == name


# --- memory and pace ---


def test_the_estimate_of_memory_is_near_the_library_s(made: dict[str, Path]) -> None:
    """The KV cache to the byte, all of it within a quarter."""
    for path in (DEMO.model, made["q8_0"]):
        file = GgufFile(path)
        facts = _facts.facts_of(file)
        model = _lib.ModelHandle(path, None)
        n_ctx = model.info.n_ctx_train
        session = _lib.SessionHandle(model, n_ctx=n_ctx, n_batch=1024, n_views=1, precision="fast")
        kv, buffers, _ = session.memory()
        assert _memory.kv_bytes(facts) * n_ctx == kv
        assert _memory.needed(0, facts, 1 << 20) == pytest.approx(
            kv + buffers, rel=0.25 if path == DEMO.model else 1
        )
        session.close()
        model.close()
    assert _memory.needed(5, {}) == 5  # of what a header does not tell


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads /proc")
def test_free_memory_is_what_is_free() -> None:
    """Not all there is."""
    cpu = next(device for device in _lib.devices() if device.kind == "cpu")
    told = {
        line.split(":")[0]: int(line.split()[1]) << 10
        for line in Path("/proc/meminfo").read_text().splitlines()
    }
    assert 0 < cpu.memory_free < cpu.memory_total
    assert cpu.memory_free < told["MemAvailable"] * 1.1


def test_what_a_token_reads(made: dict[str, Path]) -> None:
    """All weights but the embeddings, of which it takes one row; where the output is the same table, all of it."""
    tensors = GgufFile(made["f16"]).tensors
    everything = sum(tensor.n_bytes for tensor in tensors)
    table = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
    assert _pace.bytes_per_token(tensors) == everything - table.n_bytes
    tied = [tensor for tensor in tensors if tensor.name != "output.weight"]
    assert _pace.bytes_per_token(tied) == sum(tensor.n_bytes for tensor in tied)
    assert _pace.bandwidth() > 1e8
    assert [_pace.about(rate) for rate in (0.4321, 6.7, 9.96, 47.4, 1234.0)] == [
        "0.4",
        "7",
        "10",
        "47",
        "1200",
    ]


# --- info ---


def test_info_of_a_folder(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path, made, q8_0="m.gguf", mmproj="p.gguf")
    assert cli.main(["info", str(folder), "-c", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [str(folder / "m.gguf"), str(folder / "p.gguf"), "the two fit"]
    assert lines[3].startswith("needs ")
    assert "of memory at a context of 64: weights " in lines[3]
    assert lines[3].endswith(" are free here")
    assert "vision: CPU" in lines[4]
    assert lines[5] == f"how fast it is here, `pyllava-cli bench -m {folder}` measures"
    monkeypatch.setattr(_pace, "LEAST_BYTES", 1)
    assert cli.main(["info", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    memory, speed = told["memory"], told["speed"]
    assert memory["all"] == memory["weights"] + memory["kv_cache"] + memory["buffers"]
    assert (told["n_ctx"], told["has_vision"]) == (512, True)
    assert speed["bytes_per_token"] == _pace.bytes_per_token(GgufFile(folder / "m.gguf").tensors)
    assert cli.main(["info", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[5].startswith("up to about ")


def test_info_of_what_has_no_memory_or_projector(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path, made, q8_0="m.gguf")
    monkeypatch.setattr(_memory, "free", lambda: 1000)
    assert cli.main(["info", f"{folder}"]) == 0
    out = capsys.readouterr().out
    assert "no projector beside it: it sees no pictures" in out
    assert "that is more than there is" in out

    def refuse(*_: object, **__: object) -> None:
        raise pyllava.ModelMemoryError("need 99 GiB")

    monkeypatch.setattr(_lib, "SessionHandle", refuse)
    assert cli.main(["info", f"{folder}"]) == 0
    assert "memory does not hold it at a context of 512: need 99 GiB" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["demo", "demo-1.6"])
def test_info_of_a_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", name]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(f"{os.sep}{name}-q8_0.gguf")


def test_info_of_parts_that_do_not_fit(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path, made, q8_0="m.gguf")
    assert DEMO.mmproj is not None
    shutil.copy(DEMO.mmproj, folder / "mmproj.gguf")
    assert cli.main(["info", str(folder)]) == 1
    err = capsys.readouterr().err
    assert "256" in err
    assert "64" in err
