"""Models on the Hugging Face Hub: which files of a repository are the model, what they need, and fetching them.

Nothing here is done unless a repository was asked for by name. What lies in the cache is used as it is, without a question to
the network; `offer` asks, and finds what is newer.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from . import _hub_cache, _memory, models
from ._aliases import ALIASES, Spec, spec_of
from ._choice import Candidate, language_model
from ._choice import projector as choose_projector
from ._gguf_names import FIRST_PART, is_projector_name, parts_of, spelled
from ._hub_client import Listing, RemoteFile, client, fetch, head, in_cache, listing, remember
from ._lib.values import is_false
from .errors import GenerationCancelled, HubError, ModelMismatchError
from .models import ModelFiles

__all__ = [
    "Checkpoint",
    "Offer",
    "cached",
    "fetch_all",
    "files_of",
    "get",
    "is_offline",
    "offer",
    "parsed",
    "settled",
]

_DEFAULT_QUANTS = ("Q4_K_M", "Q4_K", "INT4", "Q4_K_S", "Q4_0")
"""Where none is named: the first is what llama.cpp's tools take, too."""
_MOST_HEADS = 16  # headers that are read where names do not tell what files are
_NO_MODEL = re.compile(r"imatrix|(?:^|[-_.])lora(?:$|[-_.])", re.IGNORECASE)
_OF_CHECKPOINTS = re.compile(
    r"[^/]*\.(?:json|txt|model|jinja|safetensors)|pytorch_model[^/]*\.bin|mm_projector\.bin"
)
_WEIGHTS = re.compile(r"[^/]*\.safetensors|pytorch_model[^/]*\.bin")
Progress = Callable[[str, float], object]


@dataclass(frozen=True)
class _Files:
    """Files of a repository that can be fetched, from a commit that is fixed."""

    name: str
    """As it was asked for."""
    files: tuple[RemoteFile, ...]
    licence: str

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)

    @property
    def missing(self) -> tuple[RemoteFile, ...]:
        """What is not in the cache."""
        return tuple(file for file in self.files if in_cache(file) is None)

    @property
    def n_missing(self) -> int:
        """Bytes."""
        return sum(file.n_bytes for file in self.missing)


@dataclass(frozen=True)
class Checkpoint(_Files):
    """A repository without GGUF files; `pyllava-cli convert` makes them."""

    def refusal(self) -> HubError:
        return HubError(
            f"{self.name}: a checkpoint, no GGUF files in it: `pyllava-cli pull {self.name}` fetches it "
            f"({self.n_bytes / 1e9:.1f} GB), and `pyllava-cli convert` makes GGUF files of it"
        )


@dataclass(frozen=True)
class Offer(_Files):
    """The files of a model: the language model's first file last, so that a cache which has it has everything."""

    model: RemoteFile
    mmproj: RemoteFile | None
    n_memory: int
    """Bytes, about: weights, and a KV cache of 4096 positions."""
    why: str
    """What was chosen among, in words."""


def parsed(name: str, quant: str | None = None) -> Spec:
    """What `name` (``owner/name``, an alias, either with ``:QUANT``) means. Raises ValueError where it is neither."""
    spec = spec_of(name)
    if spec is None:
        near = get_close_matches(name.partition(":")[0].lower(), ALIASES, n=1)
        found = f"{name!r}, need" if not near else f"{name!r}, did you mean {near[0]}? Need"
        raise ValueError(f"{found} owner/name of a repository, or a name that `pyllava-cli models` shows")
    return Spec(spec.name, spec.repo, spelled(quant or spec.quant or "") or None, spec.mmproj_repo)


def cached(spec: Spec, revision: str | None = None) -> ModelFiles | None:
    """The model in the cache, without any network; None where it is not there as a whole, as far as can be told."""
    language = _in_snapshot(spec.repo, revision, spec.quant)
    if language is None:
        return None
    if spec.mmproj_repo:
        folder = _hub_cache.snapshot(spec.mmproj_repo, None)
        projectors = [file.path for file in _hub_cache.ggufs(folder) if file.is_projector] if folder else []
        language = ModelFiles(language.model, projectors[0] if projectors else None)
    return language if language.mmproj is not None or is_offline() else None


