"""What lies in the cache of the Hugging Face Hub's client on this machine: the GGUF files in it, and their removal."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._aliases import Spec
from ._gguf_names import is_projector_name, parts_of, quant_of
from ._hub_client import COMMIT, client, folder_of
from .errors import HubError


@dataclass(frozen=True)
class CachedFile:
    """A GGUF file of a cached repository: `name` as in the repository."""

    name: str
    path: Path
    n_bytes: int

    @property
    def quant(self) -> str:
        return quant_of(self.name)

    @property
    def is_projector(self) -> bool:
        return is_projector_name(self.name)


@dataclass(frozen=True)
class CachedModel:
    """A repository with GGUF files in the cache."""

    repo: str
    files: tuple[CachedFile, ...]

    @property
    def n_bytes(self) -> int:
        return sum(size for _, size in {(file.path.resolve(), file.n_bytes) for file in self.files})

    @property
    def quants(self) -> list[str]:
        """Of the language models."""
        return sorted({file.quant.lower() or "?" for file in self.files if not file.is_projector})


def root() -> Path:
    return Path(client().constants.HF_HUB_CACHE)


def snapshot(repo: str, revision: str | None) -> Path | None:
    """The folder with the files of a revision; None where it is not in the cache."""
    folder = folder_of(repo)
    commit = revision or "main"
    if not COMMIT.fullmatch(commit):
        try:
            commit = (folder / "refs" / commit).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
    found = folder / "snapshots" / commit
    return found if COMMIT.fullmatch(commit) and found.is_dir() else None


def ggufs(folder: Path) -> list[CachedFile]:
    """All GGUF files below a snapshot, whole models only."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    names = [name for name in paths if name.lower().endswith(".gguf")]
    whole = [name for name in names if all(part in paths for part in parts_of(name))]
    return [CachedFile(name, paths[name], paths[name].stat().st_size) for name in sorted(whole)]


def models() -> list[CachedModel]:
    """Every repository in the cache that has GGUF files, by name."""
    found = []
    for folder in sorted(root().glob("models--*--*")):
        files = [file for snapshot in sorted(folder.glob("snapshots/*")) for file in ggufs(snapshot)]
        if files:
            repo = folder.name.removeprefix("models--").replace("--", "/", 1)
            found.append(CachedModel(repo, tuple(files)))
    return found


@dataclass(frozen=True)
class Removal:
    """What would be removed; `run` does it."""

    names: tuple[str, ...]
    n_bytes: int
    _strategy: Any
    _folders: tuple[Path, ...] = ()

    def run(self) -> None:
        if self._strategy is not None:
            self._strategy.execute()
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)


def removal(spec: Spec) -> Removal:
    """All that is cached of a model, what was broken off too, or its files of one quantisation. Raises HubError where there is
    nothing."""
    repos = [repo for repo in (spec.repo, spec.mmproj_repo) if repo]
    folders = tuple(folder for repo in repos if (folder := folder_of(repo)).is_dir())
    if not folders:
        raise HubError(f"{spec.repo}: not in the cache ({root()}): `pyllava-cli models` shows what is")
    cache: Any = client().scan_cache_dir(root())
    revisions = [one for repo in cache.repos if repo.repo_path in folders for one in repo.revisions]
    files = [file for revision in revisions for file in revision.files]
    if spec.quant is not None:
        return _removal_of_quant(spec, cache, files)
    strategy = cache.delete_revisions(*(one.commit_hash for one in revisions)) if revisions else None
    broken = [path for folder in folders for path in folder.glob("blobs/*.incomplete")]
    names = {file.file_name for file in files} | {path.name for path in broken}
    n_bytes = sum(path.stat().st_size for path in broken) + (strategy.expected_freed_size if strategy else 0)
    return Removal(tuple(sorted(names)), n_bytes, strategy, folders)


def _removal_of_quant(spec: Spec, cache: Any, files: list[Any]) -> Removal:
    of_models = [file for file in files if not is_projector_name(file.file_name)]
    named = [file for file in of_models if quant_of(file.file_name) == spec.quant]
    if not named:
        raise HubError(f"{spec.repo}: no file of {str(spec.quant).lower()} in the cache")
    with _new_enough():
        strategy = cache.delete_files(*named)
    return Removal(tuple(sorted({file.file_name for file in named})), strategy.expected_freed_size, strategy)


@contextlib.contextmanager
def _new_enough() -> Iterator[None]:
    try:
        yield
    except AttributeError:
        raise HubError(
            "removing one quantisation needs a newer huggingface-hub: pip install -U huggingface-hub, or remove all of it"
        ) from None
