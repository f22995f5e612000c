"""A server on this machine that speaks what the Hugging Face Hub's client asks: lists of files, redirects, ranges, ETags; and its faults.

The endpoint is on 127.0.0.1, the files' bytes on "localhost", which is another origin, as they are on the real hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


def commit(repo: str, n: int) -> str:
    """The hash of the n-th commit of a repository."""
    return hashlib.sha1(f"{repo} {n}".encode()).hexdigest()


@dataclass
class Repo:
    """`commits`: files by name, the newest last; `listed`: sums that the list tells instead of the true ones."""

    commits: list[dict[str, bytes]]
    licence: str = "apache-2.0"
    token: str = ""
    gated: bool = False
    listed: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    method: str
    path: str
    host: str
    range: str
    token: str
    status: int = 0


@dataclass
class Faults:
    """What goes wrong: `cut_after` bytes of a file the line breaks, for the first `n_cuts` answers."""

    status: int = 0
    n_failing: int = 0
    cut_after: int = 0
    n_cuts: int = 0
    no_ranges: bool = False
    no_end: bool = False
    """A file's bytes are followed by others, as long as somebody reads them."""
    listing: bytes = b""
    """What a list of files is instead."""


class Hub:
    """In a ``with`` statement: `url` is its endpoint, `requests` what it was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults = Faults()
        self.requests: list[Request] = []
        self.n_beyond = 0  # bytes that followed the end of a file
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Hub:
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def asked(self, method: str, part: str) -> list[Request]:
        return [one for one in self.requests if one.method == method and part in one.path]

    def blob(self, sha: str) -> bytes | None:
        """What has this sum, or is listed under it."""
        for repo in self.repos.values():
            for files in repo.commits:
                for name, data in files.items():
                    if sha in (repo.listed.get(name), hashlib.sha256(data).hexdigest()):
                        return data
        return None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(_Handler):
            server_hub = hub

        return Handler


class _Handler(BaseHTTPRequestHandler):
    server_hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server_hub
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        told = Request(self.command, path, self.headers["Host"], self.headers.get("Range", ""), token)
        hub.requests.append(told)
        self.told = told
        if hub.faults.n_failing > 0:
            hub.faults.n_failing -= 1
            self._send(hub.faults.status, {})
        elif listed := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._list(listed[1], listed[2] or "main")
        elif file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(file[1], file[2], file[3])
        elif blob := re.fullmatch(r"/blobs/([0-9a-f]{64})", path):
            self._bytes(hub.blob(blob[1]))
        else:
            self._send(404, {})

    def _repo(self, name: str) -> Repo | None:
        repo = self.server_hub.repos.get(name)
        if repo is None or (repo.token and self.told.token != repo.token):
            if repo is not None and repo.gated:
                self._send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
            else:
                self._send(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return None
        return repo

    def _commit(self, name: str, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]] | None:
        known = {commit(name, n): files for n, files in enumerate(repo.commits)}
        wanted = list(known)[-1] if revision == "main" else revision
        if wanted not in known:
            self._send(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no such revision"})
            return None
        return wanted, known[wanted]

    def _list(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        found = self._commit(name, repo, revision) if repo else None
        if repo is None or found is None:
            return
        siblings = [
            {"rfilename": file, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            | (
                {"lfs": {"sha256": _sum(repo, file, data), "size": len(data), "pointerSize": 130}}
                if _is_large(file)
                else {}
            )
            for file, data in found[1].items()
        ]
        card = {"license": repo.licence} if repo.licence else {}
        if self.server_hub.faults.listing:
            self._send(200, {"Content-Type": "application/json"}, self.server_hub.faults.listing)
            return
        body = {"id": name, "sha": found[0], "siblings": siblings, "cardData": card, "tags": []}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repo = self._repo(name)
        found = self._commit(name, repo, revision) if repo else None
        if repo is None or found is None:
            return
        data = found[1].get(file)
        if data is None:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found[0]})
            return
        headers = {"X-Repo-Commit": found[0]}
        if _is_large(file):
            sha = _sum(repo, file, data)
            headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data))}
            headers["Location"] = f"http://localhost:{self.server_hub.port}/blobs/{sha}"
            self._send(302, headers)
        else:
            self._send(200, {**headers, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data)

    def _bytes(self, data: bytes | None) -> None:
        faults = self.server_hub.faults
        if data is None:
            self._send(404, {})
            return
        status, headers, first = 200, {"Accept-Ranges": "bytes"}, 0
        total = len(data)
        if self.told.range and not faults.no_ranges:
            start, _, end = self.told.range.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or total - 1), total - 1)
            if first >= total:
                self._send(416, {"Content-Range": f"bytes */{total}"})
                return
            status, data = 206, data[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        cut = 0
        is_whole = (
            first + len(data) == total and total > 4096
        )  # not the header's bytes, which are asked for with an end
        if faults.n_cuts > 0 and is_whole and len(data) > faults.cut_after:
            faults.n_cuts -= 1
            cut = faults.cut_after
        if faults.no_end and is_whole:
            self._send_without_end(data)
            return
        self._send(status, headers, data, cut)

    def _send_without_end(self, data: bytes) -> None:
        self.told.status = 200
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(OSError):
            while self.server_hub.n_beyond < 1 << 28:
                self.wfile.write(data)
                data = bytes(1 << 16)
                self.server_hub.n_beyond += len(data)

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"", cut: int = 0) -> None:
        self.told.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if not cut:
            self.wfile.write(body)
            return
        self.wfile.write(body[:cut])
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)


def _is_large(file: str) -> bool:
    return file.endswith((".gguf", ".safetensors", ".bin"))


def _sum(repo: Repo, file: str, data: bytes) -> str:
    return repo.listed.get(file) or hashlib.sha256(data).hexdigest()
