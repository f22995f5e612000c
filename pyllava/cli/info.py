"""``pyllava-cli info``: what is in a GGUF file, or what the model in a folder needs and can do."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._facts import facts_of
from .._memory import USUAL_CTX
from .._plain import plain
from .info_pair import pair_facts, pair_of, pair_report
from .info_words import sentences
from .option_kinds import COUNT
from .options import PROGRAM, Parser

if TYPE_CHECKING:
    from ..gguf import GgufFile

_SHOWN = 4  # elements of a long array
_TEXT_SHOWN = 80  # characters of a long text


def info(argv: Sequence[str]) -> None:
    """Print what is in the file that the command line names, or about the model in a folder."""
    parser = Parser(
        prog=f"{PROGRAM} info",
        description="Show the metadata and the tensors of a GGUF file. Of a folder, or another name that -m takes: which "
        "files are the model, what it needs in memory, and how fast it can be here.",
    )
    parser.add_argument(
        "file", metavar="FILE", help="GGUF file, or what -m takes: folder, FOLDER:QUANT, name"
    )
    parser.add_argument(
        "-c", "--ctx-size", metavar="N", type=COUNT, default=USUAL_CTX, help=f"context (default: {USUAL_CTX})"
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print JSON, arrays in full")
    options = parser.parse(argv)
    from ..gguf import GgufFile

    if not os.path.isfile(os.path.expanduser(options.file)) and (pair := pair_of(options.file)) is not None:
        told = pair_facts(pair, options.ctx_size)
        print(json.dumps(told, indent=2) if options.json else "\n".join(pair_report(told, options.file)))
        return
    options.file = os.path.expanduser(options.file)
    file = GgufFile(options.file)
    summary = _summary(file, options.file)
    summary["words"] = sentences(file, options.file, summary["model"])
    if summary["model"]["kind"] == "language model":
        summary["devices"] = _places(options.file)
    if options.tensors:
        summary["tensors"] = [_tensor(tensor) for tensor in file.tensors]
    if options.json:
        print(json.dumps({**summary, "metadata": dict(file.metadata)}, indent=2, default=_plain))
    else:
        print("\n".join(_report(summary, file.metadata)))


def _summary(file: GgufFile, path: str) -> dict[str, Any]:
    types: dict[str, dict[str, int]] = {}
    for tensor in file.tensors:
        of_type = types.setdefault(_type_name(tensor.type), {"tensors": 0, "bytes": 0})
        of_type["tensors"] += 1
        of_type["bytes"] += tensor.n_bytes
    return {
        "file": os.fspath(path),
        "bytes": os.path.getsize(path),
        "version": file.version,
        "alignment": file.alignment,
        "model": facts_of(file),
        "types": dict(sorted(types.items(), key=lambda item: -item[1]["bytes"])),
    }


def _places(path: str) -> dict[str, Any] | None:
    """Which devices of this machine would hold the model's parts; None for a model that this version does not run."""
    from .._lib import plan_devices
    from ..errors import PyllavaError

    try:
        devices = plan_devices(path, None)
    except (PyllavaError, ValueError):
        return None
    shown = {"layers": list(devices.layers), "output": devices.output, "n_gpu_layers": devices.n_gpu_layers}
    return {**shown, "text": str(devices)}


# --- text ---


def _report(summary: Mapping[str, Any], metadata: Mapping[str, Any]) -> list[str]:
    model = summary["model"]
    facts = ", ".join(f"{name} {plain(str(value))}" for name, value in model.items() if name != "kind")
    lines = [
        summary["file"],
        f"GGUF version {summary['version']}, {_size(summary['bytes'])}, alignment {summary['alignment']}",
        f"{model['kind']}: {facts}",
        *summary["words"],
        *([f"on this machine: {summary['devices']['text']}"] if summary.get("devices") else []),
        "",
        f"metadata ({len(metadata)})",
    ]
    width = max((len(key) for key in metadata), default=0)
    lines += [f"  {key:<{width}}  {_short(value)}" for key, value in metadata.items()]
    n_tensors = sum(of_type["tensors"] for of_type in summary["types"].values())
    lines += ["", f"tensors ({n_tensors})"]
    lines += [
        f"  {name:<8} {t['tensors']:6d}  {_size(t['bytes']):>10}" for name, t in summary["types"].items()
    ]
    listed = summary.get("tensors", [])
    width = max((len(tensor["name"]) for tensor in listed), default=0)
    lines += [""] if listed else []
    lines += [f"  {t['name']:<{width}}  {t['type']:<6} {t['shape']} at {t['offset']:,}" for t in listed]
    return lines


def _short(value: Any) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= _TEXT_SHOWN else value[:_TEXT_SHOWN] + "...")
    if isinstance(value, float):
        return f"{value:.7g}"  # f32 in the file
    is_array = hasattr(value, "tolist")
    if not is_array and not isinstance(value, Sequence):
        return str(value)
    first = value[:_SHOWN].tolist() if is_array else value[:_SHOWN]
    shown = ", ".join(_short(element) for element in first)
    return f"[{shown}]" if len(value) <= _SHOWN else f"[{shown}, ...] ({len(value)})"


def _size(n_bytes: int) -> str:
    size, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{n_bytes} B" if unit == "B" else f"{size:.2f} {unit}"


def _tensor(tensor: Any) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "type": _type_name(tensor.type),
        "shape": list(tensor.shape),
        "bytes": tensor.n_bytes,
        "offset": tensor.offset,
    }


def _type_name(type: Any) -> str:
    return str(getattr(type, "name", type))


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
