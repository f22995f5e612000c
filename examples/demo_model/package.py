"""Turns an exported checkpoint into the files of the package, with the converters that everybody uses.

python -m examples.demo_model.package --export DIR

writes pyllava/models/demo-q8_0.gguf and demo-mmproj-q8_0.gguf (shipped in the wheel), and the same as f16 into
tests/data/demo/ (for tests of quantisation; not in the wheel).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"q8_0": ROOT / "pyllava" / "models", "f16": ROOT / "tests" / "data" / "demo"}


def script(name: str, *arguments: object) -> None:
    """Runs a converter of the source tree; its messages go to stderr."""
    subprocess.run([sys.executable, str(ROOT / "convert" / f"{name}.py"), *map(str, arguments)], check=True)


def package(export: Path, work: Path) -> None:
    """Converts `export`/llava-demo and `export`/clip-demo to every target."""
    llava = export / "llava-demo"
    script("llava_surgery", "-m", llava, "-o", work)
    for outtype, folder in TARGETS.items():
        folder.mkdir(parents=True, exist_ok=True)
        model, out = work / f"demo-{outtype}.gguf", work / outtype
        script(
            "convert_legacy_llama", llava, "--skip-unknown", "--outtype", outtype, "--outfile", model,
            "--model-name", "pyllava-demo",
        )  # fmt: skip
        projector = ("--llava-projector", work / "llava.projector", "--output-dir", out, "--outtype", outtype)
        script("convert_image_encoder_to_gguf", "-m", export / "clip-demo", *projector)
        shutil.move(model, folder / model.name)
        shutil.move(out / f"mmproj-model-{outtype}.gguf", folder / f"demo-mmproj-{outtype}.gguf")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--export", type=Path, required=True, help="what examples.demo_model.export wrote")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        package(options.export, Path(work))
    for folder in TARGETS.values():
        for path in sorted(folder.glob("*.gguf")):
            print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
