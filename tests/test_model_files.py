"""Models in other wrappings: split over files, with other alignments, mapped or read. The numbers stay the same."""

from __future__ import annotations

import contextlib
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf
from reference.cases import text
from reference.subject import Subject
from tiny import Array, TinySpec
from tiny_gguf import Files, Gguf

import pyllava
from pyllava import _lib
from pyllava.gguf import GgufFile

SPEC = TinySpec(seed=41)
U8, U32, STRING = gguf.GGUFValueType.UINT8, gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING


@pytest.fixture(scope="module", params=["f32", "f16", "q8_0"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    spec = TinySpec(seed=41, n_ff=160)
    folder = tmp_path_factory.mktemp("files")
    projector = tiny_gguf.convert(
        folder / "a", spec, outtype="f16" if request.param == "f16" else "f32"
    ).mmproj
    return Files(tiny_gguf.convert(folder / "b", spec, outtype=request.param).model, projector)


def outputs(files: Files, *, use_mmap: bool = True) -> tuple[Array, Array]:
    model = _lib.ModelHandle(files.model, files.mmproj, use_mmap=use_mmap)
    session = _lib.SessionHandle(model, n_ctx=128, n_threads=1, precision="exact")
    pixels = np.random.RandomState(2).standard_normal((1, 3, SPEC.image_size, SPEC.image_size))
    embeddings = session.encode(pixels.astype(np.float32))
    logits = session.logits([_lib.Tokens(text(1, 30, SPEC.n_vocab)), _lib.Rows(embeddings[0], 1)])
    session.close()
    model.close()
    return embeddings, logits


def same(a: Files, b: Files, *, use_mmap: bool = True) -> None:
    for x, y in zip(outputs(a), outputs(b, use_mmap=use_mmap), strict=True):
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("use_mmap", [True, False])
@pytest.mark.parametrize("alignment", [8, 16, 32, 64, 4096])
def test_alignment(files: Files, tmp_path: Path, alignment: int, use_mmap: bool) -> None:
    """An odd vector first, so that with an alignment of 8 some tensors do lie apart from 32."""
    written = [
        tiny_gguf.write(tmp_path / path.name, tiny_gguf.read(path), alignment=alignment)
        for path in (files.model, files.mmproj)
    ]
    handle = _lib.GgufHandle(written[0])
    assert handle.header() == (3, alignment)
    same(files, Files(*written), use_mmap=use_mmap)


@pytest.mark.parametrize("use_mmap", [True, False])
@pytest.mark.parametrize("n_tensors", [1, 6, 15])
def test_split_files(files: Files, tmp_path: Path, n_tensors: int, use_mmap: bool) -> None:
    first = tiny_gguf.write(tmp_path / "model.gguf", tiny_gguf.read(files.model), split=n_tensors)
    n = -(-21 // n_tensors)
    assert first.name == f"model-00001-of-{n:05d}.gguf"
    assert len(list(tmp_path.iterdir())) == n
    same(files, Files(first, files.mmproj), use_mmap=use_mmap)


def test_a_folder_of_split_files(files: Files, tmp_path: Path) -> None:
    tiny_gguf.write(tmp_path / "model.gguf", tiny_gguf.read(files.model), split=6)
    shutil.copy(files.mmproj, tmp_path / "mmproj.gguf")
    with pyllava.Llava(tmp_path, n_threads=1) as llava:
        found = llava.ask(None, "the cat", max_tokens=4).tokens
    with pyllava.Llava(files.model, files.mmproj, n_threads=1) as llava:
        assert llava.ask(None, "the cat", max_tokens=4).tokens == found


def second_shard(folder: Path) -> Path:
    return folder / "model-00002-of-00004.gguf"


def missing(folder: Path) -> None:
    second_shard(folder).unlink()


def exchanged(folder: Path) -> None:
    other = folder / "model-00003-of-00004.gguf"
    data = other.read_bytes()
    other.write_bytes(second_shard(folder).read_bytes())
    second_shard(folder).write_bytes(data)


def of_another_model(folder: Path) -> None:
    """A whole model where a shard should be."""
    shutil.copy(folder / "whole.gguf", second_shard(folder))


def cut_short(folder: Path) -> None:
    data = second_shard(folder).read_bytes()
    second_shard(folder).write_bytes(data[: len(data) // 2])


def miscounted(folder: Path) -> None:
    """split.tensors.count: 21 in the first shard."""
    first = folder / "model-00001-of-00004.gguf"
    key = b"split.tensors.count"
    data = bytearray(first.read_bytes())
    at = data.index(key) + len(key) + 4
    assert data[at] == 21
    data[at] = 22
    first.write_bytes(data)


def a_tensor_twice(folder: Path) -> None:
    """The name of a tensor of shard 2 changed into that of one of shard 1."""
    first, second = tiny_gguf.read(folder / "model-00001-of-00004.gguf"), tiny_gguf.read(second_shard(folder))
    names = [(a, b) for a in first.tensors for b in second.tensors if len(a) == len(b) and a != b]
    old, new = names[0][1].encode(), names[0][0].encode()
    second_shard(folder).write_bytes(second_shard(folder).read_bytes().replace(old, new, 1))


WRONG: list[tuple[Callable[[Path], None], type[Exception], str]] = [
    (missing, FileNotFoundError, r"model-00002-of-00004\.gguf"),
    (exchanged, pyllava.PyllavaError, r"split\.no"),
    (of_another_model, pyllava.PyllavaError, r"split\."),
    (cut_short, pyllava.ModelFileError, r"model-00002-of-00004\.gguf"),
    (miscounted, pyllava.ModelMismatchError, r"split\.tensors\.count is 22, .* hold 21"),
    (a_tensor_twice, pyllava.PyllavaError, "unused|missing|twice"),
]


@pytest.mark.parametrize(("damage", "error", "pattern"), WRONG, ids=[w[0].__name__ for w in WRONG])
def test_wrong_splits(
    files: Files, tmp_path: Path, damage: Callable[[Path], None], error: type[Exception], pattern: str
) -> None:
    file = tiny_gguf.read(files.model)
    tiny_gguf.write(tmp_path / "whole.gguf", file)
    first = tiny_gguf.write(tmp_path / "model.gguf", file, split=6)
    damage(tmp_path)
    with pytest.raises(error, match=pattern):
        _lib.ModelHandle(first, None)


@pytest.mark.parametrize("name", ["model-00002-of-00004.gguf", "renamed.gguf"])
def test_split_files_opened_wrongly(files: Files, tmp_path: Path, name: str) -> None:
    first = tiny_gguf.write(tmp_path / "model.gguf", tiny_gguf.read(files.model), split=6)
    if name == "renamed.gguf":
        first.rename(tmp_path / name)
    with pytest.raises(pyllava.PyllavaError, match=r"-00001-of-00004\.gguf"):
        _lib.ModelHandle(tmp_path / name, None)


# --- counts that lie: the tables are shorter than what was written, and what follows them would shift ---

N_TENSORS, N_KEYS = 8, 16  # where the counts stand in the file


def counted(path: Path, at: int, change: int) -> Path:
    """The file with one of its counts changed by `change`."""
    data = bytearray(path.read_bytes())
    (n,) = struct.unpack_from("<Q", data, at)
    struct.pack_into("<Q", data, at, n + change)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("part", ["model", "mmproj"])
@pytest.mark.parametrize("alignment", [8, 32, 4096])
@pytest.mark.parametrize(
    ("at", "change"), [(N_TENSORS, -1), (N_TENSORS, -2), (N_TENSORS, 1), (N_KEYS, -1), (N_KEYS, 1)]
)
def test_counts_that_lie(
    files: Files, tmp_path: Path, part: str, alignment: int, at: int, change: int
) -> None:
    """The last tensor is one that a model can do without, so that the count alone tells."""
    file = tiny_gguf.read(getattr(files, part))
    last = {"model": "blk.1.attn_q.bias", "mmproj": "v.post_ln.bias"}[part]
    tensors = {k: v for k, v in file.tensors.items() if k != last}
    vector = tiny_gguf.f32(np.zeros(SPEC.n_embd if part == "model" else SPEC.v_embd))
    whole = Gguf(file.keys, tensors | {last: vector})
    path = tiny_gguf.write(tmp_path / "x.gguf", whole, alignment=alignment)
    pair = (path, files.mmproj) if part == "model" else (files.model, path)
    _lib.ModelHandle(*pair).close()
    counted(path, at, change)
    with pytest.raises(pyllava.ModelFileError, match=re.escape(str(path))):
        _lib.ModelHandle(*pair)
    with pytest.raises(pyllava.ModelFileError, match=re.escape(str(path))):
        GgufFile(path)


@pytest.mark.parametrize("lie", [8, 16, 64])
def test_an_alignment_that_lies(files: Files, tmp_path: Path, lie: int) -> None:
    """All tensors are multiples of 64 bytes, so that offsets fit either alignment."""
    path = tmp_path / "x.gguf"
    for n_filling in range(0, 64, 8):  # one of them lets the data begin elsewhere
        keys = {"general.alignment": (32, U32, None), "filling": ("x" * (n_filling + 1), STRING, None)}
        file = Gguf(keys, {"a": tiny_gguf.f32(np.ones(64)), "b": tiny_gguf.f32(np.ones(64))})
        data = tiny_gguf.write(path, file).read_bytes()
        start = GgufFile(path).tensors[0].offset
        at = data.index(b"general.alignment") + len("general.alignment") + 4
        path.write_bytes(data[:at] + struct.pack("<I", lie) + data[at + 4 :])
        with contextlib.suppress(pyllava.ModelFileError):
            assert GgufFile(path).tensors[0].offset == start


def test_bytes_behind_a_shard(files: Files, tmp_path: Path) -> None:
    first = tiny_gguf.write(tmp_path / "model.gguf", tiny_gguf.read(files.model), split=6)
    _lib.ModelHandle(first, None).close()
    with second_shard(tmp_path).open("ab") as shard:
        shard.write(bytes(33))
    with pytest.raises(pyllava.ModelFileError, match=r"model-00002-of-00004\.gguf: 33 bytes"):
        _lib.ModelHandle(first, None)


def test_padding_of_the_last_tensor_may_be_missing(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    file = tiny_gguf.read(files.mmproj).renamed(lambda name: None if name == "v.post_ln.bias" else name)
    written = tiny_gguf.write(
        path, file.with_tensors({"v.post_ln.bias": tiny_gguf.f32(np.zeros(3))})
    ).read_bytes()
    for n_cut in range(21):
        path.write_bytes(written[: len(written) - n_cut])
        _lib.ModelHandle(files.model, path).close()
    path.write_bytes(written[:-21])
    with pytest.raises(pyllava.ModelFileError, match="is it cut off"):
        _lib.ModelHandle(files.model, path)


# --- metadata are read when they are asked for ---

MEASURED = """
import resource, sys, time
from pyllava import _lib
from pyllava.gguf import GgufFile
import pyllava
path, ask = sys.argv[1:]
GgufFile(path)
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
{call}
seconds = time.perf_counter() - started
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, seconds)
"""


def measured(path: Path, call: str) -> tuple[float, float]:
    """MiB and seconds that a call takes, in a process of its own."""
    code = MEASURED.replace("{call}", call)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), ""], capture_output=True, text=True, check=True
    )
    kib, seconds = map(float, done.stdout.split())
    return kib / 1024, seconds


@pytest.fixture(scope="module")
def f32_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return tiny_gguf.convert(tmp_path_factory.mktemp("f32"), SPEC)


def with_zeros(file: Gguf, path: Path, kind: gguf.GGUFValueType, n: int, item_size: int) -> Path:
    """The file with an array of n zeros, or empty texts, under the key "more"; n a multiple of 32."""
    empty = "" if kind == STRING else 0
    keys = {"more": ([empty] * 32, gguf.GGUFValueType.ARRAY, kind)} | file.keys
    data = tiny_gguf.write(path, Gguf(keys, file.tensors)).read_bytes()
    at = data.index(b"more") + 8  # behind the array's type; what is put in keeps all offsets' alignment
    head = data[: at + 4] + struct.pack("<Q", n)
    path.write_bytes(head + bytes((n - 32) * item_size) + data[at + 12 :])
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
@pytest.mark.parametrize("kind", ["numbers", "texts"])
def test_long_arrays_cost_nothing_where_they_are_not_read(
    f32_files: Files, tmp_path: Path, kind: str
) -> None:
    file, path = tiny_gguf.read(f32_files.model), tmp_path / "x.gguf"
    if kind == "numbers":
        with_zeros(file, path, U8, 48 << 20, 1)
    else:
        with_zeros(file, path, STRING, 1_600_000, 8)
    for call in (
        "model = pyllava.Llava(path, n_ctx=64, n_threads=1)",
        "model = _lib.ModelHandle(path, None); assert model.metadata()['general.architecture'] == 'llama'",
        "assert 'more' in GgufFile(path).metadata and len(GgufFile(path).metadata) > 20",
    ):
        mib, seconds = measured(path, call)
        assert mib < 50, call
        assert seconds < 1, call
    mib, seconds = measured(path, "assert len(GgufFile(path).metadata['more']) > 1_000_000")
    assert mib < 150  # the file's pages and a copy, or a list of one text
    assert seconds < 2


def test_values_of_metadata(tmp_path: Path) -> None:
    kinds = gguf.GGUFValueType
    arrays = {
        kinds.UINT8: [0, 255],
        kinds.INT8: [-128, 127],
        kinds.UINT16: [0, 65535],
        kinds.INT16: [-32768, 3],
        kinds.UINT32: [1, 2**32 - 1],
        kinds.INT32: [-(2**31), 5],
        kinds.FLOAT32: [0.5, -2.0],
        kinds.BOOL: [True, False, True],
        kinds.UINT64: [2**64 - 1, 0],
        kinds.INT64: [-(2**63), 1],
        kinds.FLOAT64: [0.1, 1e300],
    }
    keys = {f"a.{k.name}": (v, kinds.ARRAY, k) for k, v in arrays.items()}
    keys |= {f"s.{k.name}": (v[0], k, None) for k, v in arrays.items()}
    texts = ["", "a", "\u4e2d" * 500, "", "z"]
    keys["texts"], keys["text"], keys["empty"] = (
        (texts, kinds.ARRAY, STRING),
        ("caf\u00e9", STRING, None),
        ("", STRING, None),
    )
    path = tiny_gguf.write(tmp_path / "x.gguf", Gguf(keys, {"a": tiny_gguf.f32(np.ones(8))}))
    metadata = GgufFile(path).metadata
    assert list(metadata) == list(keys)
    assert len(metadata) == len(keys)
    for name, (value, kind, _) in keys.items():
        found = metadata[name]
        if kind == kinds.ARRAY and name != "texts":
            assert isinstance(found, np.ndarray)
            assert found.tolist() == value
        else:
            assert found == value
            assert type(found) is type(value)
    assert "nothing" not in metadata
    assert metadata.get("nothing", 7) == 7
    with pytest.raises(KeyError):
        metadata["nothing"]


def test_metadata_outlive_their_file_s_name_but_no_change(f32_files: Files, tmp_path: Path) -> None:
    """What is mapped must not be read where the file has become shorter: that would end the process."""
    path = tmp_path / "x.gguf"
    shutil.copy(f32_files.model, path)
    kept = GgufFile(path).metadata
    path.unlink()
    assert kept["general.architecture"] == "llama"
    shutil.copy(f32_files.model, path)
    changed = GgufFile(path).metadata
    path.write_bytes(b"")
    with pytest.raises(pyllava.ModelFileError, match="changed since it was opened"):
        changed["tokenizer.ggml.tokens"]
    handle = _lib.ModelHandle(f32_files.model, None)
    metadata, none = handle.metadata(), handle.mmproj_metadata()
    assert not list(none)
    assert metadata["general.architecture"] == "llama"
    handle.close()
    with pytest.raises(pyllava.ClosedError):
        metadata["general.architecture"]


@pytest.mark.parametrize(
    ("kind", "n", "size"),
    [(0, 3 << 30, 3 << 30), (7, 300 << 20, 300 << 20), (8, 1 << 27, 1 << 30), (8, 5 << 20, 40 << 20)],
)
def test_arrays_beyond_all_measure(tmp_path: Path, kind: int, n: int, size: int) -> None:
    """Sparse files: they cost their writer nothing, and must not cost the reader more."""
    path = tmp_path / "x.gguf"
    with path.open("wb") as out:
        out.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1siiQ", 1, b"a", 9, kind, n))
        out.truncate(out.tell() + size)
    started = time.perf_counter()
    with pytest.raises(pyllava.ModelFileError, match=r"x\.gguf: a.*need at most"):
        GgufFile(path)
    with pytest.raises(pyllava.ModelFileError, match="need at most"):
        _lib.ModelHandle(path, None)
    assert time.perf_counter() - started < 1


def test_subject_closes(files: Files) -> None:
    """Loading and freeing in a loop keeps nothing."""
    for _ in range(5):
        Subject(files).close()