def is_offline() -> bool:
    """Whether the environment forbids the network (HF_HUB_OFFLINE)."""
    return bool(client().constants.HF_HUB_OFFLINE)


def _in_snapshot(repo: str, revision: str | None, quant: str | None) -> ModelFiles | None:
    folder = _hub_cache.snapshot(repo, revision)
    parents = {file.path.parent for file in _hub_cache.ggufs(folder)} if folder else set()
    if len(parents) != 1:
        return None
    try:
        return models.in_folder(parents.pop(), None, quant)
    except ModelMismatchError:  # another quantisation, or the projector alone
        return None


def get(
    name: str, *, quant: str | None = None, revision: str | None = None, progress: Progress | None = None
) -> ModelFiles:
    """The files of a model: those of a path on this machine, of the cache, or fetched."""
    if os.path.exists(os.path.expanduser(name)):
        return models.find(f"{name}:{quant}" if quant else name, None)
    return settled(parsed(name, quant), revision, progress)


def settled(
    spec: Spec,
    revision: str | None = None,
    progress: Progress | None = None,
    allow: Callable[[Offer], object] = lambda _: None,
) -> ModelFiles:
    """The files of a repository's model, of the cache, or fetched; before that, `allow` is called and may raise."""
    found = cached(spec, revision)
    if found is not None:
        return found
    offered = offer(spec, revision)
    if isinstance(offered, Checkpoint):
        raise offered.refusal()
    allow(offered)
    fetch_all(offered, progress)
    return files_of(offered)


def fetch_all(offered: _Files, progress: Progress | None = None) -> Path:
    """Fetches what is missing; gives the folder in the cache. `progress` as that of ``Llava``, with "fetch" and "verify"."""
    missing, total = offered.missing, offered.n_missing
    _check_disk(total)
    done = {"fetch": 0, "verify": 0}

    def report(stage: str, n: int) -> None:
        done[stage] += n
        if progress is not None and is_false(progress(stage, min(1.0, done[stage] / max(1, total)))):
            raise GenerationCancelled(
                "fetching was cancelled by the progress callback; what has come is kept"
            )

    for file in missing:
        fetch(file, report)
    for file in offered.files:
        remember(file)
    last = offered.files[-1]
    return fetch(last, report).parents[last.name.count("/")]


