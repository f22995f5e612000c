"""Finds the projector and the vision tower in a LLaVA checkpoint and writes them on their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

from .._part_file import replacing
from .checkpoints.checkpoint import Checkpoint, checkpoint_files, summary
from .checkpoints.dtypes import FLOATS, STORED
from .checkpoints.safetensors_file import check_safetensors, write_safetensors
from .checkpoints.tensor import Tensor
from .errors import CheckpointError, NoCheckpoint, shown
from .names import projector_name, tower_name
from .script import log
from .xtuner import projector_beside

# Files of pre-training and LoRA releases that hold a projector on its own, looked at when the shards hold
# none.
PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin", "non_lora_trainables.bin")

TOWER_HINT = "copy it to CLIP_DIR/model.safetensors, beside the config.json of the CLIP model"


def split_off(model: Path, folder: Path, *, tower: bool = True, hint: str = TOWER_HINT) -> list[Path]:
    """Write `llava.projector` (f32) and, if there is a tower and it is wanted, `llava.clip` (as stored).

    Returns the paths. `hint`: what to do with a tower, for the log.
    """
    if not model.is_dir():
        raise CheckpointError(f"{model}: not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint(_files(model)))
        projector = find_projector(model, checkpoint, stack)
        written = [_write(folder / "llava.projector", projector, "f32", checkpoint.files)]
        found = renamed(checkpoint, tower_name)
        if found and tower:
            written.append(_write(folder / "llava.clip", found, None, checkpoint.files))
            log.info("the checkpoint holds its own vision tower, it is in %s: %s", written[-1].name, hint)
        elif found:
            log.info("the checkpoint holds its own vision tower: -C (--clean-vision-tower) writes llava.clip")
    log.info("now convert the language model with --skip-unknown, and the CLIP folder with --llava-projector")
    return written


def find_projector(model: Path, checkpoint: Checkpoint, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    """The projector and the newline, from whichever shards, by their original names.

    Where the checkpoint holds none, that of a file beside it, which `stack` closes. Raises CheckpointError.
    """
    projector = renamed(checkpoint, projector_name)
    for name in PROJECTOR_FILES:
        if _has_weights(projector) or not (model / name).exists():
            continue
        log.info("no projector in the checkpoint itself, taking the one in %s", name)
        beside = stack.enter_context(Checkpoint([model / name]))
        projector.update(renamed(beside, projector_name))
    if not _has_weights(projector):
        projector.update(projector_beside(model, stack))
    if not _has_weights(projector):
        raise CheckpointError(
            f"{model}: no projector (model.mm_projector.*) among {len(checkpoint)} tensors: "
            f"{summary(checkpoint)}; is this a LLaVA model?"
        )
    return projector


def _files(model: Path) -> list[Path]:
    """The checkpoint's files; none where only a projector file was released."""
    try:
        return checkpoint_files(model)
    except NoCheckpoint:
        if any((model / name).exists() for name in PROJECTOR_FILES):
            return []
        raise


def renamed(checkpoint: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """The tensors that `rename` knows, by their new names."""
    found: dict[str, Tensor] = {}
    for name, tensor in checkpoint.items():
        new = rename(name)
        if new is None:
            continue
        if new in found:
            raise CheckpointError(f"{shown(name)} and {shown(found[new].name)} are both {shown(new)}")
        found[new] = tensor
    return found


def _has_weights(projector: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("model.mm_projector.") for name in projector)


def _write(path: Path, tensors: Mapping[str, Tensor], dtype: str | None, inputs: list[Path]) -> Path:
    if dtype is not None:
        for name, tensor in tensors.items():
            if tensor.dtype not in FLOATS:
                raise CheckpointError(f"{shown(name)}: type {tensor.dtype}, need one of {', '.join(FLOATS)}")
    pairs = sorted(tensors.items())
    item = STORED[dtype].itemsize if dtype else 8
    n_bytes = sum(tensor.n_rows * tensor.row_elements * item for _, tensor in pairs)
    with replacing(path, n_bytes=n_bytes + (1 << 20), inputs=inputs) as file:
        write_safetensors(file, pairs, dtype)
        file.flush()
        check_safetensors(Path(file.name), pairs, dtype)
    log.info("%s: %d tensors, %.1f MB", path, len(pairs), path.stat().st_size / 1e6)
    return path
