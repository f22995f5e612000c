"""Opening finished files with pyllava itself, where its compiled library is at hand."""

from __future__ import annotations

from pathlib import Path

from .errors import OutputError
from .script import log

N_CTX = 64  # enough to open a session; its cache stays small


def opened_by_library(model: Path, mmproj: Path) -> bool:
    """Whether pyllava opened the two files, which checks every key, shape and type; it logs why not.

    Raises OutputError where the library is there and calls a file damaged or the two unfit for each other.
    """
    try:
        from .. import Llava, ModelMemoryError, PyllavaError, UnsupportedModelError
    except ImportError as error:
        log.info("not opened with pyllava itself, which is not ready to run here: %s", error)
        return False
    try:
        with Llava(model, mmproj, n_ctx=N_CTX, n_batch=8) as opened:
            opened.tokenize("<image>")
    except (UnsupportedModelError, ModelMemoryError) as error:
        log.warning("written, but pyllava cannot run it here: %s", error)
        return False
    except PyllavaError as error:
        raise OutputError(f"pyllava refuses what was written: {error}") from None
    log.info("opened with pyllava: both files fit together")
    return True
