"""The Hugging Face Hub, through its own client: what is in a repository, the header of a GGUF file, a file into the cache.

The client says where the cache lies, which endpoint and token are used, and whether there is a network (``HF_HOME``,
``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``). What it leaves undone is done here: a download that was broken off is
resumed by the next call, and what has come is compared with the sum that the repository lists.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from ._facts import facts_of
from ._part_file import replacing
from .errors import HubError, ModelFileError

_TIMEOUT_S = 10
_RETRIES = 2
# Of a file: headers with 32,000 tokens have 0.7 MB, with 150,000 and merges 8.
_HEAD_BYTES = (1 << 20, 1 << 23, 1 << 26)
_MOST_BYTES = 1 << 50
COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 16  # what has come of one is lost with the line


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, as it is at one commit."""

    repo: str
    revision: str
    """The branch or tag that was asked for; `commit` is what it stood for."""
    commit: str
    name: str
    n_bytes: int
    sha256: str
    """"" for a small one that Git itself holds."""


@dataclass(frozen=True)
class Listing:
    """What is in a repository at one commit."""

    repo: str
    commit: str
    licence: str
    files: Mapping[str, RemoteFile]


def client() -> Any:
    """The package huggingface_hub. Raises ImportError where it is not installed."""
    try:
        package = importlib.import_module("huggingface_hub")
        for part in ("constants", "errors", "file_download", "utils"):
            importlib.import_module(f"huggingface_hub.{part}")
    except ImportError:
        raise ImportError(
            "models are fetched with huggingface-hub: pip install 'pyllava[hub]', or fetch the files by hand and name "
            "them with -m and --mmproj"
        ) from None
    return package


def listing(repo: str, revision: str | None) -> Listing:
    """The files of `repo` at `revision`, by default its main branch."""
    with explained(repo, revision):
        api = client().HfApi(library_name="pyllava")
        try:
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
            return _listed(repo, revision or "main", info)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # the page of a proxy, perhaps
            raise HubError(
                f"{repo}: {client().constants.ENDPOINT} answers with what is no list of files: {_line(error)[:200]}"
            ) from None


def _listed(repo: str, revision: str, info: Any) -> Listing:
    """Raises ValueError, and what Python does of other types, for what cannot be fetched."""
    commit, files = info.sha, {}
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise ValueError(f"commit {commit!r:.80}, need 40 digits")
    for file in info.siblings or ():
        name, sum_, size = file.rfilename, "", file.size or 0
        if file.lfs:
            sum_, size = file.lfs.sha256, file.lfs.size
        if not isinstance(name, str) or not isinstance(size, int) or not 0 <= size < _MOST_BYTES:
            raise ValueError(f"{name!r:.80} of {size!r:.80} bytes")
        if sum_ and not _SHA256.fullmatch(sum_):
            raise ValueError(f"{name!r:.80} with the SHA-256 {sum_!r:.80}")
        files[name] = RemoteFile(repo, revision, commit, name, size, sum_)
    return Listing(repo, commit, _licence(info.card_data), files)


def _licence(card: Any) -> str:
    """What the model's page says, by the name it gives where it is none of the usual ones."""
    told = getattr(card, "license_name", None) or getattr(card, "license", None)
    return told[:80] if isinstance(told, str) else ""


def head(file: RemoteFile) -> Mapping[str, Any]:
    """What the header of a GGUF file tells (``_facts.facts_of``), from its first bytes alone."""
    reason = ""
    for n_bytes in _HEAD_BYTES:
        with explained(file.repo, file.commit):
            data = _first_bytes(file, n_bytes)
        try:
            return facts_of_start(data, file.n_bytes)
        except ModelFileError as error:
            reason = str(error)
        if len(data) < n_bytes:
            break
    raise HubError(f"{file.repo}: {file.name} is no GGUF file that can be read: {reason}")


