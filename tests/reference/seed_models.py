"""The LLaVA models of the published series at full configuration and reduced size: checkpoints as they are published.

Heads, ratio of heads, rope theta, epsilon, context, vocabulary, the tower's heads and layers, resolutions, special tokens
and file layout are those of the real models; the widths, the depth of the language model and the picture are small. The
weights are numbers that f16 and bf16 both hold, so that a checkpoint of either type is the same model.

    write_original(folder, model)         liuhaotian/llava-*, SkunkworksAI/BakLLaVA-1
    write_hugging_face(folder, model)     llava-hf/*: more rows than pieces, transformers' names and words
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiny
from tiny import Array, Arrays, TinySpec

from .reference import torch

IMAGE_SIZE = 56  # of 336: 4 x 4 patches of 14
TOWER = "clip-vit-large-patch14-336"
PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # in tiles: (336, 672) and so on in the real models
ROWS_ADDED = 64  # of the Hugging Face layout: <image>, <pad>, and then up to a multiple of 64


@dataclass(frozen=True)
class SeedModel:
    """A published model. Its names: of the original, of the Hugging Face layout, of the language model it was built on."""

    name: str
    spec: TinySpec
    kind: str  # model_type of the original config.json
    template: str  # the conversation it was trained with
    shards: int  # of the original
    hf_name: str
    hf_text: str
    anyres: bool = False
    tower_inside: bool = False  # the original checkpoint holds the vision tower
    fmt: str = "safetensors"
    yi: bool = False  # Yi's vocabulary, not LLaMA's

    @property
    def pinpoints(self) -> tuple[tuple[int, int], ...]:
        """(width, height), as the original code reads them."""
        side = self.spec.image_size
        return tuple((w * side, h * side) for w, h in PINPOINTS) if self.anyres else ()

    @property
    def text_kind(self) -> str:
        """model_type of the language model in transformers."""
        return "mistral" if self.kind == "llava_mistral" else "llama"

    @property
    def stop(self) -> int:
        """The token that ends an answer."""
        return 7 if self.yi else 2

    @property
    def image_token(self) -> int:
        """Of the Hugging Face layout."""
        return self.spec.n_vocab


def _spec(n_head: int, n_head_kv: int, n_ff: int, *, head_dim: int = 8, **more: Any) -> TinySpec:
    """`n_ff` keeps the real ratio to the width."""
    real = TinySpec(
        image_size=IMAGE_SIZE,
        v_embd=64,
        v_head=16,
        v_layer=24,
        v_ff=256,
        select_layer=-2,
        n_embd=n_head * head_dim,
        n_layer=2,
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_ff=n_ff,
        n_vocab=32000,
        n_ctx=4096,
        eps=1e-5,
        rope_theta=1e4,
    )
    return replace(real, **more)


VICUNA_7B = _spec(32, 32, 688, dtype="bf16")
VICUNA_13B = _spec(40, 40, 864, dtype="bf16")
MISTRAL_7B = _spec(32, 8, 896, dtype="bf16", n_ctx=32768)

MODELS = {
    model.name: model
    for model in (
        SeedModel(
            "llava-v1.5-7b", replace(VICUNA_7B, dtype="f16", seed=1), "llava", "vicuna_v1", 2,
            "llava-1.5-7b-hf", "lmsys/vicuna-7b-v1.5", fmt="torch",
        ),
        SeedModel(
            "llava-v1.5-13b", replace(VICUNA_13B, dtype="f16", seed=2), "llava", "vicuna_v1", 3,
            "llava-1.5-13b-hf", "lmsys/vicuna-13b-v1.5", fmt="torch",
        ),
        SeedModel(
            "BakLLaVA-1", replace(MISTRAL_7B, seed=3), "llava_mistral", "vicuna_v1", 2,
            "bakLlava-v1-hf", "mistralai/Mistral-7B-v0.1", tower_inside=True, fmt="torch",
        ),
        SeedModel(
            "llava-v1.6-vicuna-7b", replace(VICUNA_7B, seed=4), "llava", "vicuna_v1", 3,
            "llava-v1.6-vicuna-7b-hf", "lmsys/vicuna-7b-v1.5", anyres=True, tower_inside=True,
        ),
        SeedModel(
            "llava-v1.6-vicuna-13b", replace(VICUNA_13B, seed=5), "llava", "vicuna_v1", 6,
            "llava-v1.6-vicuna-13b-hf", "lmsys/vicuna-13b-v1.5", anyres=True, tower_inside=True,
        ),
        SeedModel(
            "llava-v1.6-mistral-7b", replace(MISTRAL_7B, rope_theta=1e6, seed=6), "llava_mistral",
            "mistral_instruct", 4, "llava-v1.6-mistral-7b-hf", "mistralai/Mistral-7B-Instruct-v0.2",
            anyres=True, tower_inside=True,
        ),
        SeedModel(
            "llava-v1.6-34b",
            _spec(56, 8, 640, head_dim=4, dtype="bf16", n_vocab=64000, rope_theta=5e6, seed=7), "llava",
            "chatml_direct", 15, "llava-v1.6-34b-hf", "NousResearch/Nous-Hermes-2-Yi-34B",
            anyres=True, tower_inside=True, yi=True,
        ),
    )
}  # fmt: skip


# Weights


@dataclass(frozen=True)
class Tensors:
    """Under the names of tiny.py; `newline` where the model has one."""

    language: Arrays
    projector: Arrays
    vision: Arrays
    newline: Array | None


@functools.lru_cache(maxsize=1)  # both layouts of a model are written one after the other
def tensors_of(model: SeedModel) -> Tensors:
    def both(arrays: Arrays) -> Arrays:
        return {name: tiny.rounded(tiny.rounded(x, "bf16"), "f16") for name, x in arrays.items()}

    spec = replace(model.spec, dtype="f32")
    newline = np.random.RandomState(spec.seed + 50).standard_normal(spec.n_embd).astype(np.float32)
    return Tensors(
        both(tiny.language_tensors(spec)),
        both(tiny.projector_tensors(spec)),
        both(tiny.vision_tensors(spec)),
        both({"": newline})[""] if model.anyres else None,
    )


def _with_rows(x: Array, n: int) -> Array:
    """`n` more rows, the mean of those there are: what transformers starts added tokens with."""
    mean = tiny.rounded(tiny.rounded(x.mean(0, keepdims=True), "bf16"), "f16")
    return np.concatenate([x, np.repeat(mean, n, 0)])


# Files


DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def _write_shards(folder: Path, arrays: Arrays, dtype: str, fmt: str, shards: int) -> None:
    """As transformers saves a model: shards filled in order, and an index; written by torch or safetensors."""
    stem, suffix = ("model", "safetensors") if fmt == "safetensors" else ("pytorch_model", "bin")
    tensors = {name: torch.from_numpy(x).to(DTYPES[dtype]) for name, x in arrays.items()}
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        path = folder / f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}"
        chosen = {n: tensors[n] for n in names[i * len(names) // shards : (i + 1) * len(names) // shards]}
        if fmt == "safetensors":
            from safetensors.torch import save_file

            save_file(chosen, path, metadata={"format": "pt"})
        else:
            torch.save(chosen, path)
        weight_map |= dict.fromkeys(chosen, path.name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    _write_json(folder / f"{stem}.{suffix}.index.json", index)


def _write_json(path: Path, table: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2))


def write_original(folder: Path, model: SeedModel) -> Path:
    """The checkpoint in `folder`/NAME, and beside it the tower that its config names: OpenAI's, other weights than the
    checkpoint's own where it has some."""
    tensors, path = tensors_of(model), folder / model.name
    path.mkdir(parents=True)
    arrays = dict(tensors.language)
    if tensors.newline is not None:
        arrays["model.image_newline"] = tensors.newline
    if model.tower_inside:
        prefix = "model.vision_tower.vision_tower."
        arrays |= {prefix + name: x for name, x in tensors.vision.items()}
    arrays |= tensors.projector
    arrays["lm_head.weight"] = arrays.pop("lm_head.weight")  # the last, as transformers saves it
    _write_shards(path, arrays, model.spec.dtype, model.fmt, model.shards)
    _write_json(path / "config.json", original_config(model))
    _write_json(path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": model.stop})
    write_tokenizer(path, model)
    if model.name == "BakLLaVA-1":
        _write_json(path / "added_tokens.json", {"</s>": 2, "<s>": 1, "<unk>": 0})
    seed = model.spec.seed + 90 * model.tower_inside
    tiny.write_clip_folder(folder / TOWER, replace(model.spec, seed=seed, dtype="f32"))
    if not model.tower_inside:  # the same numbers as `tensors`
        tiny.write_shards(folder / TOWER, tensors.vision, "f32")
    return path


def original_config(model: SeedModel) -> dict[str, Any]:
    spec = model.spec
    names = {"llava": "LlavaLlamaForCausalLM", "llava_mistral": "LlavaMistralForCausalLM"}
    table: dict[str, Any] = {
        "_name_or_path": f"./checkpoints/{model.name}",
        "architectures": [names[model.kind]],
        "bos_token_id": 1,
        "eos_token_id": model.stop,
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "hidden_act": "silu",
        "hidden_size": spec.n_embd,
        "image_aspect_ratio": "anyres" if model.anyres else "pad",
        "image_grid_pinpoints": [list(pair) for pair in model.pinpoints] or None,
        "initializer_range": 0.02,
        "intermediate_size": spec.n_ff,
        "max_length": 4096,
        "max_position_embeddings": spec.n_ctx,
        "mm_hidden_size": spec.v_embd,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": spec.select_layer,
        "mm_vision_tower": f"openai/{TOWER}",
        "model_type": model.kind,
        "num_attention_heads": spec.n_head,
        "num_hidden_layers": spec.n_layer,
        "num_key_value_heads": spec.n_head_kv,
        "pad_token_id": 0,
        "rms_norm_eps": spec.eps,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": {"f16": "float16", "bf16": "bfloat16"}[spec.dtype],
        "transformers_version": "4.36.2",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": model.anyres,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": spec.n_vocab,
    }
    if model.kind == "llava_mistral":
        table["sliding_window"] = None if model.anyres else 4096
    if spec.rope_theta != 1e4 or model.anyres:
        table["rope_theta"] = spec.rope_theta
    if model.anyres:
        table |= {
            "image_crop_resolution": 224,
            "image_split_resolution": 224,
            "mm_patch_merge_type": "spatial_unpad",
            "mm_vision_tower_lr": 2e-06,
            "tokenizer_model_max_length": 4096,
            "tokenizer_padding_side": "right",
        }
    return table


def write_hugging_face(folder: Path, model: SeedModel) -> Path:
    """llava-hf's: f16, every part in the checkpoint under the names of transformers before its version 5."""
    tensors, path = tensors_of(model), folder / model.hf_name
    path.mkdir(parents=True)
    arrays = {}
    if tensors.newline is not None:
        arrays["image_newline"] = tensors.newline
    for name, x in tensors.language.items():
        rows = name in ("model.embed_tokens.weight", "lm_head.weight")
        arrays["language_model." + name] = _with_rows(x, ROWS_ADDED) if rows else x
    for name, x in tensors.projector.items():
        _, _, i, end = name.split(".")
        arrays[f"multi_modal_projector.linear_{1 if i == '0' else 2}.{end}"] = x
    arrays |= {"vision_tower." + name: x for name, x in tensors.vision.items()}
    _write_shards(path, arrays, "f16", "safetensors", 3)
    _write_json(path / "config.json", hugging_face_config(model))
    _write_json(
        path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": model.stop, "pad_token_id": 0}
    )
    _write_json(path / "preprocessor_config.json", _processor(model))
    added = {"<image>": model.image_token, "<pad>": model.image_token + 1}
    write_tokenizer(path, model, added)
    _write_json(path / "added_tokens.json", added)
    return path


def hugging_face_config(model: SeedModel) -> dict[str, Any]:
    """What llava-hf leaves out (a value that transformers has by default) is left out unless it is a reduced size."""
    spec = model.spec
    n_vocab = spec.n_vocab + ROWS_ADDED
    text: dict[str, Any] = {
        "_name_or_path": model.hf_text,
        "hidden_size": spec.n_embd,
        "intermediate_size": spec.n_ff,
        "max_position_embeddings": spec.n_ctx,
        "model_type": model.text_kind,
        "num_attention_heads": spec.n_head,
        "num_hidden_layers": spec.n_layer,
        "num_key_value_heads": spec.n_head_kv,
        "rms_norm_eps": spec.eps,
        "torch_dtype": "float16",
        "vocab_size": n_vocab,
    }
    if spec.rope_theta != 1e4:
        text["rope_theta"] = spec.rope_theta
    if model.text_kind == "mistral":
        text["sliding_window"] = None if model.anyres else 4096
    defaults = {
        "num_attention_heads": 32,
        "num_key_value_heads": 8 if model.text_kind == "mistral" else spec.n_head,
    }
    text = {key: value for key, value in text.items() if key not in defaults or defaults[key] != value}
    vision = {
        "hidden_size": spec.v_embd,
        "image_size": spec.image_size,
        "intermediate_size": spec.v_ff,
        "model_type": "clip_vision_model",
        "num_attention_heads": spec.v_head,
        "num_hidden_layers": spec.v_layer,
        "patch_size": spec.patch_size,
        "projection_dim": 768,
        "vocab_size": 32000,
    }
    table: dict[str, Any] = {
        "architectures": [f"Llava{'Next' if model.anyres else ''}ForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": model.image_token,
        "model_type": "llava_next" if model.anyres else "llava",
        "projector_hidden_act": "gelu",
        "text_config": text,
        "torch_dtype": "float16",
        "vision_config": vision,
        "vision_feature_layer": spec.select_layer,
        "vision_feature_select_strategy": "default",
    }
    if model.anyres:
        table |= {
            "image_grid_pinpoints": [list(pair) for pair in model.pinpoints],
            "tie_word_embeddings": False,
            "use_image_newline_parameter": True,
        }
    else:
        table["vocab_size"] = n_vocab
    return table


def _processor(model: SeedModel) -> dict[str, Any]:
    """1.5: shortest edge and centre crop, as llava-hf has it, although the model was trained on padded pictures."""
    side = model.spec.image_size
    table: dict[str, Any] = {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": f"{'LlavaNext' if model.anyres else 'CLIP'}ImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": {"shortest_edge": side},
    }
    if model.anyres:
        table |= {
            "aspect_ratio_setting": "anyres",
            "image_grid_pinpoints": [list(p) for p in model.pinpoints],
        }
    return table


# Tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
VOCAB = Path(__file__).resolve().parents[3] / "shared" / "data" / "vocab" / "ggml-vocab-llama-spm.gguf"
Piece = tuple[str, float, int]
YI_MARKS = (
    ("<|startoftext|>", CONTROL),
    ("<|endoftext|>", CONTROL),
    *((name, USER_DEFINED) for name in ("<|Human|>", "<|Assistant|>", "<|System|>")),
    *((name, USER_DEFINED) for name in ("<|im_start|>", "<|im_end|>")),  # 6, 7
    *((name, USER_DEFINED) for name in ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<repo_name>")),
)
# Pieces from which merging makes the whole of the marks, one after the other, if they may come from text.
YI_STEPS = (
    "<|", "im", "|>", "_s", "_e", "_start", "_end", "im_start", "im_end",
    "<|im_start", "<|im_end", "<|im_start|", "<|im_end|",
)  # fmt: skip


def write_tokenizer(folder: Path, model: SeedModel, added: Mapping[str, int] | None = None) -> None:
    """tokenizer.model and its settings; `added`: the tokens of the Hugging Face layout."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(model.yi))
    settings: dict[str, Any] = {
        "add_bos_token": not model.yi,
        "add_eos_token": False,
        "bos_token": "<|startoftext|>" if model.yi else "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>" if model.yi else "</s>",
        "legacy": not model.yi,
        "model_max_length": 4096,
        "pad_token": "<unk>",
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    special = {0: "<unk>", 1: "<|startoftext|>", 2: "<|endoftext|>", 7: "<|im_end|>"} if model.yi else {}
    special |= {i: text for text, i in (added or {}).items()}
    if special:
        settings["added_tokens_decoder"] = {
            str(i): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for i, text in special.items()
        }
    _write_json(folder / "tokenizer_config.json", settings)
    names = {key: settings[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    _write_json(folder / "special_tokens_map.json", names)


def write_tokenizer_json(folder: Path, model: SeedModel) -> None:
    """In the place of tokenizer.model: the same tokens as transformers converts them, merges and all."""
    (folder / "tokenizer.model").unlink()
    pieces = yi_pieces(USER_DEFINED) if model.yi else llama_pieces()
    added = json.loads((folder / "added_tokens.json").read_text())
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    best_first = sorted((p for p in pieces if p[2] == NORMAL), key=lambda piece: -piece[1])
    merges = [
        f"{text[:cut]} {text[cut:]}"
        for text, _, _ in best_first
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    special = [
        (text, i, pieces[i][2] != USER_DEFINED) for text, i in ids.items() if pieces[i][2] in (2, 3, 4)
    ]
    special += [(text, i, True) for text, i in added.items()]
    table = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "special": is_special, "normalized": False}
            for text, i, is_special in sorted(special, key=lambda entry: entry[1])
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *([] if model.yi else [{"type": "Prepend", "prepend": "\u2581"}]),
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": merges,
        },
    }
    _write_json(folder / "tokenizer.json", table)


@functools.cache
def sentencepiece_model(yi: bool, marks: int = USER_DEFINED) -> bytes:
    """tokenizer.model; `marks`: the kind of Yi's chat marks in it (CONTROL: a tokenizer that reads them as plain text)."""
    pieces = yi_pieces(marks) if yi else llama_pieces()
    return _proto(pieces, add_dummy_prefix=not yi)


@functools.cache
def llama_pieces() -> tuple[Piece, ...]:
    """32000 pieces: LLaMA's own where they are at hand, else trained ones and then pieces that no text holds."""
    if VOCAB.is_file():
        import tiny_gguf

        keys = tiny_gguf.read(VOCAB).keys
        columns = (keys[f"tokenizer.ggml.{name}"][0] for name in ("tokens", "scores", "token_type"))
        return tuple((str(text), float(score), int(kind)) for text, score, kind in zip(*columns, strict=True))
    return (*_trained(), *_filler(32000 - len(_trained()), 0))


def yi_pieces(marks: int) -> tuple[Piece, ...]:
    """64000 pieces in Yi's order: `<unk>`, the marks, bytes, then the rest."""
    head: list[Piece] = [("<unk>", 0.0, UNKNOWN)]
    head += [(text, 0.0, marks if kind == USER_DEFINED else kind) for text, kind in YI_MARKS]
    known = {text for text, _, _ in head} | {"<s>", "</s>"}
    rest = [piece for piece in llama_pieces() if piece[0] not in known and piece[2] in (NORMAL, BYTE)]
    texts = {text for text, _, _ in rest}
    rest += [(text, -1e6 - i, NORMAL) for i, text in enumerate(YI_STEPS) if text not in texts]
    pieces = [*head, *rest]
    return (*pieces, *_filler(64000 - len(pieces), len(pieces)))


@functools.cache
def _trained() -> tuple[Piece, ...]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=tiny.tokenizer_model(384))
    kinds = [
        UNKNOWN
        if model.is_unknown(i)
        else CONTROL
        if model.is_control(i)
        else BYTE
        if model.is_byte(i)
        else NORMAL
        for i in range(model.get_piece_size())
    ]
    return tuple((model.id_to_piece(i), model.get_score(i), kind) for i, kind in enumerate(kinds))


def _filler(n: int, first: int) -> list[Piece]:
    """Pieces of Yi syllables: no text here holds them."""
    digits = [chr(0xA000 + i) for i in range(64)]
    return [
        (digits[i // 4096 % 64] + digits[i // 64 % 64] + digits[i % 64] + digits[0], -2e6 - i, NORMAL)
        for i in range(first, first + n)
    ]


def _proto(pieces: tuple[Piece, ...], *, add_dummy_prefix: bool) -> bytes:
    """sentencepiece_model.proto's ModelProto: pieces, TrainerSpec, NormalizerSpec."""
    records = []
    for text, score, kind in pieces:
        piece = text.encode()
        record = (
            b"\x0a"
            + _varint(len(piece))
            + piece
            + b"\x15"
            + np.float32(score).tobytes()
            + b"\x18"
            + _varint(kind)
        )
        records.append(_message(1, record))
    trainer = _message(2, _number(3, 2) + _number(4, len(pieces)) + _number(35, 1))  # BPE, byte_fallback
    rules = _text(1, "identity") + _number(3, int(add_dummy_prefix)) + _number(4, 0) + _number(5, 1)
    return b"".join(records) + trainer + _message(3, rules)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


# Pictures


def picture(width: int, height: int) -> npt.NDArray[np.uint8]:
    """Noise on slopes; the same for the same size."""
    from .cases import picture as drawn

    return drawn(width * 1000 + height, width, height)
