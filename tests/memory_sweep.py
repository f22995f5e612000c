"""Makes each allocation of each call fail in turn, in a process of its own, with c/failing_memory.c preloaded.

python tests/memory_sweep.py MODEL MMPROJ [--precision exact] [--calls load,encode] [--most 5]

Each line says what a call did when its n-th request for memory failed, or (`after`) all from the n-th on: `right` is a
typed error or the right result, and then the right result of the same call with memory; everything else is a fault. The
test is in `test_memory.py`.
"""

from __future__ import annotations

import argparse
import ctypes as c
import hashlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import pyllava
from pyllava import _lib
from pyllava._lib import Rows, Run, SamplerHandle, SessionHandle, Tokens

SECONDS = 60  # for one call and what is done after it; more is a hang
IDS = list(range(5, 25))
shim = c.CDLL(None)


class Calls:
    """Each method prepares, without a fault, and returns the call: what it returns is compared byte by byte."""

    def __init__(self, model: str, mmproj: str, precision: str) -> None:
        self.files, self.precision = (model, mmproj), precision

    def _model(self, **options: Any) -> _lib.ModelHandle:
        return _lib.ModelHandle(*self.files, **options)

    def _session(self, model: _lib.ModelHandle | None = None) -> SessionHandle:
        options: dict[str, Any] = {"n_ctx": 128, "n_batch": 32, "n_seq": 3, "n_threads": 2}
        return SessionHandle(model or self._model(), precision=self.precision, **options)

    def _views(self, model: _lib.ModelHandle) -> Any:
        shape = (1, 3, model.info.image_size, model.info.image_size)
        return np.random.RandomState(1).standard_normal(shape).astype(np.float32)

    def devices(self) -> Callable[[], object]:
        return lambda: [(d.name, d.kind) for d in _lib.devices()]

    def plan(self) -> Callable[[], object]:
        return lambda: str(_lib.plan_devices(*self.files))

    def load(self) -> Callable[[], object]:
        return lambda: self._about(self._model())

    def load_read(self) -> Callable[[], object]:
        return lambda: self._about(self._model(use_mmap=False))

    def _about(self, model: _lib.ModelHandle) -> object:
        return model.info, str(model.devices), model.tokenize("the cat sat")

    def tokenize(self) -> Callable[[], object]:
        model = self._model()
        return lambda: model.tokenize("the cat sat on the mat " * 40)

    def session(self) -> Callable[[], object]:
        model = self._model()
        return lambda: self._session(model).memory()

    def encode(self) -> Callable[[], object]:
        session = self._session()
        views = self._views(session._model)
        return lambda: session.encode(views).tobytes()

    def encode_after_text(self) -> Callable[[], object]:
        session = self._session()
        views = self._views(session._model)
        session.encode(views)
        session.prefill([Tokens(IDS)])
        return lambda: session.encode(views).tobytes()

    def prefill(self) -> Callable[[], object]:
        session = self._session()
        rows = Rows(np.ones((50, session._model.info.n_embd), np.float32), 7)
        return lambda: session.prefill([Tokens(IDS), rows, Tokens(IDS)])[0].tobytes()

    def decode(self) -> Callable[[], object]:
        session = self._session()
        session.prefill([Tokens(IDS)])
        session.prefill([Tokens(IDS[:7])], seq=1)

        def call() -> object:
            found = session.decode([9, 11], seqs=[0, 1]).tobytes()
            session.seq_trim(0, len(IDS))
            session.seq_trim(1, 7)
            return found

        return call

    def generate(self) -> Callable[[], object]:
        session = self._session()

        def call() -> object:
            session.prefill([Tokens(IDS)])
            sampler = SamplerHandle(session._model, temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, seed=3)
            found: list[Any] = []
            while len(found) < 12:  # a call returns what it has chosen before a fault
                last = found[-1].id if found else 7
                run = Run([Tokens([last])], append=True, answer=True, sampler=sampler, n_alternatives=3)
                found += session.generate([run], 12 - len(found))[0]
            return found

        return call

    def copy(self) -> Callable[[], object]:
        session = self._session()
        session.prefill([Tokens(IDS)])

        def call() -> object:
            session.seq_copy(0, 2, len(IDS) - 3)
            return session.seq_length(2), session.cells_free([0])

        return call

    def trace(self) -> Callable[[], object]:
        session = self._session()

        def call() -> object:
            session.prefill([Tokens([3])])  # or rows would be reused
            digest = hashlib.sha256()
            session.trace(
                lambda: session.prefill([Tokens(IDS)]), lambda name, array: digest.update(array.tobytes())
            )
            return digest.hexdigest()

        return call

    def quantize(self) -> Callable[[], object]:
        kinds = [_lib.tensor_type(name) for name in ("q8_0", "q4_k", "q6_k", "q5_0", "bf16")]
        x = np.random.RandomState(2).standard_normal((8, 512)).astype(np.float32)
        outs = [np.empty(kind.n_bytes(x.size), np.uint8) for kind in kinds]
        back = np.empty_like(x)

        def call() -> object:
            for kind, out in zip(kinds, outs, strict=True):
                _lib.quantize(x, kind, out)
            _lib.dequantize(outs[0], kinds[0], back)
            return [out.tobytes() for out in outs], back.tobytes()

        return call

    def close(self) -> Callable[[], object]:
        def call() -> object:
            model = self._model()
            session = self._session(model)
            with_memory()
            session.prefill([Tokens(IDS)])
            without_again()
            session.close()
            model.close()
            return None

        return call

    def ask(self) -> Callable[[], object]:
        options: dict[str, Any] = {"n_ctx": 256, "n_threads": 2, "precision": self.precision}
        picture = np.arange(60 * 40 * 3).reshape(60, 40, 3).astype(np.uint8)

        def call() -> object:
            with pyllava.Llava(*self.files, **options) as model:
                return model.ask(picture, "What is it?", max_tokens=8).tokens

        return call


