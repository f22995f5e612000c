"""The options of ``pyllava-cli``: those of ``llama-llava-cli`` that a LLaVA user has use for, same names."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_args

from .. import _terminal
from .._defaults import MAX_TOKENS
from .._version import __version__
from ..formats import CacheType
from ..templates import IMAGE_MARK, TEMPLATES
from .mistakes import ADVICE, SYNONYMS
from .option_kinds import COUNT, COUNT_OR_0, COUNT_OR_LESS, FROM_MINUS_1, INTEGER, adder, changed
from .sampling_options import add_sampling
from .structure_options import add_structure, read_structures, structures_given
from .words import is_model, is_picture, is_sentence, stands_alone

PROGRAM = "pyllava-cli"
DEFAULT_PROMPT = "Provide a full description."
_CACHE_TYPES: tuple[str, ...] = get_args(CacheType)


_TEMPLATES = {  # what they call those that are here
    "vicuna": "vicuna_v1",
    "llama3": "llama_3",
    "phi3": "phi_3",
    "granite": "granite_vision",
    **dict.fromkeys(("llama2", "llama2-sys"), "llava_llama_2"),
    **dict.fromkeys(("mistral-v1", "mistral-v3", "mistral-v7"), "mistral_instruct"),
}


class Parser(_terminal.Parser):
    """argparse as llama.cpp's tools read: ``_`` for ``-`` in long names, values may start with a dash.

    Where --image is an option, the words that belong to none are pictures, as if it stood before them, and the question:
    these are in `texts`.
    """

    advice, synonyms = ADVICE, SYNONYMS

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        if self.add_help:  # argparse's own, in the words of the others
            self._option_string_actions["-h"].help = "show this"
        self.words: Sequence[str] = ()
        """What is being parsed."""

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The options in `argv`; exits with code 2 and one line on stderr if they are wrong."""
        actions = self._option_string_actions
        arguments: list[str] = []
        texts: list[str] = []
        self.words, words = argv, collections.deque(argv)
        while words:
            word = words.popleft()
            name, equals, value = self._named(word)
            if name not in actions:
                self._alone(word, words, arguments, texts)
            elif actions[name].nargs == 0 and equals:
                self.error(f"{name}: takes no value, found {value!r}")
            elif actions[name].nargs is not None:
                arguments.append(name + equals + value)
            elif not (equals or words):
                self.error(f"argument {name}: needs a value")
            else:
                option = actions[name].option_strings[-1]
                arguments.append(f"{option}={value if equals else words.popleft()}")
                while option == _IMAGE and words and _goes_on(words[0]):  # a pattern that a shell expanded
                    arguments.append(f"{option}={words.popleft()}")
        options: argparse.Namespace = self.parse_args(arguments)
        options.texts = texts
        return options

    def _named(self, word: str) -> tuple[str, str, str]:
        """An option by the name that it has here, and its value where that is part of the word."""
        name, equals, value = word.partition("=")
        known = self._option_string_actions
        if name.startswith("--"):
            name = name.replace("_", "-")
        if name not in known and self.synonyms.get(name) in known:
            name = self.synonyms[name]
        return name, equals, value

    def _alone(
        self, word: str, words: collections.deque[str], arguments: list[str], texts: list[str]
    ) -> None:
        """A word that is no option: of a picture, of the question, or for argparse to name what it is."""
        if word != "--" and not stands_alone(word):
            arguments.append(self._known(word))
            return
        if _IMAGE not in self._option_string_actions:
            arguments.append(word)
            return
        alone = [word]
        if word == "--":  # the end of options
            alone = list(words)
            words.clear()
        for each in alone:
            if is_model(each):
                self.error(f"{_terminal.printable(each)}: a model, no picture: -m names it")
            if is_picture(each):
                arguments.append(f"{_IMAGE}={each}")
            else:
                texts.append(each)


_IMAGE = "--image"


def _goes_on(word: str) -> bool:
    """Whether the word after a picture is another one."""
    return stands_alone(word) and (is_picture(word) or not is_sentence(word))


def _layers(text: str) -> int:
    """A number of layers, -1 for all; llama.cpp has words for that, too."""
    return -1 if text in ("all", "auto") else int(FROM_MINUS_1(text))


