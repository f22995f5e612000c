"""``pyllava-cli caption --engine ray``: workers on a cluster, as the options say."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator

from .._terminal import Console
from ..bulk.asking import Asking
from ..ray.cluster import connected, cpus_of_nodes, seen_by_workers, sizes
from ..ray.workers import Demand, Workers


@contextlib.contextmanager
def workers(
    options: argparse.Namespace,
    asking: Asking,
    n_pictures: int,
    console: Console,
    tell: Callable[[str], object],
) -> Iterator[Workers]:
    """Workers for so many pictures while the cluster is connected. `tell` shows a line, even with --log-disable."""
    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    n_local = options.worker_cpus and options.worker_cpus * (options.workers or 1)
    with connected(address, n_local) as ray:
        nodes = cpus_of_nodes(ray)
        n_workers, n_cpus = sizes(nodes, options.workers, options.worker_cpus)
        n_batch = max(1, min(options.parallel, -(-n_pictures // (2 * n_workers))))
        console.note(f"Ray: workers: {n_workers:,}, CPUs of each: {n_cpus:g}, nodes: {len(nodes):,}")
        files = {name: seen_by_workers(asking.model[name]) for name in ("model", "mmproj")}
        sent = dataclasses.replace(asking, model={**asking.model, **files})
        yield Workers(ray, Demand(n_workers, n_cpus, n_batch), sent, tell)
