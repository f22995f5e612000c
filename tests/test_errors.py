"""Files that must be refused: the right exception, a text that names the field, and the process lives on."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_gguf
from tiny import TinySpec
from tiny_gguf import Files, Gguf, f32

import pyllava
from pyllava import _lib
from pyllava.gguf import GgufFile

U32, F32, STRING, BOOL, ARRAY = (
    gguf.GGUFValueType.UINT32,
    gguf.GGUFValueType.FLOAT32,
    gguf.GGUFValueType.STRING,
    gguf.GGUFValueType.BOOL,
    gguf.GGUFValueType.ARRAY,
)
Refused = (
    pyllava.ModelFileError,
    pyllava.ModelMismatchError,
    pyllava.UnsupportedModelError,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return tiny_gguf.convert(tmp_path_factory.mktemp("model"), TinySpec(v_embd=32, n_embd=64))


@pytest.fixture(scope="module")
def model(files: Files) -> Gguf:
    return tiny_gguf.read(files.model)


@pytest.fixture(scope="module")
def mmproj(files: Files) -> Gguf:
    return tiny_gguf.read(files.mmproj)


# --- the container, byte by byte ---


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def header(n_tensors: int = 0, n_kv: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, n_tensors, n_kv)


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<i", kind) + value


def info(name: str | bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    packed = struct.pack("<I", len(dims)) + b"".join(struct.pack("<q", d) for d in dims)
    return text(name) + packed + struct.pack("<iQ", kind, offset)


ALIGN = "general.alignment"
PAD = bytes(64)
CONTAINERS: dict[str, tuple[bytes, str]] = {
    "magic": (b"FUGG" + PAD, "not a GGUF file"),
    "old": (b"tjgg" + PAD, "before GGUF"),
    "torch": (b"PK\3\4" + PAD, "PyTorch"),
    "safetensors": (struct.pack("<Q", 99) + b'{"a":1}' + PAD, "safetensors"),
    "lfs": (b"version https://git-lfs" + PAD, "LFS pointer"),
    "html": (b"<html>" + PAD, "web page"),
    "short": (b"GGUF\3\0\0", "need"),
    "version 0": (header(version=0), "version 0"),
    "version 1": (header(version=1), "version 1"),
    "version 4": (header(version=4), "version 4"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "tensor count": (header(n_tensors=2**64 - 1), r"more than \d+ bytes hold"),
    "tensor count over the file": (header(n_tensors=5) + PAD, r"more than \d+ bytes hold"),
    "key count": (header(n_kv=2**63) + PAD, r"more than \d+ bytes hold"),
    "key count over the file": (header(n_kv=9) + PAD, r"more than \d+ bytes hold"),
    "empty key": (header(n_kv=1) + key("", 4, b"\0" * 4) + PAD, "key .byte 24.: empty"),
    "long key": (header(n_kv=1) + struct.pack("<Q", 2**64 - 1) + PAD, r"string of \d+ bytes, file has"),
    "zero byte in key": (header(n_kv=1) + key(b"a\0b", 4, b"\0" * 4) + PAD, "need printable ASCII"),
    "duplicate key": (header(n_kv=2) + key("a", 4, b"\0" * 4) * 2 + PAD, "twice"),
    "value type": (header(n_kv=1) + key("a", 13, b"\0" * 8) + PAD, r"type -?\d+, need 0..12"),
    "bool": (header(n_kv=1) + key("a", 7, b"\2") + PAD, "neither 0 nor 1"),
    "string length": (
        header(n_kv=1) + key("a", 8, struct.pack("<Q", 2**63)) + PAD,
        r"string of \d+ bytes, file has",
    ),
    "utf-8": (header(n_kv=1) + key("a", 8, text(b"\xff\xfe")) + PAD, "not valid UTF-8"),
    "zero byte in text": (header(n_kv=1) + key("a", 8, text(b"x\0y")) + PAD, "zero byte inside text"),
    "nested array": (header(n_kv=1) + key("a", 9, struct.pack("<iQ", 9, 1)) + PAD, "array of arrays"),
    "item type": (header(n_kv=1) + key("a", 9, struct.pack("<iQ", -1, 1)) + PAD, r"type -?\d+, need 0..12"),
    "array length": (
        header(n_kv=1) + key("a", 9, struct.pack("<iQ", 10, 2**61)) + PAD,
        "bytes left|bytes, need",
    ),
    "strings": (header(n_kv=1) + key("a", 9, struct.pack("<iQ", 8, 2**27)) + PAD, "strings cannot lie in"),
    "alignment type": (header(n_kv=1) + key(ALIGN, 5, b"\x20\0\0\0") + PAD, "need u32"),
    "alignment 0": (header(n_kv=1) + key(ALIGN, 4, b"\0\0\0\0") + PAD, "power of two"),
    "alignment 24": (header(n_kv=1) + key(ALIGN, 4, b"\x18\0\0\0") + PAD, "power of two"),
    "alignment 4": (header(n_kv=1) + key(ALIGN, 4, b"\4\0\0\0") + PAD, "8..65536"),
    "empty name": (header(n_tensors=1) + info("", [1]) + PAD, "empty or not printable"),
    "long name": (header(n_tensors=1) + info("x" * 64, [1]) + PAD, "need at most"),
    "duplicate tensor": (
        header(n_tensors=2) + info("x", [8]) + info("x", [8], offset=32) + bytes(256),
        "twice",
    ),
    "no dimensions": (header(n_tensors=1) + info("x", []) + PAD, "dimensions, need 1..4"),
    "five dimensions": (header(n_tensors=1) + info("x", [1] * 5) + PAD, "dimensions, need 1..4"),
    "negative dimension": (header(n_tensors=1) + info("x", [-1]) + PAD, "need at least 1"),
    "empty dimension": (header(n_tensors=1) + info("x", [8, 0]) + PAD, "need at least 1"),
    "elements": (header(n_tensors=1) + info("x", [2**32, 2**32]) + PAD, "too many elements"),
    "bytes": (header(n_tensors=1) + info("x", [2**62]) + PAD, "too many elements"),
    "bytes wrap": (
        header(n_tensors=1) + info("x", [542551296285575072], 8) + PAD,
        "too many elements|needs at least",
    ),
    "removed type": (header(n_tensors=1) + info("x", [32], 4) + PAD, "unknown to or was removed"),
    "unknown type": (header(n_tensors=1) + info("x", [32], 2**31 - 1) + PAD, "unknown to or was removed"),
    "block": (header(n_tensors=1) + info("x", [33], 8) + PAD, "multiple of 32"),
    "offset": (header(n_tensors=1) + info("x", [8], offset=4) + bytes(256), "lie one after the other"),
    "overlap": (
        header(n_tensors=2) + info("x", [8]) + info("y", [8]) + bytes(256),
        "lie one after the other",
    ),
    "offset wraps": (
        header(n_tensors=1) + info("x", [8], offset=2**64 - 32) + bytes(256),
        "lie one after the other",
    ),
    "cut off": (header(n_tensors=1) + info("x", [64]) + bytes(64), "cut off"),
    "behind a tensor": (
        header(n_tensors=1) + info("x", [8]) + bytes(27 + 32 + 1),
        "1 bytes after byte 96 belong to no",
    ),
    "behind an unaligned tensor": (
        header(n_tensors=1) + info("x", [3]) + bytes(27 + 33),
        "belong to no tensor",
    ),
    "data without a table": (header() + bytes(9), "1 bytes after byte 32 belong to no"),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_container(case: str, tmp_path: Path) -> None:
    content, message = CONTAINERS[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(pyllava.ModelFileError, match=message) as caught:
        GgufFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_and_no_regular_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        pyllava.Llava(tmp_path / "missing.gguf")
    with pytest.raises(pyllava.ModelFileError, match="not a regular file"):
        GgufFile(tmp_path)
    with pytest.raises(pyllava.ModelFileError, match="not a regular file"):
        GgufFile("/dev/zero")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(pyllava.ModelFileError, match="empty file"):
        GgufFile(tmp_path / "empty.gguf")
    with pytest.raises(ValueError, match="zero byte"):
        GgufFile("a\0b")


@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_truncated_anywhere(files: Files, tmp_path: Path, step: int) -> None:
    """Through header, metadata and tensor table by this step; by larger ones through the data."""
    path = tmp_path / "cut.gguf"
    for file in (files.model, files.mmproj):
        whole = file.read_bytes()
        start = min(t.offset for t in GgufFile(file).tensors)
        for n in [*range(0, start, step), *range(start, len(whole) - 32, len(whole) // 50)]:
            path.write_bytes(whole[:n])
            with pytest.raises(pyllava.ModelFileError):
                GgufFile(path)


@pytest.mark.parametrize("n", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_flipped_bits_never_end_the_process(files: Files, tmp_path: Path, n: int) -> None:
    """A flipped bit in the metadata gives a model or a typed exception."""
    path, n_refused = tmp_path / "flipped.gguf", 0
    random = np.random.RandomState(1)
    for file in (files.model, files.mmproj):
        whole = bytearray(file.read_bytes())
        start = min(t.offset for t in GgufFile(file).tensors)
        for bit in random.choice(8 * start, n, replace=False):
            whole[bit // 8] ^= 1 << (bit % 8)
            path.write_bytes(whole)
            whole[bit // 8] ^= 1 << (bit % 8)
            try:
                pair = (path, files.mmproj) if file == files.model else (files.model, path)
                _lib.ModelHandle(*pair).close()
            except (*Refused, ValueError, OSError):
                n_refused += 1
    assert n_refused > n // 4


# --- the model behind the container ---

Change = Callable[[Gguf], Gguf]


def set_key(name: str, value: Any, kind: Any = U32, item: Any = None) -> Change:
    return lambda g: Gguf(g.keys | {name: (value, kind, item)}, g.tensors)


def drop_key(name: str) -> Change:
    return lambda g: g.without_keys(name)


def without_text(text: str) -> Change:
    """No token has this text: the one that had has another."""

    def change(g: Gguf) -> Gguf:
        texts, *kinds = g.keys[TOKENS]
        return Gguf(g.keys | {TOKENS: ([t if t != text else "other" for t in texts], *kinds)}, g.tensors)

    return change


def drop_tensor(name: str) -> Change:
    return lambda g: g.renamed(lambda n: None if n == name else n)


def set_tensor(name: str, array: Any) -> Change:
    return lambda g: g.with_tensors({name: f32(np.asarray(array, np.float32))})


def behind(n_layer: int) -> Change:
    """A tower of which layers behind hidden state 2 are not run."""
    feature = set_key("clip.vision.feature_layer", [2], ARRAY, gguf.GGUFValueType.INT32)
    return lambda g: feature(set_key("clip.vision.block_count", n_layer)(g))


TOKENS = "tokenizer.ggml.tokens"
Mismatch, Unsupported = pyllava.ModelMismatchError, pyllava.UnsupportedModelError
MODELS: list[tuple[str, Change, type[Exception], str]] = [
    ("architecture", set_key("general.architecture", "gpt9", STRING), Unsupported, "'gpt9', this version runs 'llama', 'qwen2', 'granite'$"),
    ("architecture type", set_key("general.architecture", 7), Mismatch, "is u32, need string"),
    ("no architecture", drop_key("general.architecture"), Mismatch, "general.architecture is missing"),
    ("block_count 0", set_key("llama.block_count", 0), Mismatch, "found 0, need 1..512"),
    ("block_count 513", set_key("llama.block_count", 513), Mismatch, "found 513"),
    ("block_count + 1", set_key("llama.block_count", 3), Mismatch, "missing tensor blk.2.attn_norm"),
    ("block_count - 1", set_key("llama.block_count", 1), Mismatch, "9 tensors unused"),
    ("block_count f32", set_key("llama.block_count", 2.0, F32), Mismatch, "is f32, need an integer"),
    ("embedding_length", set_key("llama.embedding_length", 72), Mismatch, "dimension_count"),
    ("head_count 0", set_key("llama.attention.head_count", 0), Mismatch, "found 0"),
    ("head_count_kv 3", set_key("llama.attention.head_count_kv", 3), Mismatch, "must divide"),
    ("head_count_kv 8", set_key("llama.attention.head_count_kv", 8), Mismatch, "need 1..4"),
    ("feed_forward_length", set_key("llama.feed_forward_length", 161), Mismatch, "ffn_gate.weight: shape"),
    ("rope dimension", set_key("llama.rope.dimension_count", 6), Mismatch, "dimension_count"),
    ("rope base", set_key("llama.rope.freq_base", -1.0, F32), Mismatch, "freq_base"),
    ("rope base nan", set_key("llama.rope.freq_base", float("nan"), F32), Mismatch, "freq_base"),
    ("rope scaling", set_key("llama.rope.scaling.type", "bogus", STRING), Unsupported, "bogus"),
    ("eps", set_key("llama.attention.layer_norm_rms_epsilon", 0.0, F32), Mismatch, "epsilon"),
    ("no eps", drop_key("llama.attention.layer_norm_rms_epsilon"), Mismatch, "epsilon is missing"),
    ("experts", set_key("llama.expert_count", 8), Unsupported, "8 experts"),
    ("vocab_size", set_key("llama.vocab_size", 99), Mismatch, "vocab_size"),
    ("missing tensor", drop_tensor("blk.1.ffn_up.weight"), Mismatch, "missing tensor blk.1.ffn_up.weight"),
    ("no norm", drop_tensor("output_norm.weight"), Mismatch, "missing tensor output_norm.weight"),
    ("short matrix", set_tensor("blk.0.attn_q.weight", np.zeros((63, 64))), Mismatch, r"\[63, 64\], need \[64, 64\]"),
    ("cube", set_tensor("blk.0.attn_q.weight", np.zeros((2, 32, 64))), Mismatch, r"\[2, 32, 64\]"),
    ("extra tensor", set_tensor("blk.0.mystery", np.zeros(4)), Mismatch, "1 tensors unused, such as blk.0.mystery"),
    ("tokenizer", set_key("tokenizer.ggml.model", "bert", STRING), Unsupported, r"tokenizer 'bert', this version runs 'llama', 'gpt2'$"),
    ("no tokens", drop_key(TOKENS), Mismatch, "tokens is missing"),
    ("tokens type", set_key(TOKENS, [1, 2, 3], ARRAY, U32), Mismatch, "need array of string"),
    ("bos", set_key("tokenizer.ggml.bos_token_id", 5000), Mismatch, "bos_token_id"),
    ("add_bos", set_key("tokenizer.ggml.add_bos_token", 1), Mismatch, "is u32, need bool"),
    ("split", set_key("split.count", 3, gguf.GGUFValueType.UINT16), Mismatch, "00001-of-00003"),
    ("split number", set_key("split.no", 1, gguf.GGUFValueType.UINT16), Mismatch, "split.no .* found 1, need 0..0"),
    ("split number of 1", lambda g: set_key("split.no", 1)(set_key("split.count", 1)(g)), Mismatch, "split.no"),
    ("split tensors", set_key("split.tensors.count", 20), Mismatch, "split.tensors.count is 20, .* hold 21"),
    ("split type", set_key("split.no", "0", STRING), Mismatch, "is string, need an integer"),
    ("linear", set_key("llama.rope.scaling.type", "linear", STRING), Mismatch, "no llama.rope.scaling.factor"),
    ("linear 0", lambda g: set_key("llama.rope.scaling.factor", 0.0, F32)(set_key("llama.rope.scaling.type", "linear", STRING)(g)), Mismatch, "no llama.rope.scaling.factor > 0"),
    ("no bos", drop_key("tokenizer.ggml.bos_token_id"), Mismatch, "bos_token_id is missing"),
    ("no bos, said", lambda g: set_key("tokenizer.ggml.add_bos_token", True, BOOL)(drop_key("tokenizer.ggml.bos_token_id")(g)), Mismatch, "bos_token_id is missing"),
    ("no end", lambda g: drop_key("tokenizer.ggml.eos_token_id")(without_text("</s>")(g)), Mismatch, "eos_token_id is missing"),
    *((f"{name} id", set_key(f"tokenizer.ggml.{name}_token_id", id), Mismatch, f"{name}_token_id .* need 0..383")
      for name, id in [("padding", 384), ("padding", 2**32 - 1), ("eos", 384), ("unknown", 384), ("seperator", 384), ("eot", 384), ("mask", 9999), ("fim_pre", 384)]),
    ("pad i32", set_key("tokenizer.ggml.padding_token_id", -1, gguf.GGUFValueType.INT32), Mismatch, "found -1"),
    *((f"{name} u32", set_key(name, 1), Mismatch, "is u32, need bool")
      for name in ["tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.remove_extra_whitespaces",
                   "llama.attention.causal", "llama.use_parallel_residual"]),
    ("bool for an integer", set_key("llama.block_count", True, BOOL), Mismatch, "is bool, need an integer"),
]  # fmt: skip
PROJECTORS: list[tuple[str, Change, type[Exception], str]] = [
    ("no vision", set_key("clip.has_vision_encoder", False, BOOL), Unsupported, "no vision tower"),
    ("vision type", set_key("clip.has_vision_encoder", 1), Mismatch, "need bool"),
    ("projector type", set_key("clip.projector_type", "resampler", STRING), Unsupported, "resampler"),
    ("image_size 0", set_key("clip.vision.image_size", 0), Mismatch, "found 0"),
    ("image_size 70", set_key("clip.vision.image_size", 70), Mismatch, r"shape \[17, 32\], need \[26, 32\]"),
    ("patch_size", set_key("clip.vision.patch_size", 65536), Mismatch, "patch_size"),
    ("positions", set_tensor("v.position_embd.weight", np.zeros((16, 32))), Mismatch, r"position_embd.weight: shape"),
    ("block_count", set_key("clip.vision.block_count", 200_000_000), Mismatch, "need 1..512"),
    ("feature_layer", set_key("clip.vision.feature_layer", [9], ARRAY, gguf.GGUFValueType.INT32), Mismatch, "found 9"),
    ("heads", set_key("clip.vision.attention.head_count", 5), Mismatch, "not a multiple of head_count 5"),
    ("eps", set_key("clip.vision.attention.layer_norm_epsilon", 0.0, F32), Mismatch, "epsilon"),
    ("mean", set_key("clip.vision.image_mean", [0.5, 0.5], ARRAY, F32), Mismatch, "need 3 each"),
    ("std", set_key("clip.vision.image_std", [0.5, 0.0, 0.5], ARRAY, F32), Mismatch, "image_std"),
    ("activations", lambda g: set_key("clip.use_silu", True, BOOL)(set_key("clip.use_gelu", True, BOOL)(g)), Mismatch, "both true"),
    ("text encoder", set_key("clip.has_text_encoder", 0), Mismatch, "is u32, need bool"),
    ("says it projects", set_key("clip.has_llava_projector", 1), Mismatch, "is u32, need bool"),
    ("gelu", set_key("clip.use_gelu", 0, gguf.GGUFValueType.UINT8), Mismatch, "is u8, need bool"),
    ("ffn_down", set_tensor("v.blk.0.ffn_down.weight", np.zeros((96, 40))), Mismatch, "ffn_down.weight: shape"),
    ("ffn_up", set_tensor("v.blk.0.ffn_up.weight", np.zeros((32, 90))), Mismatch, "ffn_up.weight: shape"),
    ("layers behind", behind(4), Mismatch, "missing tensor v.blk.3.ln1.weight"),
    ("many layers behind", behind(512), Mismatch, "missing tensor v.blk.3.ln1.weight"),
    ("a whole tower", set_key("clip.vision.block_count", 24), Mismatch, "missing tensor v.blk.3.ln1.weight"),
    ("half a layer behind", lambda g: drop_tensor("v.blk.2.ffn_up.bias")(behind(3)(g)), Mismatch, "missing tensor v.blk.2.ffn_up.bias"),
    ("split number", set_key("split.no", 2), Mismatch, "split.no .* found 2"),
    ("mm.0", drop_tensor("mm.0.weight"), Mismatch, "missing tensor mm.0.weight"),
    ("mm.2", set_tensor("mm.2.weight", np.zeros((48, 64))), Mismatch, "wrong mmproj"),
    ("bias", drop_tensor("v.blk.0.attn_q.bias"), Mismatch, "missing tensor v.blk.0.attn_q.bias"),
    ("mlp_norm", set_tensor("mm.3.weight", np.zeros((64, 64))), Mismatch, "missing tensor mm.1.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), [c[1:] for c in MODELS], ids=[c[0] for c in MODELS])
def test_model(
    files: Files, model: Gguf, tmp_path: Path, change: Change, error: type[Exception], message: str
) -> None:
    path = tiny_gguf.write(tmp_path / "bad.gguf", change(model))
    with pytest.raises(error, match=message) as caught:
        _lib.ModelHandle(path, files.mmproj)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "message"), [c[1:] for c in PROJECTORS], ids=[c[0] for c in PROJECTORS]
)
def test_projector(
    files: Files, mmproj: Gguf, tmp_path: Path, change: Change, error: type[Exception], message: str
) -> None:
    path = tiny_gguf.write(tmp_path / "bad.gguf", change(mmproj))
    with pytest.raises(error, match=message) as caught:
        _lib.ModelHandle(files.model, path)
    assert str(path) in str(caught.value)


def test_every_missing_tensor_is_named(files: Files, model: Gguf, mmproj: Gguf, tmp_path: Path) -> None:
    optional = {"output.weight", "v.class_embd", "v.pre_ln.weight", "v.pre_ln.bias"}
    for name in [n for n in model.tensors if n not in optional]:
        path = tiny_gguf.write(tmp_path / "bad.gguf", drop_tensor(name)(model))
        with pytest.raises(Mismatch, match=f"missing tensor {name}"):
            _lib.ModelHandle(path, None)
    unread = {n for n in mmproj.tensors if n.startswith("v.blk.2.") or n.startswith("v.post_ln")}
    for name in [n for n in mmproj.tensors if n not in optional | unread]:
        path = tiny_gguf.write(tmp_path / "bad.gguf", drop_tensor(name)(mmproj))
        with pytest.raises(Mismatch, match=f"missing tensor {name}"):
            _lib.ModelHandle(files.model, path)


def test_vocabularies(model: Gguf, tmp_path: Path) -> None:
    tokens, kind, item = model.keys[TOKENS]
    scores = "tokenizer.ggml.scores"
    types = "tokenizer.ggml.token_type"

    def refuse(change: Change, message: str) -> None:
        path = tiny_gguf.write(tmp_path / "bad.gguf", change(model))
        with pytest.raises(Mismatch, match=message):
            _lib.ModelHandle(path, None)

    refuse(set_key(TOKENS, [*tokens[:-1], tokens[5]], kind, item), "have the same text")
    renamed = [t.replace("<0x41>", "oops") for t in tokens]
    refuse(set_key(TOKENS, renamed, kind, item), "no token <0x41>")
    refuse(set_key(scores, model.keys[scores][0][:-1], ARRAY, F32), "entries, need 384")
    refuse(set_key(scores, [float("nan")] * len(tokens), ARRAY, F32), "not finite")
    refuse(set_key(types, [99] * len(tokens), ARRAY, gguf.GGUFValueType.INT32), "is 99, need 0..6")


WARNING = 30  # of pyllava_log_level


def loaded(path: Path) -> list[str]:
    """What a model file that is accepted has warned about."""
    said: list[str] = []
    _lib.ModelHandle(
        path, None, log=lambda level, text: said.append(text) if level == WARNING else None
    ).close()
    return said


def test_versions_of_quantised_blocks(model: Gguf, mmproj: Gguf, files: Files, tmp_path: Path) -> None:
    name, path = "blk.0.attn_q.weight", tmp_path / "x.gguf"
    quantised = tiny_gguf.quantized(model.tensors[name].data, gguf.GGMLQuantizationType.Q8_0)
    of_blocks = model.with_tensors({name: quantised})
    for version in (0, 1, 3, 999):
        change = set_key("general.quantization_version", version)
        with pytest.raises(Unsupported, match=f"quantization_version: {version}, this version reads 2"):
            _lib.ModelHandle(tiny_gguf.write(path, change(of_blocks)), None)
        (said,) = loaded(tiny_gguf.write(path, change(model)))
        assert f"general.quantization_version: {version} is unknown" in said
    for file in (
        drop_key("general.quantization_version")(of_blocks),
        set_key("general.quantization_version", 2)(of_blocks),
    ):
        assert not loaded(tiny_gguf.write(path, file))
    wide = tiny_gguf.quantized(mmproj.tensors["mm.0.weight"].data, gguf.GGMLQuantizationType.Q8_0)
    change = set_key("general.quantization_version", 3)
    tiny_gguf.write(path, change(mmproj.with_tensors({"mm.0.weight": wide})))
    with pytest.raises(Unsupported, match=f"{path.name}: general.quantization_version"):
        _lib.ModelHandle(files.model, path)
    tiny_gguf.write(path, set_key("general.quantization_version", "2", STRING)(model))
    with pytest.raises(Mismatch, match="is string, need an integer"):
        _lib.ModelHandle(path, None)


def test_what_says_little_is_accepted(model: Gguf, tmp_path: Path) -> None:
    """Files merged from shards, files that need no first token, and ends of an answer that are no eos."""
    path = tmp_path / "x.gguf"
    merged = model.with_u32(split__no=0, split__count=0, split__tensors__count=len(model.tensors))
    assert not loaded(tiny_gguf.write(path, merged))
    assert not loaded(tiny_gguf.write(path, model.with_u32(split__count=1)))
    without = set_key("tokenizer.ggml.add_bos_token", False, BOOL)(
        drop_key("tokenizer.ggml.bos_token_id")(model)
    )
    assert not loaded(tiny_gguf.write(path, without))
    ended = drop_key("tokenizer.ggml.eos_token_id")(without_text("</s>")(model))
    ended = ended.with_u32(tokenizer__ggml__eot_token_id=7)
    handle = _lib.ModelHandle(tiny_gguf.write(path, ended), None)
    assert handle.info.eos_id == 7
    assert [t for t in range(handle.info.n_vocab) if handle.is_end(t)] == [7]
    factor = set_key("llama.rope.scaling.factor", 4.0, F32)
    assert not loaded(
        tiny_gguf.write(path, factor(set_key("llama.rope.scaling.type", "linear", STRING)(model)))
    )


@pytest.mark.parametrize("name", ["tokenizer.ggml.merges", "general.languages", "anything.at.all", TOKENS])
@pytest.mark.parametrize("bad", [b"ab\0c", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\x80", b"caf\xc3"])
def test_texts_in_arrays(model: Gguf, tmp_path: Path, name: str, bad: bytes) -> None:
    """Tokens may be pieces of characters, which is told; nothing may be cut by a zero byte."""
    texts = ["a b", "~~mark~~" + "y" * len(bad), "c d"]
    if name == TOKENS:
        texts = [*model.keys[TOKENS][0][:-1], "\u2581" * 9 + "~~mark~~" + "y" * len(bad)]
    path = tiny_gguf.write(tmp_path / "x.gguf", set_key(name, texts, ARRAY, STRING)(model))
    data = path.read_bytes()
    at = data.index(b"~~mark~~y") + 8
    path.write_bytes(data[:at] + bad + data[at + len(bad) :])
    if name == TOKENS and b"\0" not in bad:
        (said,) = loaded(path)
        assert "tokenizer.ggml.tokens: 1 of 384 texts are not valid UTF-8" in said
        return
    with pytest.raises(pyllava.ModelFileError, match=f"{name}: .*(zero byte inside|not valid UTF-8)"):
        _lib.ModelHandle(path, None)
    with pytest.raises(pyllava.ModelFileError, match=f"{name}: .*text {383 if name == TOKENS else 1} ?"):
        GgufFile(path)


def test_swapped_roles(files: Files) -> None:
    with pytest.raises(Mismatch, match=r"this is a projector"):
        _lib.ModelHandle(files.mmproj, None)
    with pytest.raises(Mismatch, match="this is a language model"):
        _lib.ModelHandle(files.model, files.model)


def test_broken_weights_are_a_numeric_error(files: Files, model: Gguf, tmp_path: Path) -> None:
    broken = np.full((64,), np.nan)
    path = tiny_gguf.write(tmp_path / "nan.gguf", set_tensor("blk.1.attn_norm.weight", broken)(model))
    with pyllava.Llava(path) as m, pytest.raises(pyllava.NumericError, match="not finite"):
        m.ask(None, "x")


def test_a_good_file_after_many_bad_ones(files: Files) -> None:
    with pyllava.Llava(files.model, files.mmproj) as m:
        m.ask(None, "x", max_tokens=1)
