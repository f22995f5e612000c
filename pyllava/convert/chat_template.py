"""The prompt templates of `pyllava.templates` in Jinja, for other readers of a file."""

from __future__ import annotations

import json

from ..templates import IMAGE_MARK, TEMPLATES

NAMES = tuple(name for name in TEMPLATES if name != "plain")  # that one has no turns
_PIECES = (  # a name after those that begin with it
    *("system_prefix", "system_suffix", "system", "user_prefix", "user_suffix"),
    *("answer_prefix", "answer_space", "answer_suffix"),
)


def jinja(name: str) -> str:
    """The template as Jinja text for a list of `messages` (role, content) and `add_generation_prompt`.

    A content is a text, in which `<image>` is an ordinary word, or a list of parts whose images become
    `<image>` with what stands around it.
    """
    template = TEMPLATES[name]
    system = "{%- if ns.system -%}{{- SYSTEM_PREFIX + ns.system + SYSTEM_SUFFIX -}}{%- endif -%}"
    in_turn = template.system_in_turn
    text = _HEAD + ("" if in_turn else system) + _LOOP.replace("IN_TURN", system * in_turn)
    before, after = template.image_brackets
    text = text.replace("IMAGE", json.dumps(f"{before}{IMAGE_MARK}{after}{template.image_suffix}"))
    for piece in _PIECES:
        text = text.replace(piece.upper(), json.dumps(getattr(template, piece)))
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
    "{%- else -%}{%- set ns.text = ns.text + IMAGE -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- USER_PREFIX -}}{%- if ns.first -%}IN_TURN{%- endif -%}"
    "{{- ns.text + USER_SUFFIX -}}{%- set ns.first = false -%}"
    "{%- else -%}"
    "{{- ANSWER_PREFIX + ANSWER_SPACE + (ns.text | trim) + ANSWER_SUFFIX -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- ANSWER_PREFIX -}}{%- endif -%}"
)
