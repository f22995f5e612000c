"""Code written for llama-cpp-python, with the import changed; and models that go through pickle."""

from __future__ import annotations

import base64
import copy
import functools
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from tiny import TinySpec

import pyllava
from pyllava import compat
from pyllava.compat import Llama, Llava15ChatHandler, NanoLlavaChatHandler

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "pyllava" / "models"
MODEL, MMPROJ = str(MODELS / "demo-q8_0.gguf"), str(MODELS / "demo-mmproj-q8_0.gguf")
SCENE, DUCK = str(ROOT / "examples" / "scene.png"), str(ROOT / "examples" / "duck.png")
DESCRIBE = "What is in the picture?"
DESCRIBED = 'There is a large orange square at the top left, a small purple square in the center, a small yellow star at the bottom left, a large yellow circle at the bottom right and the word "milk"'


@pytest.fixture(scope="module")
def llm() -> Iterator[Llama]:
    with Llama(MODEL, chat_handler=Llava15ChatHandler(MMPROJ), n_ctx=512, n_threads=1) as model:
        yield model


@pytest.fixture
def alone(tmp_path: Path) -> str:
    """The language model in a folder without a projector."""
    (tmp_path / "model.gguf").symlink_to(MODEL)
    return str(tmp_path / "model.gguf")


def asked(url: Any, text: str = DESCRIBE) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": parts}]


def text_of(result: Any) -> str:
    return str(result["choices"][0]["message"]["content"])


# --- chat ---


def test_the_documented_example() -> None:
    """Of llama-cpp-python's README, with a picture of this repository in a data URL, as it has it for local ones."""
    data_uri = "data:image/png;base64," + base64.b64encode(Path(SCENE).read_bytes()).decode("utf-8")
    chat_handler = Llava15ChatHandler(clip_model_path=MMPROJ)
    llm = Llama(
        model_path=MODEL,
        chat_handler=chat_handler,
        n_ctx=1024,
    )
    response = llm.create_chat_completion(
        messages=[
            {"role": "system", "content": "You are an assistant who perfectly describes images."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": DESCRIBE},
                    {"type": "image_url", "image_url": {"url": data_uri}},
                ],
            },
        ]
    )
    assert text_of(response).startswith(DESCRIBED)
    assert response["model"] == MODEL  # type: ignore[index]
    llm.close()


def test_defaults_are_those_of_llama_cpp_python(alone: str) -> None:
    """As its 0.3.36 has them."""
    chat, text = compat.ChatRequest(), compat.TextRequest()
    for request in (chat, text):
        assert (request.top_p, request.top_k, request.min_p, request.typical_p) == (0.95, 40, 0.05, 1.0)
        assert (request.presence_penalty, request.frequency_penalty, request.repeat_penalty) == (0, 0, 1)
        assert (request.mirostat_mode, request.mirostat_tau, request.mirostat_eta) == (0, 5.0, 0.1)
    assert (chat.temperature, chat.max_tokens) == (0.2, None)
    assert (text.temperature, text.max_tokens) == (0.8, 16)
    with Llama(alone) as llm:
        assert (llm.n_ctx(), llm.last_n_tokens_size, llm.chat_handler) == (512, 64, None)


def test_a_handler_may_fetch(llm: Llama) -> None:
    class Fetching(Llava15ChatHandler):
        def load_image(self, image_url: str) -> bytes:
            assert image_url == "https://example.com/scene.png"
            return Path(SCENE).read_bytes()

    with pytest.raises(pyllava.ImageError, match="a web address: fetch it first"):
        llm.create_chat_completion(asked("https://example.com/scene.png"))
    with Llama(MODEL, chat_handler=Fetching(MMPROJ), n_ctx=512, n_threads=1) as fetching:
        result = fetching.create_chat_completion(asked("https://example.com/scene.png"), temperature=0)
    assert text_of(result).startswith(DESCRIBED)


def test_streams(llm: Llama) -> None:
    chunks: Any = llm.create_chat_completion(asked(SCENE), temperature=0, stream=True)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text.startswith(DESCRIBED)
    pieces: Any = list(llm("How many", temperature=0, max_tokens=4, stream=True))
    whole: Any = llm.create_completion("How many", temperature=0, max_tokens=4)
    assert "".join(chunk["choices"][0]["text"] for chunk in pieces) == whole["choices"][0]["text"]
    assert {chunk["model"] for chunk in [*pieces, whole]} == {MODEL}


