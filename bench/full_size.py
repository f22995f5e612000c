"""A checkpoint of full size with random weights, converted and then asked: times and peak memory of both.

python bench/full_size.py --work DIR [--shape 7b|13b|34b|tiny] [--layout original|hf] [--outtype q4_k_m]
                          [--keep]

The shapes, names, number formats and shards are those of the published LLaVA-1.6 checkpoints
(`liuhaotian/llava-v1.6-vicuna-7b`, `llava-hf/llava-v1.6-vicuna-7b-hf`); the numbers are noise, so the answer
is, too. DIR needs twice the checkpoint's size at most (13 GB for 7b).
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SHARD = 5 << 30  # bytes
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int = 32000
    v_embd: int = 1024
    v_layer: int = 24
    v_head: int = 16
    v_ff: int = 4096


SIZES = {
    "7b": Sizes(4096, 32, 32, 32, 11008),
    "13b": Sizes(5120, 40, 40, 40, 13824),
    "34b": Sizes(7168, 60, 56, 8, 20480, n_vocab=64000),
    "tiny": Sizes(256, 2, 4, 4, 512, v_embd=64, v_layer=3, v_head=2, v_ff=128),
}


# --- the checkpoint ---


def language_tensors(s: Sizes) -> Iterator[tuple[str, Shape]]:
    kv = s.n_embd // s.n_head * s.n_head_kv
    yield "model.embed_tokens.weight", (s.n_vocab, s.n_embd)
    for i in range(s.n_layer):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (s.n_embd,)
        yield layer + "self_attn.q_proj.weight", (s.n_embd, s.n_embd)
        yield layer + "self_attn.k_proj.weight", (kv, s.n_embd)
        yield layer + "self_attn.v_proj.weight", (kv, s.n_embd)
        yield layer + "self_attn.o_proj.weight", (s.n_embd, s.n_embd)
        yield layer + "post_attention_layernorm.weight", (s.n_embd,)
        yield layer + "mlp.gate_proj.weight", (s.n_ff, s.n_embd)
        yield layer + "mlp.up_proj.weight", (s.n_ff, s.n_embd)
        yield layer + "mlp.down_proj.weight", (s.n_embd, s.n_ff)
    yield "model.norm.weight", (s.n_embd,)
    yield "lm_head.weight", (s.n_vocab, s.n_embd)


def vision_tensors(s: Sizes) -> Iterator[tuple[str, Shape]]:
    d, f = s.v_embd, s.v_ff
    yield "embeddings.class_embedding", (d,)
    yield "embeddings.patch_embedding.weight", (d, 3, 14, 14)
    yield "embeddings.position_embedding.weight", (577, d)
    linear = [("self_attn." + name, d, d) for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    linear += [("mlp.fc1", f, d), ("mlp.fc2", d, f)]
    norms = ["pre_layrnorm", *(f"encoder.layers.{i}.layer_norm{n}" for i in range(s.v_layer) for n in (1, 2))]
    for name in [*norms, "post_layernorm"]:
        yield f"{name}.weight", (d,)
        yield f"{name}.bias", (d,)
    for i in range(s.v_layer):
        for name, rows, columns in linear:
            yield f"encoder.layers.{i}.{name}.weight", (rows, columns)
            yield f"encoder.layers.{i}.{name}.bias", (rows,)


def tensors(s: Sizes, layout: str) -> Iterator[tuple[str, Shape]]:
    hf = layout == "hf"
    for name, shape in language_tensors(s):
        yield ("language_model." if hf else "") + name, shape
    for name, shape in vision_tensors(s):
        yield ("vision_tower." if hf else "model.vision_tower.vision_tower.") + "vision_model." + name, shape
    linears = ("linear_1", "linear_2") if hf else ("0", "2")
    for name, columns in zip(linears, (s.v_embd, s.n_embd), strict=True):
        prefix = ("multi_modal_projector." if hf else "model.mm_projector.") + name
        yield prefix + ".weight", (s.n_embd, columns)
        yield prefix + ".bias", (s.n_embd,)
    yield ("" if hf else "model.") + "image_newline", (s.n_embd,)


class Noise:
    """bfloat16 numbers from one block of normal deviates, read from a place that a tensor's name tells."""

    def __init__(self) -> None:
        self.random = np.random.RandomState(0)
        self.block = self.random.standard_normal(1 << 24).astype(np.float32)

    def write(self, file: Any, name: str, shape: Shape) -> None:
        n = int(np.prod(shape))
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            numbers = np.ones(n, np.float32)
        else:
            columns = shape[-1] if len(shape) == 2 else 100
            numbers = self.block * np.float32(columns**-0.5)
        bits = (numbers.view(np.uint32) >> 16).astype("<u2")
        at = self.random.randint(len(bits))
        while n:
            part = bits[at : at + n]
            part.tofile(file)
            n, at = n - len(part), 0


