"""Every type of weights against `transformers` with the dequantised weights, and every type of KV cache.

The exact mode multiplies full-precision weights with float32 activations, so a quantised file must give what its own
dequantised numbers give, within the gates of float32. Types that the `gguf` package cannot make come as random blocks
with scales that keep the weights small.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from tiny import TinySpec
from tiny_gguf import Files, Gguf, Tensor, gguf

from . import gates
from .cases import picture, prompt
from .reference import Reference, from_gguf, pixels_of
from .subject import Subject

pytestmark = pytest.mark.reference

SPEC = TinySpec(
    image_size=28,
    v_embd=256,
    v_ff=512,
    v_head=4,
    v_layer=2,
    n_embd=256,
    n_head=4,
    n_head_kv=2,
    n_ff=512,
    seed=30,
)
Type = gguf.GGMLQuantizationType
MADE = [
    Type[name] for name in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
]
# Type: where in a block its f16 scales stand, in bytes; what the other fields can make of a scale of 1.
DRAWN = {
    "Q2_K": ((80, 82), 45),
    "Q3_K": ((108,), 128),
    "Q4_K": ((0, 2), 945),
    "Q5_K": ((0, 2), 1953),
    "Q6_K": ((208,), 4096),
    "IQ2_XXS": ((0,), 90),
    "IQ2_XS": ((0,), 90),
    "IQ2_S": ((0,), 90),
    "IQ3_XXS": ((0,), 500),
    "IQ3_S": ((0,), 465),
    "IQ4_NL": ((0,), 127),
    "IQ4_XS": ((0,), 4000),
    "IQ1_S": ((0,), 17),
}


def drawn(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random blocks whose scales are small normal numbers, of both signs where there is one scale."""
    block, size = gguf.GGML_QUANT_SIZES[Type[name]]
    places, reach = DRAWN[name]
    random = np.random.RandomState(seed)
    blocks = random.randint(0, 256, (shape[0], shape[1] // block, size)).astype(np.uint8)
    for place in places:
        scale = random.uniform(0.5, 1.0, blocks.shape[:2]) * 4.0 / reach / shape[1] ** 0.5
        blocks[:, :, place : place + 2] = scale.astype("<f2")[..., None].view(np.uint8)
    return Tensor(blocks.reshape(shape[0], -1), Type[name])


def retyped(file: Gguf, name: str) -> Gguf:
    """Every matrix in another type; what its blocks do not divide, and the patch convolution, stay as they are."""
    block, _ = gguf.GGML_QUANT_SIZES[Type[name]]
    out = {}
    for i, (key, tensor) in enumerate(file.tensors.items()):
        if tensor.data.ndim != 2 or key.startswith("v.patch_embd") or tensor.data.shape[1] % block:
            continue
        if name in DRAWN:
            out[key] = drawn(name, tensor.data.shape, i)
        else:
            out[key] = tiny_gguf.quantized(tensor.data, Type[name])
    return file.with_tensors(out)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return tiny_gguf.convert(tmp_path_factory.mktemp("types"), SPEC)


@pytest.mark.parametrize("name", [kind.name for kind in MADE] + list(DRAWN))
def test_weight_type(name: str, files: Files, tmp_path: Path) -> None:
    language, vision = (retyped(tiny_gguf.read(path), name) for path in (files.model, files.mmproj))
    floats = [{key: t.floats() for key, t in file.tensors.items()} for file in (language, vision)]
    reference = Reference(SPEC, from_gguf(SPEC, *floats))
    written = Files(
        tiny_gguf.write(tmp_path / "model.gguf", language), tiny_gguf.write(tmp_path / "mmproj.gguf", vision)
    )
    subject = Subject(written)
    pixels = pixels_of(picture(3, 60, 44), SPEC.image_size)[None]
    gates.check_all(gates.INTERMEDIATE, reference.encode(pixels), subject.encode(pixels))
    parts = prompt(SPEC, list(reference.embeddings(pixels)))
    expected, found = reference.run(parts), subject.run(parts)
    logits = expected.pop("logits"), found.pop("logits")
    gates.check_all(gates.INTERMEDIATE, expected, found)
    gates.check("logits", gates.LOGITS, *logits)
    subject.close()


@pytest.fixture(scope="module")
def judged(files: Files) -> tuple[Files, Any, Any]:
    """Files, a prompt, and the reference's logits for it."""
    floats = [
        {k: t.floats() for k, t in tiny_gguf.read(p).tensors.items()} for p in (files.model, files.mmproj)
    ]
    reference = Reference(SPEC, from_gguf(SPEC, *floats))
    pixels = pixels_of(picture(3, 60, 44), SPEC.image_size)[None]
    parts = prompt(SPEC, list(reference.embeddings(pixels)))
    return files, parts, reference.logits(parts)


@pytest.mark.parametrize("kind", list(gates.LOGITS_KV))
def test_kv_type(kind: str, judged: tuple[Files, Any, Any]) -> None:
    files, parts, expected = judged
    subject = Subject(files, type_k=kind, type_v=kind)
    measured = gates.check(kind, gates.LOGITS_KV[kind], expected, subject.logits(parts))
    assert measured.nmse > 1e-10, "the cache's type had no effect"
    subject.close()


@pytest.mark.parametrize(("type_k", "type_v"), [("q8_0", "f16"), ("f32", "q5_1"), ("f16", "f32")])
def test_kv_types_mixed(type_k: str, type_v: str, judged: tuple[Files, Any, Any]) -> None:
    files, parts, expected = judged
    subject = Subject(files, type_k=type_k, type_v=type_v)
    gate = gates.LOGITS_KV["q5_1" if "q5_1" in (type_k, type_v) else "q8_0"]
    gates.check(f"{type_k}, {type_v}", gate, expected, subject.logits(parts))
    subject.close()
