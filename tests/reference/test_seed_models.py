"""Each model of the published series, at full configuration and reduced size: checkpoint -> converter -> answer.

`transformers` judges the numbers, `sentencepiece` the token ids, and the texts of the original conversations, written out
here, the templates.
"""

from __future__ import annotations

import functools
import gc
import re
import shutil
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from PIL import Image
from test_anyres import COUNTS
from test_devices import DEVICES, on_a_device
from tiny import Array, TinySpec
from tiny_gguf import Files, Gguf, gguf

import pyllava
from pyllava import cli
from pyllava.gguf import GgufFile
from pyllava.templates import ImageMark, Message

from . import gates
from .published import Picture, Published
from .seed_models import (
    CONTROL,
    MODELS,
    NORMAL,
    TOWER,
    YI_MARKS,
    SeedModel,
    picture,
    sentencepiece_model,
    write_hugging_face,
    write_original,
    write_tokenizer_json,
)

pytestmark = pytest.mark.reference
sentencepiece = pytest.importorskip("sentencepiece")

QUESTION = "Provide a full description."
PICTURES = {"wide": (190, 62), "tall": (45, 131), "small": (30, 21), "large": (250, 231)}
# The whole, and rows of patches times columns with the newline; the small one fits as well in two tiles side by side.
TOKENS = {"wide": 16 + 4 * 13, "tall": 16 + 12 * 5, "small": 16 + 2 * 5, "large": 16 + 8 * 9}
N_GREEDY = 40


# The models


@dataclass(eq=False)
class Lab:
    """A model in both layouts, what was made of it, and the judge."""

    model: SeedModel
    folder: Path
    opened: dict[Files, pyllava.Llava] = field(default_factory=dict)

    @functools.cached_property
    def original(self) -> Path:
        return write_original(self.folder / "original", self.model)

    @functools.cached_property
    def hugging_face(self) -> Path:
        return write_hugging_face(self.folder / "hugging_face", self.model)

    @functools.cached_property
    def reference(self) -> Published:
        return Published(self.hugging_face, self.model)

    @functools.cached_property
    def by_steps(self) -> Files:
        """The original layout by the scripts, one after the other."""
        return (steps_1_6 if self.model.anyres else steps_1_5)(self.original)

    @functools.cached_property
    def at_once(self) -> Files:
        return self._at_once(self.original)

    @functools.cached_property
    def from_hugging_face(self) -> Files:
        return self._at_once(self.hugging_face)

    def _at_once(self, source: Path) -> Files:
        """f16, which holds these weights: numbers as exact as with f32, files half as large."""
        out = self.folder / f"{source.parent.name}-converted"
        tiny_gguf.run_main("convert_llava", source, "-o", out, "--outtype", "f16")
        (mmproj,) = out.glob("*mmproj*.gguf")
        (model,) = set(out.glob("*.gguf")) - {mmproj}
        return Files(model, mmproj)

    def llava(self, files: Files) -> pyllava.Llava:
        if files not in self.opened:
            self.opened[files] = pyllava.Llava(files.model, files.mmproj, n_threads=1)
        return self.opened[files]

    def close(self) -> None:
        for llava in self.opened.values():
            llava.close()
        shutil.rmtree(self.folder)  # hundreds of megabytes


def steps_1_5(source: Path) -> Files:
    """The tower is another model's, or (BakLLaVA) the checkpoint's own in the place of that one's weights."""
    out, clip = source.parent / "converted", source.parent / TOWER
    tiny_gguf.run_main("llava_surgery", "-m", source)
    if (source / "llava.clip").exists():
        clip = source.parent / "own-clip"
        clip.mkdir()
        shutil.copy(source.parent / TOWER / "config.json", clip)
        shutil.copy(source / "llava.clip", clip / "model.safetensors")
    projector = source / "llava.projector"
    flags = ["--use-f32", "-o", out]
    tiny_gguf.run_main("convert_image_encoder_to_gguf", "-m", clip, "--llava-projector", projector, *flags)
    return _language_model(source, out)


def steps_1_6(source: Path) -> Files:
    vit, out = source.parent / "vit", source.parent / "converted"
    tiny_gguf.run_main("llava_surgery_v2", "-C", "-m", source)
    vit.mkdir()
    shutil.copy(source / "llava.clip", vit / "pytorch_model.bin")
    shutil.copy(source / "llava.projector", vit)
    tiny_gguf.run_main("llava_surgery_v2", "--write-vit-config", source, "-o", vit)
    flags = ["--clip-model-is-vision", "--use-f32", "--llava-projector", vit / "llava.projector", "-o", out]
    tiny_gguf.run_main("convert_image_encoder_to_gguf", "-m", vit, *flags)
    return _language_model(source, out)


