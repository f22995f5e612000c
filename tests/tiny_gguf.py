"""Tiny checkpoints turned into GGUF files by the project's converters, and GGUF files rewritten with the `gguf` package."""

from __future__ import annotations

import contextlib
import importlib
import io
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny

from pyllava.gguf import GgufFile

ROOT = Path(__file__).resolve().parents[1]

gguf = pytest.importorskip("gguf")
Kind = Any  # gguf.GGMLQuantizationType
Run = Callable[..., None]


# The chain: checkpoint -> the three converters -> two GGUF files


@dataclass(frozen=True)
class Files:
    model: Path
    mmproj: Path


def run_script(name: str, *args: object) -> None:
    """As a user does."""
    command = [sys.executable, str(ROOT / "convert" / f"{name}.py"), *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr


def run_main(name: str, *args: object) -> None:
    """The same in this process: no interpreter to start."""
    main = importlib.import_module(f"pyllava.convert.{name}").main
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main([str(arg) for arg in args])
    assert code == 0, errors.getvalue()


def convert(folder: Path, spec: tiny.TinySpec, *, outtype: str = "f32", run: Run = run_main) -> Files:
    """Checkpoint and CLIP folder of `spec`, written and converted in `folder`."""
    llava = tiny.write_llava_checkpoint(folder / "llava", spec)
    clip = tiny.write_clip_folder(folder / "clip", spec)
    model, out = folder / f"model-{outtype}.gguf", folder / f"mmproj-{outtype}"
    flags = ["--use-f32"] if outtype == "f32" else []
    run("llava_surgery", "-m", llava)
    projector = llava / "llava.projector"
    run("convert_image_encoder_to_gguf", "-m", clip, "--llava-projector", projector, "-o", out, *flags)
    run("convert_legacy_llama", llava, "--skip-unknown", "--outtype", outtype, "--outfile", model)
    (mmproj,) = out.glob("*.gguf")
    return Files(model, mmproj)


# GGUF files as Python objects


@dataclass(frozen=True)
class Tensor:
    """`data` as the file holds it: float32, float16, or the bytes of a quantised type, a row of them per row."""

    data: npt.NDArray[Any]
    kind: Kind

    def floats(self) -> tiny.Array:
        return np.asarray(gguf.quants.dequantize(self.data, self.kind), np.float32)


@dataclass(frozen=True)
class Gguf:
    """`keys`: value, type and type of an array's items; tensors row-major."""

    keys: dict[str, tuple[Any, Any, Any]]
    tensors: dict[str, Tensor]

    def without_keys(self, *names: str) -> Gguf:
        return replace(self, keys={k: v for k, v in self.keys.items() if k not in names})

    def with_u32(self, **values: int) -> Gguf:
        """Keys as keywords, `__` for a dot."""
        new = {k.replace("__", "."): (v, gguf.GGUFValueType.UINT32, None) for k, v in values.items()}
        return replace(self, keys=self.keys | new)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Gguf:
        return replace(self, tensors=self.tensors | dict(tensors))

    def renamed(self, rename: Callable[[str], str | None]) -> Gguf:
        """Tensors under new names; None drops one."""
        return replace(
            self, tensors={new: t for k, t in self.tensors.items() if (new := rename(k)) is not None}
        )


def f32(array: npt.NDArray[Any]) -> Tensor:
    return Tensor(np.ascontiguousarray(array, np.float32), gguf.GGMLQuantizationType.F32)


def quantized(array: npt.NDArray[Any], kind: Kind) -> Tensor:
    return Tensor(gguf.quants.quantize(np.ascontiguousarray(array, np.float32), kind), kind)


def next_projector(file: Gguf, pinpoints: Sequence[tuple[int, int]], newline: tiny.Array) -> Gguf:
    """The projector file of a LLaVA-1.5 as one of LLaVA-1.6; `pinpoints` (width, height), `newline` [n_embd]."""
    kinds = gguf.GGUFValueType
    sides = [side for pair in pinpoints for side in pair]
    keys = {
        "clip.vision.image_grid_pinpoints": (sides, kinds.ARRAY, kinds.INT32),
        "clip.vision.mm_patch_merge_type": ("spatial_unpad", kinds.STRING, None),
        "clip.vision.image_aspect_ratio": ("anyres", kinds.STRING, None),
        "clip.vision.image_crop_resolution": (224, kinds.UINT32, None),
        "clip.vision.image_split_resolution": (224, kinds.UINT32, None),
        "clip.vision.mm_projector_type": ("mlp2x_gelu", kinds.STRING, None),
    }
    return replace(file, keys=file.keys | keys).with_tensors({"model.image_newline": f32(newline)})


def vocabulary_keys(path: Path) -> dict[str, Any]:
    """The keys `tokenizer.*` of a file; by pyllava's reader, which takes a tenth of a second for 280,000 merges."""
    kind = gguf.GGUFValueType
    types = {str: kind.STRING, bool: kind.BOOL, int: kind.UINT32}
    arrays = {"tokens": kind.STRING, "merges": kind.STRING, "scores": kind.FLOAT32, "token_type": kind.INT32}
    keys = {}
    for name, value in GgufFile(path).metadata.items():
        if name.startswith("tokenizer."):
            of = arrays.get(name.rpartition(".")[2])
            keys[name] = (
                (list(value), kind.ARRAY, of) if of is not None else (value, types[type(value)], None)
            )
    return keys


def with_vocabulary(folder: Path, keys: Mapping[str, Any]) -> Path:
    """A model with the vocabulary in some file's keys and next to no weights."""
    spec = tiny.TinySpec(n_embd=8, n_head=1, n_head_kv=1, n_ff=8, n_layer=1)
    small = read(convert(folder, spec).model)
    n_vocab = len(keys["tokenizer.ggml.tokens"][0])
    rows = f32(np.random.RandomState(1).standard_normal((n_vocab, spec.n_embd)))
    own = {k: v for k, v in small.keys.items() if not k.startswith("tokenizer.")}
    own |= {k: v for k, v in keys.items() if k.startswith(("tokenizer.", "pyllava."))}
    file = replace(small, keys=own).with_u32(llama__vocab_size=n_vocab)
    return write(
        folder / "vocabulary.gguf", file.with_tensors({"token_embd.weight": rows, "output.weight": rows})
    )


def read(path: Path) -> Gguf:
    reader = gguf.GGUFReader(path)
    keys = {}
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "split.")) and name != "general.alignment":
            sub_type = field.types[-1] if len(field.types) > 1 else None
            keys[name] = (field.contents(), field.types[0], sub_type)
    return Gguf(keys, {t.name: Tensor(np.array(t.data), t.tensor_type) for t in reader.tensors})


def write(path: Path, file: Gguf, *, alignment: int = 32, split: int = 0) -> Path:
    """The file, or its first shard where `split` (tensors per shard) is given."""
    writer = gguf.GGUFWriter(path, "", split_max_tensors=split)
    writer.kv_data[0].clear()
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for name, (value, kind, sub_type) in file.keys.items():
        writer.add_key_value(name, value, kind, sub_type)
    for name, tensor in file.tensors.items():
        writer.add_tensor(name, tensor.data, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if not split else sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))[0]
