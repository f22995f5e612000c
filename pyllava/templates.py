"""Prompt templates as data, and how a conversation becomes text with image marks.

The texts are those that the LLaVA models were trained with. A prompt is a list of parts, so that the words of
a user or of an earlier answer never turn into special tokens: only the template's own text can.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeAlias

IMAGE_MARK = "<image>"

RAW_STOP = ("###", "<|im_end|>", "<|im_start|>", "USER:", "</s>", "<|eot_id|>", "<|end|>")
"""What ends the answer to a prompt of the user's own: the marks of all templates."""


@dataclass(frozen=True)
class Text:
    """A stretch of a prompt. `special`: the tokenizer recognises special tokens such as ``</s>`` in it."""

    text: str
    special: bool = True


@dataclass(frozen=True)
class ImageMark:
    """Where the rows of an image go; `index` counts the images of the whole prompt from 0."""

    index: int


@dataclass(frozen=True)
class Ids:
    """Tokens that stand in a prompt as they are; before the first of them there is no BOS but their own."""

    ids: tuple[int, ...]


Part: TypeAlias = Text | ImageMark | Ids


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `images` is the number of pictures a user's turn brings along."""

    role: Literal["user", "assistant"]
    text: str
    images: int = 0


@dataclass(frozen=True)
class Template:
    """The pieces around the words of a conversation.

    One turn reads `user_prefix` QUESTION `user_suffix` `answer_prefix`, where the answer starts; an earlier
    answer goes on with `answer_space` ANSWER `answer_suffix`. The system message, if there is one, stands
    before the first turn between `system_prefix` and `system_suffix`, or inside it, after `user_prefix`
    (`system_in_turn`).
    """

    name: str
    user_prefix: str
    user_suffix: str
    answer_prefix: str
    answer_space: str
    answer_suffix: str
    stop: tuple[str, ...]
    """An answer ends before any of these; the end-of-sequence token ends it in any case."""
    system: str = ""
    """The system message used when none is given; "" for none."""
    system_prefix: str = ""
    system_suffix: str = ""
    system_in_turn: bool = False
    image_suffix: str = "\n"
    """What follows an image put before the text of its message."""
    image_brackets: tuple[str, str] = ("", "")
    """What stands before and after every image, wherever it is."""


def _chat_between(user: str) -> str:
    return (
        f"A chat between a curious {user} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {user}'s questions."
    )


_VICUNA_V1 = Template(
    name="vicuna_v1",
    system=_chat_between("user"),
    system_suffix=" ",
    user_prefix="USER: ",
    user_suffix=" ",
    answer_prefix="ASSISTANT:",
    answer_space=" ",
    answer_suffix="</s>",
    stop=("</s>",),
)
_LLAVA_V0 = Template(
    name="llava_v0",
    system=_chat_between("human"),
    user_prefix="###Human: ",
    user_suffix="###",
    answer_prefix="Assistant:",
    answer_space=" ",
    answer_suffix="",
    stop=("###",),
)
_MISTRAL_INSTRUCT = Template(
    name="mistral_instruct",
    system_prefix="<<SYS>>\n",
    system_suffix="\n<</SYS>>\n\n",
    system_in_turn=True,
    user_prefix="[INST] ",
    user_suffix=" [/INST]",
    answer_prefix="",
    answer_space=" ",
    answer_suffix=" </s>",
    stop=("</s>",),
)
_CHATML_DIRECT = Template(
    name="chatml_direct",
    system="Answer the questions.",
    system_prefix="<|im_start|>system\n",
    system_suffix="<|im_end|>",
    user_prefix="<|im_start|>user\n",
    user_suffix="<|im_end|>",
    answer_prefix="<|im_start|>assistant\n",
    answer_space="",
    answer_suffix="<|im_end|>",
    stop=("<|im_end|>",),
)
_QWEN_1_5 = replace(
    _CHATML_DIRECT,
    name="qwen_1_5",
    system="You are a helpful assistant.",
    system_suffix="<|im_end|>\n",
    user_suffix="<|im_end|>\n",
    answer_suffix="<|im_end|>\n",
)
_LLAMA_3 = Template(
    name="llama_3",
    system_prefix="<|start_header_id|>system<|end_header_id|>\n\n",
    system_suffix="<|eot_id|>",
    user_prefix="<|start_header_id|>user<|end_header_id|>\n\n",
    user_suffix="<|eot_id|>",
    answer_prefix="<|start_header_id|>assistant<|end_header_id|>\n\n",
    answer_space="",
    answer_suffix="<|eot_id|>",
    stop=("<|eot_id|>", "<|end_of_text|>"),
)
_PHI_3 = Template(  # its tokenizer takes the white space that follows a mark into the mark
    name="phi_3",
    system_prefix="<|system|>\n",
    system_suffix="<|end|>\n",
    user_prefix="<|user|>\n",
    user_suffix="<|end|>\n",
    answer_prefix="<|assistant|>\n",
    answer_space="",
    answer_suffix="<|end|>\n",
    stop=("<|end|>", "<|endoftext|>"),
)
_GRANITE_VISION = Template(
    name="granite_vision",
    system=_chat_between("user"),
    system_prefix="<|system|>\n",
    system_suffix="\n",
    user_prefix="<|user|>\n",
    user_suffix="\n",
    answer_prefix="<|assistant|>\n",
    answer_space="",
    answer_suffix="<|end_of_text|>\n",
    stop=("<|end_of_text|>",),
)
_YI_VL = Template(
    name="yi_vl",
    system="This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI assistant. "
    "Read all the images carefully, and respond to the human's questions with informative, helpful, detailed and "
    "polite answers. 这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。"
    "仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。",
    system_suffix="\n\n",
    user_prefix="### Human: ",
    user_suffix="\n",
    answer_prefix="### Assistant:",
    answer_space=" ",
    answer_suffix="\n",
    stop=("###",),
)
_HELPFUL = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_PLAIN = Template(  # projector pre-training: image, caption, newline; a question is the start of the caption
    name="plain",
    image_suffix="",
    user_prefix="",
    user_suffix="",
    answer_prefix="",
    answer_space="",
    answer_suffix="\n",
    stop=("\n",),
)