def _check_disk(n_bytes: int) -> None:
    place = _hub_cache.root()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < n_bytes:
        raise HubError(f"{_hub_cache.root()}: needs {n_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def files_of(offered: Offer) -> ModelFiles:
    """Where the files of an offer lie that were fetched."""
    paths = [in_cache(file) if file else None for file in (offered.model, offered.mmproj)]
    if paths[0] is None:
        raise HubError(f"{offered.name}: {offered.model.name} is not in the cache")
    return ModelFiles(paths[0], paths[1])


# --- which files are the model ---


def offer(spec: Spec, revision: str | None = None) -> Offer | Checkpoint:
    """What of a repository would be fetched: asks for its list of files and for the headers of the chosen ones."""
    here = listing(spec.repo, revision)
    there = listing(spec.mmproj_repo, None) if spec.mmproj_repo else None
    if not any(FIRST_PART.search(name) for name in here.files):
        return _checkpoint(spec, here)
    language, projectors = _candidates(here, there)
    files = {**here.files, **(there.files if there else {})}
    n_projector = max((one.n_bytes for one in projectors), default=0)
    model, why = language_model(spec.repo, language, _quant(spec, language), models.room_for(n_projector))
    model = _read(files, model)
    if model.facts["kind"] != "language model":
        raise HubError(f"{spec.repo}: {model.name} is a projector, by its header: name another quantisation")
    projectors = [_read(files, one) for one in projectors[:_MOST_HEADS]]
    mmproj, _ = choose_projector(spec.repo, projectors, model.facts.get("width"))
    _check_pair(spec, model, mmproj)
    parts = [files[name] for name in reversed(parts_of(model.name))]
    extra = [files[mmproj.name]] if mmproj else []
    return Offer(
        str(spec),
        (*extra, *parts),
        here.licence,
        model=parts[-1],
        mmproj=extra[0] if extra else None,
        n_memory=_memory.needed(model.n_bytes + (mmproj.n_bytes if mmproj else 0), model.facts),
        why=why,
    )


def _candidates(here: Listing, there: Listing | None) -> tuple[list[Candidate], list[Candidate]]:
    """Language models and projectors, these in the listing `there`, if it is given. Names tell them apart, or else headers."""
    names = [name for name in here.files if FIRST_PART.search(name) and not _NO_MODEL.search(name)]
    lacking = [part for name in names for part in parts_of(name) if part not in here.files]
    found = [_candidate(here, name) for name in names if not set(lacking).intersection(parts_of(name))]
    projectors = [one for one in found if is_projector_name(one.name)]
    language = [one for one in found if one not in projectors]
    if not language or not (projectors or there or len(found) == 1):
        language, projectors = _by_headers(here, found)
    if not language:
        why = f": {lacking[0]} is not there" if lacking else ""
        raise HubError(f"{here.repo}: no language model in it{why}")
    if there is not None:
        names = [name for name in there.files if is_projector_name(name) and FIRST_PART.search(name)]
        projectors = [_candidate(there, name) for name in names]
    return language, projectors


def _candidate(here: Listing, name: str) -> Candidate:
    return Candidate(name, sum(here.files[part].n_bytes for part in parts_of(name)), {})


def _read(files: Mapping[str, RemoteFile], one: Candidate) -> Candidate:
    return Candidate(one.name, one.n_bytes, one.facts or head(files[one.name]))


def _by_headers(here: Listing, found: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """Language models and projectors, where names do not tell them apart."""
    if len(found) > _MOST_HEADS:
        raise HubError(
            f"{here.repo}: {len(found)} GGUF files, no name tells which is the projector: fetch them by hand"
        )
    read = [_read(here.files, one) for one in found]
    projectors = [one for one in read if one.facts["kind"] == "projector"]
    return [one for one in read if one not in projectors], projectors


def _quant(spec: Spec, found: Sequence[Candidate]) -> str | None:
    """The one that is asked for, or the usual one; None where there is no usual one."""
    there = {one.quant for one in found}
    return spec.quant or next((quant for quant in _DEFAULT_QUANTS if quant in there), None)


def _check_pair(spec: Spec, model: Candidate, mmproj: Candidate | None) -> None:
    """Two files that do not fit are refused before gigabytes have come."""
    if mmproj is None:
        return
    if mmproj.facts["kind"] != "projector":
        raise HubError(f"{spec.repo}: {mmproj.name} is no projector, by its header")
    width, need = mmproj.facts.get("output width"), model.facts.get("width")
    if width != need:
        raise HubError(
            f"{spec.repo}: {mmproj.name} does not fit {model.name}: its width is {width}, the language model's {need}"
        )


def _checkpoint(spec: Spec, here: Listing) -> Checkpoint:
    if "config.json" not in here.files or not any(_WEIGHTS.fullmatch(name) for name in here.files):
        raise HubError(f"{spec.repo}: no GGUF file in it, and no checkpoint that could be converted")
    names = [name for name in here.files if _OF_CHECKPOINTS.fullmatch(name)]
    if any(name.endswith(".safetensors") for name in names):
        names = [name for name in names if not name.endswith(".bin") or name == "mm_projector.bin"]
    return Checkpoint(str(spec), tuple(here.files[name] for name in sorted(names)), here.licence)
