"""Checkpoints that look like a model's and are not what can be converted: adapters, and quantised weights."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from ..errors import CheckpointError, shown
from .dtypes import FLOATS
from .json_file import read_json_if_there
from .tensor import Tensor

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

# How the names of the tensors end that come with quantised weights, and of which method.
_QUANTISED = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "fp8",
    ".weight_scale_inv": "fp8",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
}


def adapter_in(folder: Path) -> str:
    """The name of an adapter's file in a folder, "" where there is none."""
    return next((name for name in ADAPTER_FILES if (folder / name).exists()), "")


def adapter_advice(folder: Path) -> str:
    """What to do with a folder that holds an adapter and no model."""
    base: object = None
    with contextlib.suppress(CheckpointError, OSError):
        base = read_json_if_there(folder / ADAPTER_FILES[0]).get("base_model_name_or_path")
    of = f" of {shown(base)}" if isinstance(base, str) and base else ""
    return (
        f"a LoRA adapter{of} ({adapter_in(folder)}), not a model: merge it into its base model first "
        "(LLaVA's scripts/merge_lora_weights.py, or merge_and_unload() of peft), and convert what that saves"
    )


def check_numbers(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for weights that are not plain floating-point numbers."""
    for name, tensor in tensors.items():
        method = next((method for end, method in _QUANTISED.items() if name.endswith(end)), None)
        if method is None and name.endswith(".weight") and tensor.dtype not in FLOATS:
            method = "fp8" if tensor.dtype.startswith("f8") else tensor.dtype
        if method is not None:
            raise CheckpointError(
                f"{tensor.file.path}: quantised weights ({_stated(folder) or method}; {shown(name)}): need the "
                "checkpoint before that, in 16 or 32 bits; pyllava-cli quantize makes a small GGUF file of it"
            )


def _stated(folder: Path) -> str:
    """The method that the checkpoint's own files state."""
    with contextlib.suppress(CheckpointError, OSError):
        config = read_json_if_there(folder / "config.json")
        for table in (config, config.get("text_config")):
            stated = table.get("quantization_config") if isinstance(table, dict) else None
            method = stated.get("quant_method") if isinstance(stated, dict) else None
            if isinstance(method, str) and method:
                return shown(method)[1:-1]
    return ""
