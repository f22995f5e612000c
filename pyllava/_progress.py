"""Bars on a terminal: for the long stages (load, upload to a device, encode, prefill), and for bytes."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

_DELAY_S = 0.5  # a stage shorter than this shows no bar
_LOOK = "{desc:<8}{percentage:3.0f}% |{bar}| {elapsed} < {remaining}"


def bar(label: str, **how: Any) -> Any:
    """A bar on stderr that leaves no trace; `how`: tqdm's options."""
    return tqdm(desc=label, file=sys.stderr, leave=False, dynamic_ncols=True, **how)


class StageBars:
    """A progress callback: one bar at a time, on stderr; it leaves no trace when its stage is done."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Any = None

    def __call__(self, stage: str, fraction: float) -> None:
        """Show that `fraction` (0..1) of `stage` is done."""
        if self._bar is None or stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = bar(stage, total=1.0, bar_format=_LOOK, delay=_DELAY_S)
        self._bar.update(max(0.0, min(fraction, 1.0) - self._bar.n))
        if fraction >= 1:
            self.close()

    def close(self) -> None:
        """Remove the bar; a later call shows a new one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
