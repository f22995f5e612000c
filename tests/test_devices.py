"""Where a model's parts lie, and that the numbers are the same wherever that is.

The first half needs no GPU. The second runs on devices: those that $PYLLAVA_TEST_DEVICES names, with commas between
them, else the GPUs that this build finds; without any it is skipped. `make test-vulkan` runs it in software.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_gguf
from reference import gates
from reference.cases import (
    CASES,
    GOLDEN_CASES,
    GOLDEN_PICTURE,
    Array,
    newline,
    picture,
    pinpoints,
    prompt,
    text,
)
from reference.goldens import N_GREEDY, part, read_golden, some_rows
from reference.subject import Subject
from tiny import TinySpec

import pyllava
from pyllava import _lib, cli, images
from pyllava._lib import Placement, Rows, Span, Tokens
from pyllava.quantize import quantize
from pyllava.views import ImageSpec, preprocess

# Heads of 64, in both models: CUDA's flash attention has no smaller ones but 40.
SPEC = TinySpec(seed=60, n_layer=4, n_ctx=4096, n_embd=256, n_ff=320, v_embd=128, v_ff=192)


def found_devices() -> list[str]:
    named = os.environ.get("PYLLAVA_TEST_DEVICES")
    if named:
        return named.split(",")
    return [device.name for device in pyllava.devices() if device.kind in ("gpu", "integrated")]


DEVICES = found_devices()
on_a_device = pytest.mark.skipif(not DEVICES, reason="no GPU here")
on_two_devices = pytest.mark.skipif(len(DEVICES) < 2, reason="no two GPUs here")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tiny_gguf.Files:
    return tiny_gguf.convert(tmp_path_factory.mktemp("devices"), SPEC)


# --- without a device ---


def test_the_cpu_is_a_device() -> None:
    cpu = next(device for device in pyllava.devices() if device.name == "CPU")
    assert cpu.kind == "cpu"
    assert cpu.backend == "CPU"
    assert cpu.memory_total > 0


def test_all_on_the_cpu(files: tiny_gguf.Files) -> None:
    with pyllava.Llava(files.model, files.mmproj, device="cpu") as model:
        assert model.devices.layers == ("CPU",) * SPEC.n_layer
        assert (model.devices.output, model.devices.vision) == ("CPU", "CPU")
        assert model.devices.n_gpu_layers == 0
        assert str(model.devices) == "layers 0-3: CPU, output: CPU, vision: CPU"
    with pyllava.Llava(files.model, device="CPU") as model:
        assert model.devices.vision is None


def test_layers_without_a_gpu_warn_once(files: tiny_gguf.Files, caplog: pytest.LogCaptureFixture) -> None:
    for n, n_warnings in ((-1, 0), (0, 0), (20, 1)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "pyllava"):
            pyllava.Llava(files.model, files.mmproj, device="cpu", n_gpu_layers=n).close()
        texts = [record.getMessage() for record in caplog.records]
        texts = [text for text in texts if "template" not in text]
        assert len(texts) == n_warnings, texts
        assert all("n_gpu_layers=20 has no effect: device is cpu" in text for text in texts)


def test_the_log_says_where_things_are(files: tiny_gguf.Files, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pyllava"):
        pyllava.Llava(files.model, files.mmproj, device="cpu").close()
    texts = [record.getMessage() for record in caplog.records]
    assert "language model: layers 0-3 on the CPU, output on the CPU" in texts
    assert "clip_model_load: CLIP using CPU backend" in texts


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cuda9"}, pyllava.DeviceError, "device: found 'cuda9', there are: .*CPU"),
        ({"device": ""}, pyllava.DeviceError, "device: found ''"),
        ({"device": "cpu,cpu"}, pyllava.DeviceError, "device: found 'cpu'"),
        ({"device": "auto0"}, pyllava.DeviceError, "device: found 'auto0'"),
        ({"vision_device": "cuda9"}, pyllava.DeviceError, "vision_device: found 'cuda9'"),
        ({"n_gpu_layers": -2}, ValueError, "n_gpu_layers: found -2, need -1 or more"),
        ({"n_gpu_layers": 1 << 40}, ValueError, "n_gpu_layers: found 1099511627776"),
        ({"main_gpu": -1}, ValueError, "main_gpu: found -1"),
        ({"main_gpu": 77}, ValueError, "main_gpu: found 77"),
        ({"tensor_split": [1, -1]}, ValueError, "tensor_split: share 1 is -1"),
        ({"tensor_split": [float("nan")]}, ValueError, "tensor_split: share 0 is nan"),
        ({"tensor_split": [0]}, ValueError, "tensor_split: all shares are 0"),
        ({"tensor_split": np.zeros(1)}, ValueError, "tensor_split: all shares are 0"),
        ({"device": "cpu\0"}, ValueError, "device: found"),
        ({"device": None}, ValueError, "device: found None"),
        ({"flash_attn": True, "precision": "exact"}, ValueError, "flash_attn"),
    ],
)
def test_wrong_wishes_are_named(
    files: tiny_gguf.Files, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pyllava.Llava(files.model, files.mmproj, **options)


def test_a_plan_loads_nothing(files: tiny_gguf.Files, tmp_path: Path) -> None:
    plan = _lib.plan_devices(files.model, files.mmproj, Placement(device="cpu"))
    assert plan.layers == ("CPU",) * SPEC.n_layer
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(files.model.read_bytes()[:100])
    with pytest.raises(pyllava.ModelFileError):
        _lib.plan_devices(broken, None)


def test_the_environment_chooses_where_nothing_else_does(
    files: tiny_gguf.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYLLAVA_DEVICE", "cuda9")
    with pytest.raises(pyllava.DeviceError, match="cuda9"):
        pyllava.Llava(files.model, files.mmproj)
    pyllava.Llava(files.model, files.mmproj, device="cpu").close()


def test_list_devices(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--list-devices"], ["chat", "--list-devices"]):
        assert cli.main(arguments) == 0
        shown = capsys.readouterr()
        assert "CPU: " in shown.out
        assert shown.err == ""


def test_info_says_where_a_model_would_go(
    files: tiny_gguf.Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYLLAVA_DEVICE", "cpu")
    assert cli.main(["info", str(files.model)]) == 0
    assert "\non this machine: layers 0-3: CPU, output: CPU\n" in capsys.readouterr().out
    assert cli.main(["info", str(files.model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"]["output"] == "CPU"
    assert cli.main(["info", str(files.mmproj)]) == 0
    assert "on this machine" not in capsys.readouterr().out


# --- on a device ---

# Products with bf16 weights have activations of 8 bits of mantissa on devices.
BF16 = gates.Gate(nmse=1e-4, kld=2e-4)
# Some layers by the CPU in its fast mode: activations of 12 bits.
PARTLY_FAST = gates.Gate(nmse=5e-5, kld=1e-4)

PLACES: dict[str, dict[str, Any]] = {
    "all": {},
    "half": {"n_gpu_layers": 2},
    "all but the output": {"n_gpu_layers": 4},
    "the tower": {"n_gpu_layers": 0},
    "no tower": {"vision_device": "cpu"},
    "the cache on the host": {"kv_on_host": True},
    "half, the cache on the host": {"n_gpu_layers": 2, "kv_on_host": True},
}


def place(**options: Any) -> Placement:
    return Placement(**{"device": DEVICES[0], "n_gpu_layers": 99, **options})


def ids(seed: int, n: int) -> list[int]:
    return text(seed, n, SPEC.n_vocab)


def views(n: int) -> Array:
    shape = (n, 3, SPEC.image_size, SPEC.image_size)
    return np.random.RandomState(1).standard_normal(shape).astype(np.float32)


class Run:
    """A model in some place, and a session of it."""

    def __init__(self, files: tiny_gguf.Files, placement: Placement, **session: Any) -> None:
        self.model = _lib.ModelHandle(files.model, files.mmproj, placement=placement)
        options = {"n_ctx": 256, "n_threads": 2, "precision": "fast", **session}
        self.session = _lib.SessionHandle(self.model, **options)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()
        self.model.close()

    def everything(self) -> list[Array]:
        """Views, a prefill with a picture, decoding, and all logits."""
        rows = self.session.encode(views(2))
        prompt = [Tokens([1, *ids(1, 30)]), Rows(rows[0], 5), Tokens(ids(2, 41))]
        found = [rows, self.session.prefill(prompt)[0]]
        found += [self.session.decode([token])[0] for token in ids(3, 4)]
        return [*found, self.session.logits(prompt)]


@pytest.fixture(scope="module")
def expected(files: tiny_gguf.Files) -> list[Array]:
    """By the CPU, exactly."""
    with Run(files, Placement(device="cpu"), precision="exact") as run:
        return run.everything()


def near(expected: list[Array], found: list[Array]) -> None:
    gates.check("embeddings", gates.EMBEDDINGS_F16, expected[0], found[0])
    for i, (a, b) in enumerate(zip(expected[1:], found[1:], strict=True)):
        gates.check(f"logits {i}", PARTLY_FAST, a, b)


@on_a_device
@pytest.mark.parametrize("name", GOLDEN_CASES)
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_parity(name: str, precision: str, tmp_path: Path) -> None:
    """Against the numbers of `transformers`, with the gates of 16-bit computation."""
    case, golden = CASES[name], read_golden(name)
    files = tiny_gguf.convert(tmp_path, case.spec, outtype=case.outtype)
    subject = Subject(files, place(), precision=precision)
    assert subject.model.devices.n_gpu_layers == case.spec.n_layer + 1
    image = images.load_image(picture(*GOLDEN_PICTURE))
    pixels = preprocess(image, ImageSpec(case.spec.image_size)).pixels
    found = subject.encode(pixels)
    assert set(found) - {"mm.2"} == set(part(golden, "tower/"))
    gates.check("embeddings", gates.EMBEDDINGS_F16, golden["embeddings"], found["mm.2"])
    parts = prompt(case.spec, [subject.session.encode(pixels)[0]])
    gate = BF16 if case.outtype == "bf16" else gates.LOGITS_F16
    gates.check("logits", gate, golden["logits"], some_rows(subject.logits(parts), 8))
    if precision == "exact":
        assert subject.greedy(parts, N_GREEDY) == golden["greedy"].tolist()
    subject.close()


@on_a_device
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("flash_attn", [True, False])
def test_every_place_gives_the_same(
    files: tiny_gguf.Files, expected: list[Array], name: str, flash_attn: bool
) -> None:
    with Run(files, place(**PLACES[name]), flash_attn=flash_attn) as run:
        wanted = place(**PLACES[name])
        n = min(wanted.n_gpu_layers, SPEC.n_layer)
        assert run.model.devices.layers == ("CPU",) * (SPEC.n_layer - n) + (DEVICES[0],) * n
        assert run.model.devices.vision == ("CPU" if wanted.vision_device == "cpu" else DEVICES[0])
        near(expected, run.everything())


@on_two_devices
@pytest.mark.parametrize("split", [None, [1, 3], [0, 1]])
def test_two_devices(files: tiny_gguf.Files, expected: list[Array], split: list[float] | None) -> None:
    names = ",".join(DEVICES[:2])
    with Run(files, place(device=names, tensor_split=split, main_gpu=1)) as run:
        used = run.model.devices
        assert used.vision == DEVICES[1]
        assert used.output == DEVICES[1]
        if split == [0, 1]:
            assert set(used.layers) == {DEVICES[1]}
        else:
            assert set(used.layers) == set(DEVICES[:2])
        near(expected, run.everything())


@on_two_devices
def test_language_and_vision_apart(files: tiny_gguf.Files, expected: list[Array]) -> None:
    for device, vision in ((DEVICES[0], DEVICES[1]), ("cpu", DEVICES[0])):
        with Run(files, place(device=device, vision_device=vision)) as run:
            assert run.model.devices.vision == vision
            assert set(run.model.devices.layers) == {"CPU" if device == "cpu" else device}
            near(expected, run.everything())


@on_a_device
def test_the_same_again(files: tiny_gguf.Files) -> None:
    """A, A, B, B, A: nothing of one prompt stays for the next."""
    with Run(files, place()) as run:
        a, b = ([Tokens([1, *ids(seed, n)])] for seed, n in ((7, 60), (8, 75)))

        def ask(spans: list[Span]) -> bytes:
            run.session.seq_trim(0, 0)
            logits, _ = run.session.prefill(spans)
            return b"".join([logits.tobytes(), run.session.decode([5])[0].tobytes()])

        found = [ask(spans) for spans in (a, a, b, b, a)]
        assert found[0] == found[1] == found[4] != found[2] == found[3]


@on_a_device
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_sequences(tmp_path: Path, kind: str) -> None:
    """Several sequences in one step, cells shared and freed: as on the CPU."""
    spec = TinySpec(seed=61, n_embd=128, n_head=4, n_head_kv=2, n_ctx=4096)
    files = tiny_gguf.convert(tmp_path, spec)

    def steps(placement: Placement) -> list[Array]:
        with Run(files, placement, n_seq=4, n_ctx=300, n_batch=64, type_k=kind, type_v=kind) as run:
            session = run.session
            found = [
                session.prefill([Tokens([1, *text(seed, 40 * seed, spec.n_vocab)])], seq=seed)[0]
                for seed in (1, 3)
            ]
            session.seq_copy(3, 0, 100)
            session.seq_trim(1, 20)
            found.append(session.decode([4, 5, 6], seqs=[0, 1, 3]))
            session.seq_trim(3, 0)
            found.append(session.prefill([Tokens([1, *text(9, 270, spec.n_vocab)])], seq=2)[0])
            found.append(session.decode([7, 8, 9], seqs=[0, 1, 2]))
            return found

    for a, b in zip(steps(Placement(device="cpu")), steps(place()), strict=True):
        gates.check(kind, gates.Gate(kld=5e-4), a, b)


@on_a_device
@pytest.mark.parametrize("kind", ["f16", "f32", "q8_0"])
@pytest.mark.parametrize("flash", [True, False])
def test_any_sequences_in_a_step(tmp_path: Path, kind: str, flash: bool) -> None:
    """Devices read ranges of cells: of neighbours at once, of some with gaps, of those that share or are cut up."""
    spec = TinySpec(seed=63, n_embd=128, n_head=4, n_head_kv=2, n_ctx=4096)
    files = tiny_gguf.convert(tmp_path, spec)
    n_seq = 12
    steps = [
        range(n_seq),
        range(1, n_seq),
        (0, 2, 4, 6),
        (0, 1, 2, 5, 6, 7, 9, 11),
        (0, 1, 3, 6, 8, 9, 11),
        (11, 4, 7),
    ]

    def run(placement: Placement, flash_attn: bool | None) -> list[Array]:
        shape = {"n_seq": n_seq, "n_ctx": 300, "n_batch": 64, "type_k": kind, "type_v": kind}
        with Run(files, placement, flash_attn=flash_attn, **shape) as tried:
            session, found = tried.session, []
            for seq in range(n_seq - 2):  # the last ones share cells
                found.append(
                    session.prefill(
                        [Tokens([1, *text(seed=seq, n=20 + 7 * seq, n_vocab=spec.n_vocab)])], seq=seq
                    )[0]
                )
            session.seq_copy(3, n_seq - 2, 15)
            session.seq_copy(4, n_seq - 1, 30)
            for n, seqs in enumerate(steps):
                found.append(session.decode([3 + n] * len(seqs), seqs=list(seqs)))
            session.seq_trim(2, 0)
            session.seq_trim(5, 7)
            more = [Tokens(text(21, 12, spec.n_vocab))], [Tokens(text(22, 12, spec.n_vocab))]
            found += [
                session.prefill([Tokens([1]), *spans], seq=seq)[0]
                for seq, spans in zip((2, 5), more, strict=True)
            ]
            found.append(session.prefill([Tokens([1, *text(23, 280, spec.n_vocab)])], seq=7)[0])
            found.append(session.decode([5] * n_seq, seqs=list(range(n_seq))))
            return found

    for a, b in zip(run(Placement(device="cpu"), None), run(place(), None if flash else False), strict=True):
        gates.check(kind, gates.Gate(kld=5e-4), a, b)


@on_a_device
def test_what_is_not_a_number_stays_alone(files: tiny_gguf.Files) -> None:
    """Devices look at cells that a token does not see: what is in them must not matter."""
    bad = np.full((30, SPEC.n_embd), np.nan, np.float32)
    with Run(files, place(), n_seq=2) as run:
        good: list[Span] = [Tokens([1, *ids(1, 50)])]
        first = run.session.prefill(good, seq=0)[0]
        with pytest.raises(pyllava.NumericError, match="position 1: entry 0 is not finite"):
            run.session.prefill([Tokens([1]), Rows(bad, 3), Tokens(ids(2, 5))], seq=1)
        run.session.seq_trim(0, 0)
        assert run.session.prefill(good, seq=0)[0].tobytes() == first.tobytes()
        other: list[Span] = [Tokens([1, *ids(4, 70)])]
        run.session.prefill(other, seq=1)
        assert np.isfinite(run.session.decode([3, 4], seqs=[0, 1])).all()


@on_a_device
@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_k", "q5_k", "q6_k", "q3_k", "bf16"])
def test_weight_types(kind: str, tmp_path: Path) -> None:
    """Near what the CPU computes exactly with the same weights.

    Where activations are rounded to 8 bits, as in the CPU's fast mode and in CUDA, this narrow model shows 1e-3, 2e-3 on CUDA.
    """
    gate = gates.Gate(kld=3e-3)
    spec = TinySpec(seed=62, n_embd=256, n_head=4, n_head_kv=2, n_ff=512, n_ctx=512)
    files = tiny_gguf.convert(tmp_path, spec)
    small = tmp_path / f"{kind}.gguf"
    quantize(files.model, small, kind)
    some: list[Span] = [Tokens([1, *text(3, 100, spec.n_vocab)])]
    found = []
    for placement, precision in (
        (Placement(device="cpu"), "exact"),
        (place(), "fast"),
        (place(n_gpu_layers=1), "fast"),
    ):
        with Run(tiny_gguf.Files(small, None), placement, precision=precision) as run:
            found.append((run.session.logits(some), run.session.decode([5])))
    for logits, decoded in found[1:]:
        gates.check(f"{kind}, many tokens", gate, found[0][0], logits)
        gates.check(f"{kind}, one token", gate, found[0][1], decoded)


@on_a_device
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_matrices_that_a_device_cannot_multiply(tmp_path: Path, precision: str) -> None:
    """They stay in host memory, all of every layer: the CPU and the device take turns within a layer."""
    spec = TinySpec(seed=62, n_embd=256, n_head=4, n_head_kv=2, n_ff=512, n_ctx=512, n_layer=4)
    file = tiny_gguf.read(tiny_gguf.convert(tmp_path, spec).model)
    kind = gguf.GGMLQuantizationType.TQ2_0  # ternary
    matrices = {
        name: tiny_gguf.quantized(tensor.floats(), kind)
        for name, tensor in file.tensors.items()
        if name.startswith("blk.") and tensor.data.ndim == 2
    }
    path = tiny_gguf.write(tmp_path / "ternary.gguf", file.with_tensors(matrices))
    some: list[Span] = [Tokens([1, *text(3, 100, spec.n_vocab)])]
    found = []
    for placement, mode in ((Placement(device="cpu"), "exact"), (place(), precision)):
        with Run(tiny_gguf.Files(path, None), placement, precision=mode) as run:
            found.append((run.session.logits(some), run.session.decode([5])))
    gate = (
        gates.LOGITS_F16 if precision == "exact" else gates.Gate(kld=3e-2)
    )  # the CPU's fast mode shows 1e-2
    for expected, logits in zip(*found, strict=True):
        gates.check("logits", gate, expected, logits)


@on_a_device
def test_next(tmp_path: Path) -> None:
    """LLaVA-1.6 through the front door, all on the device: a picture in five views."""
    spec = CASES["gqa"].spec
    files = tiny_gguf.convert(tmp_path, spec)
    file = tiny_gguf.next_projector(tiny_gguf.read(files.mmproj), pinpoints(spec), newline(spec))
    mmproj = tiny_gguf.write(tmp_path / "next.gguf", file)
    source = picture(12, 130, 101)
    found = []
    for device in ("cpu", DEVICES[0]):
        with pyllava.Llava(files.model, mmproj, device=device, precision="exact") as model:
            found.append(
                (model.encode_image(source).array, str(model.ask(source, "What is it?", max_tokens=24)))
            )
    gates.check("embeddings", gates.EMBEDDINGS_F16, found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@on_a_device
def test_tied_output(tmp_path: Path) -> None:
    spec = TinySpec(seed=63, tied=True)
    files = tiny_gguf.convert(tmp_path, spec)
    some: list[Span] = [Tokens([1, *text(3, 20, spec.n_vocab)])]
    found = []
    for placement in (Placement(device="cpu"), place()):
        with Run(tiny_gguf.Files(files.model, None), placement, precision="exact") as run:
            found.append(run.session.logits(some))
    gates.check("logits", gates.LOGITS_F16, *found)


@on_a_device
def test_all_that_fits_is_the_default(files: tiny_gguf.Files) -> None:
    with pyllava.Llava(files.model, files.mmproj, device=DEVICES[0]) as model:
        assert model.devices.n_gpu_layers == SPEC.n_layer + 1
        assert set(model.devices.layers) == {DEVICES[0]}
        assert "CLIP" not in str(model.devices)


@on_a_device
def test_what_does_not_fit_is_refused_with_numbers(files: tiny_gguf.Files) -> None:
    with pytest.raises(pyllava.ModelMemoryError, match=r"need|no memory"):
        Run(files, place(), n_ctx=1 << 24, n_seq=100)
    with Run(files, place()) as run:  # and the device is as good as before
        run.everything()


@on_a_device
def test_a_device_for_the_tower_alone_computes_nothing_else(files: tiny_gguf.Files) -> None:
    some: list[Span] = [Tokens([1, *ids(1, 100)])]
    found = []
    for vision in ("cpu", DEVICES[0]):
        with Run(files, Placement(device="cpu", vision_device=vision)) as run:
            found.append(run.session.logits(some).tobytes())
    assert found[0] == found[1]


@on_a_device
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_refused_the_device(files: tiny_gguf.Files) -> None:
    with Run(files, place()) as run:
        run.session.encode(views(1))
        child = os.fork()
        if child == 0:
            try:
                _lib.ModelHandle(files.model, None, placement=place())
            except pyllava.ForkError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0


@on_a_device
def test_load_can_be_cancelled(files: tiny_gguf.Files) -> None:
    stages = []

    def progress(stage: str, fraction: float) -> bool:
        stages.append(stage)
        return stage != "upload"

    with pytest.raises(pyllava.GenerationCancelled):
        pyllava.Llava(files.model, files.mmproj, device=DEVICES[0], progress=progress)
    assert stages[-1] == "upload"


@on_a_device
def test_cancel(files: tiny_gguf.Files) -> None:
    """Between batches, from another thread; the session goes on working."""
    with Run(files, place(), n_ctx=2048, n_batch=32) as run:
        long: list[Span] = [Tokens([1, *ids(1, 2000)])]
        timer = threading.Timer(0.3, run.session.cancel)
        timer.start()

        def again_and_again() -> None:
            for _ in range(1000):
                run.session.seq_trim(0, 0)
                run.session.prefill(long)

        with pytest.raises(pyllava.GenerationCancelled):
            again_and_again()
        timer.join()
        run.session.cancel(False)
        assert np.isfinite(run.session.prefill(long[:1])[0]).all()


@on_a_device
def test_memory_comes_back(files: tiny_gguf.Files) -> None:
    """Load, answer, close, ten times: what the device has free does not shrink."""
    free = []
    for _ in range(10):
        with Run(files, place()) as run:
            run.everything()
        free.append(next(d for d in pyllava.devices() if d.name == DEVICES[0]).memory_free)
    assert free[-1] >= free[1] - (1 << 20), free


@pytest.fixture
def answers(tmp_path: Path) -> Callable[[str], str]:
    files = tiny_gguf.convert(tmp_path, SPEC)

    @functools.cache
    def answer(device: str) -> str:
        with pyllava.Llava(files.model, files.mmproj, device=device, precision="exact") as model:
            return str(model.ask(picture(3, 60, 40), "What is it?", max_tokens=24))

    return answer


@on_a_device
def test_the_command_line(
    files: tiny_gguf.Files, answers: Callable[[str], str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import PIL.Image

    path = tmp_path / "a.png"
    PIL.Image.fromarray(picture(3, 60, 40)).save(path)
    base = [
        "-m",
        str(files.model),
        "--mmproj",
        str(files.mmproj),
        "--image",
        str(path),
        "-p",
        "What is it?",
        "-n",
        "24",
    ]
    base += ["--precision", "exact", "--device", DEVICES[0], "-v"]
    for options in (
        [],
        ["-ngl", "2"],
        ["--no-mmproj-offload"],
        ["-nkvo"],
        ["-fa", "off"],
        ["-mg", "0"],
        ["-ts", "1"],
    ):
        assert cli.main([*base, *options]) == 0, options
        shown = capsys.readouterr()
        assert shown.out == answers("cpu") + "\n", options
        where = "CPU" if "--no-mmproj-offload" in options else DEVICES[0]
        assert f"CLIP using {where} backend" in shown.err