def _language_model(source: Path, out: Path) -> Files:
    model = out / f"{source.name}.gguf"
    tiny_gguf.run_main(
        "convert_legacy_llama", source, "--skip-unknown", "--outtype", "f32", "--outfile", model
    )
    (mmproj,) = out.glob("mmproj*.gguf")
    return Files(model, mmproj)


@pytest.fixture(scope="module", params=list(MODELS))
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(MODELS[request.param], tmp_path_factory.mktemp("seed"))
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def yi(lab: Lab) -> Lab:
    return lab


yi_only = pytest.mark.parametrize("lab", ["llava-v1.6-34b"], indirect=True)


# Token ids

CHAT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
Stretch = Sequence["str | int"]
CONVERSATIONS: dict[str, Callable[[str], tuple[Stretch, Stretch]]] = {
    "vicuna_v1": lambda q: ([CHAT + "USER: "], [f"\n{q} ASSISTANT:"]),
    "mistral_instruct": lambda q: (["[INST] "], [f"\n{q} [/INST]"]),
    "chatml_direct": lambda q: (
        [6, "system\nAnswer the questions.", 7, 6, "user\n"],
        [f"\n{q}", 7, 6, "assistant\n"],
    ),
}
"""What stands before and after the image; numbers are tokens, texts are read as they are."""

SEED_PROMPTS: dict[str, tuple[str, tuple[Stretch, Stretch]]] = {
    "vicuna_v1": ("Provide a full description.", CONVERSATIONS["vicuna_v1"](QUESTION)),
    "mistral_instruct": (
        r"<image>\nUSER:\nProvide a full description.\nASSISTANT:\n",
        ([], ["\nUSER:\nProvide a full description.\nASSISTANT:\n"]),
    ),
    "chatml_direct": (
        r"<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\n"
        r"Provide a full description.<|im_end|><|im_start|>assistant\n",
        CONVERSATIONS["chatml_direct"](QUESTION),
    ),
}
"""What is typed after -p, and what the model must get."""


@functools.cache
def processor(yi: bool) -> Any:
    """Yi's chat marks are letters to it."""
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(yi, CONTROL))


def expected_ids(model: SeedModel, parts: tuple[Stretch, Stretch]) -> list[int | ImageMark]:
    def ids(stretch: Stretch) -> list[int]:
        out: list[int] = []
        for item in stretch:
            out += [item] if isinstance(item, int) else processor(model.yi).encode(item)
        return out

    bos = [] if model.yi else [1]
    return [*bos, *ids(parts[0]), ImageMark(0), *ids(parts[1])]


def a_picture(name: str) -> Picture:
    return picture(*PICTURES[name])


# Files


@pytest.fixture(scope="module", autouse=True)
def less_waiting() -> Iterator[None]:
    """The gguf package looks at each of 64000 tokens through a slice of a memory map: a plain array is three times faster.
    And a garbage collection, of which each conversion has two, need not visit all of torch."""
    numpy = types.SimpleNamespace(
        **{**vars(np), "memmap": lambda path, mode="r": np.fromfile(path, np.uint8)}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.gguf_reader, "np", numpy)
        gc.freeze()
        yield
        gc.unfreeze()


FLOAT_TYPES: dict[str, Any] = {"f32": np.float32, "f16": np.float16}


def keys_of(path: Path) -> dict[str, Any]:
    return GgufFile(path).metadata


def tensors_of(path: Path) -> dict[str, Array]:
    """The float tensors of a file, read at the places that its table gives."""
    data = np.fromfile(path, np.uint8)
    return {
        t.name: data[t.offset : t.offset + t.n_bytes]
        .view(FLOAT_TYPES[t.type])
        .reshape(t.shape)
        .astype(np.float32)
        for t in GgufFile(path).tensors
    }


def check_same_tensors(left: Path, right: Path) -> None:
    expected, found = tensors_of(left), tensors_of(right)
    assert set(found) == set(expected)
    for name, x in expected.items():
        rows = name in ("token_embd.weight", "output.weight")  # the Hugging Face layout has more of them
        assert np.array_equal(found[name][: len(x)] if rows else found[name], x), name


