"""``pyllava-cli caption INPUT... -o captions.jsonl``: captions for many pictures; `pyllava.bulk` says how they are kept."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from .._terminal import DEMO_NOTE, Console, counted, duration, library_log, path_of, printable, say
from ..bulk import inputs, tables
from ..bulk.ledger import Ledger
from ..bulk.merge import Merged
from ..bulk.plan import Plan, plan, side_text
from ..bulk.side_files import Existing, SideFiles, check_writable
from ..bulk.texts import Texts
from ..templates import IMAGE_MARK
from .ask import given_prompt
from .caption_options import WRITTEN, caption_parser, check_engine, merge_parser
from .hub import settle
from .options import (
    DEFAULT_PROMPT,
    PROGRAM,
    Parser,
    check_answer,
    check_pairs,
    check_raw,
    model_arguments,
    sampling_arguments,
)
from .structure_options import structures_given

if TYPE_CHECKING:
    from ..bulk.asking import Answered, Asking
    from ..bulk.rows import Rows
    from ..models import ModelFiles

_STDOUT = "-"
_ERRORS_SHOWN = 20  # with a ledger, which has the others
_MINUTE = 60.0


def caption(argv: list[str]) -> None:
    """Caption as the command line says; every failure but that of single pictures is an exception."""
    if argv[:1] == ["merge"]:
        _merge(argv[1:])
        return
    parser = caption_parser()
    options = parser.parse(argv)
    check_pairs(options, parser)
    check_answer(options)
    if options.samples > 1 and not options.temperature:
        parser.error("--samples: needs --temp above 0, without it they are all the same")
    if options.json and options.output == _STDOUT:
        parser.error("--json: the rows of -o - take stdout, need one of them")
    check_engine(options, parser)
    shard = None if options.shard is None else inputs.shard_of(options.shard)
    written = _written(options, parser, shard)
    texts = _texts(options)
    check_raw(texts.prompt, options, parser)
    console = Console(options.log_disable)
    console.note_inert(options)
    with library_log(options):
        run = _run(options, written, texts, shard, console)
    if run.stopping.signal:
        raise SystemExit(128 + run.stopping.signal)
    if run.n_failed:
        raise SystemExit(1)


def _run(
    options: argparse.Namespace, written: _Written, texts: Texts, shard: inputs.Shard | None, console: Console
) -> _Run:
    """Finds out what is to be done, where it can be written, and does it."""
    from .. import models

    settle(options, console)
    files = models.find(options.model, options.mmproj)
    if not files.is_demo:
        options.model, options.mmproj = files.model, files.mmproj  # chosen once, and told once
    entries = inputs.found(options.inputs, options.column)
    entries = [entry for entry in entries if shard is None or shard.has(entry)]
    written.check(options.inputs)
    ledger = Ledger(written.ledger, anew=options.overwrite) if written.ledger is not None else None
    with contextlib.ExitStack() as opened:
        if ledger is not None:
            opened.callback(ledger.close)
        if written.side is not None:
            opened.enter_context(written.side.locked(entries))
        settings = _settings(options, texts, files)
        found = plan(entries, ledger, written.side, settings)
        run = _Run(options, written, ledger, texts, console, len(found.todo))
        run.captions(found, files, settings)
    return run


def _merge(argv: list[str]) -> None:
    parser = merge_parser()
    options = parser.parse(argv)
    path = path_of(options.output)
    write = tables.WRITERS.get(path.suffix.lower().removeprefix("."))
    if write is None:
        parser.error(
            f"argument OUTPUT: {options.output!r}, need a name that ends in .jsonl, .csv or .parquet"
        )
    console = Console(options.log_disable)
    merged = Merged([Path(name) for name in options.rows])
    write(path, merged.rows())
    console.note(f"{path}: {merged.n_rows:,} pictures, {merged.n_failed:,} of them failed")


# --- what is to be written, and how captions are made ---


@dataclass(frozen=True)
class _Written:
    """The outputs of a run."""

    ledger: Path | None
    tables: dict[str, Path]
    side: SideFiles | None
    to_stdout: bool

    def check(self, names: list[str]) -> None:
        """Raises where one of them cannot be written, or is one of the inputs."""
        for kind, path in self.tables.items():
            if kind == "parquet":
                tables.pyarrow(str(path))
            check_writable(os.path.dirname(path) or os.curdir)
        ours = [path for path in (self.ledger, *self.tables.values()) if path is not None and path.exists()]
        read = [file for name in names for file in inputs.files_of(name)] if ours else []
        for file in read:
            for path in ours:
                if os.path.exists(file) and path.samefile(file):
                    raise ValueError(f"{path}: is both input and output")


def _written(options: argparse.Namespace, parser: Parser, shard: inputs.Shard | None) -> _Written:
    kinds = [kind for kind in options.write.split(",") if kind]
    wrong = [kind for kind in kinds if kind not in WRITTEN]
    if wrong:
        parser.error(f"argument --write: {wrong[0]!r}, need some of {', '.join(WRITTEN)}")
    if options.output is None and kinds != ["txt"]:
        parser.error("need -o FILE, or --write txt for texts beside the pictures alone")
    if options.output in (None, _STDOUT) and (options.overwrite or options.existing in ("append", "prepend")):
        given = "--overwrite" if options.overwrite else f"--existing {options.existing}"
        parser.error(f"{given}: needs -o FILE, which remembers what was done")
    existing: Existing = options.existing or ("overwrite" if options.overwrite else "skip")
    side = SideFiles(options.caption_extension, existing) if "txt" in kinds else None
    others = {kind for kind in kinds if kind in ("csv", "parquet")}
    if options.output in (None, _STDOUT):
        if others:
            parser.error(f"--write {','.join(sorted(others))}: needs -o FILE")
        return _Written(None, {}, side, options.output == _STDOUT)
    path = path_of(options.output if shard is None else shard.output(options.output))
    kind = path.suffix.lower().removeprefix(".")
    if kind not in WRITTEN[1:]:
        parser.error(f"argument -o: {options.output!r}, need a name that ends in .jsonl, .csv or .parquet")
    others |= {kind} - {"jsonl"}
    ledger = path if kind == "jsonl" else path.with_suffix(".jsonl")
    made = {
        kind: path if path.suffix.lower() == f".{kind}" else path.with_suffix(f".{kind}") for kind in others
    }
    return _Written(ledger, made, side, False)


def _texts(options: argparse.Namespace) -> Texts:
    prompt = given_prompt(options)
    if not prompt.strip():
        prompt = DEFAULT_PROMPT
    if prompt.count(IMAGE_MARK) > 1:
        raise ValueError(f"the prompt has {prompt.count(IMAGE_MARK)} {IMAGE_MARK} marks, need one at most")
    return Texts(prompt, tuple(options.fail_phrases), tuple(options.strip), options.prefix, options.suffix)


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    return {**sampling_arguments(options), "stop_loops": not options.no_loop_detector}


def _settings(options: argparse.Namespace, texts: Texts, files: ModelFiles) -> str:
    """A digest of all that captions depend on but for the pictures. A longer --timeout changes none that are there."""
    sampling = _sampling(options)
    sampling.pop("timeout", None)
    if biases := sampling.pop("logit_bias", None):  # by numbers and texts, which have no order
        sampling["logit_bias"] = sorted(map(repr, biases.items()))
    parts = [(path.name, path.stat().st_size) for path in (files.model, files.mmproj) if path is not None]
    rest = [options.template, options.system, options.precision, options.image_max_tiles, options.image_merge]
    types = [options.cache_type_k, options.cache_type_v]
    told = [vars(texts), sorted(sampling.items()), options.samples, parts, rest, types]
    return hashlib.sha256(repr(told).encode(errors="surrogatepass")).hexdigest()[:16]


# --- the run ---


class _Stopping:
    """The first signal lets the pictures under way be finished, the second ends the process."""

    def __init__(self) -> None:
        self.signal = 0
        self.is_wanted = False

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal, self.is_wanted = number, True
        with contextlib.suppress(RuntimeError):  # stderr was being written to
            say("\nfinishing the pictures under way; Ctrl-C again gives them up")


class _Run:
    """Captions, one after the other as they come, and what is said about them."""

    def __init__(
        self,
        options: argparse.Namespace,
        written: _Written,
        ledger: Ledger | None,
        texts: Texts,
        console: Console,
        n_todo: int,
    ) -> None:
        self.options, self.written, self.ledger = options, written, ledger
        self.texts, self.console = texts, console
        self.stdout = sys.stdout  # Ray has another one while it runs
        self.stopping = _Stopping()
        self.progress = _Progress(console, n_todo)
        self.n_ok = self.n_failed = 0

    def captions(self, found: Plan, files: ModelFiles, settings: str) -> None:
        from ..bulk.rows import Picture, Rows

        name = "demo" if self.options.model is None else files.model.name
        rows = Rows(self.texts, name, settings, has_data=bool(structures_given(self.options)))
        self._say_plan(found)
        for entry, why in found.refused:
            self._record(rows.row(Picture(entry), (), ValueError(why)), entry)
        if found.todo and not self.stopping.is_wanted:
            if files.is_demo:
                self.console.note(DEMO_NOTE)
            self._ask(found.todo, rows)
        if self.ledger is not None:
            for kind, path in self.written.tables.items():
                tables.WRITERS[kind](path, self.ledger.rows())
        self._say_end(found)

    def _say_plan(self, found: Plan) -> None:
        counts = {
            "to do": len(found.todo),
            "done before": found.n_done,
            "with a text beside them, skipped (--existing)": found.n_skipped,
        }
        self.console.note(
            "pictures: " + ", ".join(f"{n:,} {what}" for what, n in counts.items() if n or what == "to do")
        )

    def _ask(self, entries: list[inputs.Entry], rows: Rows) -> None:
        from ..bulk.asking import Asking

        model = {**model_arguments(self.options), "kv_cells": self.options.kv_cells or "pictures"}
        raw = IMAGE_MARK in self.texts.prompt
        sampling = _sampling(self.options)
        asking = Asking(model, rows, self.options.samples, raw, self.options.system, sampling)
        engine = self._on_ray if self.options.engine == "ray" else self._here
        with (
            engine(entries, asking) as results,
            self.progress,
            self.stopping.on_signals(),
            contextlib.closing(results),
        ):
            for entry, row in results:
                self._record(row, entry)
                self.progress.step(self.n_failed)

    @contextlib.contextmanager
    def _here(self, entries: list[inputs.Entry], asking: Asking) -> Iterator[Answered]:
        from ..llava import Llava

        with Llava(**asking.model, progress=self._loading) as model:
            wanted = (entry for entry in entries if not self.stopping.is_wanted)
            yield asking.answered(model, wanted, in_order=False)

    @contextlib.contextmanager
    def _on_ray(self, entries: list[inputs.Entry], asking: Asking) -> Iterator[Answered]:
        from .caption_ray import workers

        with workers(self.options, asking, len(entries), self.console, self.progress.tell) as found:
            yield found.answered(entries, lambda: self.stopping.is_wanted)

    def _loading(self, stage: str, fraction: float) -> None:
        """Bars until the model is there: later ones would take turns with that of the pictures."""
        if self.console.bars is not None and stage in ("load", "upload"):
            self.console.bars(stage, fraction)

    def _record(self, row: tables.Row, entry: inputs.Entry) -> None:
        """Keeps what became of a picture: first the row, then the text beside it, which could be made from the row."""
        if self.ledger is not None:
            self.ledger.append(row)
        if self.written.to_stdout:
            self.stdout.buffer.write(tables.line_of(row))
            self.stdout.flush()
        if row["status"] == "ok":
            self.n_ok += 1
            if self.written.side is not None:
                self.written.side.write(entry, side_text(row))
            return
        self.n_failed += 1
        if self.ledger is None or self.n_failed <= _ERRORS_SHOWN:
            self.progress.tell(f"{PROGRAM}: error: {printable(entry.path)}: {row['error']}")
            if self.ledger is not None and self.n_failed == _ERRORS_SHOWN:
                self.progress.tell(f"{PROGRAM}: further errors are in {self.ledger.path} alone")
        most = self.options.max_errors
        if most is not None and self.n_failed > most and not self.stopping.is_wanted:
            self.stopping.is_wanted = True
            self.progress.tell(f"{PROGRAM}: error: more than {most} pictures failed (--max-errors): stopping")

    def _say_end(self, found: Plan) -> None:
        seconds = self.progress.seconds
        speed = f", {self.n_ok / seconds:.1f} captions per second" if seconds and self.n_ok else ""
        self.console.note(
            f"{counted(self.n_ok, 'caption')}, {self.n_failed:,} failed, in {duration(seconds)}{speed}"
        )
        n_left = len(found.todo) + len(found.refused) - self.n_ok - self.n_failed
        if self.options.json:
            counts = {"captions": self.n_ok, "failed": self.n_failed, "left": n_left, "seconds": seconds}
            print(json.dumps({**counts, "done_before": found.n_done, "skipped": found.n_skipped}))
        if n_left:
            self.console.note(f"{n_left:,} pictures are left: the same command goes on with them")
        elif self.n_failed and self.ledger is not None:
            self.console.note("the same command tries those that failed again")


class _Progress:
    """A bar on a terminal, a line a minute elsewhere."""

    def __init__(self, console: Console, n: int) -> None:
        self._console, self._n = console, n
        self._bar: Any = None
        self._n_done = 0
        self._began = self._ended = self._told = 0.0

    def __enter__(self) -> _Progress:
        self._began = self._told = time.monotonic()
        if self._console.bars is not None:
            from .._progress import bar

            self._console.bars.close()
            self._bar = bar("captions", total=self._n, unit=" pictures", smoothing=0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = time.monotonic()
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @property
    def seconds(self) -> float:
        return self._ended - self._began

    def step(self, n_failed: int) -> None:
        """Another picture is finished."""
        self._n_done += 1
        if self._bar is not None:
            if n_failed:
                self._bar.set_postfix_str(f"{n_failed:,} failed", refresh=False)
            self._bar.update()
        elif time.monotonic() - self._told > _MINUTE:
            self._told = time.monotonic()
            rate = self._n_done / (self._told - self._began)
            left = duration((self._n - self._n_done) / rate)
            self._console.note(
                f"{self._n_done:,} of {self._n:,} pictures, {n_failed:,} failed, {rate:.2f} per second, {left} left"
            )

    def tell(self, text: str) -> None:
        """A line of its own, even with --log-disable."""
        if self._bar is not None:
            self._bar.clear()
        say(text)
