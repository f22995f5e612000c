"""The library's functions and structs as ctypes has them: those of ``csrc/pyllava.h``, in its order."""

from __future__ import annotations

import ctypes as c
from typing import Any

_MAX_LAYERS = 512
_TEXT, _P, _U64, _I32, _BOOL = c.c_char_p, c.c_void_p, c.c_uint64, c.c_int32, c.c_bool
_PROGRESS_FN = c.CFUNCTYPE(c.c_bool, c.c_char_p, c.c_float, c.c_void_p)
_LOG_FN = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
_TRACE_FN = c.CFUNCTYPE(None, c.c_char_p, c.POINTER(c.c_float), c.POINTER(c.c_int64), c.c_int, c.c_void_p)


class _Kv(c.Structure):
    _fields_ = [
        ("key", _TEXT),
        ("type", _I32),
        ("item_type", _I32),
        ("n", _U64),
        ("data", _P),
    ]


class _TensorInfo(c.Structure):
    _fields_ = [
        ("name", _TEXT),
        ("type", _TEXT),
        ("n_dims", _I32),
        ("shape", c.c_int64 * 4),
        ("offset", _U64),
        ("size", _U64),
    ]


class _TensorType(c.Structure):
    _fields_ = [
        ("name", _TEXT),
        ("id", _I32),
        ("block", c.c_int64),
        ("block_size", _U64),
        ("can_quantize", _BOOL),
        ("can_dequantize", _BOOL),
    ]


class _Rows(c.Structure):
    _fields_ = [
        ("type", _TEXT),
        ("n", c.c_int64),
        ("n_per_row", c.c_int64),
        ("first", c.c_int64),
        ("size", _U64),
    ]


class _Device(c.Structure):
    _fields_ = [
        ("name", _TEXT),
        ("description", _TEXT),
        ("backend", _TEXT),
        ("kind", _I32),
        ("memory_free", _U64),
        ("memory_total", _U64),
    ]


class _SessionParams(c.Structure):
    _fields_ = [
        ("n_ctx", _I32),
        ("n_batch", _I32),
        ("n_seq", _I32),
        ("n_threads", _I32),
        ("n_views", _I32),
        ("type_k", _TEXT),
        ("type_v", _TEXT),
        ("precision", c.c_int),
        ("flash_attn", _I32),
        ("kv_cells", _I32),
    ]


class _ModelParams(c.Structure):
    _fields_ = [
        ("path", _TEXT),
        ("mmproj", _TEXT),
        ("use_mmap", _BOOL),
        ("device", _TEXT),
        ("vision_device", _TEXT),
        ("n_gpu_layers", _I32),
        ("main_gpu", _I32),
        ("tensor_split", c.POINTER(c.c_float)),
        ("n_tensor_split", _I32),
        ("kv_on_host", _BOOL),
        ("plan_for", c.POINTER(_SessionParams)),
        ("progress", _PROGRESS_FN),
        ("log", _LOG_FN),
        ("user", _P),
    ]


class _ModelDevices(c.Structure):
    _fields_ = [
        ("n_layer", _I32),
        ("layers", _TEXT * _MAX_LAYERS),
        ("output", _TEXT),
        ("vision", _TEXT),
        ("kv_on_host", _BOOL),
        ("n_gpu_layers", _I32),
    ]


class _ModelInfo(c.Structure):
    _fields_ = [
        ("n_vocab", _I32),
        ("n_embd", _I32),
        ("n_layer", _I32),
        ("n_head", _I32),
        ("n_head_kv", _I32),
        ("head_dim", _I32),
        ("n_ff", _I32),
        ("n_ctx_train", _I32),
        ("bos_id", _I32),
        ("eos_id", _I32),
        ("unk_id", _I32),
        ("add_bos", _BOOL),
        ("space_prefix", _BOOL),
        ("nfc", _BOOL),
        ("has_vision", _BOOL),
        ("image_size", _I32),
        ("patch_size", _I32),
        ("n_image_tokens", _I32),
        ("n_embd_vision", _I32),
        ("n_layer_vision", _I32),
        ("n_layer_vision_run", _I32),
        ("image_mean", c.c_float * 3),
        ("image_std", c.c_float * 3),
        ("aspect", _I32),
        ("anyres_max", _I32),
        ("n_pinpoints", _I32),
        ("pinpoints", _I32 * 2 * 64),
        ("size", _U64),
        ("size_vision", _U64),
    ]