def test_the_types_of_openai(llm: Llama) -> None:
    types = pytest.importorskip("openai.types.chat")
    result = llm.create_chat_completion_openai_v1(asked(SCENE), temperature=0)
    assert isinstance(result, types.ChatCompletion)
    assert result.choices[0].message.content.startswith(DESCRIBED)
    chunks = list(llm.create_chat_completion_openai_v1(asked(SCENE), temperature=0, stream=True))
    assert isinstance(chunks[0], types.ChatCompletionChunk)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == result.choices[0].message.content


def test_seeds(llm: Llama) -> None:
    def drawn(**options: Any) -> str:
        bias = {llm.token_eos(): -1e9}
        result: Any = llm("How", temperature=3, logit_bias=bias, **options)
        return str(result["choices"][0]["text"])

    assert drawn() != drawn()
    llm.set_seed(3)
    assert drawn() == drawn() == drawn(seed=3) != drawn(seed=4)
    llm.set_seed(-1)
    assert drawn() != drawn()


def test_the_window_of_penalties(alone: str) -> None:
    with Llama(alone, n_threads=1, last_n_tokens_size=0) as none, Llama(alone, n_threads=1) as some:
        options: Any = {"temperature": 0, "max_tokens": 60, "repeat_penalty": 5.0}
        texts = [model("A", logit_bias={model.token_eos(): -1e9}, **options) for model in (none, some)]
        plain = none("A", logit_bias={none.token_eos(): -1e9}, temperature=0, max_tokens=60)
        one_call = none("A", logit_bias={none.token_eos(): -1e9}, repeat_last_n=64, **options)
    found = [text["choices"][0]["text"] for text in (*texts, plain, one_call)]  # type: ignore[index]
    assert found[0] == found[2] != found[1] == found[3]  # a call's own window goes before


PROGRAMS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "compat.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("program", PROGRAMS, ids=["chat", "fetching", "asyncio", "pool"])
def test_the_programs_of_the_page_run(tmp_path: Path, program: str) -> None:
    folder = tmp_path / "models" / "llava-v1.5-7b"
    folder.mkdir(parents=True)
    (folder / "ggml-model-f16.gguf").symlink_to(MODEL)
    (folder / "mmproj-model-f16.gguf").symlink_to(MMPROJ)
    (tmp_path / "cat.png").symlink_to(SCENE)
    (tmp_path / "dog.png").symlink_to(DUCK)
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert ("There is a large" in done.stdout) == ("print" in program)


# --- what else it has ---