def _shares(text: str) -> list[float]:
    try:
        return [float(share) for share in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, need numbers with commas between them") from None


class _ListDevices(argparse.Action):
    """Shows the devices, as JSON where --json is an option of the command and given, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from .._lib import devices

        found = devices()
        if isinstance(parser, Parser) and "--json" in parser.words:
            print(json.dumps([dataclasses.asdict(device) for device in found]))
            parser.exit()
        for device in found:
            if device.kind != "other":
                free, total = (round(size / (1 << 20)) for size in (device.memory_free, device.memory_total))
                print(f"{device.name}: {device.description} ({total} MiB, {free} MiB free)")
        parser.exit()


_EXAMPLES = """\
examples:
  pyllava-cli cat.jpg "What is this?"                            the small demo model of the package
  pyllava-cli -m llava-v1.5-7b/ --image cat.jpg --temp 0.1       a folder with the model and its projector
  pyllava-cli -m ggml-model-q4_k.gguf --mmproj mmproj-model-f16.gguf --image cat.jpg
  pyllava-cli -m DIR --image *.jpg --no-perf                     one answer for each, the model loaded once
  pyllava-cli -m DIR --image a.jpg --image b.jpg -p "USER: <image> <image>\\nCompare.\\nASSISTANT:"

commands (each with --help):
  pyllava-cli chat -m DIR --image cat.jpg                        a conversation
  pyllava-cli caption -m DIR FOLDER -o captions.jsonl            captions for all pictures in a folder
  pyllava-cli explain cat.jpg "What is this?" -o heat.png        what in the picture the answer depends on
  pyllava-cli info mmproj-model-f16.gguf                         what is in a file
  pyllava-cli convert DIR                                        GGUF files from a checkpoint
  pyllava-cli quantize IN OUT q4_k_m                             a smaller GGUF file
  pyllava-cli bench -m DIR                                       how fast it is here
  pyllava-cli view cat.jpg -m DIR -o view.png                    what the model sees of a picture
  pyllava-cli doctor                                             what is installed here, and whether it works
  pyllava-cli pull llava-1.6-mistral-7b                          fetch a model of the Hugging Face Hub
  pyllava-cli models                                             which are here, and which have short names
  pyllava-cli rm llava-1.6-mistral-7b                            remove one
  pyllava-cli completion bash                                    completes command lines: bash, zsh, fish
"""
_CHAT_HELP = """\
Type questions, or lines that start with a slash: /help lists them. Ctrl-C stops an answer, Ctrl-D ends the conversation.
From a pipe or a file, a line is a question or a command, and the first one that fails ends the conversation with exit code 1.
"""


def ask_parser() -> Parser:
    """The options of a question; the commands have their own."""
    options = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [-m MODEL [--mmproj FILE]] IMAGE [IMAGE ...] [QUESTION] [options]\n"
        f"       {PROGRAM} chat [-m MODEL [--mmproj FILE]] [IMAGE ...] [options]\n"
        f"       {PROGRAM} info FILE [--tensors] [--json]\n"
        f"       {PROGRAM} caption INPUT... -o FILE [-m MODEL] [-p PROMPT] [options]\n"
        f"       {PROGRAM} chat|caption|explain|info|convert|quantize|bench|view|doctor|pull|models|rm|completion --help",
        description="Ask a LLaVA model about pictures. The answer goes to stdout, everything else to stderr.",
        epilog=_EXAMPLES,
        add_help=False,
    )
    add_model(options)
    add_devices(options)
    add_prompt(options)
    add_answer(options)
    add_output(options)
    return options


def chat_parser() -> Parser:
    """The options of ``pyllava-cli chat``: those of a question that mean something for all of a conversation."""
    options = Parser(
        prog=f"{PROGRAM} chat",
        usage=f"{PROGRAM} chat [-m MODEL [--mmproj FILE]] [IMAGE ...] [options]",
        description="A conversation with a LLaVA model. The answers go to stdout, everything else to stderr.",
        epilog=_CHAT_HELP,
        add_help=False,
    )
    add_model(options)
    add_devices(options)
    add_prompt(options, question=False)
    add_answer(options)
    add_output(options, question=False)
    return options


def add_model(options: Parser, *, parallel: int = 4) -> None:
    """The model and how it computes; `parallel`: answers at the same time, unless told otherwise."""
    add = adder(options, "model")
    types = ", ".join(_CACHE_TYPES)
    add_files(add)
    add(
        "-c --ctx-size",
        "N",
        "context in tokens (default: as many as needed, up to what the model was trained for and memory holds)",
        type=COUNT_OR_0,
        default=0,
    )
    add("-b --batch-size", "N", "tokens per prefill step (default: 1024)", type=COUNT, default=1024)
    add(
        "-np --parallel",
        "N",
        f"answers computed at the same time, where several are asked for (default: {parallel})",
        type=COUNT,
        default=parallel,
    )
    add(
        "--kv-cells",
        "N",
        "positions that all of them may use together (default: the context; for captions, room for all of them)",
        type=COUNT,
    )
    add("-t --threads", "N", "threads (default: one per core)", type=INTEGER, default=-1)
    add(
        "--precision",
        "NAME",
        "fast (default: rounded within stated gates) or exact (the reference's numbers, slower)",
        choices=("fast", "exact"),
    )
    add(
        "-ctk --cache-type-k",
        "TYPE",
        f"KV cache, keys: {types}; default f16 (exact: f32)",
        choices=_CACHE_TYPES,
    )
    add("-ctv --cache-type-v", "TYPE", "KV cache, values; as for keys", choices=_CACHE_TYPES)
    add("--no-mmap", None, "read the file into memory instead of mapping it")


def add_files(add: Callable[..., None]) -> None:
    """Which model; ``cli.hub.settle`` fetches one that is not here yet."""
    add(
        "-m --model",
        "FILE",
        "GGUF file, folder, FOLDER:QUANT or fetched model (default: demo, a small model in the package; also demo-1.6)",
    )
    add("-mm --mmproj", "FILE", "projector file (default: the one beside the model)")
    add("-hf -hfr --hf-repo", "REPO[:QUANT]", f"a model of the Hugging Face Hub, or of `{PROGRAM} models`")
    add("-y --yes", None, "fetch it without asking")


def add_devices(options: Parser) -> None:
    """The options that say where a model's parts go; `device_arguments` reads them."""
    add = adder(options, "devices")
    add(
        "-ngl --gpu-layers --n-gpu-layers",
        "N",
        "the last N layers on the GPU, N > layers: the output too (default: -1, all that fit)",
        type=_layers,
    )
    add("-dev --device", "NAMES", "auto (default: every GPU), cpu, or names of --list-devices, with commas")
    add("--list-devices", None, "show the devices and stop", action=_ListDevices, nargs=0)
    add("--vision-device", "NAME", "device of the vision tower (default: the main GPU, where it fits)")
    add("--no-mmproj-offload", None, "the vision tower on the CPU")
    add("-ts --tensor-split", "A,B,...", "shares of several GPUs (default: by free memory)", type=_shares)
    add("-mg --main-gpu", "I", "the GPU with the vision tower, from 0 (default: 0)", type=COUNT_OR_0)
    add("-nkvo --no-kv-offload", None, "the KV cache in host memory")
    add(
        "-fa --flash-attn",
        "WHEN",
        "on, off or auto (default): attention as one operation on GPUs",
        choices=("on", "off", "auto"),
        default="auto",
    )


def add_tiles(add: Callable[..., None]) -> None:
    """How pictures are cut and their rows put together, for models that see tiles."""
    add(
        "--image-max-tiles",
        "N",
        "LLaVA-1.6: tiles of a picture at most (default: all that it was trained with); fewer are faster",
        type=COUNT_OR_0,
    )
    add(
        "--image-merge",
        "NAME",
        "LLaVA-1.6: unpad (default, as trained) or flat (the rows llama.cpp gives)",
        choices=("unpad", "flat"),
        default="unpad",
    )


def add_prompt(options: Parser, *, question: bool = True, image: bool = True) -> None:
    """How pictures are seen, and the prompt; `question`: options for a question, `image`: for its pictures."""
    add = adder(options, "pictures and prompt")
    prompt = f'the question (default: "{DEFAULT_PROMPT}"); with {IMAGE_MARK} in it, the whole raw prompt'
    if image:
        add(
            "--image",
            "FILE",
            "JPEG, PNG, WebP, GIF, BMP or TIFF; several, a folder or a pattern; repeatable",
            action="append",
            default=[],
        )
    add_tiles(add)
    if question:
        add("-p --prompt", "TEXT", prompt)
        add("-f --file", "FILE", "read the prompt from a file; - is standard input")
        add("-e --escape", None, r"decode \n \r \t \' \" \\ \xHH in the prompt (default)", default=True)
        add("--no-escape", None, "take the prompt as it is", dest="escape", action="store_false")
    add(
        "--template",
        "NAME",
        f"auto (default), {', '.join(TEMPLATES)}",
        type=lambda name: _TEMPLATES.get(name, name),
        choices=("auto", *TEMPLATES),
    )
    add("-sys --system", "TEXT", "system message instead of the template's")


def add_answer(options: Parser) -> None:
    """Options with the names that ``Llava.ask`` has for them (`dest`); None: as it is there."""
    add = adder(options, "answer")
    add(
        "-n --predict --n-predict",
        "N",
        f"tokens at most (default: -1, which is {MAX_TOKENS})",
        dest="max_tokens",
        type=changed(COUNT_OR_LESS, lambda n: MAX_TOKENS if n < 0 else n),
        default=MAX_TOKENS,
    )
    add_structure(options)
    add_sampling(options)


def add_output(options: Parser, *, question: bool = True, timings: bool = True) -> None:
    """What is shown besides the answer."""
    add = adder(options, "output")
    if question:
        add(
            "--json",
            None,
            "one JSON object instead of the answer's text: with usage, timings, the model's name; with --choices, how "
            "probable each is",
        )
        add("--jsonl", None, "a line with such an object for each picture, or with its error")
        add("--verbose-prompt", None, "show the prompt and its tokens")
        add(
            "--logprobs",
            "N",
            "show on stderr how probable each token was, in colours on a terminal, and the N likeliest in its place; "
            "with --json or --jsonl, in the object",
            type=COUNT_OR_0,
        )
    if timings:
        add("--no-perf", None, "show no timings")
    add("-v --verbose", None, "show the library's log, down to details")
    add("--log-disable", None, "show nothing but the answer and errors")
    add("--version", None, "show the version", action="version", version=f"pyllava {__version__}")
    add("-h --help --usage", None, "show this", action="help")


def check_pairs(options: argparse.Namespace, parser: Parser) -> None:
    """Ends with a usage error where two options do not go together."""
    if options.model is not None and options.hf_repo is not None:
        parser.error("-m and -hf: need one of them")
    if options.mmproj is not None and options.model is None and options.hf_repo is None:
        parser.error("--mmproj: needs -m, the model it belongs to")
    if getattr(options, "prompt", None) is not None and options.file is not None:
        parser.error("-p and -f: need one of them")
    if getattr(options, "jsonl", False) and options.json:
        parser.error("--json and --jsonl: need one of them")
    if len(given := structures_given(options)) > 1:
        parser.error(f"{' and '.join(given)}: need one of them")


def check_raw(prompt: str, options: argparse.Namespace, parser: Parser) -> None:
    """The same of a prompt that is used as it stands, and what only a template has a place for."""
    if IMAGE_MARK in prompt and (options.template or options.system is not None):
        parser.error(f"a prompt with {IMAGE_MARK} is taken as it is: no --template, no --system")


def check_answer(options: argparse.Namespace) -> None:
    """Raises what is wrong with the options of an answer: before the model, which may take minutes to load."""
    from ..sampling import Sampling

    read_structures(options)
    sampling = Sampling(**sampling_arguments(options))
    if structures_given(options):
        from .._structured import wanted

        wanted(sampling)


def model_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What `options` mean to ``Llava``."""
    arguments = {
        "model": options.model,
        "mmproj": options.mmproj,
        "n_ctx": options.ctx_size or None,
        "n_batch": options.batch_size,
        "n_parallel": options.parallel,
        "kv_cells": options.kv_cells,
        "n_threads": options.threads if options.threads > 0 else None,
        "template": options.template or "auto",
        "precision": options.precision,
        "use_mmap": not options.no_mmap,
        "type_k": options.cache_type_k,
        "type_v": options.cache_type_v,
        "image_max_tiles": options.image_max_tiles,
        "image_merge": options.image_merge,
    }
    return arguments | device_arguments(options)


def device_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What `options` say of devices, as arguments of ``Llava``; what was not given is left out."""
    given = {
        "n_gpu_layers": options.gpu_layers,
        "device": options.device,
        "vision_device": "cpu" if options.no_mmproj_offload else options.vision_device,
        "tensor_split": options.tensor_split,
        "main_gpu": options.main_gpu,
        "kv_offload": False if options.no_kv_offload else None,
        "flash_attn": {"on": True, "off": False, "auto": None}[options.flash_attn],
    }
    return {name: value for name, value in given.items() if value is not None}


def sampling_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What `options` mean to ``Llava.ask``: those that it knows by the same name, and that were given."""
    from ..sampling import Options

    given = {name: getattr(options, name, None) for name in Options.__annotations__}
    return {name: value for name, value in given.items() if value is not None}
