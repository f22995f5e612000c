"""Byte-level BPE against the `tokenizers` library, with trained and with real vocabularies."""

from __future__ import annotations

import importlib.util
import random
import re
import signal
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from bpe import (
    CONTROL,
    LLAMA_BPE,
    QWEN2,
    RULES,
    SPECIAL,
    USER,
    Keys,
    Rule,
    judge_of,
    keys_of,
    parts_of,
    texts_of,
    trained,
)
from texts import strings

import pyllava
from pyllava import _lib
from pyllava.answer import Transcript
from pyllava.errors import ModelMismatchError, UnsupportedModelError

tokenizers = pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")

VOCABULARIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "vocab"
N_STRINGS = 2_000
N_STRINGS_SLOW = 100_000

# Vocabularies


@dataclass(frozen=True)
class Trained:
    """A tokenizer of the library and the same vocabulary in this one."""

    judge: Any
    handle: _lib.ModelHandle


@pytest.fixture(scope="module", params=RULES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    rule = RULES[request.param]
    judge = trained(rule)
    vocab, merges = parts_of(judge)
    path = tiny_gguf.with_vocabulary(
        tmp_path_factory.mktemp(rule.name), keys_of(texts_of(vocab), merges, rule.name)
    )
    handle = _lib.ModelHandle(path, None)
    yield Trained(rule.tokenizer(vocab, merges), handle)
    handle.close()


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pyllava.Llava]:
    vocab, merges = parts_of(trained(QWEN2))
    path = tiny_gguf.with_vocabulary(
        tmp_path_factory.mktemp("llava"), keys_of(texts_of(vocab), merges, "qwen2")
    )
    with pyllava.Llava(path, n_threads=1) as model:
        yield model


def published_file(name: str) -> Path:
    path = VOCABULARIES / f"ggml-vocab-{name}.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


def real(name: str, rule: Rule, folder: Path) -> Trained:
    keys = tiny_gguf.vocabulary_keys(published_file(name))
    return Trained(judge_of(rule, keys), _lib.ModelHandle(tiny_gguf.with_vocabulary(folder, keys), None))


@pytest.fixture(scope="module", params=[LLAMA_BPE, QWEN2], ids=lambda rule: rule.name)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    found = real(request.param.name, request.param, tmp_path_factory.mktemp("published"))
    yield found
    found.handle.close()


# The same ids


def plain_ids(model: _lib.ModelHandle, text: str) -> list[int]:
    return model.tokenize(text, plain=[(0, len(text.encode()))])


def same_composition(text: str) -> bool:
    """Whether Python composes a text as the library does, whose Unicode may be a newer one."""
    return bool(unicodedata.normalize("NFC", text) == tokenizers.normalizers.NFC().normalize_str(text))


def check_strings(found: Trained, seed: int, n: int) -> None:
    seen, left_out = set(), 0
    for text in strings(seed, n):
        if found.handle.info.nfc and not same_composition(text):
            left_out += 1
            continue
        expected = found.judge.encode(text).ids
        assert plain_ids(found.handle, text) == expected, f"{text[:200]!r}"
        seen.update(expected)
    assert len(seen) > 400, "the strings are too much alike"
    assert left_out <= n // 1000


def test_random_strings(both: Trained) -> None:
    check_strings(both, 11, N_STRINGS)


@pytest.mark.slow
def test_many_random_strings(both: Trained) -> None:
    check_strings(both, 12, N_STRINGS_SLOW)


def test_random_strings_with_real_vocabularies(published: Trained) -> None:
    check_strings(published, 13, N_STRINGS)


@pytest.mark.slow
def test_many_random_strings_with_real_vocabularies(published: Trained) -> None:
    check_strings(published, 14, N_STRINGS_SLOW)


