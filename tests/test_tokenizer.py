"""The tokenizer against the `sentencepiece` library, and text against itself after a round trip."""

from __future__ import annotations

import ctypes
import itertools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import strings

import pyllava
from pyllava import _lib
from pyllava.answer import Transcript

sentencepiece = pytest.importorskip("sentencepiece")

VOCAB = Path(__file__).resolve().parents[2] / "shared" / "data" / "vocab" / "ggml-vocab-llama-spm.gguf"
N_STRINGS = 20_000
NORMAL, BYTE = 1, 6  # kinds of pieces, the same numbers in SentencePiece and GGUF


# Models


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tiny_gguf.Files:
    return tiny_gguf.convert(tmp_path_factory.mktemp("tokenizer"), tiny.TinySpec())


@pytest.fixture(scope="module")
def llava(files: tiny_gguf.Files) -> Iterator[pyllava.Llava]:
    with pyllava.Llava(files.model, files.mmproj, n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def trained() -> Any:
    return processor(tiny.tokenizer_model(tiny.TinySpec().n_vocab))


def processor(model: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> _lib.ModelHandle:
    """A model with the vocabulary of LLaMA and next to no weights."""
    if not VOCAB.is_file():
        pytest.skip(f"{VOCAB} is not there")
    keys = tiny_gguf.vocabulary_keys(VOCAB)
    return _lib.ModelHandle(tiny_gguf.with_vocabulary(tmp_path_factory.mktemp("real"), keys), None)


@pytest.fixture(scope="module")
def real_processor() -> Any:
    if not VOCAB.is_file():
        pytest.skip(f"{VOCAB} is not there")
    keys = tiny_gguf.vocabulary_keys(VOCAB)
    names = ("tokens", "scores", "token_type")
    return processor(with_pieces(*(keys[f"tokenizer.ggml.{name}"][0] for name in names)))


def with_pieces(texts: list[str], scores: list[float], kinds: list[int]) -> bytes:
    """The trained model's settings with other pieces, as a protobuf message: field 1 of ModelProto, repeated."""
    out = b""
    for text, score, kind in zip(texts, scores, kinds, strict=True):
        piece = text.encode()
        record = b"\x0a" + varint(len(piece)) + piece
        record += b"\x15" + np.float32(score).tobytes() + b"\x18" + varint(kind)
        out += b"\x0a" + varint(len(record)) + record
    model = tiny.tokenizer_model(tiny.TinySpec().n_vocab)
    at = 0
    while model[at] == 0x0A:
        size, begin = read_varint(model, at + 1)
        at = begin + size
    return out + model[at:]


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 128:
        value, shift, at = value | (data[at] & 127) << shift, shift + 7, at + 1
    return value | data[at] << shift, at + 1


def plain_ids(model: _lib.ModelHandle, text: str) -> list[int]:
    return model.tokenize(text, plain=[(0, len(text.encode()))])


def check_strings(model: _lib.ModelHandle, judge: Any, seed: int) -> None:
    seen = set()
    for text in strings(seed, N_STRINGS):
        expected = judge.encode(text)
        assert plain_ids(model, text) == expected, f"{text[:200]!r}"
        seen.update(expected)
    assert len(seen) > 300, "the strings are too much alike"


def test_random_strings(llava: pyllava.Llava, trained: Any) -> None:
    check_strings(llava._model, trained, seed=1)


def test_random_strings_with_the_vocabulary_of_llama(real: _lib.ModelHandle, real_processor: Any) -> None:
    check_strings(real, real_processor, seed=2)


def test_known_ids_of_llama(real: _lib.ModelHandle) -> None:
    texts = VOCAB.with_suffix(".gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    lines = VOCAB.with_suffix(".gguf.out").read_text().splitlines()
    assert len(texts) == len(lines) > 40
    for text, line in zip(texts, lines, strict=True):
        assert plain_ids(real, text) == [int(i) for i in line.split()], repr(text)


# Special tokens


def test_bos_once(llava: pyllava.Llava) -> None:
    assert llava.tokenize("", add_bos=True) == [1]
    assert llava.tokenize("") == []
    ids = llava.tokenize("the cat", add_bos=True)
    assert ids[0] == 1
    assert ids[1:] == llava.tokenize("the cat")
    assert 1 not in ids[1:]
    prompt = llava.prompt_tokens(np.zeros((9, 9, 3), np.uint8), "the cat")
    assert prompt.count(1) == 1
    assert prompt[0] == 1


@pytest.mark.parametrize(("text", "token"), [("<s>", 1), ("</s>", 2), ("<unk>", 0)])
def test_special_tokens(llava: pyllava.Llava, trained: Any, text: str, token: int) -> None:
    assert llava.tokenize(text) == [token]
    whole = f"the {text}cat"
    # The fragment behind a special token starts like a text of its own.
    assert llava.tokenize(whole) == [*trained.encode("the "), token, *trained.encode("cat")]
    assert llava.tokenize(whole, parse_special=False) == trained.encode(whole)
    assert token not in llava.tokenize(text, parse_special=False)


def test_plain_ranges(llava: pyllava.Llava, trained: Any) -> None:
    """A marker that only touches a user's words is no marker; one beside them is."""
    text = "a</s>b</s>"
    judge = trained.encode
    tokenize = llava._model.tokenize
    assert tokenize(text) == [*judge("a"), 2, *judge("b"), 2]
    assert tokenize(text, plain=[(1, 5)]) == [*judge("a</s>b"), 2]
    assert tokenize(text, plain=[(0, 1), (5, 6)]) == [*judge("a"), 2, *judge("b"), 2]
    assert tokenize(text, plain=[(4, 6)]) == [*judge("a</s>b"), 2]
    assert tokenize(text, plain=[(0, 2), (9, 10)]) == judge(text)


def test_plain_ranges_of_wide_characters(llava: pyllava.Llava, trained: Any) -> None:
    """Ranges count bytes, not characters."""
    text = "\u4e2d</s>\u00e9</s>"
    at = len("\u4e2d".encode())
    assert llava._model.tokenize(text, plain=[(at, at + 4)]) == [*trained.encode("\u4e2d</s>\u00e9"), 2]


def test_the_converter_keeps_scores_and_kinds(llava: pyllava.Llava, trained: Any) -> None:
    metadata = llava._model.metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    assert tokens == [trained.id_to_piece(i) for i in range(trained.vocab_size())]
    scores = np.array(metadata["tokenizer.ggml.scores"], np.float32)
    assert np.array_equal(
        scores, np.array([trained.get_score(i) for i in range(trained.vocab_size())], np.float32)
    )


# And back


def test_round_trip(llava: pyllava.Llava) -> None:
    for text in strings(3, 4000):
        if "\u2581" not in text:  # stands for a space in the vocabulary, and cannot be told from one
            assert llava.detokenize(llava.tokenize(text, parse_special=False)) == text


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
@settings(max_examples=300, deadline=None)
def test_round_trip_of_anything(llava: pyllava.Llava, text: str) -> None:
    assert llava.detokenize(llava.tokenize(text, parse_special=False)) == text


def test_pieces_are_those_of_sentencepiece(llava: pyllava.Llava, trained: Any) -> None:
    for token in range(llava.info.n_vocab):
        piece, text = llava._model.piece(token), trained.id_to_piece(token)
        if trained.is_byte(token):
            assert piece == bytes([int(text[3:5], 16)])
        elif trained.is_control(token) or trained.is_unknown(token):
            assert piece == b""
            assert llava._model.piece(token, with_special=True) == text.encode()
        else:
            assert piece == text.replace("\u2581", " ").encode()


def test_byte_fallback(llava: pyllava.Llava) -> None:
    ids = llava.tokenize("\U0001f600")
    pieces = [llava._model.piece(token) for token in ids[1:]]
    assert pieces == [bytes([b]) for b in "\U0001f600".encode()]


def test_only_the_end_token_ends(llava: pyllava.Llava) -> None:
    assert [i for i in range(llava.info.n_vocab) if llava._model.is_end(i)] == [2]
    assert not llava._model.is_end(-1)
    assert not llava._model.is_end(llava.info.n_vocab)


@pytest.mark.parametrize("text", ["a \U0001f600\u00e9 b", "\u4e2d\u6587", "the \U0001f1e9\U0001f1ea end"])
def test_a_stream_holds_back_unfinished_characters(llava: pyllava.Llava, text: str) -> None:
    transcript, shown = Transcript(()), []
    for token in llava.tokenize(text):
        shown.append(transcript.push(llava._model.piece(token)))
        assert "\ufffd" not in shown[-1]
    shown.append(transcript.finish())
    assert "".join(shown) == text.strip() == transcript.text


def test_a_character_that_never_ends(llava: pyllava.Llava) -> None:
    """Half a character at the end of an answer, or broken off by another: shown as U+FFFD, nothing lost or raised."""
    first = llava._model.piece(llava.tokenize("\U0001f600")[1])
    transcript = Transcript(())
    assert transcript.push(b"ab") + transcript.push(first) == "ab"
    assert transcript.finish() == "\ufffd"
    transcript = Transcript(())
    shown = transcript.push(first) + transcript.push(b"cd") + transcript.finish()
    assert shown == "\ufffdcd"


@given(st.binary(max_size=40), st.lists(st.integers(0, 40), max_size=6))
@settings(max_examples=200, deadline=None)
def test_a_stream_of_any_bytes(data: bytes, cuts: list[int]) -> None:
    """However the bytes are cut into tokens, the text is the same."""
    places = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    transcript = Transcript(())
    shown = [transcript.push(data[a:b]) for a, b in itertools.pairwise(places)]
    assert "".join(shown) + transcript.finish() == data.decode(errors="replace").strip() == transcript.text


# Wrong input


def test_text_that_is_not_utf8(llava: pyllava.Llava) -> None:
    with pytest.raises(UnicodeEncodeError):
        llava.tokenize("a\ud800b")


INVALID = [
    b"\xff",
    b"\xc0\x80",
    b"a\x80",
    b"\xe4\xb8",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xf0\x80\x80\x80",
]


def tokenize_in_c(llava: pyllava.Llava, data: bytes, ids: Any, room: int) -> tuple[int, int]:
    """Status and count of the C function itself; the count is 99 where none was written."""
    n = ctypes.c_uint64(99)
    with llava._model.handle.use() as at:
        out = (ids.ctypes.data, room, ctypes.byref(n))
        return int(_lib.lib.pyllava_tokenize(at, data, len(data), None, 0, False, *out)), n.value


@pytest.mark.parametrize("data", INVALID)
def test_bytes_that_are_not_utf8(llava: pyllava.Llava, data: bytes) -> None:
    """What a C caller may hand over: an error, nothing written."""
    ids = np.full(16, -7, np.int32)
    status, n = tokenize_in_c(llava, data, ids, len(ids))
    with pytest.raises(ValueError, match="UTF-8"):
        _lib.load._check(status)
    assert n == 99
    assert (ids == -7).all()


def test_too_little_room(llava: pyllava.Llava) -> None:
    """The count comes, and nothing is written beyond the room."""
    text, ids = "the cat and the dog", np.full(16, -7, np.int32)
    whole = llava.tokenize(text)
    status, n = tokenize_in_c(llava, text.encode(), ids, 2)
    with pytest.raises(ValueError, match=f"{len(whole)} tokens"):
        _lib.load._check(status)
    assert n == len(whole)
    assert (ids[2:] == -7).all()
    status, n = tokenize_in_c(llava, text.encode(), ids, len(ids))
    _lib.load._check(status)
    assert ids[:n].tolist() == whole


@pytest.mark.parametrize("token", [-1, 384, 2**31 - 1])
def test_tokens_out_of_range(llava: pyllava.Llava, token: int) -> None:
    with pytest.raises(ValueError, match=r"need 0\.\.383"):
        llava.detokenize([token])


def measured_seconds(run: Callable[[], object]) -> float:
    """Of the CPU, whatever else runs."""
    started = time.process_time()
    run()
    return time.process_time() - started


def test_time_grows_with_length_and_not_faster(llava: pyllava.Llava) -> None:
    """A megabyte without a space: a queue, not a search through all pairs."""
    assert measured_seconds(lambda: llava.tokenize("the" * 350_000)) < 10


# Vocabularies made to cost time

CONTROL, USER = 3, 4  # kinds of tokens


def with_tokens(files: tiny_gguf.Files, path: Path, texts: list[str], kinds: list[int]) -> Path:
    """The model with more tokens behind its own."""
    file = tiny_gguf.read(files.model)
    keys = dict(file.keys)
    for name, more in (("tokens", texts), ("scores", [-1e4] * len(texts)), ("token_type", kinds)):
        value, *types = keys[f"tokenizer.ggml.{name}"]
        keys[f"tokenizer.ggml.{name}"] = ([*value, *more], *types)
    keys.pop("llama.vocab_size", None)
    n_vocab = len(keys["tokenizer.ggml.tokens"][0])
    matrices = {"token_embd.weight", "output.weight"} & set(file.tensors)
    rows = {name: tiny_gguf.f32(np.zeros((n_vocab, 64))) for name in matrices}
    return tiny_gguf.write(path, tiny_gguf.Gguf(keys, file.tensors).with_tensors(rows))


def colliding(n_blocks: int) -> list[str]:
    """2 ** n_blocks texts that FNV-1a gives one value: of each block of six letters two alternatives do."""

    def fnv(state: int, blocks: Any) -> Any:
        state = np.full(len(blocks), state, np.uint32)
        for column in blocks.T:
            state = (state ^ column) * np.uint32(16777619)
        return state

    random_state, state, texts = np.random.RandomState(5), 2166136261, [""]
    for _ in range(n_blocks):
        blocks = random_state.randint(97, 123, (400_000, 6)).astype(np.uint32)
        values = fnv(state, blocks)
        order = np.argsort(values, kind="stable")
        (twice,) = np.nonzero(np.diff(values[order]) == 0)
        a, b = next(
            (i, j)
            for i, j in zip(order[twice], order[twice + 1], strict=True)
            if (blocks[i] != blocks[j]).any()
        )
        state = int(values[a])
        both = ["".join(map(chr, blocks[i])) for i in (a, b)]
        texts = [text + block for text in texts for block in both]
    return texts


def test_texts_made_to_collide(files: tiny_gguf.Files, tmp_path: Path) -> None:
    texts = colliding(15)
    path = with_tokens(files, tmp_path / "x.gguf", texts, [NORMAL] * len(texts))
    assert measured_seconds(lambda: _lib.ModelHandle(path, None).close()) < 1


@pytest.mark.parametrize("shape", ["{0:06d}", "<|reserved_special_token_{0}", "<{0:06d}", "e{1}", "{1}f"])
def test_many_special_tokens(files: tiny_gguf.Files, tmp_path: Path, shape: str) -> None:
    """Alike at the beginning, in the end, or all through."""
    n = 2_000 if "{1}" in shape else 50_000
    texts = [shape.format(i, "a" * (i + 1)) for i in range(n)]
    handle = _lib.ModelHandle(with_tokens(files, tmp_path / "x.gguf", texts, [CONTROL] * n), None)
    prompt = "".join(random.Random(3).choice("<e|a0123 ") for _ in range(20_000)) + texts[0][0] * 20_000
    assert measured_seconds(lambda: handle.tokenize(prompt)) < 1
    some = (0, 1, n // 2, n - 1)
    found = handle.tokenize(" ".join(texts[i] for i in some))
    assert [i - 384 for i in found if i >= 384] == [*some]
    handle.close()


def longest_first(
    texts: list[tuple[bytes, int, bool]], text: bytes, plain: list[tuple[int, int]]
) -> list[int]:
    """The ids of special tokens in a text, by looking at all of them at each byte."""
    found, at = [], 0
    while at < len(text):
        for special, id, of_users in sorted(texts, key=lambda entry: -len(entry[0])):
            end = at + len(special)
            touched = any(a < b and a < end and at < b for a, b in plain)
            if text.startswith(special, at) and (of_users or not touched):
                found.append(id)
                at = end
                break
        else:
            at += 1
    return found


def test_the_longest_special_token_is_found(files: tiny_gguf.Files, tmp_path: Path) -> None:
    """Against a search through all of them, with prefixes of each other, of both kinds, beside plain ranges in any order."""
    generator = random.Random(7)
    texts = sorted({"".join(generator.choices("xyz\u00e9", k=generator.randint(2, 9))) for _ in range(400)})
    kinds = [generator.choice([CONTROL, USER]) for _ in texts]
    handle = _lib.ModelHandle(with_tokens(files, tmp_path / "x.gguf", texts, kinds), None)
    entries = [
        (text.encode(), 384 + i, kind == USER)
        for i, (text, kind) in enumerate(zip(texts, kinds, strict=True))
    ]
    n_found = 0
    for _ in range(300):
        text = "".join(generator.choices("xyz\u00e9 ", k=60))
        size = len(text.encode())
        plain = [tuple(generator.randint(0, size) for _ in range(2)) for _ in range(generator.randint(0, 4))]
        plain = [(a, b) for a, b in plain if a <= b]
        expected = longest_first(entries, text.encode(), plain)
        assert [i for i in handle.tokenize(text, plain=plain) if i >= 384] == expected, (text, plain)
        n_found += len(expected)
    assert n_found > 3000
    handle.close()


def test_many_plain_ranges(llava: pyllava.Llava) -> None:
    text = "</s>" * 50_000
    plain = [(i, i + 1) for i in range(len(text) - 1, 0, -8)]
    assert measured_seconds(lambda: llava._model.tokenize(text, plain=plain)) < 3
