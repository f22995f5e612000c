"""Ray itself: the connection to a cluster, what it has, and where this process runs in it."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ..models import DEMOS

_log = logging.getLogger("pyllava")
_LOCAL_STORE = 128 << 20  # bytes: rows are small, and Ray would take a third of the memory


def library(module: str = "ray") -> Any:
    """Ray, or a module of it. Raises ImportError, with what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module}: {error}: pip install 'pyllava[ray]'") from None


@contextlib.contextmanager
def connected(address: str, n_cpus: int | None) -> Iterator[Any]:
    """Ray while it is connected. `address` as ``ray.init`` has it; "local" starts a cluster of `n_cpus` here, for this run.

    What Ray prints goes to the log: stdout is the answer's. Its usage statistics are off, unless the environment says otherwise.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = library()
    own: dict[str, Any] = {}
    if address == "local":
        own = {"num_cpus": n_cpus, "include_dashboard": False, "object_store_memory": _LOCAL_STORE}
    with contextlib.redirect_stdout(_ToLog()):
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConnectionError(f"Ray at {address!r}: {' '.join(str(error).split())}") from None
        try:
            yield ray
        finally:
            ray.shutdown()


class _ToLog(io.TextIOBase):
    """Lines that are printed into it become lines of the log, which -v shows."""

    def write(self, text: str) -> int:
        if text.strip():
            _log.info("Ray: %s", text.strip())
        return len(text)


def sizes(nodes: Sequence[int], n_workers: int | None, n_cpus: float | None) -> tuple[int, float]:
    """How many workers, and the CPUs of each, on `nodes` with so many: what is None is what fills them.

    A model is in memory once for each worker: so by default one has all CPUs of a node, the smallest.
    """
    nodes = [n for n in nodes if n] or [1]
    if n_cpus is None:
        on_a_node = -(-(n_workers or len(nodes)) // len(nodes))
        n_cpus = max(1, min(nodes) // on_a_node)
    return n_workers or max(1, sum(int(n // n_cpus) for n in nodes)), n_cpus


def cpus_of_nodes(ray: Any) -> list[int]:
    """The CPUs of each node that lives."""
    return [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]


def seen_by_workers(path: str | os.PathLike[str] | None) -> str | None:
    """A model's file, or a demo model's name, as workers find it, whose folder is another one."""
    if path is None:
        return None
    return os.fspath(path if path in DEMOS else os.path.abspath(os.path.expanduser(path)))


def assigned_cpus() -> int | None:
    """The CPUs that Ray gave the task or actor that runs here; None outside of one, and where it was given none."""
    if not _is_worker():
        return None
    n_cpus = sys.modules["ray"].get_runtime_context().get_assigned_resources().get("CPU")
    return n_cpus and max(1, int(n_cpus))


def node() -> str:
    """What messages of a worker end with: its node's name in brackets; nothing elsewhere."""
    return f" (on {platform.node()})" if _is_worker() else ""


def _is_worker() -> bool:
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    worker = getattr(ray.get_runtime_context(), "worker", None)
    return bool(getattr(worker, "mode", None) == ray.WORKER_MODE)
