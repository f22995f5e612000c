"""The judge: LLaVA-1.5 and 1.6 of a TinySpec in `transformers`, float32, every intermediate under pyllava's names.

Nothing here uses pyllava. Skips the module that imports it where torch or transformers is missing, unless
PYLLAVA_REQUIRE_REFERENCE=1: then that is an error.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import tiny
from PIL import Image
from test_anyres import views_of


def _need(name: str) -> Any:
    if os.environ.get("PYLLAVA_REQUIRE_REFERENCE") == "1":
        return importlib.import_module(name)
    return pytest.importorskip(name)


torch = _need("torch")
transformers = _need("transformers")
torch.set_num_threads(1)

Array: TypeAlias = npt.NDArray[np.float32]
Arrays: TypeAlias = dict[str, Array]
Prompt: TypeAlias = Sequence["list[int] | Array"]
"""Token ids and image rows [n, n_embd] in turn."""
Pinpoints: TypeAlias = tuple[tuple[int, int], ...]


# Weights


@dataclass(frozen=True)
class Weights:
    """Float32 arrays under Hugging Face's names, as tiny.py has them."""

    language: Arrays
    projector: Arrays
    vision: Arrays

    @classmethod
    def of(cls, spec: tiny.TinySpec) -> Weights:
        """Exactly the checkpoint's."""
        return cls(tiny.language_tensors(spec), tiny.projector_tensors(spec), tiny.vision_tensors(spec))

    def with_f16_patches(self) -> Weights:
        """The patch convolution as every projector file holds it."""
        name = "vision_model.embeddings.patch_embedding.weight"
        return replace(self, vision=self.vision | {name: tiny.rounded(self.vision[name], "f16")})


LANGUAGE_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
VISION_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "ffn_down": "mlp.fc1",  # the legacy names: down is the expanding layer
    "ffn_up": "mlp.fc2",
}


def paired(x: Array, n_head: int) -> Array:
    """Columns of q or k from halves (Hugging Face: i and i + d/2 turn together) to pairs (GGUF: 2i and 2i + 1)."""
    n, width = x.shape
    return np.ascontiguousarray(x.reshape(n, n_head, 2, -1).swapaxes(2, 3).reshape(n, width))


def halved(x: Array, n_head: int) -> Array:
    """The inverse of `paired`."""
    n, width = x.shape
    return np.ascontiguousarray(x.reshape(n, n_head, -1, 2).swapaxes(2, 3).reshape(n, width))


def from_gguf(spec: tiny.TinySpec, language: Arrays, mmproj: Arrays) -> Weights:
    """The weights of a pair of GGUF files (dequantised, under their names) under Hugging Face's."""
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    out = {f"{names[k.split('.')[0]]}.weight": v for k, v in language.items() if k.split(".")[0] in names}
    for i in range(spec.n_layer):
        for ours, theirs in LANGUAGE_NAMES.items():
            w = language[f"blk.{i}.{ours}.weight"]
            heads = {"attn_q": spec.n_head, "attn_k": spec.n_head_kv}.get(ours)
            w = w if heads is None else halved(w.T, heads).T
            out[f"model.layers.{i}.{theirs}.weight"] = w
    projector = {f"model.mm_projector.{k[3:]}": v for k, v in mmproj.items() if k.startswith("mm.")}
    return Weights(out, projector, _vision_from_gguf(spec, mmproj))


def _vision_from_gguf(spec: tiny.TinySpec, mmproj: Arrays) -> Arrays:
    out = {
        "embeddings.class_embedding": mmproj["v.class_embd"],
        "embeddings.patch_embedding.weight": mmproj["v.patch_embd.weight"],
        "embeddings.position_embedding.weight": mmproj["v.position_embd.weight"],
        "pre_layrnorm.weight": mmproj["v.pre_ln.weight"],
        "pre_layrnorm.bias": mmproj["v.pre_ln.bias"],
        "post_layernorm.weight": np.ones(spec.v_embd, np.float32),
        "post_layernorm.bias": np.zeros(spec.v_embd, np.float32),
    }
    for i in range(spec.v_layer):
        for ours, theirs in VISION_NAMES.items():
            for part in ("weight", "bias"):
                out[f"encoder.layers.{i}.{theirs}.{part}"] = mmproj[f"v.blk.{i}.{ours}.{part}"]
    return {"vision_model." + name: array for name, array in out.items()}


