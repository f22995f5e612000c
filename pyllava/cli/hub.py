"""``pyllava-cli pull``, ``models`` and ``rm``: models of the Hugging Face Hub and its cache; and -m and -hf with their names.

Nothing is fetched or removed that was not named. At a terminal a question comes first, unless --yes is given. Elsewhere
``pull``, ``-hf`` and ``--yes`` fetch, and ``-m`` with a name refuses.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from .._aliases import ALIASES, Alias, spec_of
from .._plain import plain
from .._terminal import Console, library_log, say
from ..errors import HubError
from .options import PROGRAM, Parser

if TYPE_CHECKING:
    from .._hub_cache import CachedModel
    from ..hub import Checkpoint, Offer


def settle(options: argparse.Namespace, console: Console) -> None:
    """Where -m or -hf names a repository, `options` get the paths of its files, which are fetched if need be."""
    named = options.hf_repo or options.model
    if named is None or (options.hf_repo is None and not _is_elsewhere(named)):
        return
    from .. import hub

    must_ask = options.hf_repo is None
    spec = hub.parsed(named)
    try:
        found = hub.settled(
            spec,
            progress=console.bars,
            allow=lambda offered: _allow(offered, options, console, must_ask),
        )
    except HubError as error:
        if must_ask and spec.name == spec.repo:  # it may have been meant as a path
            raise HubError(f"{plain(named)}: no such file or folder; as a repository, {error}") from None
        raise
    options.model = os.fspath(found.model)
    if options.mmproj is None and found.mmproj is not None:
        options.mmproj = os.fspath(found.mmproj)


def _is_elsewhere(named: str) -> bool:
    return not os.path.exists(os.path.expanduser(named)) and spec_of(named) is not None


def _allow(offered: Offer, options: argparse.Namespace, console: Console, must_ask: bool) -> None:
    """Shows what would come, and asks. Raises where it must not come."""
    if not offered.missing:
        return
    size = f"{_gb(offered.n_missing)} GB"
    if must_ask and not options.yes and not _has_terminal():
        raise HubError(
            f"{offered.name}: {size} are to be fetched: `{PROGRAM} pull {offered.name}` does it, or --yes"
        )
    _show(offered, console)
    _ask(f"fetch {size}?", options.yes)


def _show(offered: Offer, console: Console) -> None:
    from .. import _memory
    from .._hub_cache import root

    files = ", ".join(plain(file.name) for file in offered.files)
    about = [*sorted({file.repo for file in offered.files} - {offered.name}), plain(offered.licence)]
    free = _memory.free()
    have = f", {_gb(free)} GB are free" if free else ""
    console.note(f"{offered.name} ({', '.join(filter(None, about))}): {files}, into {root()}")
    if offered.why:
        console.note(plain(offered.why))
    console.note(f"it needs about {_gb(offered.n_memory)} GB of memory{have}")


def _has_terminal() -> bool:
    """For a question and its answer."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def _ask(question: str, yes: bool) -> None:
    """Raises SystemExit where the answer is no. Without a terminal nobody is asked."""
    if yes or not _has_terminal():
        return
    say(f"{question} [Y/n] ", end="")
    if sys.stdin.readline().strip().lower() not in ("", "\n", "y", "yes"):
        raise SystemExit(1)


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f}" if n_bytes >= 5e7 else f"{n_bytes / 1e9:.3f}"


# --- commands ---


def pull(argv: list[str]) -> None:
    """Fetch the model that the command line names, and print the paths of its files."""
    parser = _asking_parser(
        "pull", "Fetch a model of the Hugging Face Hub into its cache. The paths of its files go to stdout."
    )
    parser.add_argument("name", metavar="REPO[:QUANT]", help=f"owner/name, or a name of `{PROGRAM} models`")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit (default: main)")
    options = parser.parse(argv)
    console = Console(options.log_disable)
    from .. import hub

    with library_log(options):
        spec = hub.parsed(options.name)
        found = hub.cached(spec, options.revision) if hub.is_offline() else None
        if found is None:
            offered = hub.offer(spec, options.revision)
            if isinstance(offered, hub.Checkpoint):
                _pull_checkpoint(offered, options, console)
                return
            _allow(offered, options, console, must_ask=False)
            hub.fetch_all(offered, console.bars)
            found = hub.files_of(offered)
    print("\n".join(str(path) for path in (found.model, found.mmproj) if path is not None))
    console.note(f"now ask: {PROGRAM} -m {options.name} --image IMAGE.jpg")