def test_every_way_to_convert_gives_the_same_model(lab: Lab) -> None:
    """The same numbers, under the keys of the real model."""
    spec = lab.model.spec
    files = [lab.by_steps, lab.at_once, lab.from_hugging_face]
    for other in files[1:]:
        check_same_tensors(files[0].model, other.model)
        check_same_tensors(files[0].mmproj, other.mmproj)
    facts = {
        "llama.context_length": spec.n_ctx,
        "llama.embedding_length": spec.n_embd,
        "llama.attention.head_count": spec.n_head,
        "llama.attention.head_count_kv": spec.n_head_kv,
        "llama.rope.freq_base": spec.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(spec.eps),
        "tokenizer.ggml.add_bos_token": not lab.model.yi,
    }
    for path, n_vocab in zip(files, (spec.n_vocab, spec.n_vocab, spec.n_vocab + 64), strict=True):
        keys = keys_of(path.model)
        assert {name: keys.get(name) for name in facts} == facts
        assert len(keys["tokenizer.ggml.tokens"]) == n_vocab
        assert lab.model.stop in (
            keys["tokenizer.ggml.eos_token_id"],
            keys.get("tokenizer.ggml.eot_token_id"),
        )
    pairs = [side for pair in lab.model.pinpoints for side in pair]
    for path in files:
        keys = keys_of(path.mmproj)
        assert list(keys.get("clip.vision.image_grid_pinpoints", [])) == pairs
        assert keys["clip.vision.feature_layer"] == [23]
        assert keys["clip.vision.attention.head_count"] == 16
        assert keys.get("clip.vision.mm_patch_merge_type") == ("spatial_unpad" if lab.model.anyres else None)


# Numbers


@pytest.mark.parametrize("name", list(PICTURES))
def test_numbers(lab: Lab, name: str) -> None:
    """The image's rows, and the logits of every position."""
    source, llava = a_picture(name), lab.llava(lab.by_steps)
    expected = lab.reference.embeddings(source)
    n_image = TOKENS[name] if lab.model.anyres else 16
    assert len(expected) == n_image
    found = llava.encode_image(source).array
    gates.check("embeddings", gates.EMBEDDINGS, expected, found)
    prompt = llava.prompt_tokens(source, QUESTION)
    logits = lab.reference.logits(prompt, [source], [n_image])[:, : lab.model.spec.n_vocab]
    gates.check("logits", gates.LOGITS, logits, llava.logits(source, QUESTION))


@pytest.mark.parametrize("name", ["wide", "large"])
def test_greedy(lab: Lab, name: str) -> None:
    """As many tokens as transformers generates, by the file of each layout."""
    source, n_image = a_picture(name), TOKENS[name] if lab.model.anyres else 16
    prompt = expected_ids(lab.model, CONVERSATIONS[lab.model.template](QUESTION))
    ids = lab.reference.greedy(prompt, source, n_image, N_GREEDY)
    for files in (lab.by_steps, lab.from_hugging_face):
        answer = lab.llava(files).ask(source, QUESTION, max_tokens=N_GREEDY)
        assert list(answer.tokens) == ids
        assert answer.usage.image_tokens == n_image


def test_hugging_face_layout(lab: Lab) -> None:
    """Logits of all its rows, those of the added tokens and of the padding too."""
    source, llava = a_picture("tall"), lab.llava(lab.from_hugging_face)
    prompt = llava.prompt_tokens(source, QUESTION)
    expected = lab.reference.logits(prompt, [source], [len(llava.encode_image(source))])
    assert expected.shape[1] == lab.model.spec.n_vocab + 64
    gates.check("logits", gates.LOGITS, expected, llava.logits(source, QUESTION))


@on_a_device
def test_on_a_device(lab: Lab) -> None:
    """All of it there, in the mode that is the default, with the gates of 16-bit computation."""
    source, files = a_picture("large"), lab.from_hugging_face
    expected = lab.reference.embeddings(source)
    with pyllava.Llava(files.model, files.mmproj, device=DEVICES[0], precision="fast") as llava:
        assert llava.devices.n_gpu_layers == lab.model.spec.n_layer + 1
        gates.check("embeddings", gates.EMBEDDINGS_F16, expected, llava.encode_image(source).array)
        prompt = llava.prompt_tokens(source, QUESTION)
        logits = lab.reference.logits(prompt, [source], [len(expected)])
        gates.check("logits", gates.LOGITS_F16, logits, llava.logits(source, QUESTION))


