"""Files through workers on a Ray cluster, for ``pyllava-cli caption --engine ray``.

The driver gives each worker two batches at a time, so that its model never waits, and takes whole batches of rows back. A
worker that dies is replaced, on whichever node has room, and what it had under way is done again: first as it was; if a worker
dies of it again, picture by picture at the end, each alone on its worker; a picture of which a third one dies is an error.
So a picture that kills its worker (it takes too much memory, say) costs its own caption and no other one.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .._terminal import one_line
from .._version import __version__
from ..bulk.asking import Answered, Asking
from ..bulk.inputs import Entry
from ..bulk.rows import Picture
from ..bulk.tables import Row
from ..errors import PyllavaError
from .cluster import assigned_cpus, node

if TYPE_CHECKING:
    from ..llava import Llava

_AT_ONCE = 2  # batches of a worker
_MOST_DEATHS = 3  # of workers, by the same picture, or while they load the model
_PATIENCE = 30.0  # seconds without any worker after which that is said
_SLICE = 0.5  # seconds that the driver waits at a time, so that it sees a signal

_log = logging.getLogger("pyllava")


class Worker:
    """What an actor is: a model, and how pictures are asked about."""

    def __init__(self, asking: Asking) -> None:
        self._asking = asking
        self._model: Llava | None = None

    def load(self) -> Loaded:
        """Loads the model, on as many threads as the actor has CPUs if nothing else is told."""
        from ..llava import Llava

        n_threads = self._asking.model["n_threads"] or assigned_cpus()
        with _failing_with_node(), _warnings() as warnings:
            self._model = Llava(**{**self._asking.model, "n_threads": n_threads})
        return Loaded(platform.node(), __version__, warnings)

    def rows(self, entries: list[Entry]) -> list[Row]:
        """Their rows, in order."""
        assert self._model is not None
        with _failing_with_node():
            found = [row for _, row in self._asking.answered(self._model, entries, in_order=True)]
        return [row if row["error"] is None else {**row, "error": row["error"] + node()} for row in found]


@dataclass(frozen=True)
class Loaded:
    """What a worker that is ready says of itself."""

    node: str
    version: str
    warnings: list[str]


@contextlib.contextmanager
def _failing_with_node() -> Iterator[None]:
    """What fails here is told in one line, and where."""
    try:
        yield
    except Exception as error:
        raise PyllavaError(one_line(error) + node()) from None


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """What the library warns of while this lasts: nobody reads the log of a worker."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    _log.addHandler(handler)
    try:
        yield found
    finally:
        _log.removeHandler(handler)


# --- the driver ---


@dataclass(frozen=True)
class _Batch:
    entries: list[Entry]
    n_deaths: int = 0
    """Workers that died while they had it."""

    @property
    def is_alone(self) -> bool:
        """Whether its worker gets nothing else meanwhile: it has been the end of several."""
        return self.n_deaths > 1


@dataclass(eq=False)
class _Place:
    """A worker as the driver sees it."""

    actor: Any
    node: str | None = None
    """Where it is; None until its model is loaded."""
    batches: dict[Any, _Batch] = field(default_factory=dict)
    """Those under way, by the reference to their rows."""


@dataclass(frozen=True)
class Demand:
    """How many workers, of how many CPUs each, and of how many pictures a batch has."""

    n_workers: int
    n_cpus: float
    n_batch: int


