"""``pyllava-cli convert``: the converters' one-step command, from wherever they lie."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from ._options import PROGRAM
from .errors import PyllavaError

_PACKAGE = "pyllava._convert"
_SOURCES = Path(__file__).resolve().parents[1] / "convert"  # in a checkout, beside the package


def convert(argv: list[str]) -> None:
    """Convert the checkpoint that the command line names. Raises SystemExit with the exit code where that is not 0."""
    code = _converters().main(argv, prog=f"{PROGRAM} convert")
    if code:
        raise SystemExit(code)


def _converters() -> ModuleType:
    """The module of the command: of the installed package, or of the source tree under the same name."""
    if importlib.util.find_spec(_PACKAGE) is None:
        if not (_SOURCES / "convert_llava.py").is_file():
            raise PyllavaError(f"the converters are not in this installation (no {_PACKAGE})")
        spec = importlib.util.spec_from_file_location(
            _PACKAGE, _SOURCES / "__init__.py", submodule_search_locations=[str(_SOURCES)]
        )
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[_PACKAGE] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{_PACKAGE}.convert_llava")