def test_two_pictures(lab: Lab) -> None:
    """In one prompt; of different numbers of views where the model has them."""
    sources, llava = [a_picture("wide"), a_picture("large")], lab.llava(lab.from_hugging_face)
    prompt = llava.prompt_tokens(sources, QUESTION)
    assert [item for item in prompt if isinstance(item, ImageMark)] == [ImageMark(0), ImageMark(1)]
    expected = lab.reference.logits(prompt, sources, [len(llava.encode_image(source)) for source in sources])
    gates.check("logits", gates.LOGITS, expected, llava.logits(sources, QUESTION))


# Prompts


def test_template(lab: Lab) -> None:
    """Told by what the converter wrote, whichever way."""
    expected = expected_ids(lab.model, CONVERSATIONS[lab.model.template](QUESTION))
    for files in (lab.by_steps, lab.at_once, lab.from_hugging_face):
        llava = lab.llava(files)
        assert llava.template.name == lab.model.template
        assert llava.prompt_tokens(a_picture("small"), QUESTION) == expected
    assert keys_of(lab.at_once.model)["pyllava.template"] == lab.model.template
    assert keys_of(lab.from_hugging_face.model)["pyllava.template"] == lab.model.template


def test_added_tokens_of_the_hugging_face_layout_are_letters(lab: Lab) -> None:
    """In a user's words; with no image given, its mark too."""
    llava, words = lab.llava(lab.from_hugging_face), "What do <pad>, <unk> and <dummy00001> mean?"
    expected = expected_ids(lab.model, CONVERSATIONS[lab.model.template](words))
    assert llava.prompt_tokens(a_picture("small"), words) == expected
    assert lab.model.image_token not in llava.prompt_tokens(None, "What does <image> mean?")


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    assert cli.main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def shown_ids(errors: str) -> list[int | ImageMark]:
    """The tokens that --verbose-prompt shows."""
    found = re.findall(r"^ *(\d+|image) -> (.*)$", errors, re.MULTILINE)
    return [ImageMark(int(text)) if name == "image" else int(name) for name, text in found]


