"""``pyllava-cli chat``: a conversation with one model; the answers go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from .._named_pictures import SUFFIXES, expanded, found
from .._sources import is_data_url, local_path
from .._terminal import DEMO_NOTE, Console, counted, did_you_mean, library_log, one_line
from ..errors import ContextOverflowError, PyllavaError
from .chat_file import Record, Turn, write
from .dropped import dropped, looks_dropped
from .hub import settle
from .lines import Lines
from .mistakes import SLASH_ADVICE, SLASH_SYNONYMS
from .options import PROGRAM, chat_parser, check_answer, check_pairs, model_arguments, sampling_arguments

if TYPE_CHECKING:
    from PIL import Image

    from ..answer import Answer
    from ..llava import Llava

_WELCOME = "type a question; /image FILE, or a file dropped here, shows a picture with it, /help lists the commands, Ctrl-D ends"
_PROMPT, _MORE = "> ", "... "
_FAILURES = (PyllavaError, ValueError, MemoryError)


class _Quit(Exception):
    """The user has had enough."""


def chat(argv: list[str]) -> None:
    """Have the conversation of a command line; every failure that ends it is an exception."""
    parser = chat_parser()
    options = parser.parse(argv)
    check_pairs(options, parser)
    if options.texts:
        found = options.texts[0]
        parser.error(
            f"{found!r:.80}: no such picture; -m names a model, and questions are typed when the model is there"
        )
    check_answer(options)
    console = Console(options.log_disable)
    console.note_inert(options)
    pictures = _pictures(options.image, console)  # before the model, which takes longer
    sampling = sampling_arguments(options)
    from ..llava import Llava

    with library_log(options):
        settle(options, console)
        with Llava(**model_arguments(options), progress=console.bars) as model:
            if model.is_demo:
                console.note(DEMO_NOTE)
            Conversation(model, options, sampling, console, pictures).run()


@dataclass(frozen=True)
class Picture:
    """A picture as the user named it, decoded."""

    path: str
    image: Image.Image

    @classmethod
    def load(cls, path: str) -> Picture:
        from ..images import load_image, open_source, source_name

        if path == "-":
            raise ValueError("-: standard input brings the messages; name a file")
        source = open_source(path)
        image = load_image(source)
        return cls(source_name(source) if is_data_url(source) else os.path.abspath(local_path(path)), image)

    def __str__(self) -> str:
        return f"{os.path.basename(self.path)}, {self.image.width} x {self.image.height}"


def _pictures(names: Sequence[str], console: Console) -> list[Picture]:
    """Of a folder or a pattern what can be shown, and a line for each file that cannot; one at least."""
    pictures: list[Picture] = []
    for name in names:
        paths, n_before = expanded([name]), len(pictures)
        for path in paths:
            try:
                pictures.append(Picture.load(found(path)))
            except (PyllavaError, OSError, ValueError) as error:
                if path == paths[-1] and len(pictures) == n_before:
                    raise
                console.tell(f"{PROGRAM}: error: {one_line(error)}")
    return pictures


class Conversation:
    """The messages on stdin, each a question or a command, and what becomes of them."""

    def __init__(
        self,
        model: Llava,
        options: argparse.Namespace,
        sampling: dict[str, Any],
        console: Console,
        pictures: Sequence[Picture],
    ) -> None:
        self._model = model
        self._options = options
        self._sampling = sampling
        self._console = console
        self._chat = model.chat(options.system)
        self._turns: list[Turn] = []
        self._pending: list[Picture] = []
        self._file: str | None = None
        self._lines = Lines(completions)
        self._show(pictures)

    def run(self) -> None:
        """Goes on to the end of stdin or to /quit; a failure ends it only if nobody sits there to correct it."""
        interactive = self._lines.interactive
        if interactive:
            self._console.note(_WELCOME)
        with _counted_interrupts() as interrupts:
            while (message := self._lines.message(_PROMPT, _MORE)) is not None:
                interrupts.clear()
                try:
                    self._do(message)
                except _Quit:
                    return
                except KeyboardInterrupt:
                    if not interactive or len(interrupts) > 1:
                        raise
                except _FAILURES as error:
                    if not interactive:
                        raise
                    self._console.tell(f"error: {one_line(error)}{self._hint(error)}")
                    if not message.lstrip().startswith("/"):
                        self._note_pending()  # they are still to be seen

    def _do(self, message: str) -> None:
        paths, rest = dropped(message)
        if looks_dropped(rest):
            raise ValueError(f"{rest.strip()}: no such picture")
        command, text = parse(rest)
        try:
            if paths:
                self._show([Picture.load(path) for path in paths])
            if command is not None:
                command.run(self, text)
        except KeyboardInterrupt:
            self._console.note("\nstopped")
            raise
        except OSError as error:  # of a file; from an answer it would be of stdout, and the end
            raise ValueError(one_line(error)) from error
        if command is None and text:
            self._ask(text)

    # --- questions ---

    def _ask(self, question: str) -> None:
        _check_text("the question", question)
        self._note_no_picture()
        n_before = len(self._chat.messages)
        pieces: list[str] = []
        try:
            stream = self._chat.ask(
                question,
                images=[picture.image for picture in self._pending],
                stream=True,
                **self._sampling,
            )
            n_known = len(stream.usage.image_tokens_each) - len(self._pending)
            for n_tokens in stream.usage.image_tokens_each[n_known:]:
                self._console.note(f"encode_image_with_clip: image embedding created: {n_tokens} tokens")
            with _ended_line(pieces):
                for piece in stream:
                    pieces.append(piece)
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            self._stop(question, "".join(pieces), n_before)
            raise
        self._turned(question, stream.answer.text, stream.answer.finish_reason)
        self._report(stream.answer)

    def _note_no_picture(self) -> None:
        """Before the first question of a conversation, which may have been meant for a picture."""
        if self._model.info.has_vision and not (self._turns or self._pending):
            self._console.note(
                "no picture is there yet: /image FILE shows one, and so does a file dropped here"
            )

    def _stop(self, question: str, shown: str, n_before: int) -> None:
        """Ctrl-C while an answer was made: what was shown of it stays in the conversation."""
        if not (shown and sys.stdout.isatty()):
            self._console.note("")  # after the ^C of the terminal
        if not shown:
            self._console.note("stopped: the question is not part of the conversation")
            self._note_pending()
            return
        if len(self._chat.messages) == n_before:
            self._chat.add(question, shown, [picture.image for picture in self._pending])
        self._turned(question, shown, "interrupted")
        self._console.note("stopped: what is there of the answer is part of the conversation")

    def _turned(self, question: str, answer: str, finish_reason: str) -> None:
        images = tuple(picture.path for picture in self._pending)
        self._turns.append(Turn(question, images, answer, finish_reason))
        self._pending = []

    def _report(self, answer: Answer) -> None:
        usage, timings = answer.usage, answer.timings
        if answer.finish_reason == "length":
            self._console.note(
                f"the answer was cut after {usage.completion_tokens} tokens: -n N allows more"
                if usage.completion_tokens >= self._options.max_tokens
                else "the context is full: /clear forgets the conversation, -c N has more room"
            )
        if not self._options.no_perf:
            self._console.note(
                f"[{usage.prompt_tokens} tokens, {usage.cached_tokens} of them known; "
                f"encode {timings.encode:.2f} s, prefill {timings.prefill:.2f} s; "
                f"{counted(usage.completion_tokens, 'token')} in {timings.decode:.2f} s]"
            )

    # --- commands ---

    def image(self, argument: str) -> None:
        paths = split_paths(argument)
        if not paths:
            raise ValueError("/image: need a FILE")
        self._show([Picture.load(path) for path in paths])

    def _show(self, pictures: Sequence[Picture]) -> None:
        if pictures and not self._model.info.has_vision:
            raise PyllavaError(f"{self._model.files.model}: a picture, but no projector: need --mmproj FILE")
        self._pending += pictures
        if pictures:
            self._note_pending()

    def drop(self, argument: str) -> None:
        self._pending = []
        self._console.note("no picture with the next question")

    def clear(self, argument: str) -> None:
        self._chat.clear()
        self._turns, self._pending, self._file = [], [], None
        self._console.note("forgotten: the conversation begins anew")

    def save(self, argument: str) -> None:
        self._save(argument, replace=False)

    def save_over(self, argument: str) -> None:
        self._save(argument, replace=True)

    def _save(self, argument: str, *, replace: bool) -> None:
        if not self._turns:
            raise ValueError("/save: no answer yet")
        files = self._model.files
        record = Record(
            str(files.model),
            None if files.mmproj is None else str(files.mmproj),
            self._model.template.name,
            self._chat.system,
            self._turns,
        )
        named = _unquoted(argument) or self._file or time.strftime("pyllava-chat-%Y%m%d-%H%M%S.md")
        path = os.path.abspath(os.path.expanduser(named))
        try:
            write(path, record, replace=replace or path == self._file)
        except FileExistsError:
            raise ValueError(f"{path}: exists; /save! {named} replaces it") from None
        self._file = path
        self._console.note(f"saved: {path}")

    def system(self, argument: str) -> None:
        if argument:
            _check_text("the system message", argument)
            self._chat.system = argument
            self._console.note("the system message holds from the next question on")
        else:
            now = self._chat.system
            self._console.tell(self._model.template.system if now is None else now)

    def help(self, argument: str) -> None:
        usages = [(f"{name} {command.argument}".rstrip(), command.help) for name, command in COMMANDS.items()]
        width = max(len(usage) for usage, _ in usages)
        self._console.tell("\n".join(f"{usage:<{width}}  {help}" for usage, help in (*usages, *_MORE_HELP)))

    def quit(self, argument: str) -> None:
        raise _Quit

    def _note_pending(self) -> None:
        if self._pending:
            names = "; ".join(map(str, self._pending))
            self._console.note(f"with the next question: {names}")

    def _hint(self, error: BaseException) -> str:
        if not isinstance(error, ContextOverflowError):
            return ""
        drop = "/drop takes the pictures back, " if self._pending else ""
        return f"; {drop}/clear forgets the conversation"


@dataclass(frozen=True)
class Command:
    """What a line that starts with a slash does."""

    run: Callable[[Conversation, str], None]
    argument: str
    help: str
    completes: tuple[str, ...] | None = None
    """Suffixes of the files that its argument may name; None: it names no file."""


COMMANDS: Mapping[str, Command] = {
    "/image": Command(
        Conversation.image, "FILE", "show a picture with the next question; repeatable", SUFFIXES
    ),
    "/drop": Command(Conversation.drop, "", "take the pictures for the next question back"),
    "/clear": Command(Conversation.clear, "", "forget the conversation and all pictures"),
    "/save": Command(
        Conversation.save, "[FILE]", "write the conversation to a .md or .json file", (".md", ".json")
    ),
    "/save!": Command(Conversation.save_over, "FILE", "the same, over a file that exists", (".md", ".json")),
    "/system": Command(Conversation.system, "[TEXT]", "set the system message, or show it"),
    "/help": Command(Conversation.help, "", "show this"),
    "/quit": Command(Conversation.quit, "", "end; so do /bye, /exit and Ctrl-D"),
}
_ENDS = ("exit", "quit", "bye", "exit()", "quit()")
_MORE_HELP = (
    ("//TEXT", "ask a question that starts with a slash"),
    ("TEXT\\", "go on in the next line"),
    ("Ctrl-C", "stop the answer; at the prompt, end"),
)


def parse(message: str) -> tuple[Command | None, str]:
    """The command of a message and its argument, or None and the question. Raises ValueError for no such command."""
    message = message.strip()
    if message.startswith("//"):
        return None, message[1:]
    if message in _ENDS:
        return COMMANDS["/quit"], ""
    if not message.startswith("/"):
        return None, message
    name, *argument = message.split(maxsplit=1)
    command = COMMANDS.get(SLASH_SYNONYMS.get(name, name))
    if command is None:
        what = "no such command, and no such picture" if "/" in name[1:] else "no such command"
        advice = SLASH_ADVICE.get(name) or did_you_mean(name.lower(), COMMANDS)
        told = advice or "/help lists them, //... asks what starts with a slash"
        raise ValueError(f"{name}: {what}; {told}")
    return command, argument[0] if argument else ""


def split_paths(argument: str) -> list[str]:
    """The files that an argument names: one with its spaces as they are, or several; quoted and escaped as in a shell."""
    whole = os.path.expanduser(argument)
    if os.path.lexists(whole):
        return [whole]
    lexer = shlex.shlex(argument, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    if os.name == "nt":
        lexer.escape = ""  # there it separates folders
    try:
        paths = [os.path.expanduser(word) for word in lexer if word]
    except ValueError:  # an apostrophe, say
        return [whole]
    return paths if len(paths) < 2 or any(map(os.path.lexists, paths)) else [whole]


def completions(line: str) -> list[str]:
    """What a line may become: a command's name, or one with the path of a file or a folder."""
    name, space, argument = line.partition(" ")
    if not space:
        known = ((name, command) for name, command in COMMANDS.items() if name.startswith(line))
        return [f"{name} " if command.argument else name for name, command in known] if line else []
    command = COMMANDS.get(name)
    if command is None or command.completes is None:
        return []
    before = argument[: len(argument) - len(argument.lstrip())]
    quote = argument.strip()[:1] if argument.strip()[:1] in ("'", '"') else ""
    path = argument.lstrip().removeprefix(quote)
    return [f"{name} {before}{quote}{found}" for found in _paths(path, command.completes)]