def check_cases(handle: _lib.ModelHandle, path: Path) -> None:
    texts = path.with_suffix(".gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    lines = path.with_suffix(".gguf.out").read_text().splitlines()
    assert len(texts) == len(lines) > 40
    for text, line in zip(texts, lines, strict=True):
        assert plain_ids(handle, text) == [int(i) for i in line.split()], repr(text)


def test_published_cases(published: Trained) -> None:
    name = "qwen2" if published.handle.info.nfc else "llama-bpe"
    check_cases(published.handle, published_file(name))


@pytest.mark.slow
def test_every_character_is_in_the_class_of_the_library(both: Trained) -> None:
    """Beside a letter, a digit, a space and a sign each falls into the same piece: neighbours of all classes."""
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for at in range(0, len(codes), 4096):
        text = "".join(f"a{chr(code)}1{chr(code)} {chr(code)}!" for code in codes[at : at + 4096])
        if not both.handle.info.nfc or same_composition(text):
            assert plain_ids(both.handle, text) == both.judge.encode(text).ids, hex(codes[at])


def test_the_table_of_classes_is_that_of_unicode() -> None:
    """As far as Python knows the characters; the table's version stands in its head."""
    root = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location("unicode_ranges", root / "packaging" / "unicode_ranges.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    written = {"L": "LETTER", "N": "NUMBER", "P": "PUNCTUATION"}
    rows = {}
    text = (root / "csrc" / "text" / "unicode_ranges.c").read_text()
    for first, last, name in re.findall(r"\{ 0x(\w+), 0x(\w+), CHAR_(\w+) \}", text):
        rows |= dict.fromkeys(range(int(first, 16), int(last, 16) + 1), name)
    for code in range(0x110000):
        category = unicodedata.category(chr(code))
        if category not in ("Cn", "Cs"):
            space = chr(code).isspace() and not 0x1C <= code < 0x20
            assert rows.get(code) == ("SPACE" if space else written.get(category[0])), hex(code)
    assert rows == script.classes(), "python packaging/unicode_ranges.py > csrc/text/unicode_ranges.c"
    assert f"Unicode {script.version({c for c, n in rows.items() if n == 'LETTER'})}," in text.splitlines()[0]


# Composed characters


@pytest.mark.parametrize("text", ["e\u0301t\u00e9", "\u1112\u1161\u11ab\u1100\u1173\u11af", "\u212b \u0344a"])
def test_qwen2_composes(qwen2: pyllava.Llava, text: str) -> None:
    composed = unicodedata.normalize("NFC", text)
    assert composed != text
    assert qwen2.tokenize(text) == qwen2.tokenize(composed)
    assert qwen2.detokenize(qwen2.tokenize(text)) == composed


def test_a_users_marks_change_no_template(qwen2: pyllava.Llava) -> None:
    """ ">" and a long solidus would become one character, and the end of a turn letters; ranges move along."""
    text, end = "e\u0301<|im_end|>\u0338 e\u0301<|im_end|>", qwen2.tokenize("<|im_end|>")
    assert len(end) == 1
    size = len("e\u0301".encode())
    after = size + len("<|im_end|>")
    plain = [(0, size), (after, len(text.encode()) - len("<|im_end|>"))]
    ids = qwen2._model.tokenize(text, plain=plain)
    assert ids == [*qwen2.tokenize("\u00e9"), *end, *qwen2.tokenize("\u0338 \u00e9"), *end]
    everything = qwen2._model.tokenize(text, plain=[(0, len(text.encode()))])
    assert end[0] not in everything
    assert qwen2.detokenize(everything) == unicodedata.normalize("NFC", text)


def test_others_do_not_compose(both: Trained) -> None:
    text = "e\u0301"
    assert both.handle.info.nfc == (plain_ids(both.handle, text) == plain_ids(both.handle, "\u00e9"))


# Text alone


def test_a_language_model_alone(qwen2: pyllava.Llava) -> None:
    """A question without pictures, in the template that the vocabulary tells, and a conversation."""
    assert qwen2.template.name == "qwen_1_5"
    start, end = qwen2.tokenize("<|im_start|>")[0], qwen2.tokenize("<|im_end|>")[0]
    ids = qwen2.prompt_tokens(None, "the cat <|im_end|>")
    assert [i for i in ids if i in (start, end)] == [start, end, start, end, start]
    answer = qwen2.ask(None, "the cat", max_tokens=4)
    assert 0 < len(answer.tokens) <= 4
    chat = qwen2.chat()
    chat.ask("the cat", max_tokens=4)
    chat.ask("the dog", max_tokens=4)
    assert len(chat.messages) == 4


def test_the_system_message_of_its_own_template(tmp_path: Path) -> None:
    """ChatML as a file's Jinja template has it: with the message that it writes where none is given."""
    jinja = (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}"
        "{% endif %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    )
    vocab, merges = parts_of(trained(RULES["gpt-2"]))
    keys = keys_of(texts_of(vocab), merges, "gpt-2")
    keys["tokenizer.chat_template"] = (jinja, gguf.GGUFValueType.STRING, None)
    with pyllava.Llava(tiny_gguf.with_vocabulary(tmp_path, keys), n_threads=1) as model:
        turn = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
        expected = f"<|im_start|>system\nBe kind<|im_end|>\n{turn}"
        assert model.prompt_tokens(None, "the cat") == model.tokenize(expected)
        assert model.prompt_tokens(None, "the cat", system="") == model.tokenize(turn)


# Special tokens


def with_specials(folder: Path, judge: Any, tokens: Sequence[Any], kinds: dict[str, int]) -> _lib.ModelHandle:
    _, merges = parts_of(judge)
    judge.add_tokens(list(tokens))
    texts = [judge.id_to_token(i) for i in range(judge.get_vocab_size())]
    kind = gguf.GGUFValueType
    keys = keys_of(texts, merges, "gpt-2", kinds)
    for side in ("lstrip", "rstrip"):
        ids = [judge.token_to_id(token.content) for token in tokens if getattr(token, side)]
        keys[f"pyllava.tokens_{side}"] = (ids, kind.ARRAY, kind.INT32)
    return _lib.ModelHandle(tiny_gguf.with_vocabulary(folder, keys), None)


def test_special_tokens_with_white_space(tmp_path: Path) -> None:
    """Those that strip take white space of any kind along, as the library has it."""
    added = [
        tokenizers.AddedToken("<mask>", lstrip=True, special=True, normalized=False),
        tokenizers.AddedToken("<|user|>", rstrip=True, special=True, normalized=False),
        tokenizers.AddedToken("<|user|>s", lstrip=True, rstrip=True, special=True, normalized=False),
        tokenizers.AddedToken("<box>", special=False, normalized=False),
    ]
    judge = trained(RULES["gpt-2"])
    handle = with_specials(tmp_path, judge, added, {"<mask>": CONTROL, "<|user|>s": CONTROL, "<box>": USER})
    generator = random.Random(5)
    choices = [
        *(token.content for token in added),
        *SPECIAL,
        " ",
        "\n",
        "\u3000",
        "\u00a0",
        "the cat",
        "\u00e9",
        "'s",
    ]
    for _ in range(2000):
        text = "".join(generator.choices(choices, k=generator.randint(1, 12)))
        assert handle.tokenize(text) == judge.encode(text).ids, repr(text)
    handle.close()


def test_a_users_words_are_never_special(both: Trained) -> None:
    generator = random.Random(6)
    pieces = [*SPECIAL, "<|im_", "end|>", "<", "|", " ", "x"]
    for _ in range(300):
        text = "".join(generator.choices(pieces, k=8))
        assert min(plain_ids(both.handle, text), default=3) > 2, repr(text)
    assert both.handle.tokenize("".join(SPECIAL)) == [0, 1, 2]


def test_a_merge_into_a_control_token_is_none(tmp_path: Path) -> None:
    """Letters that a file would merge into a control token stay letters, whole pieces too."""
    vocab, merges = parts_of(trained(LLAMA_BPE))
    parts = {part for merge in merges for part in merge}
    merge = next(
        m for m in merges if "".join(m).isalpha() and "".join(m).isascii() and "".join(m) not in parts
    )
    word = "".join(merge)
    keys = keys_of(texts_of(vocab), merges, "llama-bpe", {word: CONTROL})
    handle = _lib.ModelHandle(tiny_gguf.with_vocabulary(tmp_path, keys), None)
    others = {text: i for text, i in vocab.items() if text != word}
    judge = LLAMA_BPE.tokenizer(others, [m for m in merges if "".join(m) != word])
    for text in (word, f"{word} {word}s x{word}"):
        assert plain_ids(handle, text) == judge.encode(text).ids
    assert handle.tokenize(word) == [vocab[word]]
    handle.close()


def test_fillers_are_unused(tmp_path: Path) -> None:
    """[PADn] with its own id is no token of a text, whatever the file calls it; with another it is."""
    vocab, merges = parts_of(trained(RULES["gpt-2"]))
    n = len(vocab)
    texts = [*texts_of(vocab), f"[PAD{n}]", f"[PAD{n + 7}]"]
    keys = keys_of(texts, merges, "gpt-2", dict.fromkeys(texts[n:], USER))
    handle = _lib.ModelHandle(tiny_gguf.with_vocabulary(tmp_path, keys), None)
    assert n not in handle.tokenize(f"[PAD{n}]")
    assert handle.tokenize(f"[PAD{n + 7}]") == [n + 1]
    handle.close()


def test_phi3(tmp_path: Path) -> None:
    """Its tokens take the white space behind them along; its fillers are called unknown."""
    path = published_file("phi-3")
    handle = _lib.ModelHandle(tiny_gguf.with_vocabulary(tmp_path, tiny_gguf.vocabulary_keys(path)), None)
    check_cases(handle, path)
    question = plain_ids(handle, "Hi")
    assert handle.tokenize("<|user|>\n Hi<|end|>\n<|assistant|>\n") == [32010, *question, 32007, 32001]
    assert handle.tokenize("<|endoftext|> Hi") == [32000, *plain_ids(handle, " Hi")]
    assert handle.is_end(32007)
    assert 32011 not in handle.tokenize("[PAD32011]")
    handle.close()


# And back


def test_round_trip(both: Trained) -> None:
    for text in strings(15, N_STRINGS):
        wanted = unicodedata.normalize("NFC", text) if both.handle.info.nfc else text
        pieces = [both.handle.piece(token) for token in plain_ids(both.handle, text)]
        assert b"".join(pieces).decode() == wanted


def test_pieces_are_bytes(both: Trained) -> None:
    """Every byte has a token; special tokens are hidden unless asked for."""
    pieces = [both.handle.piece(token) for token in range(both.handle.info.n_vocab)]
    assert {bytes([byte]) for byte in range(256)} <= set(pieces)
    assert pieces[:3] == [b"", b"", b""]
    assert both.handle.piece(2, with_special=True) == b"<|im_end|>"


def test_a_leading_space_stays(qwen2: pyllava.Llava) -> None:
    """None is put in front of a text, and none is taken away."""
    assert qwen2.detokenize(qwen2.tokenize(" the cat")) == " the cat"
    assert qwen2.tokenize("the") != qwen2.tokenize(" the")


@pytest.mark.parametrize("text", ["a \U0001f600\u00e9 b", "\u4e2d\u6587 \U0001f1e9\U0001f1ea end"])
def test_a_stream_holds_back_unfinished_characters(qwen2: pyllava.Llava, text: str) -> None:
    transcript, shown = Transcript(()), []
    for token in qwen2.tokenize(text):
        shown.append(transcript.push(qwen2._model.piece(token)))
        assert "\ufffd" not in shown[-1]
    assert "".join(shown) + transcript.finish() == text


def test_text_that_is_not_utf8(qwen2: pyllava.Llava) -> None:
    with pytest.raises(UnicodeEncodeError):
        qwen2.tokenize("a\ud800b")


# BOS and the ends of answers


def test_bos_as_the_rule_says(tmp_path: Path) -> None:
    vocab, merges = parts_of(trained(LLAMA_BPE))
    kind = gguf.GGUFValueType
    told = {"add_bos_token": (False, kind.BOOL, None)}
    for pre, more, expected in (("llama-bpe", {}, True), ("qwen2", {}, False), ("llama-bpe", told, False)):
        keys = keys_of(texts_of(vocab), merges, pre, **more)
        handle = _lib.ModelHandle(tiny_gguf.with_vocabulary(tmp_path, keys), None)
        assert handle.info.add_bos is expected
        assert handle.tokenize("the", add_bos=True)[0] == handle.info.bos_id == 0
        handle.close()


def test_no_bos(tmp_path: Path) -> None:
    vocab, merges = parts_of(trained(QWEN2))
    keys = keys_of(texts_of(vocab), merges, "qwen2")
    del keys["tokenizer.ggml.bos_token_id"]
    handle = _lib.ModelHandle(tiny_gguf.with_vocabulary(tmp_path, keys), None)
    assert handle.info.bos_id == handle.info.unk_id == -1
    with pytest.raises(ValueError, match="BOS is wanted"):
        handle.tokenize("the", add_bos=True)
    handle.close()


def test_what_ends_an_answer(both: Trained) -> None:
    assert [i for i in range(both.handle.info.n_vocab) if both.handle.is_end(i)] == [0, 2]


# Files


def load(folder: Path, keys: Keys) -> None:
    _lib.ModelHandle(tiny_gguf.with_vocabulary(folder, keys), None).close()


def test_a_rule_without_a_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Files from before there were names for rules: 'default', with a warning."""
    vocab, merges = parts_of(trained(RULES["default"]))
    with pyllava.Llava(tiny_gguf.with_vocabulary(tmp_path, keys_of(texts_of(vocab), merges, None))) as model:
        judge = RULES["default"].tokenizer(vocab, merges)
        assert model.tokenize("12345!? x") == judge.encode("12345!? x").ids
    assert "tokenizer.ggml.pre is missing: texts are cut as 'default'" in caplog.text


@pytest.mark.parametrize(
    ("rule", "at", "marks"),
    [
        (
            LLAMA_BPE,
            128000,
            {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"},
        ),
        (QWEN2, 151643, {0: "endoftext", 1: "im_start", 2: "im_end"}),
    ],
    ids=["llama-bpe", "qwen2"],
)
def test_rules_known_by_special_tokens(rule: Rule, at: int, marks: dict[int, str], tmp_path: Path) -> None:
    judge = trained(rule)
    vocab, merges = parts_of(judge)
    texts = [text for text in texts_of(vocab) if text not in SPECIAL]
    texts += [f"unused{i}" for i in range(len(texts), at)]
    texts += [f"<|{marks.get(i, f'reserved_{i}')}|>" for i in range(256)]
    keys = keys_of(texts, merges, None, bos_token_id=(at, gguf.GGUFValueType.UINT32, None))
    handle = _lib.ModelHandle(tiny_gguf.with_vocabulary(tmp_path, keys), None)
    assert (handle.info.nfc, handle.info.add_bos) == (rule is QWEN2, rule is LLAMA_BPE)
    ids = {text: i for i, text in enumerate(texts)}
    expected = [ids[judge.id_to_token(i)] for i in judge.encode("I'LL 12345").ids]
    assert plain_ids(handle, "I'LL 12345") == expected
    handle.close()


def test_an_unknown_rule(tmp_path: Path) -> None:
    vocab, merges = parts_of(trained(QWEN2))
    with pytest.raises(
        UnsupportedModelError,
        match=r"tokenizer\.ggml\.pre 'tekken', this version runs 'llama-bpe', .*'default'",
    ):
        load(tmp_path, keys_of(texts_of(vocab), merges, "tekken"))


Change = Callable[[list[str]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda merges: merges.append("ab"), "entry {n} is not two texts"),
        (lambda merges: merges.append(" ab"), "entry {n} is not two texts"),
        (lambda merges: merges.append("ab "), "entry {n} is not two texts"),
        (lambda merges: merges.append(""), "entry {n} is not two texts"),
        (lambda merges: merges.append("a" * 5000 + " " + "b" * 5000), "entry {n} is not two texts"),
        (lambda merges: merges.insert(3, "t zzz"), "entry 3: 'zzz' is no token"),
        (lambda merges: merges.append("z z"), "entry {n}: 'zz' is no token"),
    ],
)
def test_merges_that_fit_no_vocabulary(change: Change, message: str, tmp_path: Path) -> None:
    vocab, merges = parts_of(trained(QWEN2))
    keys = keys_of(texts_of(vocab), merges, "qwen2")
    change(keys["tokenizer.ggml.merges"][0])
    with pytest.raises(ModelMismatchError, match=message.format(n=len(merges))):
        load(tmp_path, keys)


def test_no_merges(tmp_path: Path) -> None:
    vocab, merges = parts_of(trained(QWEN2))
    keys = keys_of(texts_of(vocab), merges, "qwen2")
    del keys["tokenizer.ggml.merges"]
    with pytest.raises(ModelMismatchError, match=r"key tokenizer\.ggml\.merges is missing"):
        load(tmp_path, keys)


def test_bytes_that_the_vocabulary_lacks_are_left_out(tmp_path: Path) -> None:
    """As in the library: SmolLM's has no token for some control characters."""
    judge = trained(RULES["gpt-2"])
    vocab, merges = parts_of(judge)
    lost = "\u0104"  # stands for byte 4
    texts = [text if text != lost else "lost" for text in texts_of(vocab)]
    kept = {text: i for i, text in enumerate(texts)}
    handle = _lib.ModelHandle(tiny_gguf.with_vocabulary(tmp_path, keys_of(texts, merges, "gpt-2")), None)
    expected = RULES["gpt-2"].tokenizer(kept, merges).encode("x\x04\x04!\x04!").ids
    assert plain_ids(handle, "x\x04\x04!\x04!") == expected
    assert expected
    handle.close()


# Time


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "ab",
        " ",
        "1",
        "!",
        "\n ",
        "'s",
        "'",
        "the ",
        "\u00e9",
        "\u4e2d",
        "\u0301",
        " \u0301",
        "\r\n\t",
        "a1",
    ],
)
def test_a_megabyte_takes_less_than_a_second(both: Trained, unit: str) -> None:
    """A queue for the merges, and rules that look at each character a few times."""
    text = unit * (1_000_000 // len(unit.encode()))
    started = time.process_time()
    both.handle.tokenize(text)
    assert time.process_time() - started < 1


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer")
def test_an_interrupt_does_not_wait_for_a_long_text(qwen2: pyllava.Llava) -> None:
    text = "ab" * 4_000_000

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    started = time.perf_counter()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            qwen2.tokenize(text)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    interrupted = time.perf_counter() - started
    started = time.perf_counter()
    assert len(qwen2.tokenize(text)) > 1_000_000
    assert interrupted < (time.perf_counter() - started) / 2


def test_errors_of_a_long_text(qwen2: pyllava.Llava) -> None:
    with pytest.raises(ValueError, match="need at most 64 MiB"):
        qwen2.tokenize("a" * ((64 << 20) + 1))
