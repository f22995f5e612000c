"""Finding the two files of a model: the language model and the projector beside it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import _memory
from ._choice import Candidate, language_model
from ._choice import projector as choose_projector
from ._facts import facts_of
from ._gguf_names import FIRST_PART, is_projector_name, parts_of
from .errors import ModelFileError, ModelMismatchError, PyllavaError, UnsupportedModelError
from .gguf import GgufFile

DEMOS = ("demo", "demo-1.6")
"""The models in the package: LLaVA-1.5 and 1.6, both trained on drawn scenes."""
_log = logging.getLogger("pyllava")


@dataclass(frozen=True)
class ModelFiles:
    """Paths of a model; `mmproj` is None for text only."""

    model: Path
    mmproj: Path | None
    is_demo: bool = False


def find(model: str | os.PathLike[str] | None, mmproj: str | os.PathLike[str] | None) -> ModelFiles:
    """The files of `model`: a GGUF file, a folder of them, ``FOLDER:QUANT``, the name of a demo model, or None for the first one.

    What a file is, its header tells, not its name. Of several quantisations in a folder the largest is taken that fits in
    memory. Without `mmproj`, the projector in the same folder is taken that fits the language model, of several number
    formats f16. The log says what was chosen. Raises FileNotFoundError, and ModelMismatchError where a folder holds no
    language model, different ones, or different projectors that fit.
    """
    if mmproj is not None and not os.fspath(mmproj):
        raise ValueError("mmproj: empty path")
    given = None if mmproj is None else Path(os.path.expanduser(mmproj))
    if model is None or model in DEMOS:
        name, folder = model or DEMOS[0], Path(__file__).parent / "models"
        language, projector = folder / f"{name}-q8_0.gguf", folder / f"{name}-mmproj-q8_0.gguf"
        if not language.is_file():
            raise FileNotFoundError(
                f"the model {name!r} is not in this installation ({folder}): name a model file"
            )
        return ModelFiles(language, given if mmproj else projector, is_demo=True)
    if not os.fspath(model):
        raise ValueError("model: empty path")
    path = Path(os.path.expanduser(model))
    if path.is_dir():
        return in_folder(path, given)
    if not path.exists():
        folder_name, colon, quant = str(path).rpartition(":")
        if colon and os.path.isdir(folder_name):
            return in_folder(Path(folder_name), given, quant)
        _refuse_repository(os.fspath(model))
    if given is not None or not path.is_file():
        return ModelFiles(path, given)
    return ModelFiles(path, _beside(path))


def _refuse_repository(name: str) -> None:
    """A name as of a repository on a model hub is no file that is missing: only who asks for it has it fetched."""
    from ._aliases import spec_of

    if (spec := spec_of(name)) is not None:
        quant = f", quant={spec.quant!r}" if spec.quant else ""
        hint = f"fetched by `pyllava-cli pull {name}`, in Python Llava.from_pretrained({spec.name!r}{quant})"
        raise FileNotFoundError(
            errno.ENOENT, f"no such file or folder; a repository of that name is {hint}", name
        )


def gguf_files(folder: Path) -> list[Path]:
    """The GGUF files in a folder, of split models the first; hidden ones are macOS's notes about others."""
    with contextlib.suppress(PermissionError):  # a file in it can be named all the same
        shown = (path for path in folder.iterdir() if not path.name.startswith("."))
        return sorted(path for path in shown if FIRST_PART.search(path.name) and path.is_file())
    return []


def _candidate(path: Path, file: GgufFile) -> Candidate:
    sizes = [part.stat().st_size for name in parts_of(path.name) if (part := path.with_name(name)).exists()]
    return Candidate(path.name, sum(sizes), facts_of(file, count_tokens=False))


def in_folder(folder: Path, mmproj: Path | None, quant: str | None = None) -> ModelFiles:
    """The model in a folder, of the quantisation `quant`; see `find`."""
    files = gguf_files(folder)
    if not files:
        raise ModelMismatchError(f"{folder}: {_without_gguf(folder)}")
    opened = {path: GgufFile(path) for path in files}
    found = {path: _candidate(path, file) for path, file in opened.items()}
    projectors = [one for one in found.values() if one.facts["kind"] == "projector"]
    models = [
        one for path, one in found.items() if one not in projectors and not _kind(opened[path].metadata)
    ]
    if not models:
        what = _kind(opened[files[0]].metadata) or "a projector (mmproj)"
        raise ModelMismatchError(f"{folder}: no language model in it; {files[0].name} is {what}")
    n_projector = max((one.n_bytes for one in projectors), default=0) if mmproj is None else 0
    language, why = language_model(str(folder), models, quant, room_for(n_projector))
    _tell(folder, why and f"{why}; {folder}:QUANT names one")
    if mmproj is None:
        mmproj = _projector(folder, projectors, language)
    return ModelFiles(folder / language.name, mmproj)


def room_for(n_projector: int) -> Callable[[Candidate], bool]:
    """Whether memory holds a language model and a projector of that many bytes. The machine is asked once, and only if need be."""
    have: list[int] = []

    def fits(one: Candidate) -> bool:
        have[:] = have or [_memory.free()]
        return have[0] == 0 or _memory.needed(one.n_bytes + n_projector, one.facts) <= have[0]

    return fits


def _beside(path: Path) -> Path | None:
    """The projector in the folder of a language model that was named."""
    found = []
    for other in gguf_files(path.parent):
        try:
            found.append(_candidate(other, GgufFile(other)))
        except (PyllavaError, OSError, ValueError):
            if other == path:
                return None  # loading it tells what it is
            if is_projector_name(other.name):  # likewise
                found.append(Candidate(other.name, 0, {"kind": "projector"}))
    language = next((one for one in found if one.name == path.name), None)
    projectors = [one for one in found if one.facts["kind"] == "projector" and one is not language]
    return _projector(path.parent, projectors, language)


def _projector(folder: Path, projectors: list[Candidate], language: Candidate | None) -> Path | None:
    width = None if language is None else language.facts.get("width")
    best, why = choose_projector(str(folder), projectors, width)
    _tell(folder, why)
    return None if best is None else folder / best.name


def _tell(folder: Path, choice: str) -> None:
    """A choice among files is told: another one would give other answers."""
    if choice:
        _log.warning("%s: %s", folder, choice)


_CHECKPOINT = ("config.json", "model*.safetensors", "pytorch_model*.bin", "consolidated*")
_ADAPTER = ("adapter_config.json", "adapter_model.*")
_MERGE = "merge it into its base model, and convert that"


def _without_gguf(folder: Path) -> str:
    """What a folder is in which no GGUF file lies, and what to do about it."""
    if any(True for name in _ADAPTER for _ in folder.glob(name)):
        return f"a LoRA adapter, not a model: {_MERGE}"
    if any(True for name in _CHECKPOINT for _ in folder.glob(name)):
        return f"a checkpoint, not GGUF files: `pyllava-cli convert {folder}` makes them"
    inner = next((path for path in sorted(folder.iterdir()) if path.is_dir() and gguf_files(path)), None)
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