def _paths(begun: str, suffixes: tuple[str, ...]) -> list[str]:
    """The folders, with a slash, and the files of these suffixes that a path may become."""
    folder, start = os.path.split(begun)
    found = []
    with contextlib.suppress(OSError), os.scandir(os.path.expanduser(folder) or ".") as entries:
        for entry in entries:
            is_hidden = entry.name.startswith(".") and not start
            if is_hidden or not entry.name.startswith(start):
                continue
            if entry.is_dir():
                found.append(os.path.join(folder, entry.name, ""))
            elif entry.name.lower().endswith(suffixes):
                found.append(os.path.join(folder, entry.name))
    return sorted(found)


def _unquoted(text: str) -> str:
    return text[1:-1] if text[:1] in ("'", '"') and text[1:].endswith(text[:1]) else text


def _check_text(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not UTF-8") from None


@contextlib.contextmanager
def _ended_line(pieces: list[str]) -> Iterator[None]:
    """Ends the line of an answer; of one that fails before its first piece there is none."""
    try:
        yield
    except BaseException:
        if pieces:
            _end_line()
        raise
    _end_line()


def _end_line() -> None:
    sys.stdout.write("\n")
    sys.stdout.flush()


@contextlib.contextmanager
def _counted_interrupts() -> Iterator[list[int]]:
    """The Ctrl-C so far: a second one may come while the first is obeyed, and is not to be lost."""
    seen: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield seen
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