def write_shards(folder: Path, s: Sizes, layout: str) -> int:
    shards: list[list[tuple[str, Shape]]] = [[]]
    size = 0
    for name, shape in tensors(s, layout):
        if size and size + 2 * int(np.prod(shape)) > SHARD:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += 2 * int(np.prod(shape))
    noise, places, total = Noise(), {}, 0
    for number, shard in enumerate(shards, 1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, at = {}, 0
        for name, shape in shard:
            end = at + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
            places[name], at = path.name, end
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, shape in shard:
                noise.write(file, name, shape)
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_tokenizer(folder: Path, n_vocab: int) -> None:
    """A SentencePiece model of numbered words: <unk> <s> </s>, 256 bytes, then pieces."""

    def varint(value: int) -> bytes:
        return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)

    def piece(text: str, score: float, kind: int) -> bytes:
        body = b"\x0a" + varint(len(text.encode())) + text.encode() + b"\x15" + struct.pack("<f", score)
        body += b"\x18" + varint(kind)
        return b"\x0a" + varint(len(body)) + body

    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    letters = (
        [chr(ord("a") + i) for i in range(26)] + [chr(ord("A") + i) for i in range(26)] + list("\u2581.,:?")
    )
    pieces += [(letter, -float(i), 1) for i, letter in enumerate(letters)]
    pieces += [(f"\u2581w{i}", -1000.0 - i, 1) for i in range(n_vocab - len(pieces))]
    trainer = b"\x18\x02\x98\x02\x01"  # model_type: BPE, byte_fallback
    model = b"".join(piece(*p) for p in pieces) + b"\x12" + varint(len(trainer)) + trainer
    (folder / "tokenizer.model").write_bytes(model)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def config(s: Sizes, layout: str) -> dict[str, Any]:
    text = {
        "model_type": "llama", "hidden_size": s.n_embd, "intermediate_size": s.n_ff,
        "num_hidden_layers": s.n_layer, "num_attention_heads": s.n_head, "num_key_value_heads": s.n_head_kv,
        "vocab_size": s.n_vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 5e6 if s.n_vocab == 64000 else 1e4, "hidden_act": "silu", "torch_dtype": "bfloat16",
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": s.v_embd, "intermediate_size": s.v_ff,
        "num_hidden_layers": s.v_layer, "num_attention_heads": s.v_head, "image_size": 336, "patch_size": 14,
        "projection_dim": 768, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    }  # fmt: skip
    if layout == "hf":
        return {
            "model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"],
            "text_config": text, "vision_config": vision, "image_grid_pinpoints": PINPOINTS,
            "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu", "use_image_newline_parameter": True, "image_token_index": 32000,
            "torch_dtype": "bfloat16",
        }  # fmt: skip
    return {
        **text, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"],
        "image_aspect_ratio": "anyres", "image_crop_resolution": 224, "image_split_resolution": 224,
        "image_grid_pinpoints": PINPOINTS, "mm_hidden_size": s.v_embd, "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
        "mm_vision_tower": "clip-vit-large-patch14-336",
    }  # fmt: skip


def write_checkpoint(folder: Path, s: Sizes, layout: str) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(s, layout), indent=1))
    write_tokenizer(folder, s.n_vocab)
    if layout == "original":  # the tower's settings lie beside it, its weights are in the checkpoint
        tower = folder.parent / "clip-vit-large-patch14-336"
        tower.mkdir(exist_ok=True)
        (tower / "config.json").write_text(json.dumps({"vision_config": config(s, "hf")["vision_config"]}))
    return write_shards(folder, s, layout)


# --- running ---


def peaks(pid: int) -> tuple[int, int]:
    """Resident bytes of a process now: of its own memory, and with the pages of files that it maps."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    own, whole = (int(fields[name].split()[0]) << 10 for name in ("RssAnon", "VmRSS"))
    return own, whole


def measured(what: str, command: list[str]) -> None:
    started, own, whole = time.perf_counter(), 0, 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            now = peaks(process.pid)
        except (OSError, KeyError):
            break
        own, whole = max(own, now[0]), max(whole, now[1])
        time.sleep(0.02)
    if process.wait():
        sys.exit(f"{what}: exit code {process.returncode}")
    seconds = time.perf_counter() - started
    print(
        f"{what}: {seconds:.1f} s, peak memory {own / 2**20:.0f} MiB (with mapped files {whole / 2**20:.0f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="a folder with room for the checkpoint and the files"
    )
    parser.add_argument("--shape", choices=SIZES, default="7b")
    parser.add_argument("--layout", choices=("original", "hf"), default="original")
    parser.add_argument("--outtype", default="q4_k_m")
    parser.add_argument("--image", type=Path, default=Path(__file__).parents[1] / "examples" / "scene.png")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and files in DIR")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        root = options.work if options.keep else Path(scratch)
        folder, out = root / f"llava-v1.6-{options.shape}-{options.layout}", root / f"gguf-{options.layout}"
        started = time.perf_counter()
        size = write_checkpoint(folder, SIZES[options.shape], options.layout)
        print(
            f"checkpoint: {size / 1e9:.2f} GB, written in {time.perf_counter() - started:.1f} s", flush=True
        )
        cli = [sys.executable, "-m", "pyllava"]
        measured("convert", [*cli, "convert", str(folder), "-o", str(out), "--outtype", options.outtype])
        for path in sorted(out.glob("*.gguf")):
            print(f"{path.name}: {path.stat().st_size / 1e9:.3f} GB")
        ask = ["-m", str(out), "--image", str(options.image), "-p", "What is this?", "-n", "8"]
        measured("ask", [*cli, *ask])
        if not options.keep:
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