NAMES = [name for name in vars(Calls) if not name.startswith("_")]
_armed = [0, False]


def without(n: int, after: bool) -> None:
    _armed[:] = [n, after]
    shim.failing_memory_arm(c.c_long(n), c.c_bool(after))


def with_memory() -> int:
    shim.failing_memory_disarm.restype = c.c_long
    return int(shim.failing_memory_disarm())


def without_again() -> None:
    if _armed[0] < 0:
        without(*_armed)


def digest(found: object) -> str:
    return hashlib.sha256(repr(found).encode()).hexdigest()


def outcome(call: Callable[[], object]) -> str:
    """What a call did: its result's digest, or its error."""
    try:
        return f"right: {digest(call())}"
    except MemoryError as error:  # ModelMemoryError is one
        return f"memory: {type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def one(calls: Calls, name: str, n: int, after: bool) -> dict[str, Any]:
    """In this process: the call with its n-th request failing, then twice with memory."""
    call = getattr(calls, name)()
    without(n, after)
    first = outcome(call)
    n_asked = with_memory()
    shim.failing_memory_place.restype = c.c_size_t
    place = shim.failing_memory_place()
    return {"first": first, "next": outcome(call), "n": n_asked, "place": f"{place:#x}"}


def in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of work in a forked child; how it ended, if it did not come back."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, json.dumps(work()).encode())
        except BaseException as error:
            os.write(write, json.dumps({"ended": repr(error)}).encode())
        os._exit(0)
    os.close(write)
    text, end = b"", time.monotonic() + SECONDS
    part: bytes | None = None
    while part != b"":
        if not select.select([read], [], [], max(0.0, end - time.monotonic()))[0]:
            os.kill(child, signal.SIGKILL)
            break
        text += (part := os.read(read, 65536))
    os.close(read)
    _, status = os.waitpid(child, 0)
    if part != b"":
        return {"ended": "hangs"}
    found: dict[str, Any] = json.loads(text) if text else {}
    return found or {"ended": f"exit status {os.waitstatus_to_exitcode(status)}"}


def spread(total: int, most: int) -> list[int]:
    """At most so many of the numbers from 1 to `total`, the first and the last among them; 0: all."""
    if not 1 < most < total:
        return list(range(1, total + 1))
    return [1 + i * (total - 1) // (most - 1) for i in range(most)]


def sweep(calls: Calls, name: str, after: bool, most: int) -> Iterator[dict[str, Any]]:
    """One result for each request of a call that fails in turn."""
    whole = in_child(lambda: one(calls, name, 0, False))
    if not whole.get("first", "").startswith("right") or whole["first"] != whole["next"]:
        yield {"call": name, "n": 0, "after": after, "right": False, "found": whole}
        return
    for n in spread(whole["n"], most):
        found = in_child(lambda n=n: one(calls, name, n, after))  # type: ignore[misc]
        first = found.get("first", "")
        right = (first.startswith("memory") or first == whole["first"]) and found["next"] == whole["next"]
        yield {"call": name, "n": n, "after": after, "right": right, "found": found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("mmproj", type=Path)
    parser.add_argument("--precision", default="exact", choices=("exact", "fast"))
    parser.add_argument("--calls", default=",".join(NAMES), help="of these")
    parser.add_argument(
        "--most", type=int, default=0, help="only so many requests of each call, spread over them"
    )
    args = parser.parse_args()
    calls = Calls(str(args.model), str(args.mmproj), args.precision)
    for name in args.calls.split(","):
        for after in (False, True):
            for found in sweep(calls, name, after, args.most):
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    sys.exit(main())