def test_tokens(llm: Llama) -> None:
    """The ids and bytes that llama-cpp-python 0.3.36 gives for this file."""
    assert llm.tokenize(b"Hello </s> there") == [1, 968, 1003, 347, 974, 968, 63, 50, 976, 65, 384]
    assert llm.tokenize(b"Hello</s>", add_bos=False, special=True) == [968, 1003, 347, 974, 2]
    hello = llm.tokenize(b"Hello there", add_bos=False)
    assert llm.detokenize([1, *hello]) == b"Hello there"
    assert llm.detokenize(hello) == b" Hello there"
    assert llm.detokenize([1, 2, 300, 301], special=True) == b"<s></s> p at"
    assert (llm.token_bos(), llm.token_eos(), llm.n_vocab(), llm.n_embd()) == (1, 2, 1024, 256)
    llm.reset()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"lora_path": "x"}, "lora_path: found 'x', need None"),
        ({"embedding": True}, "embedding: found True, need False"),
        ({"rope_freq_base": 1e6}, r"rope_freq_base: found 1000000.0, need 0.0"),
        ({"split_mode": 2}, "split_mode: found 2, need 1"),
        ({"draft_model": object()}, "draft_model: found"),
        ({"kv_overrides": {"a": 1}}, "kv_overrides: found"),
        ({"type_k": 999}, "type_k: found 999, which is the number of no format"),
        ({"chat_format": "moondream2"}, "chat_format: found 'moondream2', need one of llava-1-5, "),
    ],
)
def test_what_cannot_be_honoured(options: Any, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Llama(MODEL, **options)


def test_unknown_parameters() -> None:
    with pytest.raises(TypeError, match=r"Llama\(\) has no parameter 'n_gpus'"):
        Llama(MODEL, n_gpus=1)
    with pytest.raises(TypeError, match=r"chat_handler: found str, need a handler of pyllava.compat"):
        Llama(MODEL, chat_handler=MMPROJ)  # type: ignore[arg-type]
    with pytest.raises(ImportError):
        from pyllava.compat import MoondreamChatHandler  # type: ignore[attr-defined]  # noqa: F401


def test_what_is_taken_for_nothing() -> None:
    options: Any = {
        "verbose": False,
        "logits_all": True,
        "use_mlock": True,
        "n_threads_batch": 3,
        "numa": True,
    }
    options["chat_handler"] = Llava15ChatHandler(MMPROJ, verbose=False)
    with Llama(MODEL, n_threads=1, n_ctx=0, type_k=8, type_v="q8_0", flash_attn=True, **options) as llm:
        assert llm.n_ctx() == llm.llava.info.n_ctx_train
        assert text_of(llm.create_chat_completion(asked(SCENE), temperature=0)).startswith(DESCRIBED)


def test_templates(alone: str) -> None:
    for arguments, name in (
        ({"chat_format": "vicuna"}, "vicuna_v1"),
        ({"chat_format": "chatml_direct"}, "chatml_direct"),
        ({"chat_format": "llava-1-5"}, "vicuna_v1"),
        ({"chat_format": "llama-3", "chat_handler": Llava15ChatHandler(MMPROJ)}, "vicuna_v1"),
        ({"chat_handler": NanoLlavaChatHandler(MMPROJ)}, "nanollava"),
    ):
        with Llama(alone, n_threads=1, **arguments) as llm:  # type: ignore[arg-type]
            assert llm.llava.template.name == name


def test_without_a_handler_there_is_text_alone(alone: str) -> None:
    with Llama(alone, n_threads=1) as llm, pytest.raises(pyllava.PyllavaError, match="there is no projector"):
        llm.create_chat_completion(asked(SCENE))


def test_the_import_is_light() -> None:
    code = "import sys, pyllava; print(sorted(n for n in ('numpy', 'asyncio', 'ctypes') if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- pickle ---


def test_a_model_is_pickled_as_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tiny_gguf.convert(tmp_path / "model", TinySpec(n_ctx=128))
    monkeypatch.chdir(tmp_path)
    relative = [os.path.relpath(path, tmp_path) for path in (files.model, files.mmproj)]
    seen: list[str] = []
    with pyllava.Llava(
        *relative, n_ctx=99, n_threads=1, template="plain", progress=lambda stage, _: seen.append(stage)
    ) as model:
        packed = pickle.dumps(model)
        expected = model.ask(SCENE, DESCRIBE, max_tokens=8)
        n_seen = len(seen)
    assert len(packed) < 2000
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pickle.loads(packed) as again:
        assert (again.n_ctx, again.template.name) == (99, "plain")
        assert again.ask(SCENE, DESCRIBE, max_tokens=8).tokens == expected.tokens
        assert again.files.model == files.model
    assert len(seen) == n_seen > 0  # the callback stays behind


@pytest.mark.parametrize("name", [None, "demo", "demo-1.6"])
def test_demo_models_are_pickled(name: str | None) -> None:
    with pyllava.Llava(name, n_threads=1) as model, pickle.loads(pickle.dumps(model)) as again:
        assert again.is_demo
        assert again.files == model.files
        assert str(model.files.mmproj).encode() not in pickle.dumps(
            model
        )  # another machine's package lies elsewhere


def test_a_conversation_is_pickled() -> None:
    with pyllava.Llava(n_threads=1) as model:
        chat = model.chat()
        chat.ask(DESCRIBE, images=SCENE)
        again = pickle.loads(pickle.dumps(chat))
        assert again.messages == chat.messages
        asked_again, expected = (
            again.ask("How many shapes are there?"),
            chat.ask("How many shapes are there?"),
        )
        assert (asked_again.tokens, asked_again.log_probs) == (expected.tokens, expected.log_probs)


def test_a_copy_is_refused() -> None:
    with pyllava.Llava(n_threads=1) as model:
        for duplicate in (copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="a model is not copied: pass this one on"):
                duplicate(model)
        with pytest.raises(TypeError, match="a model is not copied"):
            copy.deepcopy(model.chat())


def described(model: Any, path: str) -> str:
    return str(model.ask(path, DESCRIBE))


def completed(llm: Any, path: str) -> str:
    return text_of(llm.create_chat_completion(asked(path), temperature=0))


def test_a_pool_of_processes(llm: Llama) -> None:
    with pyllava.Llava(n_threads=1) as model:
        expected = [described(model, path) for path in (SCENE, DUCK)]
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            assert pool.map(functools.partial(described, model), [SCENE, DUCK]) == expected
            assert pool.map(functools.partial(completed, llm), [SCENE, DUCK]) == expected
