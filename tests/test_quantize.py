"""Quantising: the type of every tensor, the numbers, and files that are whole or absent."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import pyllava
from pyllava import _lib, _terminal, cli
from pyllava._gguf_source import SourceFile
from pyllava._part_file import replacing
from pyllava.cli.quantize import quantize_command
from pyllava.formats import FORMATS
from pyllava.gguf import GgufFile
from pyllava.quantize import TYPES, Plan, ProjectorPlan, default_threads, quantize, quantize_rows

tiny_gguf = pytest.importorskip("tiny_gguf")
gguf = tiny_gguf.gguf

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "tests" / "data" / "demo"
MODEL, MMPROJ = DEMO / "demo-f16.gguf", DEMO / "demo-mmproj-f16.gguf"
SCENE = ROOT / "examples" / "scene.png"
NAMES = tuple(dict.fromkeys(mix.name for mix in TYPES.values()))
N_VOCAB = 100
FloatArray = npt.NDArray[np.float32]

# ------------------------------------------------------------------------------------- which type


def llama_shapes(
    n_layer: int,
    n_embd: int = 4096,
    n_ff: int = 11008,
    n_kv: int = 4096,
    fused: bool = False,
    tied: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model of the architecture, row-major."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (N_VOCAB, n_embd),
        "output_norm.weight": (n_embd,),
    }
    if not tied:
        shapes["output.weight"] = (N_VOCAB, n_embd)
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (n_embd,),
        "ffn_norm": (n_embd,),
        "attn_output": (n_embd, n_embd),
        "ffn_gate": (n_ff, n_embd),
        "ffn_up": (n_ff, n_embd),
        "ffn_down": (n_embd, n_ff),
    }
    if fused:
        layer["attn_qkv"] = (n_embd + 2 * n_kv, n_embd)
    else:
        layer |= {"attn_q": (n_embd, n_embd), "attn_k": (n_kv, n_embd), "attn_v": (n_kv, n_embd)}
    for i in range(n_layer):
        shapes |= {f"blk.{i}.{part}.weight": shape for part, shape in layer.items()}
    return shapes


def plan_types(plan: Plan | ProjectorPlan, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    return {name: plan.tensor_type(name, shape) for name, shape in shapes.items()}


def llama_types(
    mix: str, n_layer: int, *, n_gqa: int = 1, tied: bool = False, **shape: Any
) -> dict[str, str]:
    plan = Plan(mix, n_layer=n_layer, n_head=32, n_head_kv=32 // n_gqa, tied=tied)
    return plan_types(plan, llama_shapes(n_layer, tied=tied, **shape))


def layers(types: dict[str, str], part: str, kind: str) -> list[int]:
    return [int(n.split(".")[1]) for n, t in types.items() if n.endswith(f".{part}.weight") and t == kind]


# The layers with more bits, by layer count: written out by hand.
MORE = {
    5: [2, 4],
    32: [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31],
    40: [0, 1, 2, 3, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 35, 36, 37, 38, 39],
    60: [*range(7), 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45, 48, 51, *range(52, 60)],
}
FIRST_EIGHTH = {5: [], 32: [0, 1, 2, 3], 40: [0, 1, 2, 3, 4], 60: [0, 1, 2, 3, 4, 5, 6]}
FIRST_SIXTEENTH = {5: [], 32: [0, 1], 40: [0, 1], 60: [0, 1, 2]}


@pytest.mark.parametrize("n_layer", MORE)
@pytest.mark.parametrize(("mix", "base"), [("q4_k_m", "Q4_K"), ("q5_k_m", "Q5_K")])
def test_medium_mixes_give_some_layers_more(mix: str, base: str, n_layer: int) -> None:
    types = llama_types(mix, n_layer)
    every = list(range(n_layer))
    for part in ("attn_v", "ffn_down"):
        assert layers(types, part, "Q6_K") == MORE[n_layer]
        assert sorted(layers(types, part, "Q6_K") + layers(types, part, base)) == every
    for part in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
        assert layers(types, part, base) == every


@pytest.mark.parametrize("n_layer", MORE)
def test_small_and_three_bit_mixes(n_layer: int) -> None:
    every = list(range(n_layer))
    small = llama_types("q4_k_s", n_layer)
    assert layers(small, "attn_v", "Q5_K") == every[:4]
    assert layers(small, "ffn_down", "Q5_K") == FIRST_EIGHTH[n_layer]
    assert layers(small, "attn_output", "Q4_K") == every
    medium = llama_types("q3_k_m", n_layer)
    assert layers(medium, "attn_v", "Q5_K") == [0, 1]
    assert layers(medium, "attn_v", "Q4_K") == every[2:]
    assert layers(medium, "ffn_down", "Q5_K") == FIRST_SIXTEENTH[n_layer]
    assert layers(medium, "ffn_down", "Q4_K") == every[len(FIRST_SIXTEENTH[n_layer]) :]
    assert layers(medium, "attn_output", "Q4_K") == every
    assert layers(medium, "attn_q", "Q3_K") == every
    large = llama_types("q3_k_l", n_layer)
    for part in ("attn_v", "ffn_down", "attn_output"):
        assert layers(large, part, "Q5_K") == every


@pytest.mark.parametrize(("n_gqa", "kind"), [(1, "Q3_K"), (2, "Q3_K"), (4, "Q4_K"), (8, "Q4_K")])
def test_two_bits_depend_on_how_many_heads_share(n_gqa: int, kind: str) -> None:
    types = llama_types("q2_k", 5, n_gqa=n_gqa)
    assert layers(types, "attn_v", kind) == [0, 1, 2, 3, 4]
    for part in ("ffn_down", "attn_output"):
        assert layers(types, part, "Q3_K") == [0, 1, 2, 3, 4]
    for part in ("attn_q", "attn_k", "ffn_gate", "ffn_up"):
        assert layers(types, part, "Q2_K") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("mix", "counts"),
    [  # as model cards of LLaMA-7B list them
        ("q8_0", {"F32": 65, "Q8_0": 226}),
        ("q4_0", {"F32": 65, "Q4_0": 225, "Q6_K": 1}),
        ("q4_k_m", {"F32": 65, "Q4_K": 193, "Q6_K": 33}),
        ("q5_k_m", {"F32": 65, "Q5_K": 193, "Q6_K": 33}),
        ("q4_k_s", {"F32": 65, "Q4_K": 217, "Q5_K": 8, "Q6_K": 1}),
        ("q3_k_m", {"F32": 65, "Q3_K": 129, "Q4_K": 92, "Q5_K": 4, "Q6_K": 1}),
        ("q6_k", {"F32": 65, "Q6_K": 226}),
        ("f16", {"F32": 65, "F16": 226}),
    ],
)
def test_counts_of_a_7b_model(mix: str, counts: dict[str, int]) -> None:
    assert Counter(llama_types(mix, 32).values()) == counts


@pytest.mark.parametrize("mix", [name for name in NAMES if name not in ("f32", "f16", "bf16", "q8_0")])
def test_output_and_embeddings(mix: str) -> None:
    types = llama_types(mix, 2)
    assert types["output.weight"] == "Q6_K"
    assert types["token_embd.weight"] == TYPES[mix].base
    assert llama_types(mix, 2, tied=True)["token_embd.weight"] == "Q6_K"


def test_q8_0_has_one_type() -> None:
    assert set(llama_types("q8_0", 3).values()) == {"Q8_0", "F32"}


@pytest.mark.parametrize(
    ("mix", "kind"),
    [("q3_k_m", "Q4_K"), ("q3_k_l", "Q4_K"), ("q4_k_m", "Q5_K"), ("q5_k_m", "Q6_K"), ("q2_k", "Q2_K")],
)
def test_fused_attention(mix: str, kind: str) -> None:
    assert layers(llama_types(mix, 3, fused=True), "attn_qkv", kind) == [0, 1, 2]


def test_70b_raises_the_values() -> None:
    for mix in ("q2_k", "q3_k_s", "q4_k_s"):
        assert layers(llama_types(mix, 80, n_gqa=8), "attn_v", "Q5_K") == list(range(80))
    assert layers(llama_types("q3_k_s", 80), "attn_v", "Q3_K") == list(range(80))


def test_pure_is_one_type() -> None:
    plan = Plan("q4_k_m", n_layer=5, n_head=32, n_head_kv=32, tied=False, pure=True)
    assert set(plan_types(plan, llama_shapes(5)).values()) == {"Q4_K", "F32"}


def test_rows_that_a_type_does_not_divide() -> None:
    """Multiples of 32 take the older type, others f16; each is recorded."""
    wanted = {"q2_k": "Q4_0", "q3_k_s": "Q4_0", "q4_k_s": "Q5_0", "q5_k_s": "Q5_1", "q6_k": "Q8_0"}
    for mix, kind in wanted.items():
        plan = Plan(mix, n_layer=9, n_head=4, n_head_kv=4, tied=False)
        assert plan.tensor_type("blk.5.ffn_up.weight", (64, 96)) == kind
        assert plan.tensor_type("output.weight", (64, 96)) == "Q8_0"
        assert plan.tensor_type("blk.5.ffn_gate.weight", (64, 100)) == "F16"
        assert plan.tensor_type("blk.5.attn_q.weight", (64, 256)) == TYPES[mix].base
        assert plan.tensor_type("blk.5.ffn_norm.weight", (100,)) == "F32"
        assert [(f.name, f.wanted, f.type, f.n_per_row) for f in plan.fallbacks] == [
            ("blk.5.ffn_up.weight", TYPES[mix].base, kind, 96),
            ("output.weight", "Q6_K", "Q8_0", 96),
            ("blk.5.ffn_gate.weight", TYPES[mix].base, "F16", 100),
        ]
    assert (
        Plan("q8_0", n_layer=1, n_head=1, n_head_kv=1, tied=True).tensor_type("token_embd.weight", (9, 40))
        == "F16"
    )


def test_projector_types() -> None:
    plan = ProjectorPlan("q4_k_m")
    shapes: dict[str, tuple[int, ...]] = {
        "v.class_embd": (1024,),
        "v.patch_embd.weight": (1024, 3, 14, 14),
        "v.position_embd.weight": (577, 1024),
        "v.pre_ln.weight": (1024,),
        "v.blk.0.attn_v.weight": (1024, 1024),
        "v.blk.0.attn_v.bias": (1024,),
        "v.blk.0.ffn_down.weight": (4096, 1024),
        "v.blk.0.ffn_up.weight": (1024, 4304),
        "mm.2.weight": (4096, 4096),
        "model.image_newline": (4096,),
    }
    kept = {name for name, shape in shapes.items() if not plan.quantizes(name, shape)}
    assert kept == {name for name, shape in shapes.items() if len(shape) != 2}
    types = {name: plan.tensor_type(name, shape) for name, shape in shapes.items() if name not in kept}
    assert types == {
        "v.position_embd.weight": "F16",
        "v.blk.0.attn_v.weight": "Q4_K",
        "v.blk.0.ffn_down.weight": "Q4_K",
        "v.blk.0.ffn_up.weight": "F16",  # 4304 is no multiple of 32
        "mm.2.weight": "Q4_K",
    }


def test_names_of_types() -> None:
    assert TYPES["q4_k"] is TYPES["q4_k_m"]
    assert Plan("Q5_K", n_layer=1, n_head=1, n_head_kv=1, tied=True).mix.name == "q5_k_m"
    with pytest.raises(ValueError, match="type 'q7', need one of f32, f16"):
        Plan("q7", n_layer=1, n_head=1, n_head_kv=1, tied=True)


# --------------------------------------------------------------------------------------- the numbers

# Normalised mean square error on normally distributed numbers, at most.
BOUNDS = {
    "F32": 0.0,
    "F16": 1e-7,
    "BF16": 5e-6,
    "Q8_0": 4e-5,
    "Q6_K": 4e-4,
    "Q5_K": 1.6e-3,
    "Q5_1": 1.8e-3,
    "Q5_0": 2.2e-3,
    "Q4_K": 6e-3,
    "Q4_1": 7e-3,
    "Q4_0": 9e-3,
    "Q3_K": 2.8e-2,
    "Q2_K": 0.1,
}


def noise(n: int, k: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def dequantized(data: npt.NDArray[np.uint8], type_name: str, n_per_row: int) -> FloatArray:
    x = np.empty((len(data), n_per_row), np.float32)
    _lib.dequantize(data, _lib.tensor_type(type_name), x)
    return x


@pytest.mark.parametrize("kind", BOUNDS)
def test_error_is_that_of_the_type(kind: str) -> None:
    x = noise(50, 512)
    y = dequantized(quantize_rows(x, kind), kind, 512)
    assert float(np.mean((x - y) ** 2) / np.mean(x**2)) <= BOUNDS[kind]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_bytes_are_those_of_gguf_py(kind: str) -> None:
    x = noise(33, 256) * np.logspace(-6, 3, 33, dtype=np.float32)[:, None]
    expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind]).view(np.uint8).reshape(33, -1)
    np.testing.assert_array_equal(quantize_rows(x, kind), expected)


@pytest.mark.parametrize("kind", [k for k in BOUNDS if k not in ("F32", "BF16")])
def test_dequantized_as_gguf_py_does(kind: str) -> None:
    data = quantize_rows(noise(20, 512), kind)
    raw = data.view(np.float16) if kind == "F16" else data
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    np.testing.assert_allclose(dequantized(data, kind, 512), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [k for k in BOUNDS if k != "F32"])
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-38, 1e-12, 1e4])
def test_extreme_numbers(kind: str, scale: float) -> None:
    """Zeros, denormals, one outlier and large numbers: finite, and no worse than rounding to the largest."""
    x = noise(3, 256) * np.float32(scale)
    x[1] *= np.float32(1e-3)
    x[1, 7] = 2 * scale
    y = dequantized(quantize_rows(x, kind), kind, 256)
    assert np.isfinite(y).all()
    assert np.abs(y - x).max() <= 0.7 * np.abs(x).max() + 1e-7
    if scale == 0:
        assert not y.any()


def test_formats_are_those_of_the_library() -> None:
    for kind in FORMATS.values():
        found = _lib.tensor_type(kind.name)
        wanted = (found.name.upper(), found.id, found.block, found.block_bytes)
        assert (kind.name, kind.id, kind.block, kind.block_bytes) == wanted
    assert {mix.base for mix in TYPES.values()} == set(FORMATS)


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "F16"])
def test_the_same_bytes_for_any_number_of_threads(kind: str) -> None:
    x = noise(2100, 1024)
    first = quantize_rows(x, kind, 1)
    for n_threads in (2, 3, None):
        np.testing.assert_array_equal(quantize_rows(x, kind, n_threads), first)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_K"])
def test_what_is_not_finite_is_refused(kind: str, bad: float) -> None:
    x = noise(5000, 256)
    x[4321, 56] = bad
    with pytest.raises(pyllava.NumericError, match=r"row 4321, column 56: (NaN|infinity)$"):
        quantize_rows(x, kind)


@pytest.mark.parametrize("large", [1e10, 1e15, 1e30, 5e37])
@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q4_1", "Q8_0", "Q6_K", "Q4_K", "Q3_K", "Q2_K"])
def test_what_is_too_large_for_the_type_is_refused(kind: str, large: float) -> None:
    with pytest.raises(pyllava.NumericError, match=r"row 1.*: .*too large for "):
        quantize_rows(noise(2, 256) * np.array([[1], [large]], np.float32), kind)


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ((2, 255), "Q4_K", "rows of 255, q4_K needs a multiple of 256"),
        ((2, 0), "F32", "rows of 0"),
        ((4,), "F32", "need \\[n, k\\]"),
        ((2, 256), "q4_k_m", "type q4_k_m is unknown to ggml"),
        ((2, 256), "IQ2_XS", "iq2_xs: no quantiser"),
        ((2, 256), "I32", "i32: no quantiser"),
    ],
)
def test_misuse(shape: tuple[int, ...], kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_rows(np.zeros(shape, np.float32), kind)


def test_no_rows() -> None:
    assert quantize_rows(np.zeros((0, 256), np.float32), "q4_K").shape == (0, 144)


# --------------------------------------------------------------------------------------------- files


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    read = tiny_gguf.read(path).tensors
    return {name: (tensor.kind.name, tensor.data.tobytes()) for name, tensor in read.items()}


def changed(path: Path, out: Path, name: str, edit: Callable[[FloatArray], None]) -> Path:
    """A copy of the file with one tensor edited, as f32."""
    file = tiny_gguf.read(path)
    x = file.tensors[name].floats().copy()
    edit(x)
    return Path(tiny_gguf.write(out, file.with_tensors({name: tiny_gguf.f32(x)})))


def assert_nothing_left(folder: Path, *expected: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_demo_answers_in_every_type(tmp_path: Path, name: str) -> None:
    model, mmproj = tmp_path / "m.gguf", tmp_path / "mmproj.gguf"
    reports = quantize(MODEL, model, name), quantize(MMPROJ, mmproj, name)
    for report, path in zip(reports, (model, mmproj), strict=True):
        file = GgufFile(path)
        assert file.metadata["general.file_type"] == TYPES[name].file_type
        assert file.metadata["general.quantization_version"] == 2
        assert file.alignment == 32
        assert path.stat().st_size % 32 == 0
        assert sum(t.n_bytes for t in file.tensors) == report.n_bytes
        assert report.types == Counter(t.type for t in file.tensors)
    with pyllava.Llava(model, mmproj, n_threads=1) as llava:
        answer = llava.ask(SCENE, "What is in the picture?", max_tokens=24)
    assert len(str(answer)) > 10
    if name in ("f32", "f16", "bf16", "q8_0", "q6_k"):
        assert str(answer).startswith("The picture shows") or len(str(answer).split()) > 3


def test_every_tensor_is_what_the_plan_says(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    quantize(MODEL, out, "q4_k_m")
    plan = Plan("q4_k_m", n_layer=5, n_head=4, n_head_kv=2, tied=False)
    source, written = tiny_gguf.read(MODEL).tensors, tensors(out)
    assert list(written) == list(source)
    for name, (kind, data) in written.items():
        x = source[name].floats()
        assert kind == plan.tensor_type(name, x.shape)
        assert data == quantize_rows(x.reshape(-1, x.shape[-1]), kind).tobytes(), name


@pytest.mark.parametrize("name", ["q4_k_m", "q8_0", "f32"])
def test_metadata_are_kept(tmp_path: Path, name: str) -> None:
    for source in (MODEL, MMPROJ):
        file = tiny_gguf.read(source)
        keys = {"test.text": ("\u00e9\U0001f642" * 99, gguf.GGUFValueType.STRING, None)}
        for i, kind in enumerate(("UINT8", "INT8", "UINT16", "INT16", "INT32", "UINT64", "INT64")):
            keys[f"test.{kind}"] = (i + 1, gguf.GGUFValueType[kind], None)
        keys["test.f64"] = (0.1, gguf.GGUFValueType.FLOAT64, None)
        keys["test.flags"] = ([True, False], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.BOOL)
        rich = tiny_gguf.write(
            tmp_path / "rich.gguf", type(file)(file.keys | keys, file.tensors), alignment=64
        )
        quantize(rich, tmp_path / "out.gguf", name)
        before, after = tiny_gguf.read(rich).keys, tiny_gguf.read(tmp_path / "out.gguf").keys
        for key in ("general.file_type", "general.quantization_version"):
            before.pop(key, None)
            after.pop(key)
        assert list(after) == list(before)
        assert after == before


def test_projector_file(tmp_path: Path) -> None:
    """What must stay f16 or f32 does; the rest has the type or, where rows do not divide, its fallback."""
    out = tmp_path / "out.gguf"
    report = quantize(MMPROJ, out, "q4_0")
    source, written = tensors(MMPROJ), tensors(out)
    for name, (kind, data) in written.items():
        if name.startswith("v.patch_embd") or name == "v.position_embd.weight" or source[name][0] == "F32":
            assert (kind, data) == source[name]
        else:
            assert kind == "Q4_0"
    assert not report.fallbacks
    assert {f.type for f in quantize(MMPROJ, out, "q4_k_m").fallbacks} == {"Q5_0"}


def test_tensors_of_other_kinds(tmp_path: Path) -> None:
    """Integers are copied, experts (3-D) quantised, f64 copied: ggml has no way from it to f32."""
    kinds = gguf.GGMLQuantizationType
    others = {
        "blk.0.table.weight": tiny_gguf.Tensor(np.arange(512, dtype=np.int32).reshape(2, 256), kinds.I32),
        "blk.0.wide.weight": tiny_gguf.Tensor(np.ones((2, 256)), kinds.F64),
        "blk.0.ffn_down_exps.weight": tiny_gguf.f32(noise(12, 256).reshape(3, 4, 256)),
        "blk.0.ffn_gate_inp.weight": tiny_gguf.f32(noise(3, 256)),
    }
    keys = {"general.architecture": ("llama", gguf.GGUFValueType.STRING, None)}
    source = tiny_gguf.write(tmp_path / "m.gguf", tiny_gguf.Gguf(keys, others))
    quantize(source, tmp_path / "out.gguf", "q4_k_s")
    written = tensors(tmp_path / "out.gguf")
    assert [kind for kind, _ in written.values()] == ["I32", "F64", "Q4_K", "F32"]
    for name in ("blk.0.table.weight", "blk.0.wide.weight", "blk.0.ffn_gate_inp.weight"):
        assert written[name][1] == others[name].data.tobytes()


def test_threads_and_splits_change_no_byte(tmp_path: Path) -> None:
    quantize(MODEL, tmp_path / "one.gguf", "q4_k_m", n_threads=1)
    quantize(MODEL, tmp_path / "three.gguf", "q4_k_m", n_threads=3)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "three.gguf").read_bytes()
    first = tiny_gguf.write(tmp_path / "parts.gguf", tiny_gguf.read(MODEL), split=20)
    assert "split.count" in GgufFile(first).metadata
    quantize(first, tmp_path / "merged.gguf", "q4_k_m")
    assert tensors(tmp_path / "merged.gguf") == tensors(tmp_path / "one.gguf")
    assert not [key for key in GgufFile(tmp_path / "merged.gguf").metadata if key.startswith("split.")]


def test_incomplete_splits_are_refused(tmp_path: Path) -> None:
    first = tiny_gguf.write(tmp_path / "parts.gguf", tiny_gguf.read(MODEL), split=20)
    second, third = sorted(tmp_path.glob("*.gguf"))[1:]
    out = tmp_path / "out" / "o.gguf"
    out.parent.mkdir()
    with pytest.raises(pyllava.ModelMismatchError, match=r"its name must end in -00001-of-00003.gguf"):
        quantize(second, out, "q8_0")
    other = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(pyllava.ModelMismatchError, match="its name must end in"):
        quantize(other, out, "q8_0")
    other.rename(first)
    third.write_bytes(second.read_bytes())
    with pytest.raises(pyllava.ModelMismatchError, match=r"split.no and split.count are"):
        quantize(first, out, "q8_0")
    third.unlink()
    with pytest.raises(FileNotFoundError):
        quantize(first, out, "q8_0")
    assert_nothing_left(out.parent)


def test_tensors_in_the_wanted_type_are_copied_and_others_requantized(tmp_path: Path) -> None:
    eight, again, four = (tmp_path / f"{name}.gguf" for name in ("eight", "again", "four"))
    assert quantize(MODEL, eight, "q8_0").n_requantized == 0
    assert quantize(eight, again, "q8_0").n_requantized == 0
    assert again.read_bytes() == eight.read_bytes()
    assert quantize(eight, four, "q4_0").n_requantized == 37
    x = tiny_gguf.read(eight).tensors["blk.0.ffn_up.weight"].floats()
    assert tensors(four)["blk.0.ffn_up.weight"] == ("Q4_0", quantize_rows(x, "Q4_0").tobytes())
    quantize(four, tmp_path / "floats.gguf", "f16")
    assert {kind for kind, _ in tensors(tmp_path / "floats.gguf").values()} == {"F16", "F32"}


@pytest.mark.parametrize(
    ("name", "row"),
    [("blk.3.ffn_down.weight", 201), ("blk.1.attn_norm.weight", 0), ("token_embd.weight", 1023)],
)
def test_a_file_with_nan_is_refused(tmp_path: Path, name: str, row: int) -> None:
    def spoil(x: FloatArray) -> None:
        x.reshape(-1, x.shape[-1])[row, 5] = np.nan

    source = changed(MODEL, tmp_path / "bad.gguf", name, spoil)
    with pytest.raises(pyllava.ModelFileError, match=rf"bad.gguf: {name}: row {row}, column 5: NaN"):
        quantize(source, tmp_path / "out.gguf", "q4_k_m")
    assert_nothing_left(tmp_path, "bad.gguf")


def test_a_quantised_file_with_a_broken_scale_is_refused(tmp_path: Path) -> None:
    quantize(MODEL, tmp_path / "q8.gguf", "q8_0")
    info = next(t for t in GgufFile(tmp_path / "q8.gguf").tensors if t.name == "blk.2.attn_k.weight")
    with open(tmp_path / "q8.gguf", "rb+") as file:
        file.seek(info.offset + 7 * (256 // 32) * 34)
        file.write(b"\xff\xff")
    for name in ("q8_0", "q4_0"):
        with pytest.raises(pyllava.ModelFileError, match=r"blk.2.attn_k.weight: row 7, column 0: NaN"):
            quantize(tmp_path / "q8.gguf", tmp_path / "out.gguf", name)
    assert_nothing_left(tmp_path, "q8.gguf")


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    whole, out = MODEL.read_bytes(), tmp_path / "out.gguf"
    source = tmp_path / "cut.gguf"
    for n in (0, 3, 20, 1000, len(whole) // 2, len(whole) - 1):
        source.write_bytes(whole[:n])
        with pytest.raises(pyllava.ModelFileError):
            quantize(source, out, "q8_0")
    tiny_gguf.write(source, tiny_gguf.Gguf({}, tiny_gguf.read(MODEL).tensors))
    with pytest.raises(pyllava.UnsupportedModelError, match=r"no general.architecture"):
        quantize(source, out, "q8_0")
    with pytest.raises(FileNotFoundError):
        quantize(tmp_path / "none.gguf", out, "q8_0")
    assert_nothing_left(tmp_path, "cut.gguf")


def test_changed_bytes_give_a_typed_error_or_a_file(tmp_path: Path) -> None:
    """Every eleventh byte of a small file's header changed in turn: never another exception, and no part file."""
    source, out = random_llama(tmp_path / "m.gguf", 1, 2, 1, 32, 32, True), tmp_path / "out.gguf"
    whole = bytearray(source.read_bytes())
    start = min(t.offset for t in GgufFile(source).tensors)
    rng = np.random.default_rng(3)
    n_written = 0
    for at in range(8, start, 11):
        spoilt = whole.copy()
        spoilt[at] ^= int(rng.integers(1, 256))
        source.write_bytes(spoilt)
        try:
            quantize(source, out, "q4_k_m", n_threads=1)
            n_written += 1
        except (pyllava.PyllavaError, FileNotFoundError):
            pass
        assert not (tmp_path / "out.gguf.part").exists()
    assert n_written > 20


