"""The fast mode: the same answers as the exact one within its gates, on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from PIL import Image

import pyllava
from pyllava import _lib, models
from pyllava.quantize import quantize

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
F16 = Path(__file__).parent / "data" / "demo"
PICTURES = ["scene.png", "sign.png", "bread.png"]
QUESTION = "What is in the picture?"
SETS = ["plain", "avx2", "avxvnni", "avx512", "avx512vnni", "neon", "neondot", "neoni8mm"]
Open = Callable[..., pyllava.Llava]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    models = []

    def make(cpu: str | None = None, **options: Any) -> pyllava.Llava:
        if cpu is None:
            monkeypatch.delenv("PYLLAVA_CPU", raising=False)
        else:
            monkeypatch.setenv("PYLLAVA_CPU", cpu)
        models.append(pyllava.Llava(**{"n_threads": 1, "precision": "fast"} | options))
        return models[-1]

    yield make
    for model in models:
        model.close()


def on_this_machine(opened: Open, cpu: str) -> pyllava.Llava:
    try:
        return opened(cpu)
    except ValueError:
        pytest.skip(f"no {cpu} here")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def kld(expected: np.ndarray, found: np.ndarray) -> float:
    p, q = log_softmax(expected), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("cpu", SETS)
def test_within_the_gates(opened: Open, cpu: str) -> None:
    """Vision: cosine 0.9998 on average and 0.9995 for the worst row; logits: KL divergence 5e-4."""
    fast, exact = on_this_machine(opened, cpu), opened(precision="exact")
    divergences = []
    for name in PICTURES:
        a, b = (m.encode_image(EXAMPLES / name).array.astype(np.float64) for m in (exact, fast))
        cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert cosines.mean() >= 0.9998
        assert cosines.min() >= 0.9995
        divergences.append(kld(*(m.logits(EXAMPLES / name, QUESTION) for m in (exact, fast))))
        assert str(fast.ask(EXAMPLES / name, QUESTION)) == str(exact.ask(EXAMPLES / name, QUESTION))
    assert np.mean(divergences) <= 5e-4
    assert max(divergences) > 1e-9, "computed as in the exact mode"


def with_outliers(path: Path, out: Path, factor: float) -> Path:
    """The same tower: normalised activations of a few channels are `factor` times larger, the weights that read them smaller.

    Trained towers have such channels; what rounds activations with one scale for many loses the others beside them.
    """
    file = tiny_gguf.read(path)
    changed: dict[str, np.ndarray] = {}
    for name in [name for name in file.tensors if name.endswith(("ln1.weight", "ln2.weight"))]:
        block, norm, _ = name.rsplit(".", 2)
        channels = [(7 * int(block.rsplit(".", 1)[1]) + at) % 192 for at in (3, 90)]
        for part in ("weight", "bias"):
            vector = file.tensors[f"{block}.{norm}.{part}"].data.astype(np.float32)
            vector[channels] *= factor
            changed[f"{block}.{norm}.{part}"] = vector
        for reader in ("attn_q", "attn_k", "attn_v") if norm == "ln1" else ("ffn_down",):
            matrix = file.tensors[f"{block}.{reader}.weight"].data.astype(np.float32)
            matrix[:, channels] /= factor
            changed[f"{block}.{reader}.weight"] = matrix
    return tiny_gguf.write(out, file.with_tensors({name: tiny_gguf.f32(x) for name, x in changed.items()}))


def with_outlier_neurons(path: Path, out: Path, factor: float) -> Path:
    """Of each block's hidden neurons a few are `factor` times larger, and what reads them smaller."""
    file = tiny_gguf.read(path)
    changed: dict[str, np.ndarray] = {}
    for name in [name for name in file.tensors if name.endswith("ln2.weight")]:
        block = name.rsplit(".", 2)[0]  # the file calls fc1 ffn_down
        rows, columns = (file.tensors[f"{block}.{part}.weight"].data for part in ("ffn_down", "ffn_up"))
        bias = file.tensors[f"{block}.ffn_down.bias"].data
        fc1, fc2, bias = (np.array(x, np.float32) for x in (rows, columns, bias))
        neurons = [(31 * int(block.rsplit(".", 1)[1]) + at) % len(fc1) for at in (5, 300)]
        fc1[neurons] *= factor
        bias[neurons] *= factor
        fc2[:, neurons] /= factor
        changed |= {f"{block}.ffn_down.weight": fc1, f"{block}.ffn_down.bias": bias}
        changed[f"{block}.ffn_up.weight"] = fc2
    return tiny_gguf.write(out, file.with_tensors({name: tiny_gguf.f32(x) for name, x in changed.items()}))


