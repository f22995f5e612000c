"""Which prompt template a model was trained with, and the same template in Jinja for readers that want one.

The texts are those of `pyllava.templates`, where they are explained; a test holds the two tables equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Pieces(NamedTuple):
    """What stands around the words of a conversation. `in_turn`: the system message stands inside the first
    turn.
    """

    system: str
    system_prefix: str
    system_suffix: str
    in_turn: bool
    user_prefix: str
    user_suffix: str
    answer_prefix: str
    answer_space: str
    answer_suffix: str


def _chat_between(user: str) -> str:
    return (
        f"A chat between a curious {user} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {user}'s questions."
    )


_VICUNA = Pieces(
    *(_chat_between("user"), "", " ", False),
    *("USER: ", " ", "ASSISTANT:", " ", "</s>"),
)
_MISTRAL = Pieces(
    *("", "<<SYS>>\n", "\n<</SYS>>\n\n", True),
    *("[INST] ", " [/INST]", "", " ", " </s>"),
)
_CHATML = Pieces(
    *("Answer the questions.", "<|im_start|>system\n", "<|im_end|>", False),
    *("<|im_start|>user\n", "<|im_end|>", "<|im_start|>assistant\n", "", "<|im_end|>"),
)
TEMPLATES: Mapping[str, Pieces] = {
    "vicuna_v1": _VICUNA,
    "llava_v1": _VICUNA._replace(system=_chat_between("human")),
    "llava_v0": Pieces(
        *(_chat_between("human"), "", "", False),
        *("###Human: ", "###", "Assistant:", " ", ""),
    ),
    "mistral_instruct": _MISTRAL,
    "chatml_direct": _CHATML,
    "llava_llama_2": _MISTRAL._replace(
        system="You are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language."
    ),
    "mpt": _CHATML._replace(
        system="A conversation between a user and an LLM-based AI assistant. "
        "The assistant gives helpful and honest answers."
    ),
}

# Parts of a model's name, lower case, in the order they are looked for.
_NAMES = (
    ("bakllava", "vicuna_v1"),
    ("vicuna", "vicuna_v1"),
    ("34b", "chatml_direct"),
    ("mistral", "mistral_instruct"),
    ("llama-2", "llava_llama_2"),
    ("v1.5", "vicuna_v1"),
)
# Parts of a template's own text.
_SIGNS = (
    ("<|im_start|>", "chatml_direct"),
    ("ASSISTANT:", "vicuna_v1"),
    ("[INST]", "mistral_instruct"),
)


def choose(names: Iterable[str], template: str | None, texts: Iterable[str]) -> tuple[str, str]:
    """The template's name and why: from the model's names, the checkpoint's own template, its vocabulary."""
    for name in names:
        for part, found in _NAMES:
            if part in name.lower():
                return found, f"the name {name}"
    for sign, found in _SIGNS:
        if template is not None and sign in template:
            return found, "the checkpoint's chat template"
    if "<|im_start|>" in texts:
        return "chatml_direct", "its vocabulary"
    return "vicuna_v1", "nothing else said"


def jinja(name: str) -> str:
    """The template as Jinja text for a list of `messages` (role, content) and `add_generation_prompt`.

    A content is a text, in which `<image>` is as good as any other word, or a list of parts whose images
    become `<image>` and a newline.
    """
    pieces = TEMPLATES[name]
    quoted = {field: json.dumps(value) for field, value in pieces._asdict().items() if field != "in_turn"}
    system = "{%- if ns.system -%}{{- SYSTEM_PREFIX + ns.system + SYSTEM_SUFFIX -}}{%- endif -%}"
    text = _HEAD + ("" if pieces.in_turn else system) + _LOOP.replace("IN_TURN", system * pieces.in_turn)
    for field in sorted(quoted, key=len, reverse=True):
        text = text.replace(field.upper(), quoted[field])
    return text


# A message's text goes through `ns`, because what is set inside a loop of Jinja's ends with it.
_HEAD = (
    "{%- set ns = namespace(system=SYSTEM, first=true, text='') -%}"
    "{%- for message in messages if message['role'] == 'system' -%}"
    "{%- if message['content'] is string -%}{%- set ns.system = message['content'] -%}"
    "{%- else -%}{%- set ns.system = message['content'][0]['text'] -%}{%- endif -%}"
    "{%- endfor -%}"
)
_LOOP = (
    "{%- for message in messages if message['role'] != 'system' -%}"
    "{%- if message['content'] is string -%}{%- set ns.text = message['content'] -%}"
    "{%- else -%}{%- set ns.text = '' -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{%- set ns.text = ns.text + part['text'] -%}"
    "{%- else -%}{%- set ns.text = ns.text + '<image>\\n' -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- USER_PREFIX -}}{%- if ns.first -%}IN_TURN{%- endif -%}"
    "{{- ns.text + USER_SUFFIX -}}{%- set ns.first = false -%}"
    "{%- else -%}"
    "{{- ANSWER_PREFIX + ANSWER_SPACE + (ns.text | trim) + ANSWER_SUFFIX -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- ANSWER_PREFIX -}}{%- endif -%}"
)