def test_a_source_that_shrinks_meanwhile_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(MODEL.read_bytes())
    file = SourceFile(path)
    os.truncate(path, 100_000)
    with pytest.raises(pyllava.ModelFileError, match="ends at byte 100000"):
        file.read(99_000, 2_000)
    file.close()


def test_a_read_that_fails_names_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

    real = SourceFile.__init__

    def init(self: SourceFile, path: Path) -> None:
        real(self, path)
        self._file.close()
        self._file = Broken()  # type: ignore[assignment]

    monkeypatch.setattr(SourceFile, "__init__", init)
    with pytest.raises(OSError, match=r"demo-f16\.gguf'$"):
        quantize(MODEL, tmp_path / "out.gguf", "q8_0")
    assert_nothing_left(tmp_path)


def test_targets_that_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "m.gguf"
    source.write_bytes(MODEL.read_bytes())
    (tmp_path / "link.gguf").symlink_to(source)
    for target in (source, tmp_path / "link.gguf"):
        with pytest.raises(ValueError, match="both input and output"):
            quantize(source, target, "q8_0")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="not a regular file"):
        quantize(source, tmp_path / "folder", "q8_0")
    with pytest.raises(FileNotFoundError):
        quantize(source, tmp_path / "none" / "out.gguf", "q8_0")
    with pytest.raises(ValueError, match="type 'q9'"):
        quantize(source, tmp_path / "out.gguf", "q9")
    assert source.read_bytes() == MODEL.read_bytes()
    assert_nothing_left(tmp_path, "m.gguf", "link.gguf", "folder")