TEMPLATES: Mapping[str, Template] = MappingProxyType(
    {
        template.name: template
        for template in (
            _VICUNA_V1,
            replace(_VICUNA_V1, name="llava_v1", system=_chat_between("human")),
            _LLAVA_V0,
            _MISTRAL_INSTRUCT,
            _CHATML_DIRECT,
            replace(_MISTRAL_INSTRUCT, name="llava_llama_2", system=_HELPFUL),
            _PLAIN,
            replace(
                _CHATML_DIRECT,
                name="mpt",
                system="A conversation between a user and an LLM-based AI assistant. "
                "The assistant gives helpful and honest answers.",
            ),
            _LLAMA_3,
            replace(_LLAMA_3, name="llava_llama_3", system=_HELPFUL),
            replace(  # on Llama 3.1, whose system message begins with these dates
                _LLAMA_3,
                name="joycaption",
                system_prefix=_LLAMA_3.system_prefix
                + "Cutting Knowledge Date: December 2023\nToday Date: 26 July 2024\n\n",
                system="You are a helpful image captioner.",
                image_brackets=("<|reserved_special_token_70|>", "<|reserved_special_token_71|>"),
                image_suffix="",
            ),
            _PHI_3,
            _QWEN_1_5,
            replace(_QWEN_1_5, name="chatml", system=""),  # language models that see nothing
            replace(_CHATML_DIRECT, name="nanollava", system="Answer the question"),
            _GRANITE_VISION,
            _YI_VL,
        )
    }
)
"""Every template by name; ``vicuna_v1`` is the default."""


def render(template: Template, messages: Sequence[Message], *, system: str | None = None) -> list[Part]:
    """The prompt of a conversation up to where the next answer starts.

    `messages` begin and end with the user and alternate. `system` replaces the template's system message (""
    for none). The images of a message stand before its text, or at the ``<image>`` marks on lines of their own
    where there are as many of those as images; any other ``<image>`` is a word. Neighbouring texts are joined
    unless `special` differs. Raises ValueError for another order of roles.
    """
    _check_roles(messages)
    parts: list[Part] = []
    system_parts = _system_parts(template, system)
    if not template.system_in_turn:
        parts += system_parts
    n_images = 0
    for turn, message in enumerate(messages):
        if message.role == "assistant":
            answer = message.text.strip()
            parts += [Text(template.answer_space), Text(answer, special=False), Text(template.answer_suffix)]
            continue
        parts.append(Text(template.user_prefix))
        if turn == 0 and template.system_in_turn:
            parts += system_parts
        parts += _message_parts(template, message, n_images)
        parts.append(Text(template.user_suffix + template.answer_prefix))
        n_images += message.images
    return _joined(parts)


def begun(parts: Sequence[Part], start: str, space: str) -> list[Part]:
    """A prompt that ends with the beginning of its answer: after `space`, as a template has it before answers."""
    return _joined([*parts, Text(space), Text(start, special=False)]) if start else [*parts]


