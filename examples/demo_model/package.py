"""Turns an exported checkpoint into the files of the package, with the converters that everybody uses.

python -m examples.demo_model.package --export DIR [--variant 1.6]

1.5: writes pyllava/models/demo-q8_0.gguf and demo-mmproj-q8_0.gguf (shipped in the wheel) in the steps that LLaVA's
users know, and the same as f16 into tests/data/demo/ (for tests of quantisation; not in the wheel).
1.6: writes pyllava/models/demo-1.6-q8_0.gguf and demo-1.6-mmproj-q8_0.gguf, in one step.
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


def package_1_5(export: Path, work: Path) -> list[Path]:
    """Converts `export`/llava-demo and `export`/clip-demo to every target."""
    llava = export / "llava-demo"
    script("llava_surgery", "-m", llava, "-o", work)
    written = []
    for outtype, folder in TARGETS.items():
        folder.mkdir(parents=True, exist_ok=True)
        model, out = work / f"demo-{outtype}.gguf", work / outtype
        script(
            "convert_legacy_llama", llava, "--skip-unknown", "--outtype", outtype, "--outfile", model,
            "--model-name", "pyllava-demo",
        )  # fmt: skip
        projector = ("--llava-projector", work / "llava.projector", "--output-dir", out, "--outtype", outtype)
        script("convert_image_encoder_to_gguf", "-m", export / "clip-demo", *projector)
        written += [folder / model.name, folder / f"demo-mmproj-{outtype}.gguf"]
        shutil.move(model, written[-2])
        shutil.move(out / f"mmproj-model-{outtype}.gguf", written[-1])
    return written


def package_1_6(export: Path, work: Path) -> list[Path]:
    """Converts `export`/llava-demo-1.6, which has its vision tower inside."""
    types = ("--outtype", "q8_0", "--mmproj-outtype", "q8_0")
    script("convert_llava", export / "llava-demo-1.6", "-o", work, *types, "--name", "pyllava-demo-1.6")
    folder = TARGETS["q8_0"]
    names = {
        "pyllava-demo-1.6-q8_0.gguf": "demo-1.6-q8_0.gguf",
        "mmproj-pyllava-demo-1.6-q8_0.gguf": "demo-1.6-mmproj-q8_0.gguf",
    }
    for made, name in names.items():
        shutil.move(work / made, folder / name)
    return [folder / name for name in names.values()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--export", type=Path, required=True, help="what examples.demo_model.export wrote")
    parser.add_argument("--variant", choices=("1.5", "1.6"), default="1.5")
    options = parser.parse_args()
    package = package_1_6 if options.variant == "1.6" else package_1_5
    with tempfile.TemporaryDirectory() as work:
        written = package(options.export, Path(work))
    for path in written:
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