def test_an_input_named_like_the_part_file_survives(tmp_path: Path) -> None:
    source = tmp_path / "out.gguf.part"
    source.write_bytes(MODEL.read_bytes())
    with pytest.raises(ValueError, match=r"out\.gguf\.part: is an input"):
        quantize(source, tmp_path / "out.gguf", "q8_0")
    assert source.read_bytes() == MODEL.read_bytes()
    assert_nothing_left(tmp_path, "out.gguf.part")


def test_the_unfinished_file_of_another_program_gets_no_name(tmp_path: Path) -> None:
    """It began later and writes the same target: its part file is left to it."""
    part = tmp_path / "out.gguf.part"

    def other_begins() -> None:
        part.unlink()
        part.write_bytes(b"half")

    with pytest.raises(FileExistsError, match="another program"), replacing(part.with_suffix(""), n_bytes=0):
        other_begins()
    assert part.read_bytes() == b"half"
    assert_nothing_left(tmp_path, "out.gguf.part")


def test_an_interrupt_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    (tmp_path / "out.gguf.part").write_bytes(b"of a killed run")

    def interrupt(stage: str, fraction: float) -> None:
        assert stage == "quantize"
        if fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(MODEL, out, "q4_k_m", progress=interrupt)
    assert out.read_bytes() == b"old"
    assert_nothing_left(tmp_path, "out.gguf")