def test_seed_prompt(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in the instructions that came with the models: what the model gets, what is told, what it answers."""
    source, (prompt, parts) = a_picture("tall"), SEED_PROMPTS[lab.model.template]
    Image.fromarray(source).save(tmp_path / "some-random-image.png")
    image, n = tmp_path / "some-random-image.png", 12
    flags = f"-c 4096 -n {n} -t 1 --verbose-prompt".split()
    if lab.model.yi:
        flags.append("-e")
    folder = lab.by_steps.model.parent
    out, errors = run_cli(capsys, "-m", folder, "--image", image, *flags, "-p", prompt)
    expected = expected_ids(lab.model, parts)
    assert shown_ids(errors) == expected
    n_image = TOKENS["tall"] if lab.model.anyres else 16
    assert f"encode_image_with_clip: image embedding created: {n_image} tokens\n" in errors
    ids = lab.reference.greedy(expected, source, n_image, n)
    assert out == lab.llava(lab.by_steps).detokenize(ids).strip() + "\n"


# The end of an answer


def ending_with(path: Path, target: Path, stop: int, like: int) -> Path:
    """A copy of a model that says `stop` where it would say `like`."""
    shutil.copy(path, target)
    head = next(t for t in GgufFile(path).tensors if t.name == "output.weight")
    rows = np.memmap(target, FLOAT_TYPES[head.type], "r+", offset=head.offset, shape=head.shape)
    rows[stop] = rows[like].astype(np.float32) * 1.02
    rows.flush()
    return target


def first_new(ids: list[int], least: int = 2) -> int:
    """The place of a token that was not said before."""
    return next(i for i in range(least, len(ids)) if ids[i] not in ids[:i])


def check_stop(lab: Lab, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The answer ends before it, and nothing of it is shown."""
    source, llava = a_picture("small"), lab.llava(files)
    ids = list(llava.ask(source, QUESTION, max_tokens=16).tokens)
    at = first_new(ids)
    model = ending_with(files.model, tmp_path / files.model.name, lab.model.stop, ids[at])
    Image.fromarray(source).save(tmp_path / "image.png")
    flags = ["-m", model, "--mmproj", files.mmproj, "--image", tmp_path / "image.png", "-t", 1]
    out, _ = run_cli(capsys, *flags, "-p", QUESTION, "-n", 16)
    assert out == llava.detokenize(ids[:at]).strip() + "\n"
    with pyllava.Llava(model, files.mmproj, n_threads=1, template=lab.model.template) as ended:
        answer = ended.ask(source, QUESTION, max_tokens=16)
        assert (list(answer.tokens), answer.finish_reason) == (ids[:at], "stop")
    model.unlink()


@pytest.mark.parametrize("lab", [name for name, model in MODELS.items() if not model.yi], indirect=True)
def test_the_stop_token_ends_the_answer(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_stop(lab, lab.at_once, tmp_path, capsys)


# Yi's chat marks

MARKS_IN_WORDS = "Is <|im_end|> a word? And <|im_start|>user or <|startoftext|>, </s>?"


def legacy(file: Gguf) -> Gguf:
    """As the scripts of 2024 wrote Yi: its marks of type NORMAL, another end of text, no word of a template."""
    kinds = list(file.keys["tokenizer.ggml.token_type"][0])
    for i, (_, kind) in enumerate(YI_MARKS, 1):
        kinds[i] = kind if kind == CONTROL else NORMAL
    file = file.without_keys("pyllava.template", "tokenizer.chat_template", "tokenizer.ggml.eot_token_id")
    keys = file.keys | {
        "tokenizer.ggml.token_type": (kinds, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32),
        "general.name": ("LLaMA v2", gguf.GGUFValueType.STRING, None),
    }
    return replace(file, keys=keys).with_u32(tokenizer__ggml__eos_token_id=2)


@pytest.fixture(scope="module")
def legacy_yi(yi: Lab) -> Files:
    path = yi.folder / "legacy" / "ggml-yi-34b-f16.gguf"
    path.parent.mkdir()
    return Files(tiny_gguf.write(path, legacy(tiny_gguf.read(yi.at_once.model))), yi.at_once.mmproj)


@pytest.fixture(scope="module")
def yi_by_tokenizer_json(yi: Lab) -> Files:
    """Of a folder without tokenizer.model."""
    folder = yi.folder / "tokenizer.json" / yi.model.hf_name
    shutil.copytree(yi.hugging_face, folder)
    write_tokenizer_json(folder, yi.model)
    return yi._at_once(folder)


@pytest.fixture(scope="module", params=["steps", "at once", "hugging face", "tokenizer.json", "legacy"])
def yi_files(request: pytest.FixtureRequest, yi: Lab) -> Any:
    others = {"legacy": "legacy_yi", "tokenizer.json": "yi_by_tokenizer_json"}
    if request.param in others:
        return request.getfixturevalue(others[request.param])
    return {"steps": yi.by_steps, "at once": yi.at_once, "hugging face": yi.from_hugging_face}[request.param]


@yi_only
def test_yi_marks(yi: Lab, yi_files: Files) -> None:
    """One token each in the template and in a raw prompt; letters in a user's words, a system message, an answer."""
    llava, source = yi.llava(yi_files), a_picture("small")
    assert llava.template.name == "chatml_direct"
    expected = expected_ids(yi.model, CONVERSATIONS["chatml_direct"](MARKS_IN_WORDS))
    assert llava.prompt_tokens(source, MARKS_IN_WORDS) == expected
    raw = SEED_PROMPTS["chatml_direct"][0].replace("\\n", "\n")
    seed = expected_ids(yi.model, CONVERSATIONS["chatml_direct"](QUESTION))
    assert llava.prompt_tokens(source, raw, raw=True) == seed
    before, after = CONVERSATIONS["chatml_direct"]("Why?")
    before = [6, f"system\n{MARKS_IN_WORDS}", *before[2:]]
    assert llava.prompt_tokens(source, "Why?", system=MARKS_IN_WORDS) == expected_ids(
        yi.model, (before, after)
    )
    assert llava.tokenize(MARKS_IN_WORDS, parse_special=False) == processor(True).encode(MARKS_IN_WORDS)
    assert llava.token_text(7) == "<|im_end|>"
    assert llava.detokenize([6, 7]) == ""


@yi_only
def test_yi_conversation(yi: Lab, yi_files: Files) -> None:
    """Earlier words and answers stay letters; between turns nothing stands."""
    llava, source = yi.llava(yi_files), a_picture("small")
    chat = llava.chat()
    chat.add("One?", f"Yes. {MARKS_IN_WORDS}", source)
    parts = chat._parts(Message("user", "Two?"))
    found = [
        item
        for stretch in llava._prompts.tokenized(parts)
        for item in ([stretch] if isinstance(stretch, ImageMark) else stretch)
    ]
    before, _ = CONVERSATIONS["chatml_direct"]("")
    after = ["\nOne?", 7, 6, f"assistant\nYes. {MARKS_IN_WORDS}", 7, 6, "user\nTwo?", 7, 6, "assistant\n"]
    assert found == expected_ids(yi.model, (before, after))


@yi_only
def test_yi_end(yi: Lab, yi_files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_stop(yi, yi_files, tmp_path, capsys)


# Old files say nothing of a template


@pytest.fixture(scope="module")
def any_model(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return tiny_gguf.convert(tmp_path_factory.mktemp("any"), TinySpec())


@pytest.mark.parametrize(
    ("general", "file", "template"),
    [
        ("LLaMA v2", "ggml-yi-34b-f16-q_3_k.gguf", "chatml_direct"),
        ("LLaMA v2", "llava-v1.6-34b.Q4_K_M.gguf", "chatml_direct"),
        ("LLaMA v2", "ggml-mistral-q_4_k.gguf", "mistral_instruct"),
        ("LLaMA v2", "llava-v1.6-mistral-7b.Q4_K_M.gguf", "mistral_instruct"),
        ("llava-v1.6-mistral-7b", "ggml-model-f16.gguf", "mistral_instruct"),
        ("1.6", "llava-1.6-34b-q4_k.gguf", "chatml_direct"),
        ("LLaMA v2", "vicuna-13b-q5_k.gguf", "vicuna_v1"),
        ("LLaMA v2", "ggml-model-q4_k.gguf", "vicuna_v1"),
        ("BakLLaVA-1", "ggml-model-f16.gguf", "vicuna_v1"),
    ],
)
def test_template_by_name(tmp_path: Path, any_model: Files, general: str, file: str, template: str) -> None:
    small = tiny_gguf.read(any_model.model).without_keys("pyllava.template", "tokenizer.chat_template")
    keys = small.keys | {"general.name": (general, gguf.GGUFValueType.STRING, None)}
    path = tiny_gguf.write(tmp_path / file, replace(small, keys=keys))
    with pyllava.Llava(path, any_model.mmproj, n_threads=1) as llava:
        assert llava.template.name == template
    with pyllava.Llava(path, any_model.mmproj, n_threads=1, template="llava_v0") as llava:
        assert llava.template.name == "llava_v0"


def test_template_by_flag(any_model: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(a_picture("small")).save(tmp_path / "image.png")
    files = ["-m", any_model.model, "--mmproj", any_model.mmproj, "--image", tmp_path / "image.png"]
    seen, flags = set(), ["-p", "Why?", "-n", 1, "-t", 1, "--verbose-prompt"]
    for name in CONVERSATIONS:
        _, errors = run_cli(capsys, *files, *flags, "--template", name)
        with pyllava.Llava(any_model.model, any_model.mmproj, n_threads=1, template=name) as llava:
            assert shown_ids(errors) == llava.prompt_tokens(a_picture("small"), "Why?")
        seen.add(str(shown_ids(errors)))
    assert len(seen) == len(CONVERSATIONS)


# The real size of pictures


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """336 pixels, patches of 14; six layers of the tower."""
    model = MODELS["llava-v1.6-mistral-7b"]
    spec = replace(model.spec, image_size=336, v_layer=6, seed=8)
    lab = Lab(replace(model, spec=spec), tmp_path_factory.mktemp("full"))
    yield lab
    lab.close()


@pytest.mark.parametrize("size", [(672, 672), (300, 1000), (640, 480), (224, 224)])
def test_full_size(full_size: Lab, size: tuple[int, int]) -> None:
    """The numbers of tokens of the real models, and what is in them; the last logits after nearly 3000 positions."""
    source, llava = picture(*size), full_size.llava(full_size.from_hugging_face)
    embedding = llava.encode_image(source)
    assert len(embedding) == COUNTS[size]
    gates.check("embeddings", gates.EMBEDDINGS, full_size.reference.embeddings(source), embedding.array)
    prompt = llava.prompt_tokens(source, QUESTION)
    ids = full_size.reference.greedy(prompt, source, len(embedding), 4)
    answer = llava.ask(source, QUESTION, max_tokens=4)
    assert list(answer.tokens) == ids
    assert answer.usage.image_tokens_each == (COUNTS[size],)
