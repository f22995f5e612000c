"""A question of the command line: pictures and a prompt in, the answer on stdout."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._named_pictures import expanded, found
from .._terminal import DEMO_NOTE, Console, library_log, one_line, path_of
from .._text_file import text_of
from ..errors import ContextOverflowError, ImageError, PyllavaError
from ..templates import IMAGE_MARK, ImageMark, unescape
from .hub import settle
from .options import (
    DEFAULT_PROMPT,
    PROGRAM,
    Parser,
    ask_parser,
    check_answer,
    check_pairs,
    check_raw,
    model_arguments,
    sampling_arguments,
)
from .structure_options import cut_short, structures_given

if TYPE_CHECKING:
    from PIL import Image

    from .._scorer import Scores
    from ..answer import Answer, Stream, Usage
    from ..images import ImageSource
    from ..llava import Llava

_IMAGE_TAG = re.compile(r'<img src="(data:image/[^,"]*,[^"]*)">')
_IMAGE_TAG_START = '<img src="data:image/'


@dataclass(frozen=True)
class Request:
    """What is asked: one run per list of images."""

    prompt: str
    raw: bool
    runs: list[list[ImageSource]]


def ask(argv: list[str]) -> None:
    """Answer the question of a command line; every failure is an exception."""
    parser = ask_parser()
    options = parser.parse(argv)
    check_pairs(options, parser)
    check_answer(options)
    _take_question(options, parser)
    console = Console(options.log_disable)
    request = _request(options, console)
    if options.json and len(request.runs) > 1:
        parser.error(
            f"--json: an object for one question, here are {len(request.runs)}: --jsonl writes a line for each"
        )
    check_raw(request.prompt, options, parser)
    console.note_inert(options)
    answers = _kind(options)(request, options, console)
    with library_log(options):
        answers.run()
    if answers.done and not options.no_perf:
        console.note(_timings(answers.done))
    if answers.n_failed:
        sys.stdout.flush()
        raise SystemExit(1)


def _take_question(options: argparse.Namespace, parser: Parser) -> None:
    """A question without -p is the prompt; it is one word of the shell."""
    if len(options.texts) > 1:
        first, second = (f"{text!r:.80}" for text in options.texts[:2])
        parser.error(
            f"{first} and {second}: need one question, with quotes around it, and pictures that are there"
        )
    if options.texts:
        if options.prompt is not None or options.file is not None:
            parser.error(
                f"{options.texts[0]!r:.80} and {'-f' if options.prompt is None else '-p'}: need one question"
            )
        options.prompt = options.texts[0]


def _kind(options: argparse.Namespace) -> type[Answers]:
    if not (options.json or options.jsonl):
        return Answers
    from .ask_json import JsonAnswers

    return JsonAnswers


class Answers:
    """The runs of a request, one after the other. Of several, one that fails leaves an empty line in its place."""

    def __init__(self, request: Request, options: argparse.Namespace, console: Console) -> None:
        self.request, self.options, self.console = request, options, console
        self.sampling = sampling_arguments(options)  # read before the model is loaded
        self.done: list[Answer] = []
        self.n_failed = 0

    def run(self) -> None:
        """Answers what can be. Before the model is loaded there is a picture to show to it."""
        shown = ((run, self._pictures(run)) for run in self.request.runs)
        first = next(((run, pictures) for run, pictures in shown if pictures is not None), None)
        if first is None:
            return
        from ..llava import Llava

        settle(self.options, self.console)
        with Llava(**model_arguments(self.options), progress=self.console.bars) as model:
            if model.is_demo:
                self.console.note(DEMO_NOTE)
            for run, pictures in itertools.chain([first], shown):
                if pictures is not None:
                    self._answer(model, run, pictures)

    def _pictures(self, run: list[ImageSource]) -> list[Image.Image] | None:
        """The pictures of a run, decoded; None where that fails and there are other runs."""
        from ..images import load_image, open_source

        try:
            return [
                load_image(open_source(found(image)) if isinstance(image, str) else image) for image in run
            ]
        except (PyllavaError, OSError, ValueError) as error:
            self._failed(run, error)
            return None

    def _answer(self, model: Llava, run: list[ImageSource], pictures: list[Image.Image]) -> None:
        if len(self.request.runs) > 1:
            self.console.note(f"\n{self.name(run[0])}:")
        try:
            if self.options.verbose_prompt:
                _show_prompt(model, pictures, self.request, self.options, self.console)
            answer = self.tell(model, run, pictures)
            self.done.append(answer)
            if structures_given(self.options) and not self.options.choices and answer.was_cut:
                self.n_failed += 1
                self.console.tell(f"{PROGRAM}: error: {cut_short(answer)}")
        except (ContextOverflowError, ImageError) as error:  # before its first piece: of this picture alone
            self._failed(run, error)

    def _failed(self, run: list[ImageSource], error: Exception) -> None:
        if self.is_single():
            raise error
        self.n_failed += 1
        self.console.tell(f"{PROGRAM}: error: {one_line(error)}")
        self.miss(run, error)

    def is_single(self) -> bool:
        """Whether the failure of a run is that of the command."""
        return len(self.request.runs) == 1

    def name(self, image: ImageSource) -> str:
        from ..images import source_name

        return "standard input" if image == "-" else source_name(image)

    def tell(self, model: Llava, run: list[ImageSource], pictures: list[Image.Image]) -> Answer:
        """Asks about `pictures` in one prompt; the answer goes to stdout as it comes."""
        if self.options.choices:
            answer = self.score(model, pictures).answer
            sys.stdout.write(f"{answer}\n")
            sys.stdout.flush()
        else:
            answer = _streamed(self.stream(model, pictures), self.console)
        if self.options.logprobs is not None and answer.logprobs:
            _show_tokens(answer, self.console)
        return answer

    def miss(self, run: list[ImageSource], error: Exception) -> None:
        """What stands on stdout in the place of an answer."""
        sys.stdout.write("\n")
        sys.stdout.flush()

    def stream(self, model: Llava, pictures: list[Image.Image]) -> Stream:
        """The answer that is being made."""
        request, options = self.request, self.options
        stream: Stream = model.ask(
            pictures,
            request.prompt,
            raw=request.raw,
            system=options.system,
            stream=True,
            **self.sampling,
        )
        self._note_rows(stream.usage)
        return stream

    def score(self, model: Llava, pictures: list[Image.Image]) -> Scores:
        """How probable each of --choices is."""
        request, options = self.request, self.options
        scores = model.score(
            pictures,
            request.prompt,
            options.choices,
            logprobs=options.logprobs or 0,
            raw=request.raw,
            system=options.system,
        )
        self._note_rows(scores.usage)
        return scores

    def _note_rows(self, usage: Usage) -> None:
        for n_tokens in usage.image_tokens_each:
            self.console.note(f"encode_image_with_clip: image embedding created: {n_tokens} tokens")


def _request(options: argparse.Namespace, console: Console) -> Request:
    prompt, tagged = _take_image_tag(given_prompt(options))
    images: list[ImageSource] = [*expanded(options.image)]
    if tagged is not None:
        if images:  # an image given is an image seen
            raise ValueError("an image in the prompt and as a file: need one of them")
        images = [tagged]
    if not images:
        raise ValueError(
            f'no image: need its FILE, as in `{PROGRAM} IMAGE "QUESTION"`; '
            "`pyllava-cli chat` talks without pictures, too"
        )
    if not prompt.strip():
        prompt = DEFAULT_PROMPT
    n_marks = prompt.count(IMAGE_MARK)
    if n_marks > 1 and n_marks != len(images):
        raise ValueError(f"the prompt has {n_marks} {IMAGE_MARK} marks, images given: {len(images)}")
    together = n_marks == len(images)
    return Request(prompt, n_marks > 0, [images] if together else [[image] for image in images])


def given_prompt(options: argparse.Namespace) -> str:
    """The prompt of a command line, or of the file that it names; "" for none."""
    text: str = options.prompt or ""
    if options.file == "-":
        if "-" in options.image:
            raise ValueError("-f - and --image -: standard input is one of them")
        text = text_of(sys.stdin.buffer.read(), "standard input").removesuffix("\n")
    elif options.file is not None:
        with open(path_of(options.file), "rb") as file:
            text = text_of(file.read(), options.file).removesuffix("\n")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the prompt is not UTF-8") from None
    return unescape(text) if options.escape else text


def _take_image_tag(prompt: str) -> tuple[str, bytes | None]:
    """The prompt without its ``<img src="data:...">`` tag, and the bytes of that image."""
    n_tags = prompt.count(_IMAGE_TAG_START)
    if n_tags == 0:
        return prompt, None
    tag = _IMAGE_TAG.search(prompt)
    if n_tags > 1 or tag is None:
        found = f"{n_tags} of them" if n_tags > 1 else "no end of it"
        raise ValueError(f'image tag in the prompt: {found}, need one <img src="data:image/jpeg;base64,...">')
    from ..images import decode_data_url

    return prompt[: tag.start()] + prompt[tag.end() :], decode_data_url(tag[1])


def _streamed(stream: Stream, console: Console) -> Answer:
    """The answer, whose pieces go to stdout as they come."""
    last = ""
    for piece in stream:
        if not last:
            console.note("")
        sys.stdout.write(piece)
        sys.stdout.flush()
        last = piece
    if not last.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    return stream.answer


def _show_tokens(answer: Answer, console: Console) -> None:
    """How probable each token was; it was asked for, so --log-disable does not hide it."""
    from .._token_colors import takes_color, terminal_lines

    console.tell("\n" + "\n".join(terminal_lines(answer.logprobs, colored=takes_color(sys.stderr))))


def _show_prompt(
    model: Llava, pictures: list[Image.Image], request: Request, options: argparse.Namespace, console: Console
) -> None:
    tokens = model.prompt_tokens(pictures, request.prompt, raw=request.raw, system=options.system)
    console.note(f"prompt: {request.prompt!r}")
    console.note(f"number of tokens in prompt = {len(tokens)} (an image counts as one here)")
    for token in tokens:
        if isinstance(token, ImageMark):
            console.note(f"{'image':>6} -> {token.index}")
        else:
            console.note(f"{token:6d} -> {model.token_text(token)!r}")


def _timings(answers: list[Answer]) -> str:
    """Milliseconds, tokens and tokens per second of each stage, summed over the answers."""
    usages = [answer.usage for answer in answers]
    timings = [answer.timings for answer in answers]
    encode, prefill = sum(t.encode for t in timings), sum(t.prefill for t in timings)
    decode, load = sum(t.decode for t in timings), timings[0].load
    lines = [
        f"{'load':>8} {load * 1000:10.2f} ms",
        _stage("encode", encode, sum(usage.image_tokens for usage in usages), "image tokens"),
        _stage("prefill", prefill, sum(usage.prompt_tokens - usage.cached_tokens for usage in usages)),
        _stage("decode", decode, sum(usage.completion_tokens for usage in usages)),
        f"{'total':>8} {(load + encode + prefill + decode) * 1000:10.2f} ms",
    ]
    return "\n" + "\n".join(lines)


def _stage(name: str, seconds: float, n_tokens: int, unit: str = "tokens") -> str:
    speed = f" ({n_tokens / seconds:9.2f} tokens per second)" if seconds > 0 and n_tokens else ""
    return f"{name:>8} {seconds * 1000:10.2f} ms / {n_tokens:5d} {unit}{speed}"