@pytest.mark.skipif(not F16.is_dir(), reason="the f16 pair is kept in the repository only")
@pytest.mark.parametrize("cpu", SETS)
@pytest.mark.parametrize(
    ("make", "factor"),
    [(with_outliers, 30), (with_outliers, 100), (with_outlier_neurons, 30)],
)
def test_a_tower_with_outliers(
    opened: Open, tmp_path: Path, cpu: str, make: Callable[[Path, Path, float], Path], factor: float
) -> None:
    mmproj = make(F16 / "demo-mmproj-f16.gguf", tmp_path / "mmproj.gguf", factor)
    model = models.find(None, None).model
    try:
        fast = opened(cpu, model=model, mmproj=mmproj)
    except ValueError:
        pytest.skip(f"no {cpu} here")
    exact = opened(model=model, mmproj=mmproj, precision="exact")
    a, b = (m.encode_image(EXAMPLES / "scene.png").array.astype(np.float64) for m in (exact, fast))
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert cosines.mean() >= 0.9998
    assert cosines.min() >= 0.9995


@pytest.mark.parametrize("n_threads", [2, 3])
def test_the_same_bytes_for_any_thread_count(opened: Open, n_threads: int) -> None:
    one, more = opened(), opened(n_threads=n_threads)
    picture = EXAMPLES / "scene.png"
    for angle in range(3):
        image = Image.open(picture).rotate(angle)
        assert np.array_equal(one.encode_image(image).array, more.encode_image(image).array)
        assert np.array_equal(one.logits(picture, QUESTION), more.logits(picture, QUESTION))
        assert one.ask(picture, QUESTION).tokens == more.ask(picture, QUESTION).tokens


@pytest.mark.skipif(not F16.is_dir(), reason="the f16 pair is kept in the repository only")
def test_weights_that_the_engine_multiplies(opened: Open, tmp_path: Path) -> None:
    """Few tokens of types without a kernel: such graphs run on the engine's threads, the prompt on ours."""
    demo = models.find(None, None)
    quantize(F16 / "demo-f16.gguf", tmp_path / "model.gguf", "q5_0")
    exact, one, more = (
        opened(model=tmp_path / "model.gguf", mmproj=demo.mmproj, **options)
        for options in ({"precision": "exact"}, {"n_threads": 1}, {"n_threads": 3})
    )
    picture = EXAMPLES / "scene.png"
    for _ in range(2):
        answers = [model.ask(picture, QUESTION) for model in (exact, one, more)]
        assert answers[0].text == answers[1].text
        assert answers[1].tokens == answers[2].tokens
        assert np.array_equal(one.logits(None, QUESTION), more.logits(None, QUESTION))


