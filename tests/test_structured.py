"""Structured answers: whatever the model says, they are what a schema, an expression, a list or a grammar allows."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tiny_gguf

import pyllava
from pyllava import _structured, cli
from pyllava._closing import GrammarEnds, RegularEnds
from pyllava._gbnf import is_gbnf, lark_of
from pyllava.sampling import Sampling

if importlib.util.find_spec("llguidance") is None:
    pytest.skip("llguidance is not installed: pip install 'pyllava[structured]'", allow_module_level=True)
pydantic = pytest.importorskip("pydantic")

ROOT = Path(__file__).resolve().parents[1]
SCENE = str(ROOT / "examples" / "scene.png")
VOCABULARIES = ROOT.parent / "shared" / "data" / "vocab"
CHOICES = ["a star", "a circle", "yes", "yes, a square", "café au lait", "(x|y)*", '"milk"']
REGEX = r"(The|A) [a-z ]+\. \d{2,4} [A-Z][a-z]+ing!?"
ARITHMETIC = r"""
root ::= sum "\n"     # a comment
sum  ::= term ([-+] term)*
term ::= [0-9]+ | "(" sum ")"
"""


class Circle(pydantic.BaseModel):
    kind: Literal["circle"]
    radius: float


class Square(pydantic.BaseModel):
    kind: Literal["square"]
    side: int = pydantic.Field(ge=1, le=99)


class Scene(pydantic.BaseModel):
    title: str = pydantic.Field(max_length=20)
    n_stars: int = pydantic.Field(ge=0, le=10)
    colours: list[Literal["red", "reddish", "blue"]] = pydantic.Field(min_length=1, max_length=4)
    shape: Circle | Square = pydantic.Field(discriminator="kind")
    note: str | None = None


class Node(pydantic.BaseModel):
    value: int
    children: list[Node]


LISTS = {"type": "array", "items": {"type": "string", "minLength": 2}, "minItems": 3}


@pytest.fixture(scope="module", params=[None, "demo-1.6"], ids=["demo", "demo-1.6"])
def model(request: pytest.FixtureRequest) -> Iterator[pyllava.Llava]:
    with pyllava.Llava(request.param, n_threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def demo() -> Iterator[pyllava.Llava]:
    with pyllava.Llava(n_threads=1) as loaded:
        yield loaded


def check(answer: pyllava.Answer, kind: str) -> None:
    """An answer of one of the kinds below is what it has to be, and its parts fit together."""
    text = str(answer)
    assert len(answer.tokens) == len(answer.log_probs) == answer.usage.completion_tokens
    assert 0 <= answer.usage.forced_tokens <= answer.usage.completion_tokens
    if kind in ("scene", "node"):
        judge = {"scene": Scene, "node": Node}[kind]
        assert type(answer.data) is judge
        assert judge.model_validate_json(text) == answer.data
        assert json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":")).count(
            " "
        ) == text.count(" ")
    elif kind in ("lists", "any"):
        assert json.loads(text) == answer.data or math.isnan(answer.data)
        if kind == "lists":
            assert len(answer.data) >= 3
            assert all(isinstance(item, str) and len(item) >= 2 for item in answer.data)
    else:
        assert answer.data == text
        if kind == "choices":
            assert text in CHOICES
        else:
            assert re.fullmatch({"regex": REGEX, "grammar": r"[-+()0-9]+\n"}[kind], text)


KINDS: dict[str, dict[str, Any]] = {
    "scene": {"schema": Scene},
    "node": {"schema": Node},
    "lists": {"schema": LISTS},
    "any": {"schema": True},
    "choices": {"choices": CHOICES},
    "regex": {"regex": REGEX},
    "grammar": {"grammar": ARITHMETIC},
}


def ask(model: pyllava.Llava, kind: str, seed: int, **options: Any) -> pyllava.Answer:
    drawn: dict[str, Any] = {"temperature": 0.5 + seed % 3, "seed": seed, "max_tokens": 60 + seed % 60}
    return model.ask(SCENE, "Describe the picture.", **{**KINDS[kind], **drawn, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_was_asked_for(model: pyllava.Llava, kind: str) -> None:
    for seed in range(4):
        check(ask(model, kind, seed), kind)


@pytest.mark.slow
def test_a_thousand_answers_are_what_was_asked_for(model: pyllava.Llava) -> None:
    """500 on each of the demo models, eight at once: at any temperature, and wherever they are cut."""
    kinds = [*KINDS]

    def one(seed: int) -> None:
        check(ask(model, kinds[seed % len(kinds)], seed), kinds[seed % len(kinds)])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(one, range(500)))


@pytest.mark.parametrize("kind", ["scene", "node", "lists", "regex", "choices", "grammar"])
def test_room_for_the_end_is_kept(demo: pyllava.Llava, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """With any number of tokens that suffices at all the answer is whole; with fewer it says that they do not."""
    whole = 0
    for most in (*range(1, 12), 16, 24, 31, 40, 48, 55, 64, 80, 100, 120, 140):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "pyllava"):
            answer = ask(demo, kind, 7, max_tokens=most)
        if answer.data is None:
            assert not whole, (most, str(answer))
            assert (answer.finish_reason, len(answer.tokens), answer.was_cut) == ("length", most, True)
            assert "takes" in caplog.text
        else:
            check(answer, kind)
            whole += 1
            assert len(answer.tokens) <= most
    assert whole >= 4


def test_an_end_that_was_chosen_for_it_says_so(demo: pyllava.Llava) -> None:
    open_end = {"schema": {"type": "string"}, "logit_bias": {'"': -100.0}, "max_tokens": 20}
    answer = demo.ask(SCENE, "Describe it.", **open_end)
    assert (answer.finish_reason, len(answer.tokens)) == ("length", 20)
    assert answer.data == json.loads(str(answer))
    late = demo.ask(SCENE, "Describe it.", **{**open_end, "max_tokens": 400, "timeout": 0.005})
    assert late.finish_reason == "timeout"
    assert late.data == json.loads(str(late))
    loop = demo.ask(SCENE, "Describe it.", regex=r"(a?b?){400}!", stop_loops=True, logit_bias={"a": 99.0})
    assert loop.finish_reason == "loop"
    assert loop.data == str(loop)
    assert str(loop).endswith("!")


def test_greedy_answers_are_the_likeliest_of_those_allowed(demo: pyllava.Llava) -> None:
    answer = demo.ask(SCENE, "Describe it.", choices=["There", "star"])
    assert str(answer) == "There"  # as the free answer begins
    assert str(demo.ask(SCENE, "Describe it.", choices=["star"])) == "star"


def test_log_probs_of_forced_tokens_are_the_model_s(demo: pyllava.Llava) -> None:
    answer = demo.ask(SCENE, "Describe it.", schema=Scene, logprobs=2)
    assert answer.usage.forced_tokens > 20
    rows = demo.logits(SCENE, "Describe it.", answer=answer.tokens)[-len(answer.tokens) - 1 : -1].astype(
        float
    )
    for row, token, log_prob, entry in zip(
        rows, answer.tokens, answer.log_probs, answer.logprobs, strict=True
    ):
        top = row.max()
        assert log_prob == pytest.approx(row[token] - top - np.log(np.exp(row - top).sum()), abs=1e-4)
        assert (entry.id, entry.logprob, len(entry.alternatives)) == (token, log_prob, 2)


def test_what_is_forced_takes_few_steps(demo: pyllava.Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    step = demo._engine.session.step
    monkeypatch.setattr(demo._engine.session, "step", lambda runs: steps.append(runs) or step(runs))
    answer = demo.ask(SCENE, "Describe it.", choices=["There is nothing at all in the whole picture", "no"])
    assert str(answer).startswith("There")
    assert len(steps) <= 5
    assert answer.usage.forced_tokens >= len(answer.tokens) - 3


def test_answers_at_once_are_those_alone(demo: pyllava.Llava) -> None:
    def one(number: int) -> tuple[Any, ...]:
        kind = [None, "scene", "choices", "regex"][number % 4]
        if kind is None:
            answer = demo.ask(SCENE, "Describe it.")
            assert answer.data is None
            assert answer.usage.forced_tokens == 0
        else:
            answer = ask(demo, kind, number)
        return answer.text, answer.tokens, answer.log_probs, answer.finish_reason

    alone = [one(number) for number in range(12)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(one, range(12))) == alone


def test_an_answer_that_loses_its_place_goes_on() -> None:
    long = {"schema": {"type": "string", "minLength": 500}, "max_tokens": 220, "temperature": 1.0}
    with pyllava.Llava(n_threads=1, n_parallel=4, n_ctx=400, kv_cells=400) as model:

        def one(seed: int) -> pyllava.Answer:
            return model.ask(SCENE, "Describe it.", seed=seed, **long)

        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(one, range(6)))
        assert model.stats().set_aside > 0
        for seed, answer in enumerate(answers):
            assert len(answer.data) >= 500
            assert answer.text == one(seed).text


def test_streams(demo: pyllava.Llava) -> None:
    with demo.ask(SCENE, "Describe it.", schema=Scene, stream=True) as stream:
        pieces = list(stream)
        assert len(pieces) > 3
        assert "".join(pieces) == str(stream.answer)
        assert isinstance(stream.answer.data, Scene)
    with demo.ask(
        SCENE, "Describe it.", schema={"type": "string", "minLength": 600}, max_tokens=700, stream=True
    ) as slow:
        first = next(slow)
        time.sleep(0.3)  # it is parked
        assert first + "".join(slow) == str(slow.answer)
    assert len(slow.answer.data) >= 600


def test_conversations(demo: pyllava.Llava) -> None:
    chat = demo.chat()
    assert isinstance(chat.ask("What is it?", images=SCENE, schema=Scene).data, Scene)
    assert str(chat.ask("Is there a star?", choices=["yes", "no"])) in ("yes", "no")
    free = chat.ask("What is in the picture?")
    assert free.data is None
    assert free.usage.cached_tokens > 100
    assert [message.text for message in chat.messages][3] in ("yes", "no")


def test_batches(demo: pyllava.Llava) -> None:
    results = list(demo.batch([SCENE] * 3, "Describe it.", schema=Scene, samples=2, temperature=1.0, seed=1))
    assert [[type(answer.data) for answer in result.answers] for result in results] == [[Scene, Scene]] * 3


def test_white_space_is_the_answer_s(demo: pyllava.Llava) -> None:
    """Nothing is taken off but the space that the template has before answers."""
    assert str(demo.ask(SCENE, "?", choices=["  two \n"])) == "  two \n"
    assert str(demo.ask(SCENE, "?", regex="a b\n\n")) == "a b\n\n"
    assert str(demo.ask(SCENE, "?", choices=["There"])) == "There"
    asked = {
        "type": "object",
        "properties": {"a": {"const": 1}},
        "required": ["a"],
        "x-guidance": {"whitespace_flexible": True},
    }
    spaced = demo.ask(SCENE, "?", schema=asked, start_with='{ "a" :')
    assert spaced.data == {"a": 1}


def test_start_with(demo: pyllava.Llava) -> None:
    answer = demo.ask(SCENE, "Describe it.", schema=Scene, start_with='{"title":"A pic')
    assert str(answer).startswith('{"title":"A pic')
    assert answer.data.title.startswith("A pic")
    with pytest.raises(ValueError, match=r"start_with: 'Well' is no beginning of what schema allows"):
        demo.ask(SCENE, "Describe it.", schema=Scene, start_with="Well")


def test_objects_have_no_other_properties_unless_asked_for(demo: pyllava.Llava) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 9}},
        "required": ["a"],
    }
    for seed in range(5):
        given = demo.ask(SCENE, "?", schema=schema, temperature=2.0, seed=seed)
        assert given.data.keys() == {"a"}
    assert schema.keys() == {"type", "properties", "required"}  # what was given is left alone
    told = _structured.wanted(Sampling(schema={**schema, "additionalProperties": {"type": "null"}}))
    assert told is not None
    assert told.body["json_schema"]["additionalProperties"] == {"type": "null"}


def test_a_model_s_own_validator_may_refuse(demo: pyllava.Llava) -> None:
    class Never(pydantic.BaseModel):
        n: Literal[1]

        @pydantic.field_validator("n")
        @classmethod
        def refuse(cls, n: int) -> int:
            raise ValueError("not today")

    with pytest.raises(pyllava.PyllavaError, match=r"Never refuses .*\"n\":1.*not today"):
        demo.ask(SCENE, "?", schema=Never)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": True, "regex": "a"}, "schema and regex: need one of them"),
        ({"choices": ["a"], "grammar": "root ::= [a]"}, "choices and grammar: need one of them"),
        ({"schema": True, "stop": ["x"]}, "schema and stop: need one of them"),
        ({"regex": "a", "ignore_eos": True}, "regex and ignore_eos: need one of them"),
        ({"choices": []}, "choices: found none"),
        ({"choices": ["a", ""]}, "choices: found ''"),
        ({"schema": "{"}, "schema: no JSON"),
        ({"schema": "[1]"}, r"schema: \[1\], need a JSON object, or true for any JSON"),
        ({"schema": {"type": "strin"}}, "schema: Invalid type: strin"),
        ({"schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"schema": {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}}, "uniqueItems"),
        ({"schema": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "oneOf"),
        ({"schema": {"$ref": "https://example.com/a.json"}}, r"example\.com"),
        ({"schema": {"enum": [2**53 + 1]}}, "enum: found 9007199254740993, need numbers within"),
        ({"schema": {"enum": [{"id": [2**53 + 1]}]}}, "enum: found 9007199254740993"),
        ({"schema": {"type": "integer", "minimum": 1e50, "maximum": 1e50}}, r"found 10\*\*20 or more"),
        ({"schema": {"const": 2**63 - 1}}, "const: found 9223372036854775807"),
        (
            {"schema": {"oneOf": [{"type": "object", "properties": {"a": {"const": 1}}, "required": 3}]}},
            "required",
        ),
        ({"schema": {"$ref": "#"}}, "schema: no text satisfies it"),
        ({"schema": {"enum": []}}, "schema: Unsatisfiable"),
        ({"schema": {"const": object()}}, "schema: no JSON"),
        ({"regex": "(a"}, "regex: .*"),
        ({"grammar": "start: b"}, "grammar: .*b"),
        ({"grammar": "start: start"}, "grammar: no text satisfies it"),
    ],
)
def test_wrong_ones(demo: pyllava.Llava, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        demo.ask(SCENE, "?", **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "options", [{"schema": 1}, {"schema": [1]}, {"regex": 1}, {"choices": "ab"}, {"grammar": b"a"}]
)
def test_wrong_types(demo: pyllava.Llava, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=rf"{next(iter(options))}: found"):
        demo.ask(SCENE, "?", **options)


def nested(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


def chain(n: int) -> dict[str, Any]:
    links = {
        f"a{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(n)
    }
    return {"$defs": {**links, f"a{n}": {}}, "$ref": "#/$defs/a0"}


HOSTILE: dict[str, dict[str, Any]] = {
    "deep": {"schema": nested(10_000)},
    "deep text": {"schema": '{"items":' * 10_000 + "{}" + "}" * 10_000},
    "deep enough": {"schema": nested(90)},
    "huge enum": {"schema": {"enum": [f"{i:010}" for i in range(900_000)]}},
    "enum": {"schema": {"enum": [f"{i:010}" for i in range(8_000)]}},
    "wide": {"schema": {"type": "object", "properties": {f"k{i}": {} for i in range(5_000)}}},
    "chain of references": {"schema": chain(2_000)},
    "itself": {"schema": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
    "endless": {
        "schema": {"$defs": {"a": {"type": "object", "properties": {"n": {"$ref": "#/$defs/a"}}, "required": ["n"]}}, "$ref": "#/$defs/a"}
    },
    "choices": {"choices": [f"{i:08}" for i in range(500_000)]},
    "(a|a)*b": {"regex": "(a|a)*b"},
    "(x+x+)+y": {"regex": "(x+x+)+y"},
    "powers": {"regex": "a{1000}{1000}{1000}"},
    "powers in a pattern": {"schema": {"type": "string", "pattern": "^((a{1000}){1000}){1000}$"}},
    "powers later": {"regex": "x+((a{1000}){1000}){1000}"},
    "exponential": {"regex": "(a|b)*a(a|b){300}"},
    "letters": {"regex": r"\p{L}{500}"},
    "brackets": {"regex": "(" * 5_000 + "a" + ")" * 5_000},
    "long": {"schema": {"type": "string", "minLength": 10**9}},
    "many": {"schema": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}},
    "chain of rules": {"grammar": "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(5_000)) + 'a5000: "x"'},
    "chain of terminals": {"grammar": "root ::= a0\n" + "".join(f'a{i} ::= "y" a{i + 1}\n' for i in range(5_000)) + 'a5000 ::= "x"'},
    "deep grammar": {"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "references in a grammar": {"grammar": f"start: %json {json.dumps(chain(5_000))}"},
    "doubling": {"grammar": "start: A30\nA0: /[ab]/\n" + "".join(f"A{i + 1}: A{i} A{i}\n" for i in range(30))},
    "left recursion": {"grammar": 'start: start "a" | "b"'},
    "ambiguous": {"grammar": 'start: e\ne: e e | "a" | '},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_ones_end(demo: pyllava.Llava, name: str) -> None:
    """With an answer that is whole or says that it is not, or with an error of one line; the process goes on."""
    demo.ask(None, "Hi", choices=["a"])
    started, said = time.thread_time(), ""
    try:
        answer = demo.ask(None, "Hi", max_tokens=20, temperature=1.0, seed=3, **HOSTILE[name])
        assert answer.data is not None or answer.finish_reason == "length"
    except (ValueError, pyllava.PyllavaError) as error:
        said = str(error)
    assert len(said) < 500
    assert "\n" not in said
    assert time.thread_time() - started < 1.0  # of the caller; the rest waits at most as long
    assert str(demo.ask(None, "Hi", choices=["a"])) == "a"


def test_compiling_is_given_up_after_a_while(monkeypatch: pytest.MonkeyPatch, demo: pyllava.Llava) -> None:
    monkeypatch.setattr(_structured, "_SECONDS", 0.001)
    with pytest.raises(ValueError, match=r"schema: takes more than 0\.001 s to compile"):
        demo.ask(None, "Hi", schema={"enum": [f"{i:06}" for i in range(8_000)]})


def test_without_llguidance(demo: pyllava.Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(pyllava.PyllavaError, match=r"pip install 'pyllava\[structured\]'"):
        demo.ask(None, "Hi", choices=["a"])


# --- the way to the end ---


def ends_of(model: pyllava.Llava, **options: Any) -> _structured._Compiled:
    want = _structured.wanted(Sampling(**options))
    assert want is not None
    model._structures.constraint(want, "", "")
    return model._structures._compiled[want.grammar(""), ""]


@pytest.mark.parametrize(
    ("options", "shortest"),
    [
        ({"schema": {"type": "object", "properties": {k: {"type": "string"} for k in "abcdef"}, "required": [*"abcdef"]}},
         b'{"a":"","b":"","c":"","d":"","e":"","f":""}'),
        ({"schema": {"type": "array", "items": {"type": "integer"}, "minItems": 50}}, b"[" + b"0," * 49 + b"0]"),
        ({"schema": {"type": ["object", "null"]}}, b"{}"),
        ({"schema": {"enum": ["a long text", "b"]}}, b'"b"'),
        ({"schema": nested(80)}, b"[]"),
        ({"choices": ["aaaaaaaaa", "b"]}, b"b"),
        ({"regex": "(a|a)*b"}, b"b"),
        ({"regex": "[A-Z][a-z]+ing"}, b"Aning"),
        ({"regex": r"\d{4}-\d\d"}, b"0000-00"),
        ({"grammar": ARITHMETIC}, b"0\n"),
    ],
)  # fmt: skip
def test_shortest_ways(demo: pyllava.Llava, options: dict[str, Any], shortest: bytes) -> None:
    compiled = ends_of(demo, **options)
    ways = [compiled.ends.first(compiled.letters, b"")[0], compiled.ends.shortest(compiled.letters, b"")[0]]
    assert min(filter(None, ways), key=len) == shortest
    for way in filter(None, ways):
        end = compiled.letters.deep_copy()
        assert end.consume_tokens([*way])
        assert end.is_accepting()


def test_expressions_have_their_own_search(demo: pyllava.Llava) -> None:
    assert isinstance(ends_of(demo, regex="a+").ends, RegularEnds)
    assert isinstance(ends_of(demo, schema=True).ends, GrammarEnds)


# --- GBNF ---


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        ('root ::= "yes" | "no"', ["yes", "no"], ["yesno", ""]),
        ('root ::= ("ab"){2,3} [0-9]{2} x{0,2}\nx ::= "q"', ["abab12", "ababab99qq"], ["ab12", "abab1"]),
        ('root ::= [a-z]+ "b"', ["ab", "abbb"], ["b", "ac"]),  # what is longest first would not end
        ('root ::= x "b" y\nx ::= [a-z]+\ny ::= "(" y ")" | "c"', ["abbc", "qb((c))"], ["bc", "qb((c)"]),
        ('root ::= start "x" fooBar foo-bar\nstart ::= "s"\nfooBar ::= "1"\nfoo-bar ::= "2"', ["sx12"], ["sx1"]),
        (r'root ::= [\u0041-\u005a\-\]] "\u00e9" "\U0001F600" "\x41\n"', ["Bé😀A\n", "-é😀A\n", "]é😀A\n"], ["aé😀A\n"]),
        ('root ::= "a/b" [/] [^/]', ["a/b/x"], ["a/b//"]),
        ('root ::= "" | . "é"?', ["", "\n", "漢é"], ["ab"]),
        ('root ::= (\n  "a"   # one\n  | "b"\n)* ws\nws ::= | " "', ["", "abba "], ["c"]),
        (ARITHMETIC, ["1+(2-3)\n", "42\n"], ["1+\n", "(1\n"]),
    ],
)  # fmt: skip
def test_gbnf(demo: pyllava.Llava, grammar: str, good: list[str], bad: list[str]) -> None:
    assert is_gbnf(grammar)
    compiled = ends_of(demo, grammar=grammar)
    for text in (*good, *bad):
        end = compiled.letters.deep_copy()
        n = len(text.encode())
        is_whole = end.try_consume_tokens([*text.encode()]) == n and end.is_accepting()
        assert is_whole == (text in good), (text, lark_of(grammar))


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('root ::= "a', "line 1: '\"a' is no GBNF"),
        ("root ::= \n\n x", "line 3: rule root uses x, which is not defined"),
        ('x ::= "a"', "no rule root"),
        ('root ::= ("a"', "a bracket of rule root is not closed"),
        ('root ::= * "a"', r"\* has nothing before it"),
        ('root ::= "a"\nroot ::= "b"', "line 2: rule root is defined twice"),
        ("root ::= <think>", "is no GBNF"),
        (r'root ::= "\Uffffffff"', "is no character"),
    ],
)
def test_wrong_gbnf(grammar: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lark_of(grammar)


# --- vocabularies ---


@pytest.mark.parametrize("name", ["llama-spm", "llama-bpe", "phi-3", "qwen2"])
def test_real_vocabularies(name: str, tmp_path: Path) -> None:
    """Weights are random, so that any token comes; what is forced is cut as the tokenizer cuts it."""
    path = VOCABULARIES / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"{path} is missing")
    keys = ["big colour", "Größe", "\u212b", "n"]
    schema = {
        "type": "object",
        "properties": {key: {"type": "string", "maxLength": 9} for key in keys},
        "required": keys,
    }
    with pyllava.Llava(
        tiny_gguf.with_vocabulary(tmp_path, tiny_gguf.vocabulary_keys(path)), n_threads=1
    ) as model:
        for seed in range(3):
            answer = model.ask(None, "Hi", schema=schema, temperature=1.0, seed=seed, max_tokens=200)
            assert [*answer.data] == keys
            assert json.loads(str(answer)) == answer.data
        long = model.ask(None, "Hi", choices=["Extraordinary! There is nothing to be seen in the picture"])
        assert len(long.tokens) <= 2 + len(model.tokenize(str(long)))
        assert long.usage.forced_tokens >= len(long.tokens) - 2


# --- the command line ---


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["--image", SCENE, "-p", "Describe it.", *arguments])
    return code, *capsys.readouterr()


def test_cli(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    schema = json.dumps(Scene.model_json_schema())
    (tmp_path / "schema.json").write_text(schema)
    (tmp_path / "grammar.gbnf").write_text(ARITHMETIC)
    assert run(capsys, "--choices", "There, star")[:2] == (0, "There\n")
    for given in (("-j", schema), ("--json-schema-file", str(tmp_path / "schema.json"))):
        code, out, _ = run(capsys, *given)
        assert code == 0
        Scene.model_validate_json(out)
    code, out, _ = run(capsys, "--grammar-file", str(tmp_path / "grammar.gbnf"), "-n", "20")
    assert (code, bool(re.fullmatch(r"[-+()0-9]+\n", out))) == (0, True)
    assert run(capsys, "--regex", "[0-9]{3}")[0] == 0
    assert run(capsys, "-j", '{"const": null}')[:2] == (0, "null\n")
    assert json.loads(run(capsys, "-j", '{"const": [1]}', "--json")[1])["data"] == [1]


def test_cli_says_that_an_answer_was_cut(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--regex", "There is nothing at all in the whole picture", "-n", "3")
    assert code == 1
    assert out
    assert "error: the answer ended before it was whole (length, 3 tokens): raise -n" in err


def test_cli_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "--choices", "a,b", "--grammar", "root ::= [a]")
    assert (code, "--grammar and --choices: need one of them" in err) == (2, True)
    code, _, err = run(capsys, "--json-schema-file", str(tmp_path / "missing.json"))
    assert (code, "missing.json" in err) == (1, True)
    assert "demo model" not in err  # not even loaded
    for schema, told in (("{", "schema: no JSON"), ("3", "schema: 3, need a JSON object")):
        code, out, err = run(
            capsys, "-j", schema, "-m", str(tmp_path / "missing")
        )  # told before the model is looked for
        assert (code, out, told in err) == (1, "", True)


def test_cli_takes_any_json_for_true(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "-j", "true")
    assert code == 0
    json.loads(out)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_cli_reads_a_schema_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As from ``<(...)`` of a shell, for several pictures."""
    pipe = tmp_path / "schema"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=('{"type": "integer"}',), daemon=True)
    writer.start()
    code, out, err = run(capsys, "-jf", str(pipe), "--image", SCENE)
    assert code == 0, err
    assert len({int(line) for line in out.splitlines()}) == 1
    assert out.count("\n") == 2


def test_captions_with_data(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(Scene.model_json_schema()))
    output = tmp_path / "rows.jsonl"
    command = [
        "caption",
        SCENE,
        "-o",
        str(output),
        "--write",
        "csv",
        "--schema",
        str(tmp_path / "schema.json"),
        "-n",
        "200",
    ]
    assert cli.main(command) == 0
    row = json.loads(output.read_text())
    assert json.loads(row["caption"]) == row["data"]
    Scene.model_validate(row["data"])
    assert (
        json.dumps(row["data"], ensure_ascii=False).replace('"', '""')
        in output.with_suffix(".csv").read_text()
    )
    assert cli.main([*command[:-1], "5", "--overwrite"]) == 1
    row = json.loads(output.read_text())
    assert (row["status"], row["data"]) == ("error", None)
    assert "ended before it was whole" in row["error"]