class _Range(c.Structure):
    _fields_ = [("begin", _U64), ("end", _U64)]


class _SessionPlan(c.Structure):
    _fields_ = [("kv_size", _U64), ("compute_size", _U64), ("compute_size_vision", _U64)]


class _Layout(c.Structure):
    _fields_ = [("columns", _I32), ("rows", _I32), ("width", _I32), ("height", _I32), ("flat", _BOOL)]


class _Span(c.Structure):
    _fields_ = [("tokens", _P), ("embd", _P), ("key", _U64), ("n", _I32)]


class _Choice(c.Structure):
    _fields_ = [("id", _I32), ("log_prob", c.c_float)]


class _Run(c.Structure):
    _fields_ = [
        ("seq", _I32),
        ("append", _BOOL),
        ("kind", c.c_int),
        ("spans", c.POINTER(_Span)),
        ("n_spans", _I32),
        ("first", _I32),
        ("logits", _P),
        ("n_reused", _I32),
        ("sampler", _P),
        ("mask", _P),
        ("n_alternatives", _I32),
        ("choice", c.POINTER(_Choice)),
        ("alternatives", c.POINTER(_Choice)),
    ]


class _Bias(c.Structure):
    _fields_ = [("id", _I32), ("bias", c.c_float)]


class _SamplerParams(c.Structure):
    _fields_ = [
        ("temperature", c.c_float),
        ("dynatemp_range", c.c_float),
        ("dynatemp_exponent", c.c_float),
        ("top_k", _I32),
        ("top_p", c.c_float),
        ("min_p", c.c_float),
        ("typical_p", c.c_float),
        ("top_n_sigma", c.c_float),
        ("xtc_probability", c.c_float),
        ("xtc_threshold", c.c_float),
        ("repeat_penalty", c.c_float),
        ("presence_penalty", c.c_float),
        ("frequency_penalty", c.c_float),
        ("repeat_last_n", _I32),
        ("dry_multiplier", c.c_float),
        ("dry_base", c.c_float),
        ("dry_allowed_length", _I32),
        ("dry_penalty_last_n", _I32),
        ("dry_sequence_breakers", c.POINTER(_TEXT)),
        ("n_dry_sequence_breakers", _I32),
        ("mirostat", _I32),
        ("mirostat_tau", c.c_float),
        ("mirostat_eta", c.c_float),
        ("adaptive_target", c.c_float),
        ("adaptive_decay", c.c_float),
        ("logit_bias", c.POINTER(_Bias)),
        ("n_logit_bias", _I32),
        ("ignore_eos", _BOOL),
        ("samplers", c.POINTER(_TEXT)),
        ("n_samplers", _I32),
        ("seed", _U64),
    ]


_STATUS = c.c_int  # functions that return pyllava_status