def regrouped(llava: pyllava.Llava, name: str) -> tuple[dict[str, bool], float]:
    """Whether positions computed in other company have the bytes of one batch; the divergence of an answer's rows."""
    picture, answer = llava.encode_image(EXAMPLES / name), llava.ask(EXAMPLES / name, QUESTION).tokens
    prompt: list[_lib.Span] = [
        _lib.Tokens([part]) if isinstance(part, int) else _lib.Rows(picture.array, picture.key)
        for part in llava.prompt_tokens(picture, QUESTION)
    ]
    parts, n_prompt = [*prompt, _lib.Tokens(answer)], sum(map(len, prompt))

    def session(n_batch: int) -> _lib.SessionHandle:
        options = {"n_ctx": 512, "n_seq": 2, "n_threads": 1, "precision": "fast"}
        return _lib.SessionHandle(llava._model, n_batch=n_batch, **options)

    usual = session(512)
    expected = usual.logits(parts)
    usual.prefill([_lib.Tokens(llava.tokenize("something else"))])
    found = {"slot": np.array_equal(expected, usual.logits(parts, seq=1))}
    for n_batch in (16, 5):
        small = session(n_batch)
        found[f"n_batch {n_batch}"] = np.array_equal(expected, small.logits(parts))
        small.close()
    usual.prefill(parts)
    for n in (1, n_prompt // 2, n_prompt, len(expected) - 1):  # one of them inside the picture
        usual.seq_trim(0, n)
        last, n_reused = usual.prefill(parts)
        assert n_reused == n
        found[f"reuse of {n} of {len(expected)}"] = np.array_equal(expected[-1], last)
    usual.seq_trim(0, n_prompt)
    steps = np.stack([usual.decode([token])[0] for token in answer])
    usual.close()
    return found, kld(expected[n_prompt:], steps)


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m"])
def test_another_grouping_changes_nothing(opened: Open, tmp_path: Path, name: str, kind: str) -> None:
    """Batch size, sequence slot, prefix reuse: the same bytes. Rows of an answer, one at a time: KL divergence 5e-4."""
    demo = models.find(None, None)
    model = demo.model
    if kind != "q8_0":
        if not F16.is_dir():
            pytest.skip("the f16 pair is kept in the repository only")
        model = tmp_path / "model.gguf"
        quantize(F16 / "demo-f16.gguf", model, kind)
    same, decoded = regrouped(opened(model=model, mmproj=demo.mmproj), name)
    assert all(same.values()), same
    assert decoded <= 5e-4


@pytest.mark.parametrize("cpu", SETS)
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0", "q4_k_m", "q6_k"])
def test_rows_of_answers_do_not_depend_on_each_other(
    opened: Open, tmp_path: Path, cpu: str, kind: str
) -> None:
    """1, 2, 3, 8, 9 and 17 sequences a step: each row has the bytes that it has alone."""
    if not F16.is_dir():
        pytest.skip("the f16 pair is kept in the repository only")
    model = F16 / "demo-f16.gguf"
    if kind != "f16":
        quantize(model, tmp_path / "model.gguf", kind)
        model = tmp_path / "model.gguf"
    try:
        llava = opened(cpu, model=model, mmproj=models.find(None, None).mmproj)
    except ValueError:
        pytest.skip(f"no {cpu} here")
    options = {"n_ctx": 64, "n_threads": 2, "precision": "fast"}
    session = _lib.SessionHandle(llava._model, n_seq=17, **options)
    prompts = [llava.tokenize(f"the {i} shapes", add_bos=True) for i in range(17)]
    rows: dict[int, list[np.ndarray]] = {}
    for n in (1, 2, 3, 8, 9, 17):
        for i in range(0, 17, n):
            seqs = list(range(i, min(i + n, 17)))
            for seq in seqs:
                session.prefill([_lib.Tokens(prompts[seq])], seq=seq)
            for seq, row in zip(seqs, session.decode([50 + seq for seq in seqs], seqs=seqs), strict=True):
                rows.setdefault(seq, []).append(row)
    session.close()
    for found in rows.values():
        assert all(np.array_equal(found[0], row) for row in found)


def test_asking_again(opened: Open) -> None:
    model = opened()
    first, again = (model.ask(EXAMPLES / "scene.png", QUESTION) for _ in range(2))
    assert again.usage.cached_tokens > 0
    assert first.text == again.text


def test_it_is_the_default(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYLLAVA_PRECISION", raising=False)
    usual, fast = opened(precision=None), opened()
    assert usual.precision == "fast"
    assert np.array_equal(*(m.logits(EXAMPLES / "scene.png", QUESTION) for m in (usual, fast)))


def test_a_set_that_is_not_there(opened: Open) -> None:
    with pytest.raises(ValueError, match="PYLLAVA_CPU=sse9"):
        opened("sse9")


def test_exact_does_not_look_at_it(opened: Open) -> None:
    opened("sse9", precision="exact")


def test_cancel_and_go_on(opened: Open) -> None:
    model = opened()
    stream = model.ask(EXAMPLES / "scene.png", QUESTION, stream=True)
    next(stream)
    model.cancel()
    with pytest.raises(pyllava.GenerationCancelled):
        list(stream)
    assert model.ask(EXAMPLES / "scene.png", QUESTION).text


def test_numbers_that_are_not_finite_are_not_rounded_away(opened: Open) -> None:
    model = opened()
    rows = model.encode_image(EXAMPLES / "scene.png")
    array = rows.array.copy()
    array[3, 5] = np.nan
    with pytest.raises(pyllava.NumericError):
        model.ask(pyllava.ImageEmbedding(array, rows.size, 77), QUESTION)
