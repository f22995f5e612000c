"""Conversations in the dictionaries of the OpenAI API: what is taken, what is refused, what comes back."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pyllava
from pyllava._completion import create_completion
from pyllava._completion_request import (
    ChatOptions,
    ChatRequest,
    TextOptions,
    TextRequest,
    conversation,
    schema_of,
)

ROOT = Path(__file__).resolve().parents[1]
SCENE, DUCK = str(ROOT / "examples" / "scene.png"), str(ROOT / "examples" / "duck.png")
DESCRIBE, COUNT = "What is in the picture?", "How many shapes are there?"


@pytest.fixture(scope="module")
def m() -> Iterator[pyllava.Llava]:
    with pyllava.Llava(n_threads=1) as model:
        yield model


def shown(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def asked(text: str, *pictures: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}, *map(shown, pictures)]}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def text_of(result: Any) -> str:
    return str(result["choices"][0]["message"]["content"])


def data_url(path: str) -> str:
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


# --- what comes back ---


def test_a_result(m: pyllava.Llava) -> None:
    before = int(time.time())
    result = m.create_chat_completion(messages=[asked(DESCRIBE, SCENE)], temperature=0)
    answer = m.ask(SCENE, DESCRIBE)
    assert result.pop("id").startswith("chatcmpl-")
    assert before <= result.pop("created") <= time.time()
    n_prompt, n_answer = answer.usage.prompt_tokens, answer.usage.completion_tokens
    n_cached = result["usage"].pop("prompt_tokens_details")["cached_tokens"]
    assert 0 <= n_cached < n_prompt
    assert result == {
        "object": "chat.completion",
        "model": "demo-q8_0.gguf",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": str(answer)},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_answer,
            "total_tokens": n_prompt + n_answer,
        },
    }


def test_chunks(m: pyllava.Llava) -> None:
    chunks = list(
        m.create_chat_completion([asked(DESCRIBE, SCENE)], temperature=0, stream=True, model="mine")
    )
    heads = [(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks]
    assert set(heads) == {(chunks[0]["id"], chunks[0]["created"], "mine", "chat.completion.chunk")}
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [choice["delta"] for choice in (choices[0], choices[-1])] == [{"role": "assistant"}, {}]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    texts = [choice["delta"]["content"] for choice in choices[1:-1]]
    assert len(texts) > 10
    assert "".join(texts) == str(m.ask(SCENE, DESCRIBE))


@pytest.mark.parametrize("logprobs", [None, True])
def test_the_types_of_openai_take_it(m: pyllava.Llava, logprobs: bool | None) -> None:
    types = pytest.importorskip("openai.types.chat")
    options: Any = {"temperature": 0, "logprobs": logprobs, "top_logprobs": 2 if logprobs else None}
    messages = [asked(DESCRIBE, SCENE)]
    given = m.create_chat_completion(messages, **options)
    result = types.ChatCompletion.model_validate(given, strict=True)
    assert result.choices[0].message.content == str(m.ask(SCENE, DESCRIBE))
    assert (
        result.model_dump(exclude_unset=True) == given
    )  # no key that it does not know, none of another type
    for chunk in m.create_chat_completion(messages, stream=True, **options):
        taken = types.ChatCompletionChunk.model_validate(chunk, strict=True)
        assert taken.model_dump(exclude_unset=True) == chunk


def entries(choices: Sequence[Any]) -> list[Any]:
    return [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]


def test_logprobs(m: pyllava.Llava) -> None:
    messages = [asked(DESCRIBE, SCENE)]
    answer = m.ask(SCENE, DESCRIBE, logprobs=2, stop=["botto"])
    options: Any = {"temperature": 0, "logprobs": True, "top_logprobs": 2, "stop": "botto"}
    whole = entries(m.create_chat_completion(messages, **options)["choices"])
    assert [(e["token"], bytes(e["bytes"]), e["logprob"]) for e in whole] == [
        (t.token, t.bytes, t.logprob) for t in answer.logprobs
    ]
    assert [[other["logprob"] for other in e["top_logprobs"]] for e in whole] == [
        [other.logprob for other in t.alternatives] for t in answer.logprobs
    ]
    chunks = [c["choices"][0] for c in m.create_chat_completion(messages, stream=True, **options)]
    assert entries(chunks) == whole
    told = [(c["delta"].get("content"), [e["token"] for e in entries([c])]) for c in chunks]
    assert told[1] == ("There", [" There"])  # each chunk tells of its own tokens
    assert told[-1] == (None, [" bottom"])  # and the last one of those that do not show


def test_pieces_of_a_stream_tell_of_their_tokens(m: pyllava.Llava) -> None:
    stream = m.ask(SCENE, DESCRIBE, logprobs=1, stream=True)
    pieces = list(stream)
    assert all(isinstance(piece, pyllava.answer.StreamPiece) for piece in pieces)
    found = [entry for piece in pieces for entry in piece.logprobs]  # type: ignore[attr-defined]
    assert tuple(found) == stream.answer.logprobs
    assert not any(p.logprobs for p in m.ask(SCENE, DESCRIBE, stream=True))  # type: ignore[attr-defined]


def test_reasons_to_end(m: pyllava.Llava) -> None:
    def reason(**options: Any) -> str:
        result = m.create_chat_completion([asked(DESCRIBE, SCENE)], temperature=0, **options)
        return str(result["choices"][0]["finish_reason"])

    forever: Any = {"logit_bias": {str(m.info.eos_id): -math.inf}}
    assert reason() == reason(stop=["white"]) == "stop"
    assert reason(max_tokens=3) == "length"
    assert reason(timeout=1e-6, **forever) == "length"
    loop = {str(m.tokenize("circle")[-1]): 1e9}
    assert reason(logit_bias=loop, stop_loops=True) == "length"
    cut = m.create_chat_completion([asked(DESCRIBE, SCENE)], temperature=0, logit_bias=loop, stop_loops=True)
    assert cut["usage"]["completion_tokens"] < 100  # a loop ended it, not the context


def test_as_many_tokens_as_the_context_has_room_for() -> None:
    with pyllava.Llava(n_threads=1, n_ctx=128) as small:
        eos = {small.info.eos_id: -1e9}
        for most in (None, 0, -1):
            usage = small.create_chat_completion([asked(COUNT)], max_tokens=most, logit_bias=eos)["usage"]
            assert usage["total_tokens"] == 128


def test_seeds_and_defaults(m: pyllava.Llava) -> None:
    def drawn(**options: Any) -> str:
        bias = {m.info.eos_id: -1e9}
        return text_of(m.create_chat_completion([asked("a")], max_tokens=30, logit_bias=bias, **options))

    assert drawn(seed=7, temperature=3) == drawn(seed=7, temperature=3) != drawn(seed=8, temperature=3)
    assert len({drawn(temperature=3, seed=seed) for seed in (None, -1, None)}) == 3
    ours: Any = {"temperature": 0.2, "top_p": 0.95, "top_k": 40, "min_p": 0.05, "seed": 5}
    assert drawn(seed=5) == drawn(**ours)
    assert drawn(seed=5, temperature=3, top_k=-1) == drawn(seed=5, temperature=3, top_k=0)


# --- conversations ---


def test_a_conversation_is_that_of_chat(m: pyllava.Llava) -> None:
    chat, messages = m.chat("You see shapes."), [{"role": "system", "content": "You see shapes."}]
    for question, pictures in ((DESCRIBE, [SCENE]), (COUNT, []), (DESCRIBE, [DUCK]), (COUNT, [])):
        answer = chat.ask(question, images=pictures, logprobs=0, reuse=False)
        messages.append(asked(question, *pictures))
        result = m.create_chat_completion(messages, temperature=0, logprobs=True)
        assert text_of(result) == str(answer)
        assert [e["logprob"] for e in entries(result["choices"])] == [*answer.log_probs]
        assert result["usage"]["prompt_tokens"] == answer.usage.prompt_tokens
        messages.append(result["choices"][0]["message"])
    assert len(messages) == 9


def test_what_the_model_holds_of_a_conversation_is_not_computed_again(m: pyllava.Llava) -> None:
    first = [asked(DESCRIBE, SCENE)]
    answer = m.create_chat_completion(first, temperature=0)
    second = [*first, answer["choices"][0]["message"], asked(COUNT)]
    again = m.create_chat_completion(second, temperature=0)["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] >= answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize("kind", ["data", "path", "file", "bytes", "picture", "array", "text"])
def test_pictures(m: pyllava.Llava, kind: str) -> None:
    sources: dict[str, Any] = {
        "data": data_url(SCENE),
        "path": SCENE,
        "file": Path(SCENE).as_uri(),
        "bytes": Path(SCENE).read_bytes(),
        "picture": Image.open(SCENE),
        "array": np.asarray(Image.open(SCENE).convert("RGB")),
    }
    part = {"type": "image_url", "image_url": SCENE} if kind == "text" else shown(sources[kind])
    message = {"role": "user", "content": [part, {"type": "text", "text": DESCRIBE}]}
    assert text_of(m.create_chat_completion([message], temperature=0)) == str(m.ask(SCENE, DESCRIBE))


def test_pictures_come_before_the_text_or_at_its_marks() -> None:
    found = conversation([asked("Which?", "a", "b"), said("Both."), asked("<image>\nand\n<image>", "c", "d")])
    assert found.images == ["a", "b", "c", "d"]
    assert [(message.text, message.images) for message in found.messages] == [
        ("Which?", 2),
        ("Both.", 0),
        ("<image>\nand\n<image>", 2),
    ]
    parts: Any = [{"type": "text", "text": "a"}, shown("x"), {"type": "text", "text": "b"}]
    assert conversation([{"role": "user", "content": parts}]).messages[0].text == "ab"


@pytest.mark.parametrize("url", ["http://example.com/a.png", "https://example.com/a.png"])
def test_nothing_is_fetched(m: pyllava.Llava, url: str) -> None:
    with pytest.raises(
        pyllava.ImageError, match="a web address: fetch it first, and give the file or its bytes"
    ):
        m.create_chat_completion([asked(DESCRIBE, url)])


def test_detail() -> None:
    def detailed(detail: Any) -> Any:
        url = {"url": SCENE, "detail": detail}
        return [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]

    for detail in (None, "auto", "high"):
        assert conversation(detailed(detail), is_tiled=True).images == [SCENE]
    assert conversation(detailed("low")).images == [SCENE]  # the model has one view of it
    with (
        pyllava.Llava("demo-1.6", n_threads=1) as tiled,
        pytest.raises(ValueError, match="image_max_tiles=0"),
    ):
        tiled.create_chat_completion(detailed("low"))
    with pytest.raises(ValueError, match=r"detail: found 'huge', need"):
        conversation(detailed("huge"))


def test_a_template_s_own_system_message_and_none(m: pyllava.Llava) -> None:
    def n_prompt(*messages: Any) -> int:
        usage = m.create_chat_completion([*messages, asked(COUNT)], max_tokens=1)["usage"]
        return int(usage["prompt_tokens"])

    none, own = n_prompt({"role": "system", "content": ""}), n_prompt()
    assert none == m.ask(None, COUNT, system="", max_tokens=1).usage.prompt_tokens
    assert own == m.ask(None, COUNT, max_tokens=1).usage.prompt_tokens
    assert none < own
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "short."}]
    assert n_prompt({"role": "system", "content": parts}) == n_prompt(
        {"role": "system", "content": "Be short."}
    )


SYSTEM = {"role": "system", "content": "x"}
TOOL_CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([], "messages: found 0, need the user's as the last one"),
        ([SYSTEM], "messages: found 1, need the user's as the last one"),
        ([asked("a"), said("b")], "messages: found 2, need the user's as the last one"),
        ([asked("a"), asked("b")], r"messages\[1\]: found role 'user', need 'assistant'"),
        ([said("a")], r"messages\[0\]: found role 'assistant', need 'user'"),
        ([asked("a"), SYSTEM], r"messages\[1\]: need the system message first"),
        ([SYSTEM, SYSTEM, asked("a")], r"messages\[1\]: need the system message first"),
        ([asked("a", SCENE, role="system"), asked("a")], r"messages\[0\]: .* no picture in it"),
        (
            [asked("a"), asked("b", SCENE, role="assistant"), asked("c")],
            "a picture, which only users can show",
        ),
        ([{"role": "tool", "content": "a"}], "found role 'tool', need 'user'"),
        ([{"content": "a"}], "found role 'None', need 'user'"),
        ([{"role": "user"}], r"messages\[0\]: content: found NoneType, need a text or a list"),
        ([{"role": "user", "content": 3}], "content: found int, need a text or a list"),
        ([asked("a"), TOOL_CALL, asked("c")], r"messages\[1\]: found 'tool_calls', need nothing but role"),
        ([{"role": "user", "content": "a", "name": "Ann"}], r"messages\[0\]: found 'name'"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], r"content\[0\]: found 'input_audio'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]: found 'text', need a text"),
        ([{"role": "user", "content": ["a"]}], r"content\[0\]: found 'str', need a text or an image_url"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\]: found 'image_url', need"),
        ([asked("a", "")], r"messages\[0\]: image_url: need a data: URL, a path, bytes or a picture"),
        ([asked("a", None)], r"messages\[0\]: image_url: need a data: URL"),
    ],
)
def test_wrong_messages(m: pyllava.Llava, messages: Any, what: str) -> None:
    for stream in (False, True):  # at once, not when the first chunk is read
        with pytest.raises(ValueError, match=what):
            m.create_chat_completion(messages, stream=stream)


def test_messages_of_another_type(m: pyllava.Llava) -> None:
    with pytest.raises(TypeError, match=r"messages\[0\]: found str, need a dict"):
        m.create_chat_completion("What is this?")  # type: ignore[arg-type]
    null = {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None, "annotations": []}
    assert len(conversation([asked("a"), null, asked("c")]).messages) == 3  # as openai dumps its messages


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"tools": [{"type": "function"}]}, "tools: pyllava has nothing of the kind"),
        ({"functions": [{"name": "f"}]}, "functions: pyllava has nothing of the kind"),
        ({"tool_choice": "required"}, "tool_choice: pyllava calls no tools"),
        ({"function_call": {"name": "f"}}, "function_call: pyllava calls no tools"),
        ({"tfs_z": 0.9}, "tfs_z: found 0.9, need 1.0"),
        ({"logits_processor": [lambda ids, scores: scores]}, "logits_processor: pyllava has nothing"),
        ({"grammar": object()}, "grammar: pyllava has nothing"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs=True"),
        ({"logit_bias": {"red": 1}}, "logit_bias: found 'red', need token ids"),
        ({"top_p": 2.0}, "top_p: found 2"),
        ({"temperature": -1.0}, "temperature: found -1.0, need a number of at least 0"),
    ],
)
def test_wrong_options(m: pyllava.Llava, options: Any, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        m.create_chat_completion([asked("a")], **options)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"temperature": None}, "temperature: found None, need a number"),
        ({"top_k": "x"}, "top_k: found 'x', need an integer"),
        ({"max_tokens": "x"}, "max_tokens: found 'x', need an integer"),
        ({"logit_bias": [1, 2]}, "logit_bias: found .1, 2., need a dict"),
        ({"stop": 3}, "stop: found 3, need a list of texts"),
        ({"stop": [3]}, "stop: found .3., need a list of texts"),
    ],
)
def test_options_of_other_types(m: pyllava.Llava, options: Any, what: str) -> None:
    with pytest.raises(TypeError, match=what):
        m.create_chat_completion([asked("a")], **options)


def test_neutral_values_are_taken(m: pyllava.Llava) -> None:
    options: Any = {
        "tools": [],
        "functions": None,
        "tool_choice": "auto",
        "function_call": "none",
        "stop": None,
    }
    options |= {"response_format": {"type": "text"}, "logit_bias": None, "logprobs": False, "grammar": None}
    result = m.create_chat_completion([asked(DESCRIBE, SCENE)], temperature=0, **options)
    assert text_of(result) == str(m.ask(SCENE, DESCRIBE))


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}


def test_response_formats() -> None:
    assert schema_of(None) is schema_of({"type": "text"}) is None
    assert schema_of({"type": "json_object"}) == {"type": "object"}
    assert schema_of({"type": "json_object", "schema": SCHEMA}) == SCHEMA
    assert schema_of({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}) == SCHEMA
    wrong: list[Any] = [
        {},
        "json",
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {}},
    ]
    for found in wrong:
        with pytest.raises(ValueError, match=r"response_format: found .*, need type 'text', 'json_object'"):
            ChatRequest(response_format=found)


@pytest.mark.parametrize("stream", [False, True])
def test_answers_have_the_format(m: pyllava.Llava, stream: bool) -> None:
    pytest.importorskip("llguidance", reason="extra [structured]")
    properties = {"n": {"type": "integer", "maximum": 99}, "kind": {"enum": ["circle", "square"]}}
    schema = {
        "type": "object",
        "properties": properties,
        "required": ["n", "kind"],
        "additionalProperties": False,
    }
    formats = (
        {"type": "json_object"},
        {"type": "json_object", "schema": schema},
        {"type": "json_schema", "json_schema": {"name": "shapes", "schema": schema, "strict": True}},
    )
    for number, wanted in enumerate(formats):
        options: Any = {"response_format": wanted, "temperature": 0, "max_tokens": 60}
        found = m.create_chat_completion([asked(DESCRIBE, SCENE)], stream=stream, **options)
        if stream:
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in found)
        else:
            text = text_of(found)
        told = json.loads(text)
        assert isinstance(told, dict)
        if number:
            assert list(told) == ["n", "kind"]
            assert told["kind"] in ("circle", "square")
            assert 99 >= told["n"] == int(told["n"])


def test_an_unknown_option(m: pyllava.Llava) -> None:
    with pytest.raises(TypeError, match="float"):
        m.create_chat_completion([asked("a")], logit_bias={1.5: 1})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="n_best"):
        m.create_chat_completion([asked("a")], n_best=2)  # type: ignore[call-arg]


@pytest.mark.parametrize(("kind", "request_"), [(ChatOptions, ChatRequest), (TextOptions, TextRequest)])
def test_options_are_the_fields_of_requests(kind: Any, request_: Any) -> None:
    assert set(kind.__annotations__) == {field.name for field in dataclasses.fields(request_)}


def test_a_stream_that_is_left_ends_its_answer(m: pyllava.Llava) -> None:
    chunks = m.create_chat_completion([asked("a")], logit_bias={m.info.eos_id: -1e9}, stream=True)
    for _ in zip(range(3), chunks, strict=False):
        pass
    chunks.close()  # type: ignore[attr-defined]
    end = time.monotonic() + 10
    while m.stats().running and time.monotonic() < end:
        time.sleep(0.005)
    assert m.stats().running == 0


# --- text ---


def test_a_text_goes_on(m: pyllava.Llava) -> None:
    prompt = "A chat. USER: How many"
    result: Any = create_completion(m, prompt, temperature=0, max_tokens=6, logprobs=2)
    assert result["id"].startswith("cmpl-")
    assert (result["object"], result["usage"]["completion_tokens"]) == ("text_completion", 6)
    choice = result["choices"][0]
    assert choice["finish_reason"] == "length"
    tokens = choice["logprobs"]["tokens"]
    assert choice["text"] == "".join(tokens)  # with the spaces at its ends
    lengths = [len(token) for token in tokens]
    assert choice["logprobs"]["text_offset"] == [len(prompt) + sum(lengths[:i]) for i in range(6)]
    assert [len(others) for others in choice["logprobs"]["top_logprobs"]] == [2] * 6
    likeliest = [max(others.values()) for others in choice["logprobs"]["top_logprobs"]]
    assert choice["logprobs"]["token_logprobs"] == likeliest
    ids = m.tokenize(prompt, add_bos=True)
    by_ids: Any = create_completion(m, ids, temperature=0, max_tokens=6)
    assert by_ids["choices"][0]["text"] == choice["text"]
    chunks: Any = list(create_completion(m, prompt, temperature=0, max_tokens=6, logprobs=2, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "length"]
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for key, whole in choice["logprobs"].items():
        assert [entry for found in told if found for entry in found[key]] == whole


def test_a_text_is_echoed(m: pyllava.Llava) -> None:
    options: Any = {"temperature": 0, "max_tokens": 3}
    plain: Any = create_completion(m, "How", **options)
    whole: Any = create_completion(m, "How", echo=True, **options)
    chunks: Any = create_completion(m, "How", echo=True, stream=True, **options)
    assert whole["choices"][0]["text"] == "How" + plain["choices"][0]["text"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]


def test_the_types_of_openai_take_a_text(m: pyllava.Llava) -> None:
    types = pytest.importorskip("openai.types")
    for logprobs in (None, 2):
        given = create_completion(m, "How many", logprobs=logprobs)
        assert types.Completion.model_validate(given, strict=True).model_dump(exclude_unset=True) == given


@pytest.mark.parametrize(
    ("prompt", "options", "what"),
    [
        ("a", {"suffix": "b"}, "suffix: pyllava has nothing of the kind"),
        ("a", {"stopping_criteria": [1]}, "stopping_criteria: pyllava has nothing of the kind"),
        ("a", {"echo": True, "logprobs": 1}, "echo and logprobs"),
        ([], {}, "empty prompt"),
        ([10**6], {}, "token 0: found 1000000, need 0"),
    ],
)
def test_wrong_texts(m: pyllava.Llava, prompt: Any, options: Any, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        create_completion(m, prompt, **options)