def facts_of_start(data: bytes, n_bytes: int) -> Mapping[str, Any]:
    """Those of a GGUF file of `n_bytes` that begins with `data`. Raises ModelFileError where they do not hold all of its header."""
    from .gguf import GgufFile

    with tempfile.TemporaryDirectory(prefix="pyllava-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "start.gguf"
        path.write_bytes(data)
        os.truncate(
            path, n_bytes
        )  # a hole where the weights are: the reader sees that they lie within the file
        try:
            file = GgufFile(path)
        except ModelFileError as error:
            raise ModelFileError(str(error).removeprefix(f"{path}: ")) from None
        if min((tensor.offset for tensor in file.tensors), default=0) > len(data) + file.alignment:
            raise ModelFileError(f"its header is longer than {len(data)} bytes")
        return facts_of(file, count_tokens=False)


def _first_bytes(file: RemoteFile, n_bytes: int) -> bytes:
    """Less than `n_bytes` where the file is shorter. A server that knows no ranges is not listened to any longer than need be."""
    hub = client()
    headers = {**hub.utils.build_hf_headers(library_name="pyllava"), "Range": f"bytes=0-{n_bytes - 1}"}
    url = hub.hf_hub_url(file.repo, file.name, revision=file.commit)
    data = bytearray()
    with _answer(url, headers) as response:
        for chunk in response.iter_bytes(chunk_size=_CHUNK):
            data += chunk
            if len(data) >= n_bytes:
                break
    return bytes(data[: min(n_bytes, file.n_bytes)])


@contextlib.contextmanager
def _answer(url: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """The answer to GET, as it comes."""
    hub = client()
    options = {"timeout": _TIMEOUT_S, "max_retries": _RETRIES, "retry_on_exceptions": ()}
    with hub.utils.http_stream_backoff("GET", url, headers=headers, **options) as response:
        hub.utils.hf_raise_for_status(response)
        yield response


# --- fetching ---


def in_cache(file: RemoteFile) -> Path | None:
    """Where a file lies that was fetched before."""
    found = client().try_to_load_from_cache(file.repo, file.name, revision=file.commit)
    return Path(found) if isinstance(found, str) else None


def remember(file: RemoteFile) -> None:
    """Writes down which commit the file's revision stands for, so that it is found by that name without a network."""
    if file.revision == file.commit:
        return
    path = folder_of(file.repo) / "refs" / file.revision
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, n_bytes=len(file.commit), durable=False) as out:
        out.write(file.commit.encode())


def folder_of(repo: str) -> Path:
    """Of a repository in the cache."""
    hub = client()
    return Path(
        hub.constants.HF_HUB_CACHE, hub.file_download.repo_folder_name(repo_id=repo, repo_type="model")
    )


def fetch(file: RemoteFile, report: Callable[[str, int], object]) -> Path:
    """The file in the cache, fetched if it is not there; `report` is called with "fetch" or "verify", and bytes just done."""
    found = in_cache(file)
    if found is not None:
        return found
    hub = client()
    with explained(file.repo, file.commit):
        url = hub.hf_hub_url(file.repo, file.name, revision=file.commit)
        told = hub.get_hf_file_metadata(url, timeout=_TIMEOUT_S, library_name="pyllava")
        etag = str(told.etag)
        if not re.fullmatch(r"[\w.-]+", etag, re.ASCII):
            raise HubError(
                f"{file.repo}: {file.name} comes with the ETag {etag!r}, need one that can name a file"
            )
        folder = folder_of(file.repo)
        blob, lock = folder / "blobs" / etag, folder.parent / ".locks" / folder.name / f"{etag}.lock"
        for made in (blob.parent, lock.parent):
            made.mkdir(parents=True, exist_ok=True)
        with hub.utils.WeakFileLock(lock):
            if not blob.exists():
                wanted = file.sha256 or (etag if _SHA256.fullmatch(etag) else "")
                _fetch_blob(replace(file, sha256=wanted), url, blob, report)
        path = Path(hub.hf_hub_download(file.repo, file.name, revision=file.commit, library_name="pyllava"))
        if not path.is_symlink():  # a system without links: the file is a copy
            blob.unlink(missing_ok=True)
        return path


def _fetch_blob(file: RemoteFile, url: str, blob: Path, report: Callable[[str, int], object]) -> None:
    """The bytes of a file under the name of its sum. What comes is kept in a file beside it until it is whole, for the next try."""
    part = blob.with_name(f"{blob.name}.incomplete")
    if part.exists() and part.stat().st_size > file.n_bytes:
        part.unlink()
    with open(part, "ab") as out:
        report("fetch", out.tell())
        _stream(url, out, file.n_bytes, report)
        out.flush()
        os.fsync(out.fileno())
    found, n_bytes = _sha256(part, report) if file.sha256 else "", part.stat().st_size
    if n_bytes < file.n_bytes:
        raise HubError(f"{file.repo}: {file.name} ended after {n_bytes} of {file.n_bytes} bytes: try again")
    if found != file.sha256 or n_bytes > file.n_bytes:
        part.unlink()
        raise HubError(
            f"{file.repo}: {file.name} came with the SHA-256 {found}, need {file.sha256}: it is thrown away, try again"
        )
    os.replace(part, blob)


def _stream(url: str, out: BinaryIO, n_bytes: int, report: Callable[[str, int], object]) -> None:
    """Appends what lacks of `n_bytes`; where the line breaks it goes on from there, until nothing more comes at all."""
    hub = client()
    n_tries = 0
    while out.tell() < n_bytes:
        before = out.tell()
        headers = {**hub.utils.build_hf_headers(library_name="pyllava"), "Range": f"bytes={before}-"}
        try:
            with _answer(url, headers) as response:
                if response.status_code == 200 and before:  # no ranges there: all of it comes again
                    report("fetch", -before)
                    out.truncate(0)
                for chunk in response.iter_bytes(chunk_size=_CHUNK):
                    out.write(chunk)
                    report("fetch", len(chunk))
                    if out.tell() > n_bytes:  # no end of it, perhaps
                        return
        except _transport_errors() as error:
            n_tries = 0 if out.tell() > before else n_tries + 1
            if n_tries > _RETRIES or isinstance(error, hub.errors.HfHubHTTPError):
                raise
            time.sleep(1)
        else:
            break


def _sha256(path: Path, report: Callable[[str, int], object]) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as data:
        while chunk := data.read(1 << 20):
            total.update(chunk)
            report("verify", len(chunk))
    return total.hexdigest()


# --- errors ---


@contextlib.contextmanager
def explained(repo: str, revision: str | None) -> Iterator[None]:
    """The client's errors as one line that says what can be done."""
    hub = client()
    errors = hub.errors
    where = hub.constants.ENDPOINT
    try:
        yield
    except HubError:
        raise
    except errors.GatedRepoError:
        raise HubError(
            f"{repo}: gated: accept its terms at {where}/{repo}, and set HF_TOKEN or run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{repo}: no such repository at {where}, or a private one: check the name; HF_TOKEN or `hf auth login` opens "
            "your own"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{repo}: no revision {revision or 'main'!r}") from None
    except errors.OfflineModeIsEnabled:
        raise HubError(f"{repo}: not in the cache, and HF_HUB_OFFLINE is set: nothing is fetched") from None
    except errors.EntryNotFoundError as error:
        raise HubError(f"{repo}: {_line(error)}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        way = "is that a hub's address (HF_ENDPOINT)?"
        if status >= 500 or status == 429:
            way = "try again later"
        elif status in (401, 403):
            way = "a token that may read it is needed (HF_TOKEN)"
        raise HubError(f"{repo}: {where} answers {status} {error.response.reason_phrase}: {way}") from None
    except _transport_errors() as error:
        raise HubError(
            f"{repo}: {where} cannot be reached ({type(error).__name__}: {_line(error)}): what has come is kept, try again"
        ) from None


def _transport_errors() -> type[Exception]:
    """Those of the HTTP library that this version of the client uses, those of answers among them."""
    found: type[Exception] = client().errors.HfHubHTTPError.__bases__[0]
    return found


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