@pytest.fixture(params=[1_000_000, 2_048_000], ids=["in-a-write", "in-the-buffer"])
def full_disk(request: pytest.FixtureRequest) -> Iterator[None]:
    """Files end there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (request.param, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing(tmp_path: Path, full_disk: None) -> None:
    with pytest.raises(OSError, match=r"out\.gguf'$"):
        quantize(MODEL, tmp_path / "out.gguf", "q8_0")
    assert_nothing_left(tmp_path)


def test_a_disk_that_is_too_small_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(OSError, match=r"needs 4\.8 MB, .* has 1\.0 MB free"):
        quantize(MODEL, tmp_path / "out.gguf", "q8_0")
    assert_nothing_left(tmp_path)


def test_progress_grows_to_one(tmp_path: Path) -> None:
    seen: list[float] = []
    quantize(MODEL, tmp_path / "out.gguf", "q8_0", progress=lambda stage, done: seen.append(done))
    assert seen == sorted(seen)
    assert seen[-1] == 1


# ---------------------------------------------------------------------------------------- the command


def test_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    quantize_command([str(MMPROJ), str(out), "Q4_K", "-t", "2", "-v"])
    output = capsys.readouterr()
    assert output.out == ""
    assert "bits per weight, q4_k_m" in output.err
    assert "31 tensors with rows of 192 are Q5_0, Q4_K does not divide those" in output.err
    assert "  v.blk.0.attn_q.weight: Q5_0 instead of Q4_K" in output.err
    quantize_command([str(out), str(tmp_path / "again.gguf"), "q4_0", "--json", "--pure"])
    report = json.loads(capsys.readouterr().out)
    assert report["type"] == "q4_0"
    assert report["n_requantized"] == 38


def test_a_file_that_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"mine")
    assert cli.main(["quantize", str(MMPROJ), str(out), "q8_0"]) == 1
    told = f"{out}: exists already; --force, in Python overwrite=True, replaces it"
    assert capsys.readouterr().err == f"pyllava-cli: error: {told}\n"
    assert out.read_bytes() == b"mine"
    assert cli.main(["quantize", str(MMPROJ), str(out), "q8_0", "--force"]) == 0
    assert out.stat().st_size > 1000
    before = out.read_bytes()
    for force in ([], ["--force"]):  # itself
        capsys.readouterr()
        assert cli.main(["quantize", str(out), str(out), "q4_0", *force]) == 1
        assert "is both input and output" in capsys.readouterr().err
    dangling = tmp_path / "link.gguf"
    dangling.symlink_to(tmp_path / "nothing.gguf")
    assert cli.main(["quantize", str(MMPROJ), str(dangling), "q8_0"]) == 1
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.gguf", "out.gguf"]


def test_files_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "in.gguf").write_bytes(MMPROJ.read_bytes())
    quantize("~/in.gguf", "~/out.gguf", "q8_0")
    assert (tmp_path / "out.gguf").is_file()


def test_a_line_now_and_then_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(_terminal.time, "monotonic", lambda: now[0])
    with _terminal.long_stages() as progress:
        for second in range(101):
            now[0] = 1000.0 + second
            progress("quantize", second / 100)
    assert capsys.readouterr().err == (
        "quantize: 30 %, about 1:10 left\nquantize: 60 %, about 40.0 s left\nquantize: 90 %, about 10.0 s left\n"
    )
    with _terminal.byte_bar("writing", 1000) as tick:
        for _ in range(5):
            now[0] += 1000
            tick(100)
    assert "writing: 50 %, about 1:06:40 left\n" in capsys.readouterr().err


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], [str(MODEL), str(tmp_path / "o.gguf"), "q9"], [str(MODEL), "x", "q8_0", "-t"]):
        with pytest.raises(SystemExit) as exit_code:
            quantize_command(argv)
        assert exit_code.value.code == 2
        assert capsys.readouterr().err.startswith("pyllava-cli: error: ")


# ------------------------------------------------------------------------------ against llama-quantize


class Peer:
    """llama.cpp's quantiser in another process. PYLLAVA_PEER_PYTHON names a Python that has llama-cpp-python."""

    def __init__(self) -> None:
        python = os.environ.get("PYLLAVA_PEER_PYTHON", sys.executable)
        found = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False)
        if found.returncode:
            pytest.skip("no llama-cpp-python; PYLLAVA_PEER_PYTHON names a Python that has it")
        script = [python, str(ROOT / "tests" / "peer_quantize.py")]
        self.process = subprocess.Popen(
            script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def quantize(self, source: Path, target: Path, file_type: int, pure: bool) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(source), str(target), file_type, pure]) + "\n")
        self.process.stdin.flush()
        lines = iter(self.process.stdout.readline, "")
        assert next(line for line in lines if line.startswith("done")) == "done 0\n"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    found = Peer()
    yield found
    found.close()


