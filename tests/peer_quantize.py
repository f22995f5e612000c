"""llama.cpp's own quantiser, for comparison: run by a Python that has llama-cpp-python. On stdin lines of JSON
[source, target, file type, pure], on stdout "done N" after each, N = 0 where it went well."""

from __future__ import annotations

import ctypes
import json
import sys

from llama_cpp import llama_cpp

for line in sys.stdin:
    source, target, file_type, pure = json.loads(line)
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure, params.allow_requantize = 1, file_type, pure, True
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    print("done", status, flush=True)