def _pull_checkpoint(offered: Checkpoint, options: argparse.Namespace, console: Console) -> None:
    from .. import hub

    if offered.missing:
        console.note(f"{offered.name}: a checkpoint without GGUF files, which `{PROGRAM} convert` makes")
        _ask(f"fetch {_gb(offered.n_missing)} GB?", options.yes)
    folder = hub.fetch_all(offered, console.bars)
    print(folder)
    console.note(f"now convert it: {PROGRAM} convert {folder} -o DIR --outtype q4_k_m")


def rm(argv: list[str]) -> None:
    """Remove what the command line names from the cache."""
    parser = _asking_parser(
        "rm", "Remove a model, or one quantisation of it, from the cache of the Hugging Face Hub."
    )
    parser.add_argument("name", metavar="REPO[:QUANT]", help=f"as `{PROGRAM} models` shows it")
    options = parser.parse(argv)
    console = Console(options.log_disable)
    from .. import _hub_cache, hub

    spec = hub.parsed(options.name)
    found = _hub_cache.removal(spec)
    console.note(f"{spec.repo}: {', '.join(map(plain, found.names))}")
    if not options.yes and not _has_terminal():
        raise HubError(f"{spec.repo}: {_gb(found.n_bytes)} GB would be removed: --yes does it")
    _ask(f"remove {_gb(found.n_bytes)} GB?", options.yes)
    found.run()
    console.note("removed")


def models(argv: list[str]) -> None:
    """Show which models are in the cache, and which have short names."""
    parser = _parser(
        "models", "Show the models in the cache of the Hugging Face Hub, and those with short names."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse(argv)
    console = Console(options.log_disable)
    try:
        from .. import _hub_cache

        found = _hub_cache.models()
    except ImportError as error:
        console.note(str(error))
        found = []
    if options.json:
        print(json.dumps({"cached": [_cached(one) for one in found], "names": {**_names()}}, indent=2))
    else:
        print("\n".join([*_lines_of_cache(found), *_lines_of_names({one.repo for one in found})]))


def _asking_parser(command: str, description: str) -> Parser:
    parser = _parser(command, description)
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    return parser


def _parser(command: str, description: str) -> Parser:
    parser = Parser(prog=f"{PROGRAM} {command}", description=description)
    parser.add_argument("-v", "--verbose", action="store_true", help="show the library's log")
    parser.add_argument("--log-disable", action="store_true", help="show errors only")
    return parser


def _cached(one: CachedModel) -> dict[str, Any]:
    files = [
        {"name": file.name, "path": str(file.path), "bytes": file.n_bytes, "quant": file.quant.lower()}
        | {"projector": file.is_projector}
        for file in one.files
    ]
    return {"repo": one.repo, "names": _short(one.repo), "bytes": one.n_bytes, "files": files}


def _names() -> dict[str, dict[str, Any]]:
    return {name: dict(vars(alias)) for name, alias in ALIASES.items()}


def _short(repo: str) -> list[str]:
    return [name for name, alias in ALIASES.items() if repo == alias.repo]


def _lines_of_cache(found: list[CachedModel]) -> list[str]:
    if not found:
        return ["no model in the cache", ""]
    rows = [
        (
            plain(one.repo),
            ", ".join(one.quants) or "projector",
            f"{_gb(one.n_bytes)} GB",
            ", ".join(_short(one.repo)),
        )
        for one in found
    ]
    return ["in the cache:", *_table(rows), ""]


def _lines_of_names(here: set[str]) -> list[str]:
    rows = [
        (
            f"{'*' if alias.repo in here else ' '} {name}",
            f"{alias.gb} GB",
            f"{alias.memory_gb} GB",
            _repos(alias),
        )
        for name, alias in ALIASES.items()
    ]
    head = ("  name", "to fetch", "memory", "from")
    return [f"short names (*: in the cache), for `{PROGRAM} pull NAME`:", *_table([head, *rows])]


def _repos(alias: Alias) -> str:
    return " and ".join(filter(None, (alias.repo, alias.mmproj_repo)))


def _table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
