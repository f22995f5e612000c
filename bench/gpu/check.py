"""Is it right on this device? The most telling checks first; prints a table, writes check.json (README.md).

python bench/gpu/check.py [--device CUDA0] [--kit gpu-kit] [--out DIR] [--seconds 230]
"""

from __future__ import annotations

import argparse
import sys

import kit
from kit import ROOT, Check, Failed, Found, Output

TESTS = {  # of tests/test_devices.py: what they show, and the seconds that they may take
    "parity with transformers' numbers": (("test_parity",), 60),
    "every place, attention as one or not": (("test_every_place_gives_the_same",), 60),
    "A A B B A to the byte, NaN stays alone": (
        ("test_the_same_again", "test_what_is_not_a_number_stays_alone"),
        40,
    ),
    "types of weights": (("test_weight_types", "test_matrices_that_a_device_cannot_multiply"), 60),
    "sequences, types of the KV cache": (("test_sequences", "test_any_sequences_in_a_step"), 60),
    "LLaVA-1.6": (("test_next",), 40),
    "tower apart, tied output, all by default": (
        (
            "test_a_device_for_the_tower_alone_computes_nothing_else",
            "test_tied_output",
            "test_all_that_fits_is_the_default",
        ),
        40,
    ),
    "too little memory": (("test_what_does_not_fit_is_refused_with_numbers",), 40),
    "cancel": (("test_cancel", "test_load_can_be_cancelled"), 40),
    "fork": (("test_a_forked_child_is_refused_the_device",), 30),
    "memory comes back": (("test_memory_comes_back",), 40),
    "command line": (("test_the_command_line",), 60),
    "two devices": (("test_two_devices", "test_language_and_vision_apart"), 60),
}
ANSWERS = {  # of the two models of the package: picture, question, answer
    "demo": ("scene.png", "How many shapes are there?", "4"),
    "demo-1.6": ("poster.png", "What words are there?", "dog, cup and bell"),
}


def pytest(name: str, seconds: float, *arguments: str) -> Check:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rfE",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]
    return Check(name, command, seconds, kit.tests)


def answers(wanted: str) -> kit.Callable[[Output], Found]:
    def read(output: Output) -> Found:
        kit.succeeded(output)
        answer = output.out.strip()
        if answer.rstrip(".").lower() != wanted:
            raise Failed(f"{answer!r}, not {wanted!r}")
        return Found(answer)

    return read


def checks(options: argparse.Namespace) -> list[Check]:
    slower = kit.patience(options.device)
    asked = []
    for model, (picture, question, answer) in ANSWERS.items():
        ask = [sys.executable, "-m", "pyllava", "-m", model, "--device", options.device]
        ask += ["--image", ROOT / "examples" / picture, "-p", question]
        asked.append(Check(f"an answer by {model}", ask, 30 * slower, answers(answer)))
    known = [
        pytest(name, seconds * slower, *(f"tests/test_devices.py::{test}" for test in names))
        for name, (names, seconds) in TESTS.items()
        if name != "two devices" or "," in options.device
    ]
    seed = "tests/reference/test_seed_models.py::test_on_a_device"
    which = ["-k", "llava-v1.5-7b"] if options.tiny else []
    return [*asked, *known, pytest("the published series, at reduced width", 90 * slower, seed, *which)]


def main() -> int:
    options = kit.parser(__doc__, 230).parse_args()
    report = kit.begin(options, "check")
    for check in checks(options):
        report.run(check)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