def raw(text: str, n_images: int) -> list[Part]:
    """A prompt without a template: special tokens are recognised, and ``<image>`` marks are the images given.

    Without images ``<image>`` is plain text. Raises ValueError if there are images and the marks are more or
    fewer.
    """
    if n_images == 0:
        return _joined([Text(text)])
    places = [mark.start() for mark in re.finditer(IMAGE_MARK, text)]
    if len(places) != n_images:
        n_marks = f"{len(places)} {IMAGE_MARK} mark{'s' * (len(places) != 1)}"
        raise ValueError(f"the prompt has {n_marks}, images given: {n_images}")
    return _joined(_split(text, places, 0, special=True))


def prompt_text(parts: Sequence[Part]) -> str:
    """The parts as one text, images as ``<image>``: for people to read."""

    def shown(part: Part) -> str:
        if isinstance(part, Text):
            return part.text
        return IMAGE_MARK if isinstance(part, ImageMark) else str(part.ids)

    return "".join(map(shown, parts))


def by_name(name: str) -> Template:
    """The template called `name`. Raises ValueError, with the names there are, if there is none."""
    try:
        return TEMPLATES[name]
    except KeyError:
        raise ValueError(f"template {name!r}: need one of {', '.join(TEMPLATES)}") from None


def unescape(text: str) -> str:
    r"""`text` with ``\n \r \t \' \" \\ \xHH`` decoded; any other escape keeps its backslash.

    ``\xHH`` is one byte of UTF-8. Raises ValueError where such bytes do not form text.
    """
    if "\\" not in text:
        return text
    escape = rb"\\(?:([nrt'\"\\])|x([0-9A-Fa-f]{2}))"
    try:
        return re.sub(escape, _unescaped, text.encode()).decode()
    except UnicodeDecodeError as error:
        found = "".join(f"\\x{byte:02x}" for byte in error.object[error.start : error.end])
        raise ValueError(f"escapes in the prompt: {found} is not UTF-8") from None


def _unescaped(match: re.Match[bytes]) -> bytes:
    if match[2] is not None:
        return bytes([int(match[2], 16)])
    return {b"n": b"\n", b"r": b"\r", b"t": b"\t"}.get(match[1], match[1])


def _check_roles(messages: Sequence[Message]) -> None:
    if len(messages) % 2 == 0:
        raise ValueError(
            f"{len(messages)} messages: need an odd number, from the user's first to the user's last"
        )
    for turn, message in enumerate(messages):
        role = ("user", "assistant")[turn % 2]
        if message.role != role:
            raise ValueError(f"message {turn} is of role {message.role!r}, need {role!r}")
        if message.images < 0 or (message.images and role == "assistant"):
            raise ValueError(f"message {turn} of the {role} has {message.images} images")


def _system_parts(template: Template, system: str | None) -> list[Part]:
    words = Text(template.system) if system is None else Text(system, special=False)
    if not words.text:
        return []
    return [Text(template.system_prefix), words, Text(template.system_suffix)]


def _message_parts(template: Template, message: Message, first: int) -> list[Part]:
    places = _places(message.text)
    if len(places) == message.images:
        parts = _split(message.text, places, first, special=False)
    else:
        parts = list[Part]()
        for index in range(first, first + message.images):
            parts += [ImageMark(index), Text(template.image_suffix)]
        parts.append(Text(message.text, special=False))
    return _bracketed(parts, template.image_brackets)


def _bracketed(parts: Sequence[Part], brackets: tuple[str, str]) -> list[Part]:
    found: list[Part] = []
    for part in parts:
        found += [Text(brackets[0]), part, Text(brackets[1])] if isinstance(part, ImageMark) else [part]
    return found


def _places(text: str) -> list[int]:
    """Where marks stand on lines that hold nothing else."""
    found, at = [], 0
    for line in text.splitlines(keepends=True):
        if not line.replace(IMAGE_MARK, "").strip():
            found += [at + mark.start() for mark in re.finditer(IMAGE_MARK, line)]
        at += len(line)
    return found


def _split(text: str, places: Sequence[int], first: int, *, special: bool) -> list[Part]:
    """The text with images `first` and on in the place of the marks that stand there."""
    parts: list[Part] = []
    at = 0
    for index, place in enumerate(places, first):
        parts += [Text(text[at:place], special), ImageMark(index)]
        at = place + len(IMAGE_MARK)
    return [*parts, Text(text[at:], special)]


def _joined(parts: Sequence[Part]) -> list[Part]:
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, Text) and not part.text:
            continue
        if isinstance(part, Text) and isinstance(last, Text) and last.special == part.special:
            joined[-1] = Text(last.text + part.text, part.special)
        else:
            joined.append(part)
    return joined