def random_llama(
    path: Path, n_layer: int, n_head: int, n_head_kv: int, n_embd: int, n_ff: int, tied: bool
) -> Path:
    """A language model of random f16 weights."""
    n_kv = n_embd // n_head * n_head_kv
    shapes = llama_shapes(n_layer, n_embd, n_ff, n_kv, tied=tied)
    rng = np.random.default_rng(0)
    kinds = gguf.GGUFValueType
    u32 = {
        "context_length": 64,
        "embedding_length": n_embd,
        "block_count": n_layer,
        "feed_forward_length": n_ff,
        "attention.head_count": n_head,
        "attention.head_count_kv": n_head_kv,
        "rope.dimension_count": n_embd // n_head,
    }
    keys: dict[str, Any] = {"general.architecture": ("llama", kinds.STRING, None)}
    keys |= {f"llama.{name}": (value, kinds.UINT32, None) for name, value in u32.items()}
    keys["llama.attention.layer_norm_rms_epsilon"] = (1e-5, kinds.FLOAT32, None)
    keys["tokenizer.ggml.model"] = ("llama", kinds.STRING, None)
    keys["tokenizer.ggml.tokens"] = ([f"t{i}" for i in range(N_VOCAB)], kinds.ARRAY, kinds.STRING)
    keys["tokenizer.ggml.scores"] = ([0.0] * N_VOCAB, kinds.ARRAY, kinds.FLOAT32)
    keys["tokenizer.ggml.token_type"] = ([1] * N_VOCAB, kinds.ARRAY, kinds.INT32)
    found = {}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape).astype(np.float32)
        f16 = tiny_gguf.Tensor(x.astype(np.float16), gguf.GGMLQuantizationType.F16)
        found[name] = f16 if len(shape) > 1 else tiny_gguf.f32(x)
    return Path(tiny_gguf.write(path, tiny_gguf.Gguf(keys, found)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        (5, 8, 8, 256, 512, False),
        (9, 8, 2, 256, 256, True),
        (3, 8, 1, 256, 160, False),
        (4, 4, 4, 96, 256, False),
        (4, 4, 4, 96, 100, True),
        (33, 4, 2, 256, 256, False),
        (80, 8, 1, 256, 256, False),
    ],
    ids=lambda m: f"{m[0]}x{m[3]}",
)
def test_llama_quantize_writes_the_same_tensors(peer: Peer, tmp_path: Path, model: Any) -> None:
    source = random_llama(tmp_path / "m.gguf", *model)
    small = model[0] < 10
    for name in NAMES if small else [name for name in NAMES if TYPES[name].rules]:
        for pure in (False, True) if small else (False,):
            quantize(source, tmp_path / "ours.gguf", name, pure=pure)
            peer.quantize(source, tmp_path / "theirs.gguf", TYPES[name].file_type, pure)
            ours, theirs = tensors(tmp_path / "ours.gguf"), tensors(tmp_path / "theirs.gguf")
            assert {k: kind for k, (kind, _) in ours.items()} == {k: kind for k, (kind, _) in theirs.items()}
            assert ours == theirs, name


@pytest.mark.slow
def test_llama_quantize_writes_the_same_projector(peer: Peer, tmp_path: Path) -> None:
    """In the types without a mix; it has none for projectors and ends the process there."""
    for name in ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"):
        quantize(MMPROJ, tmp_path / "ours.gguf", name)
        peer.quantize(MMPROJ, tmp_path / "theirs.gguf", TYPES[name].file_type, False)
        assert tensors(tmp_path / "ours.gguf") == tensors(tmp_path / "theirs.gguf"), name


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux lets a process choose")
def test_default_threads_are_what_the_process_may_use() -> None:
    """Quotas of control groups, which count too, are in tests/c/test_cores.c."""
    allowed = os.sched_getaffinity(0)
    assert 1 <= default_threads() <= len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert default_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)
