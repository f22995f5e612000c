"""Models of real shapes with random weights, for measuring speed: made in seconds.

python bench/make_model.py --shape 1b|7b|13b --type q4_k_m|q8_0|f16 OUT.gguf    a language model (LLaMA)
python bench/make_model.py --shape clip-l --n-embd 4096 --type f16|q8_0 OUT.gguf  CLIP-L/14-336 with projector
python bench/make_model.py --shape siglip --n-embd 4096 --type f16 OUT.gguf     SigLIP So400m/14-384 with projector

A few hundred rows of normal deviates are quantised for each type and width, and repeated. 24 vision layers
of CLIP are stored and named as those to run up to number 23, so that every runtime computes 23; of SigLIP's 27, 26
are run. "tiny" and "clip-tiny" are for trying the measurements themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from pyllava.quantize import TYPES, Plan, quantize_rows

N_VOCAB = 32000


@dataclass(frozen=True)
class Tower:
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    image_size: int = 336
    is_siglip: bool = False

    @property
    def n_positions(self) -> int:
        return (self.image_size // 14) ** 2 + (not self.is_siglip)


VISION = {
    "clip-l": Tower(1024, 4096, 24, 16),
    "clip-tiny": Tower(64, 256, 2, 4),
    "siglip": Tower(1152, 4304, 27, 16, image_size=384, is_siglip=True),
}
SHAPES = {  # n_embd, n_layer, n_head, n_head_kv, n_ff
    "tiny": (256, 2, 4, 4, 512),
    "1b": (2048, 22, 32, 4, 5632),  # TinyLlama's
    "7b": (4096, 32, 32, 32, 11008),
    "13b": (5120, 40, 40, 40, 13824),
}
DISTINCT = 256  # rows
Shape = tuple[int, ...]
Entry = tuple[str, Shape, str]  # name, shape, type


def language_tensors(shape: str, kind: str) -> Iterator[Entry]:
    d, n_layer, n_head, n_kv, f = SHAPES[shape]
    kv = d // n_head * n_kv
    plan = Plan(kind, n_layer=n_layer, n_head=n_head, n_head_kv=n_kv, tied=False)
    matrices: list[tuple[str, Shape]] = [("token_embd", (N_VOCAB, d)), ("output", (N_VOCAB, d))]
    for i in range(n_layer):
        block = f"blk.{i}."
        matrices += [(block + "attn_q", (d, d)), (block + "attn_k", (kv, d)), (block + "attn_v", (kv, d))]
        matrices += [
            (block + "attn_output", (d, d)),
            (block + "ffn_gate", (f, d)),
            (block + "ffn_up", (f, d)),
        ]
        matrices += [(block + "ffn_down", (d, f))]
        yield block + "attn_norm.weight", (d,), "F32"
        yield block + "ffn_norm.weight", (d,), "F32"
    yield "output_norm.weight", (d,), "F32"
    for name, size in matrices:
        yield name + ".weight", size, plan.tensor_type(name + ".weight", size)


def vision_tensors(shape: str, n_embd: int, kind: str) -> Iterator[Entry]:
    tower, matrix = VISION[shape], kind.upper()
    d, f, n_layer = tower.n_embd, tower.n_ff, tower.n_layer
    yield ("v.patch_embd.bias" if tower.is_siglip else "v.class_embd"), (d,), "F32"
    yield "v.patch_embd.weight", (d, 3, 14, 14), "F16"
    yield "v.position_embd.weight", (tower.n_positions, d), "F16"
    yield "mm.0.weight", (n_embd, d), matrix
    yield "mm.2.weight", (n_embd, n_embd), matrix
    yield "mm.0.bias", (n_embd,), "F32"
    yield "mm.2.bias", (n_embd,), "F32"
    first = () if tower.is_siglip else ("v.pre_ln",)
    for name in (*first, *(f"v.blk.{i}.ln{n}" for i in range(n_layer) for n in (1, 2))):
        yield f"{name}.weight", (d,), "F32"
        yield f"{name}.bias", (d,), "F32"
    for i in range(n_layer):
        sizes = {"attn_q": (d, d), "attn_k": (d, d), "attn_v": (d, d), "attn_out": (d, d)}
        for name, size in (sizes | {"ffn_down": (f, d), "ffn_up": (d, f)}).items():
            yield f"v.blk.{i}.{name}.weight", size, matrix if size[-1] % 32 == 0 else "F16"
            yield f"v.blk.{i}.{name}.bias", size[:1], "F32"


class Rows:
    """Quantised rows of noise, made once for each type and width."""

    def __init__(self) -> None:
        self.random = np.random.RandomState(1)
        self.made: dict[tuple[str, int], bytes] = {}

    def write(self, file: BinaryIO, name: str, shape: Shape, kind: str) -> None:
        width = shape[-1] if len(shape) == 2 else int(np.prod(shape[1:])) if len(shape) > 1 else shape[0]
        n_rows = int(np.prod(shape)) // width
        if len(shape) == 1:
            ones = 0.0 if name.endswith("bias") else 1.0
            file.write(np.full(shape, ones, np.float32).tobytes())
            return
        if (kind, width) not in self.made:
            noise = self.random.standard_normal((DISTINCT, width)).astype(np.float32) / width**0.5
            if kind == "F16":
                self.made[kind, width] = noise.astype(np.float16).tobytes()
            else:
                self.made[kind, width] = quantize_rows(noise, kind).tobytes()
        rows = self.made[kind, width]
        for start in range(0, n_rows, DISTINCT):
            file.write(rows[: (min(DISTINCT, n_rows - start)) * (len(rows) // DISTINCT)])


def language_keys(writer: gguf.GGUFWriter, shape: str) -> None:
    d, n_layer, n_head, n_kv, f = SHAPES[shape]
    writer.add_name(f"random-{shape}")
    writer.add_context_length(4096)
    writer.add_embedding_length(d)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(f)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(d // n_head)
    writer.add_vocab_size(N_VOCAB)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [f"\u2581w{i}" for i in range(N_VOCAB - len(pieces))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(i) for i in range(N_VOCAB)])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (N_VOCAB - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def vision_keys(writer: gguf.GGUFWriter, shape: str) -> None:
    tower = VISION[shape]
    numbers: dict[str, Any] = {
        "image_size": tower.image_size, "patch_size": 14, "embedding_length": tower.n_embd,
        "feed_forward_length": tower.n_ff, "projection_dim": 768, "block_count": tower.n_layer,
        "attention.head_count": tower.n_head,
    }  # fmt: skip
    writer.add_description("image encoder for LLaVA")
    for key in ("text", "vision"):
        writer.add_bool(f"clip.has_{key}_encoder", key == "vision")
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_bool("clip.use_gelu", tower.is_siglip)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_uint32("general.file_type", 1)
    for key, number in numbers.items():
        writer.add_uint32(f"clip.vision.{key}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.feature_layer", [tower.n_layer - 1])
    siglip, half = tower.is_siglip, [0.5, 0.5, 0.5]
    writer.add_array("clip.vision.image_mean", half if siglip else [0.48145466, 0.4578275, 0.40821073])
    writer.add_array("clip.vision.image_std", half if siglip else [0.26862954, 0.26130258, 0.27577711])


def make(path: Path, shape: str, kind: str, n_embd: int = 4096) -> None:
    vision = shape in VISION
    writer = gguf.GGUFWriter(path, "clip" if vision else "llama")
    if vision:
        vision_keys(writer, shape)
    else:
        language_keys(writer, shape)
    tensors = list(vision_tensors(shape, n_embd, kind) if vision else language_tensors(shape, kind))
    for name, size, type_name in tensors:
        raw = gguf.GGMLQuantizationType[type_name]
        block, n_bytes = gguf.GGML_QUANT_SIZES[raw]
        count = int(np.prod(size)) // block * n_bytes
        writer.add_tensor_info(name, size, np.dtype(np.float32), count, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file, rows = writer.fout[0], Rows()
    file.write(bytes(-file.tell() % 32))
    for name, size, type_name in tensors:
        rows.write(file, name, size, type_name)
        file.write(bytes(-file.tell() % 32))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=(*SHAPES, *VISION), required=True)
    parser.add_argument("--type", type=str.lower, choices=tuple(TYPES), required=True)
    parser.add_argument("--n-embd", type=int, default=4096, help="width of the projector's output")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    make(options.out, options.shape, options.type, options.n_embd)
    print(f"{options.out}: {options.out.stat().st_size / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