# name: (result, arguments), in the order of the header
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "pyllava_abi": (c.c_int, []),
    "pyllava_version": (_TEXT, []),
    "pyllava_engine_version": (_TEXT, []),
    "pyllava_last_error": (_TEXT, []),
    "pyllava_plugin_load": (_STATUS, [c.POINTER(_TEXT), _I32]),
    "pyllava_gguf_open": (_STATUS, [_TEXT, c.POINTER(_P)]),
    "pyllava_gguf_free": (None, [_P]),
    "pyllava_gguf_version": (c.c_uint32, [_P]),
    "pyllava_gguf_alignment": (c.c_uint32, [_P]),
    "pyllava_gguf_n_kv": (_U64, [_P]),
    "pyllava_gguf_n_tensors": (_U64, [_P]),
    "pyllava_gguf_kv": (_STATUS, [_P, _U64, c.POINTER(_Kv)]),
    "pyllava_gguf_string": (_STATUS, [_P, _U64, _U64, c.POINTER(_P), c.POINTER(_U64)]),
    "pyllava_gguf_tensor": (_STATUS, [_P, _U64, c.POINTER(_TensorInfo)]),
    "pyllava_gguf_record": (_STATUS, [_P, _U64, c.POINTER(_U64), c.POINTER(_U64)]),
    "pyllava_device_count": (_I32, []),
    "pyllava_device_describe": (_STATUS, [_I32, c.POINTER(_Device)]),
    "pyllava_cpu_count": (_I32, []),
    "pyllava_tensor_type_find": (_STATUS, [_TEXT, c.POINTER(_TensorType)]),
    "pyllava_quantize": (_STATUS, [c.POINTER(_Rows), _P, _P]),
    "pyllava_dequantize": (_STATUS, [c.POINTER(_Rows), _P, _P]),
    "pyllava_model_load": (_STATUS, [c.POINTER(_ModelParams), c.POINTER(_P)]),
    "pyllava_model_free": (None, [_P]),
    "pyllava_model_plan": (_STATUS, [c.POINTER(_ModelParams), c.POINTER(_ModelDevices)]),
    "pyllava_model_describe": (_STATUS, [_P, c.POINTER(_ModelInfo)]),
    "pyllava_model_placement": (_STATUS, [_P, c.POINTER(_ModelDevices)]),
    "pyllava_model_file": (_P, [_P]),
    "pyllava_model_mmproj": (_P, [_P]),
    "pyllava_tokenize": (_STATUS, [_P, _TEXT, _U64, _P, _U64, _BOOL, _P, _U64, c.POINTER(_U64)]),
    "pyllava_token_piece": (_STATUS, [_P, _I32, _BOOL, c.POINTER(_P), c.POINTER(_U64)]),
    "pyllava_token_is_end": (_BOOL, [_P, _I32]),
    "pyllava_session_create": (_STATUS, [_P, c.POINTER(_SessionParams), c.POINTER(_P)]),
    "pyllava_session_free": (None, [_P]),
    "pyllava_session_memory": (_STATUS, [_P, c.POINTER(_SessionPlan)]),
    "pyllava_session_cancel": (None, [_P, _BOOL]),
    "pyllava_session_trace": (None, [_P, _TRACE_FN, _P]),
    "pyllava_session_progress": (None, [_P, _PROGRESS_FN, _P]),
    "pyllava_encode": (_STATUS, [_P, _P, _I32, _P]),
    "pyllava_merge_length": (_STATUS, [_P, c.POINTER(_Layout), c.POINTER(_I32)]),
    "pyllava_merge": (_STATUS, [_P, c.POINTER(_Layout), _P, _P]),
    "pyllava_step": (_STATUS, [_P, c.POINTER(_Run), _I32]),
    "pyllava_generate": (_STATUS, [_P, c.POINTER(_Run), _I32, _I32, c.c_double, c.POINTER(_I32)]),
    "pyllava_prefill": (_STATUS, [_P, _I32, c.POINTER(_Span), _I32, _P, c.POINTER(_I32)]),
    "pyllava_logits": (_STATUS, [_P, _I32, c.POINTER(_Span), _I32, _P]),
    "pyllava_decode": (_STATUS, [_P, _P, _P, _I32, _P]),
    "pyllava_seq_length": (_STATUS, [_P, _I32, c.POINTER(_I32)]),
    "pyllava_seq_shared": (_STATUS, [_P, _I32, c.POINTER(_Run), _I32, c.POINTER(_I32)]),
    "pyllava_cells_free": (_STATUS, [_P, _P, _I32, c.POINTER(_I32)]),
    "pyllava_seq_trim": (_STATUS, [_P, _I32, _I32]),
    "pyllava_seq_copy": (_STATUS, [_P, _I32, _I32, _I32]),
    "pyllava_sampler_create": (_STATUS, [_P, c.POINTER(_SamplerParams), c.POINTER(_P)]),
    "pyllava_sampler_free": (None, [_P]),
    "pyllava_sample": (_STATUS, [_P, _P, _P, _I32, c.POINTER(_Choice), c.POINTER(_Choice)]),
}

# Functions that end within microseconds (a sampler with DRY: a millisecond) and call nobody back. They keep the interpreter's lock: to take it again
# may cost 5 ms where another thread is busy, and an answer has dozens of them.
QUICK = {
    "pyllava_last_error",
    "pyllava_token_piece",
    "pyllava_token_is_end",
    "pyllava_session_cancel",
    "pyllava_merge_length",
    "pyllava_seq_length",
    "pyllava_seq_shared",
    "pyllava_cells_free",
    "pyllava_sampler_create",
    "pyllava_sampler_free",
}
