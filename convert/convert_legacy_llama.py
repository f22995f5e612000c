"""Converts a language model: the module of this name in pyllava/convert/."""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
runpy.run_module(f"pyllava.convert.{Path(__file__).stem}", run_name="__main__", alter_sys=True)