class Workers:
    """Workers on the cluster that `ray` is connected to. `tell` shows a line to the user."""

    def __init__(self, ray: Any, demand: Demand, asking: Asking, tell: Callable[[str], object]) -> None:
        self._ray, self._demand, self._asking, self._tell = ray, demand, asking, tell
        self._places: list[_Place] = []
        self._under_way: dict[Any, _Place] = {}
        """Who has what, by the reference to its result: a batch, or the model that is being loaded."""
        self._new: Iterator[_Batch] = iter(())
        self._waiting: collections.deque[_Batch] = collections.deque()
        self._alone: collections.deque[_Batch] = collections.deque()
        self._n_failed_loads = 0

    def answered(self, entries: Iterable[Entry], is_stopping: Callable[[], bool]) -> Answered:
        """Each entry and its row, as they come; once `is_stopping`, only those under way.

        Raises PyllavaError where a worker cannot load the model, or where the model fails as a whole.
        """
        rest = iter(entries)
        self._new = map(_Batch, iter(lambda: list(itertools.islice(rest, self._demand.n_batch)), []))
        for _ in range(self._demand.n_workers):
            self._start()
        patience = time.monotonic() + _PATIENCE
        try:
            while True:
                if not is_stopping():
                    self._hand_out()
                if not self._has_batches() and (is_stopping() or not self._is_left()):
                    return
                done, _ = self._ray.wait(list(self._under_way), timeout=_SLICE)
                for ref in done:
                    yield from self._finished(ref)
                if time.monotonic() > patience and all(place.node is None for place in self._places):
                    patience = float("inf")
                    self._tell(
                        f"no worker is ready after {_PATIENCE:g} s: the cluster has no room for one "
                        f"({self._demand.n_cpus:g} CPUs each), or the model takes that long to load"
                    )
        finally:
            for place in self._places:
                self._ray.kill(place.actor)

    def _start(self) -> None:
        actor = (
            self._ray.remote(Worker)
            .options(
                num_cpus=self._demand.n_cpus,
                max_concurrency=_AT_ONCE,
                max_restarts=0,
                scheduling_strategy="SPREAD",
            )
            .remote(self._asking)
        )
        place = _Place(actor)
        self._places.append(place)
        self._under_way[actor.load.remote()] = place

    # ------------------------------------------------------------------------------------------ out

    def _has_batches(self) -> bool:
        return any(place.batches for place in self._places)

    def _is_left(self) -> bool:
        if not self._waiting:
            self._waiting.extend(itertools.islice(self._new, 1))
        return bool(self._waiting or self._alone)

    def _hand_out(self) -> None:
        """First to the workers that have nothing."""
        for n_batches in range(_AT_ONCE):
            for place in self._places:
                if place.node is None or len(place.batches) != n_batches:
                    continue
                batch = self._next(place)
                if batch is not None:
                    sent = [_whole_path(entry) for entry in batch.entries]
                    ref = place.actor.rows.remote(sent)
                    place.batches[ref], self._under_way[ref] = batch, place

    def _next(self, place: _Place) -> _Batch | None:
        if any(batch.is_alone for batch in place.batches.values()) or not self._is_left():
            return None
        if self._waiting:
            return self._waiting.popleft()
        return None if place.batches else self._alone.popleft()

    # ------------------------------------------------------------------------------------------ in

    def _finished(self, ref: Any) -> Iterable[tuple[Entry, Row]]:
        place = self._under_way.pop(ref, None)
        if place is None:  # its worker has died, as another one of its batches has told
            return ()
        try:
            result = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            raise PyllavaError(str(error.cause)) from None
        except self._ray.exceptions.RayError as error:
            return self._replace(place, error)
        if isinstance(result, Loaded):
            self._is_ready(place, result)
            return ()
        entries = place.batches.pop(ref).entries
        return [(entry, {**row, "path": entry.path}) for entry, row in zip(entries, result, strict=True)]

    def _is_ready(self, place: _Place, loaded: Loaded) -> None:
        if loaded.version != __version__:
            raise PyllavaError(f"node {loaded.node} has pyllava {loaded.version}, need {__version__} as here")
        if all(other.node is None for other in self._places):
            for warning in loaded.warnings:
                _log.warning("%s", warning)
        place.node = loaded.node
        self._n_failed_loads = 0

    def _replace(self, place: _Place, error: Exception) -> list[tuple[Entry, Row]]:
        """Another worker in the place of one that died; returns rows for pictures of which too many have died."""
        _log.info("%s", " ".join(str(error).split()))
        self._places.remove(place)
        self._under_way = {ref: other for ref, other in self._under_way.items() if other is not place}
        self._ray.kill(place.actor)  # only the connection to it may be broken
        if place.node is None:
            self._n_failed_loads += 1
            if self._n_failed_loads == _MOST_DEATHS or getattr(error, "actor_init_failed", False):
                last = (str(error).split("Worker exit detail: ")[-1].strip().splitlines() or [""])[-1]
                raise PyllavaError(f"a worker did not start: {last}")
        lost = list(place.batches.values())
        n = sum(len(batch.entries) for batch in lost)
        self._tell(f"a worker on {place.node or 'a node'} died: another one takes its {n} pictures")
        self._start()
        return [row for batch in lost for row in self._lost(batch)]

    def _lost(self, batch: _Batch) -> list[tuple[Entry, Row]]:
        n_deaths = batch.n_deaths + 1
        if n_deaths == 1:
            self._waiting.appendleft(_Batch(batch.entries, n_deaths))
        elif n_deaths < _MOST_DEATHS:
            self._alone.extend(_Batch([entry], n_deaths) for entry in batch.entries)
        else:
            died = PyllavaError(f"{n_deaths} workers died while they had this picture")
            return [(entry, self._asking.rows.row(Picture(entry), (), died)) for entry in batch.entries]
        return []


def _whole_path(entry: Entry) -> Entry:
    """As a worker finds it, whose folder is another one."""
    return dataclasses.replace(entry, path=os.path.abspath(entry.path), file=os.path.abspath(entry.file))
