"""Finding the two files of a model: the language model and the projector beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelMismatchError
from .gguf import GgufFile

DEMOS = ("demo", "demo-1.6")
"""The models in the package: LLaVA-1.5 and 1.6, both trained on drawn scenes."""
_LATER_SPLIT = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class ModelFiles:
    """Paths of a model; `mmproj` is None for text only."""

    model: Path
    mmproj: Path | None
    is_demo: bool = False


def find(model: str | os.PathLike[str] | None, mmproj: str | os.PathLike[str] | None) -> ModelFiles:
    """The files that `model` (a GGUF file, a folder of them, the name of a demo model, or None for the first) stands for.

    Without `mmproj`, the one projector in the same folder is taken. Raises FileNotFoundError, and ModelMismatchError where
    a folder holds no language model or more than one, or more than one projector.
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
    return sorted(p for p in folder.glob("*.gguf") if p.is_file() and not _LATER_SPLIT.search(p.name))


def _only(paths: list[Path], folder: Path, what: str) -> Path:
    if len(paths) != 1:
        names = ", ".join(path.name for path in paths) or "none"
        raise ModelMismatchError(f"{folder}: {len(paths)} {what} ({names}), need one: name the file")
    return paths[0]


def _in_folder(folder: Path, mmproj: str | os.PathLike[str] | None) -> ModelFiles:
    files = _gguf_files(folder)
    projectors = [p for p in files if GgufFile(p).metadata.get("general.architecture") == "clip"]
    language = _only([p for p in files if p not in projectors], folder, "language models")
    if mmproj is not None:
        return ModelFiles(language, Path(mmproj))
    return ModelFiles(language, _only(projectors, folder, "projector (mmproj) files") if projectors else None)


_NAMES = re.compile(r"general\.((base_model\.\d+\.)?name|basename|finetune|repo_url|source\.repo_url)")


def names_in(path: Path, metadata: Mapping[str, Any]) -> list[str]:
    """What a model is called, the best first: in its metadata, by its file, by the folder; then what it was made from."""
    told = {key: value for key, value in metadata.items() if _NAMES.fullmatch(key) and isinstance(value, str)}
    own = [told.pop(key) for key in ("general.name", "general.basename") if key in told]
    folder = path.absolute().parent
    if folder.parent.name == "snapshots":  # Hugging Face's cache: models--OWNER--NAME/snapshots/HASH
        folder = folder.parent.parent
    return [*own, path.name, folder.name, *(told[key] for key in sorted(told, reverse=True))]