def _load(module: Any, arrays: Arrays, *, absent: Sequence[str] = ()) -> Any:
    """The arrays into a module: every one must find its place, and nothing but `absent` may stay as it was."""
    state = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in arrays.items()}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected, f"the reference has no place for {unexpected}"
    assert set(missing) <= set(absent), f"the reference still needs {set(missing) - set(absent)}"
    return module.to(torch.float32).eval()


# Preprocessing: LLaVA's expand2square and process_images (llava/mm_utils.py), CLIP's rescaling and normalising


MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def resized(picture: npt.NDArray[np.uint8], image_size: int) -> npt.NDArray[np.uint8]:
    """u8 [S, S, 3]: centred on a square of the truncated mean colour, at full resolution, then bicubic."""
    image = Image.fromarray(picture).convert("RGB")
    width, height = image.size
    square = Image.new("RGB", (max(width, height),) * 2, tuple(int(mean * 255) for mean in MEAN))
    square.paste(image, ((square.width - width) // 2, (square.height - height) // 2))
    return np.asarray(square.resize((image_size, image_size), Image.Resampling.BICUBIC))


def pixels_of(picture: npt.NDArray[np.uint8], image_size: int) -> Array:
    """float32 [3, S, S], normalised."""
    x = resized(picture, image_size).astype(np.float64) / 255
    x = (x - np.array(MEAN)) / np.array(STD)
    return np.ascontiguousarray(x.transpose(2, 0, 1).astype(np.float32))


# LLaVA-1.6


def next_pixels(picture: npt.NDArray[np.uint8], image_size: int, pinpoints: Pinpoints) -> Array:
    """float32 [1 + tiles, 3, S, S], normalised: the original's process_anyres_image; `pinpoints` (width, height)."""
    views = np.stack(views_of(Image.fromarray(picture), image_size, pinpoints)).astype(np.float64) / 255
    views = (views - np.array(MEAN)) / np.array(STD)
    return np.ascontiguousarray(views.transpose(0, 3, 1, 2).astype(np.float32))


def packed(
    spec: tiny.TinySpec, rows: Array, size: tuple[int, int], pinpoints: Pinpoints, newline: Array
) -> Array:
    """float32 [n_tokens, n_embd]: the views' rows [1 + tiles, n_patch, n_embd] of a picture of `size` (width, height), as
    transformers' LlavaNextModel puts them together. It reads a pinpoint as height, width, the original as width, height,
    which decides between two that fit as well: the original is right.
    """
    modeling = importlib.import_module("transformers.models.llava_next.modeling_llava_next")
    settings = types.SimpleNamespace(
        vision_config=types.SimpleNamespace(image_size=spec.image_size, patch_size=spec.patch_size),
        image_grid_pinpoints=[[height, width] for width, height in pinpoints],
    )
    (found,), _ = modeling.LlavaNextModel.pack_image_features(
        types.SimpleNamespace(config=settings),
        [torch.from_numpy(rows)],
        torch.tensor([size[::-1]]),
        "default",
        torch.from_numpy(newline),
    )
    return np.ascontiguousarray(found.numpy())


# The networks


def language_config(spec: tiny.TinySpec, **more: Any) -> Any:
    kinds = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "granite": transformers.GraniteConfig,
    }
    return kinds[spec.family](**tiny.language_config(spec), **more)


class Reference:
    """CLIP's vision tower, the projector and LLaMA, Qwen2 or Granite, with the weights of a checkpoint."""

    def __init__(self, spec: tiny.TinySpec, weights: Weights | None = None) -> None:
        self.spec = spec
        weights = weights or Weights.of(spec)
        vision = transformers.CLIPVisionConfig(**tiny.vision_config(spec), attn_implementation="eager")
        self.tower = _load_vision(transformers.CLIPVisionModel(vision), weights.vision)
        language = language_config(spec, attn_implementation="eager")
        absent = ("lm_head.weight",) if spec.tied else ()
        model = transformers.AutoModelForCausalLM.from_config(language)
        self.llama = _load(model, weights.language, absent=absent)
        linear = torch.nn.Linear
        layers = [linear(spec.v_embd, spec.n_embd), torch.nn.GELU(), linear(spec.n_embd, spec.n_embd)]
        projector = {k.removeprefix("model.mm_projector."): v for k, v in weights.projector.items()}
        self.projector = _load(torch.nn.Sequential(*layers), projector)

    def encode(self, pixels: Array) -> Arrays:
        """Every intermediate of the images float32 [n, 3, S, S], rows of all of them on end; "mm.2" the embeddings."""
        spec, inner = self.spec, getattr(self.tower, "vision_model", self.tower)
        n_run = spec.v_layer + 1 + spec.select_layer
        with capture(inner, _tower_places(n_run)) as found, torch.no_grad():
            out = self.tower(torch.from_numpy(pixels), output_hidden_states=True)
            found["v.patch_embd"] = found["v.patch_embd"].flatten(2).transpose(1, 2)
            found["v.features"] = out.hidden_states[spec.select_layer][:, 1:]
            x = found["v.features"]
            for i, layer in enumerate(self.projector):
                x = found[f"mm.{i}"] = layer(x)
        return {name: _rows(x) for name, x in found.items()}

    def embeddings(self, pixels: Array) -> Array:
        """float32 [n, n_patch, n_embd]"""
        return self.encode(pixels)["mm.2"].reshape(len(pixels), -1, self.spec.n_embd)

    def next_embeddings(self, picture: npt.NDArray[np.uint8], pinpoints: Pinpoints, newline: Array) -> Array:
        """float32 [n_tokens, n_embd]: what LLaVA-1.6 makes of a picture."""
        rows = self.embeddings(next_pixels(picture, self.spec.image_size, pinpoints))
        return packed(self.spec, rows, picture.shape[1::-1], pinpoints, newline)

    def _embed(self, prompt: Prompt) -> Any:
        table = self.llama.get_input_embeddings()
        parts = [torch.from_numpy(p) if isinstance(p, np.ndarray) else table(torch.tensor(p)) for p in prompt]
        return torch.cat(parts)[None]

    def run(self, prompt: Prompt) -> Arrays:
        """Every intermediate of a whole sequence; "logits" float32 [n, n_vocab]. q and k in GGUF's order."""
        spec = self.spec
        modeling = importlib.import_module(f"transformers.models.{spec.family}.modeling_{spec.family}")
        rotate = modeling.apply_rotary_pos_emb
        with capture(self.llama, _decoder_places(spec.n_layer)) as found, torch.no_grad():
            found["logits"] = self.llama(inputs_embeds=self._embed(prompt), use_cache=False).logits
            cos, sin = found.pop("rope")
            for i in range(spec.n_layer):
                q, k = (found[f"blk.{i}.attn_{x}"].unflatten(-1, (-1, spec.head_dim)) for x in "qk")
                q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
                found[f"blk.{i}.attn_q_rope"] = q.transpose(1, 2).flatten(2)
                found[f"blk.{i}.attn_k_rope"] = k.transpose(1, 2).flatten(2)
        out = {name: _rows(x) for name, x in found.items()}
        for name in out:
            kind = name.split(".")[-1].removesuffix("_rope")
            if kind in ("attn_q", "attn_k") and spec.family in ("llama", "granite"):
                out[name] = paired(out[name], spec.n_head if kind == "attn_q" else spec.n_head_kv)
        return out

    def logits(self, prompt: Prompt) -> Array:
        """float32 [n, n_vocab]"""
        with torch.no_grad():
            return _rows(self.llama(inputs_embeds=self._embed(prompt), use_cache=False).logits)

    def greedy(self, prompt: Prompt, n: int) -> list[int]:
        """The `n` likeliest next tokens, one after the other, whatever they are; no cache."""
        ids: list[int] = []
        for _ in range(n):
            ids.append(int(self.logits([*prompt, ids] if ids else prompt)[-1].argmax()))
        return ids


def _load_vision(tower: Any, arrays: Arrays) -> Any:
    if not hasattr(tower, "vision_model"):  # transformers 5 dropped a level
        arrays = {name.removeprefix("vision_model."): array for name, array in arrays.items()}
    return _load(tower, arrays)


def logit_scale(text_config: Any) -> float:
    """What GraniteForCausalLM divides its logits by. The LLaVA classes of transformers 5 compute the output themselves and
    leave that out.
    """
    return float(getattr(text_config, "logits_scaling", 1.0))


def whole_model_logits(
    spec: tiny.TinySpec, w: Weights, pixels: Array, ids: list[int], image_token: int
) -> Array:
    """Logits of `transformers`' own LLaVA, which does the merging itself; one `image_token` in `ids` per image row."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**tiny.vision_config(spec)),
        text_config=language_config(spec),
        image_token_index=image_token,
        vision_feature_layer=spec.select_layer,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    model = transformers.LlavaForConditionalGeneration(config)
    prefix = "vision_model." if any("vision_tower.vision_model" in k for k in model.state_dict()) else ""
    arrays = {k.replace("model.", "model.language_model.", 1): v for k, v in w.language.items()}
    arrays |= {k.replace("vision_model.", f"model.vision_tower.{prefix}", 1): v for k, v in w.vision.items()}
    for name, array in w.projector.items():
        i, part = name.split(".")[-2:]
        arrays[f"model.multi_modal_projector.linear_{1 if i == '0' else 2}.{part}"] = array
    _load(model, arrays, absent=("lm_head.weight",) if spec.tied else ())
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), pixel_values=torch.from_numpy(pixels)).logits
    return _rows(logits) / logit_scale(config.text_config)


# Looking inside


def _rows(x: Any) -> Array:
    return np.ascontiguousarray(x.detach().reshape(-1, x.shape[-1]).numpy())


Places: TypeAlias = dict[str, tuple[str, str]]
"""pyllava's name: (module, "in" or "out")."""


def _tower_places(n_run: int) -> Places:
    places = {
        "v.patch_embd": ("embeddings.patch_embedding", "out"),
        "v.embd": ("embeddings", "out"),
        "v.pre_ln": ("pre_layrnorm", "out"),
    }
    inside = {
        "ln1": ("layer_norm1", "out"),
        "attn_q": ("self_attn.q_proj", "out"),
        "attn_k": ("self_attn.k_proj", "out"),
        "attn_v": ("self_attn.v_proj", "out"),
        "attn": ("self_attn.out_proj", "in"),
        "attn_out": ("self_attn.out_proj", "out"),
        "ln2": ("layer_norm2", "out"),
        "ffn_out": ("mlp.fc2", "out"),
        "out": ("", "out"),
    }
    for i in range(n_run):
        for name, (module, side) in inside.items():
            places[f"v.blk.{i}.{name}"] = (f"encoder.layers.{i}.{module}".rstrip("."), side)
    return places


def _decoder_places(n_layer: int) -> Places:
    places = {
        "rope": ("model.rotary_emb", "out"),
        "output_norm": ("model.norm", "out"),
    }
    inside = {
        "attn_norm": ("input_layernorm", "out"),
        "attn_q": ("self_attn.q_proj", "out"),
        "attn_k": ("self_attn.k_proj", "out"),
        "attn_v": ("self_attn.v_proj", "out"),
        "attn": ("self_attn.o_proj", "in"),
        "attn_out": ("self_attn.o_proj", "out"),
        "ffn_inp": ("post_attention_layernorm", "in"),
        "ffn_norm": ("post_attention_layernorm", "out"),
        "ffn_out": ("mlp.down_proj", "out"),
        "out": ("", "out"),
    }
    for i in range(n_layer):
        for name, (module, side) in inside.items():
            places[f"blk.{i}.{name}"] = (f"model.layers.{i}.{module}".rstrip("."), side)
    return places


@contextlib.contextmanager
def capture(root: Any, places: Places) -> Iterator[dict[str, Any]]:
    """What goes into or comes out of modules while the block runs."""
    found: dict[str, Any] = {}

    def keep(name: str, side: str) -> Any:
        def hook(_module: Any, args: Any, out: Any) -> None:
            value = args[0] if side == "in" else out
            single = isinstance(value, tuple) and name != "rope"
            found[name] = value[0] if single else value

        return hook

    hooks = [root.get_submodule(p).register_forward_hook(keep(n, side)) for n, (p, side) in places.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
