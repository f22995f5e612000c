"""Finding the two files of a model: the language model and the projector beside it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelFileError, ModelMismatchError, PyllavaError, UnsupportedModelError
from .gguf import GgufFile

DEMOS = ("demo", "demo-1.6")
"""The models in the package: LLaVA-1.5 and 1.6, both trained on drawn scenes."""
_FILE = re.compile(r"(?<!-\d{5}-of-\d{5})\.gguf$|-00001-of-\d{5}\.gguf$", re.IGNORECASE)


@dataclass(frozen=True)
class ModelFiles:
    """Paths of a model; `mmproj` is None for text only."""

    model: Path
    mmproj: Path | None
    is_demo: bool = False


def find(model: str | os.PathLike[str] | None, mmproj: str | os.PathLike[str] | None) -> ModelFiles:
    """The files of `model`: a GGUF file, a folder of them, the name of a demo model, or None for the first
    one.

    Without `mmproj`, the one projector in the same folder is taken. Raises FileNotFoundError, and
    ModelMismatchError where a folder holds no language model or more than one, or more than one projector.
    """
    if model is None or model in DEMOS:
        name, folder = model or DEMOS[0], Path(__file__).parent / "models"
        language, projector = folder / f"{name}-q8_0.gguf", folder / f"{name}-mmproj-q8_0.gguf"
        if not language.is_file():
            raise FileNotFoundError(
                f"the model {name!r} is not in this installation ({folder}): name a model file"
            )
        return ModelFiles(language, Path(mmproj) if mmproj else projector, is_demo=True)
    if not os.fspath(model):
        raise ValueError("model: empty path")
    path = Path(model)
    if path.is_dir():
        return _in_folder(path, mmproj)
    if mmproj is not None or not path.is_file():
        return ModelFiles(path, None if mmproj is None else Path(mmproj))
    beside = [other for other in _gguf_files(path.parent) if "mmproj" in other.name.lower() and other != path]
    return ModelFiles(path, _only(beside, path.parent, "projector (mmproj) files") if beside else None)


def _gguf_files(folder: Path) -> list[Path]:
    with contextlib.suppress(PermissionError):  # a file in it can be named all the same
        return sorted(path for path in folder.iterdir() if _FILE.search(path.name) and path.is_file())
    return []


def _only(paths: list[Path], folder: Path, what: str) -> Path:
    if len(paths) != 1:
        names = ", ".join(path.name for path in paths) or "none"
        raise ModelMismatchError(f"{folder}: {len(paths)} {what} ({names}), need one: name the file")
    return paths[0]


def _in_folder(folder: Path, mmproj: str | os.PathLike[str] | None) -> ModelFiles:
    files = _gguf_files(folder)
    if not files:
        raise ModelMismatchError(f"{folder}: {_without_gguf(folder)}")
    told = {path: GgufFile(path).metadata for path in files}
    projectors = [p for p in files if told[p].get("general.architecture") == "clip"]
    models = [p for p in files if p not in projectors and not _kind(told[p])]
    if not models:
        what = _kind(told[files[0]]) or "a projector (mmproj)"
        raise ModelMismatchError(f"{folder}: no language model in it; {files[0].name} is {what}")
    language = _only(models, folder, "language models")
    if mmproj is not None:
        return ModelFiles(language, Path(mmproj))
    return ModelFiles(language, _only(projectors, folder, "projector (mmproj) files") if projectors else None)


_CHECKPOINT = ("config.json", "model*.safetensors", "pytorch_model*.bin", "consolidated*")
_ADAPTER = ("adapter_config.json", "adapter_model.*")
_MERGE = "merge it into its base model, and convert that"


def _without_gguf(folder: Path) -> str:
    """What a folder is in which no GGUF file lies, and what to do about it."""
    if any(True for name in _ADAPTER for _ in folder.glob(name)):
        return f"a LoRA adapter, not a model: {_MERGE}"
    if any(True for name in _CHECKPOINT for _ in folder.glob(name)):
        return f"a checkpoint, not GGUF files: `pyllava-cli convert {folder}` makes them"
    inner = next((path for path in sorted(folder.iterdir()) if path.is_dir() and _gguf_files(path)), None)
    return "no GGUF file in it" + (f"; {inner.name} in it has some: name that folder" if inner else "")


def _kind(metadata: Mapping[str, Any]) -> str:
    """What a GGUF file is that is no model, in words; "" if it may be one."""
    kind = metadata.get("general.type")
    return _KINDS.get(kind, "") if isinstance(kind, str) else ""


_KINDS = {
    "adapter": f"a LoRA adapter, not a model: {_MERGE}",
    "imatrix": "an importance matrix, not a model",
    "vocab": "a vocabulary without weights, not a model",
}


@contextlib.contextmanager
def explained(files: ModelFiles) -> Iterator[None]:
    """Where a file that cannot be loaded is something else than was thought, the error says what, and what to do."""
    try:
        yield
    except (ModelFileError, ModelMismatchError, UnsupportedModelError) as error:
        for path in filter(None, (files.model, files.mmproj)):
            if what := _what(path):
                raise type(error)(f"{path}: {what}") from None
        raise


def _what(path: Path) -> str:
    if any(path.match(name) for name in _ADAPTER):
        return f"a LoRA adapter, not a model: {_MERGE}"
    if (
        path.suffix in (".json", ".safetensors", ".bin", ".pt", ".pth")
        and (path.parent / "config.json").exists()
    ):
        return f"a file of a checkpoint, not GGUF: `pyllava-cli convert {path.parent}` makes GGUF files of it"
    try:
        return _kind(GgufFile(path).metadata)
    except (PyllavaError, OSError, ValueError):
        return ""


_NAMES = re.compile(r"general\.((base_model\.\d+\.)?name|basename|finetune|repo_url|source\.repo_url)")


def names_in(path: Path, metadata: Mapping[str, Any]) -> list[str]:
    """What a model is called, the best first: in its metadata, by its file, by the folder; then what it was made from."""
    told = {key: value for key, value in metadata.items() if _NAMES.fullmatch(key) and isinstance(value, str)}
    own = [told.pop(key) for key in ("general.name", "general.basename") if key in told]
    folder = path.absolute().parent
    if folder.parent.name == "snapshots":  # Hugging Face's cache: models--OWNER--NAME/snapshots/HASH
        folder = folder.parent.parent
    return [*own, path.name, folder.name, *(told[key] for key in sorted(told, reverse=True))]
