"""Which prompt template a model was trained with: told by what its file brings, or guessed with a warning."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ._plain import plain
from .templates import TEMPLATES


class Choice(NamedTuple):
    """The template of a model, and what told it."""

    name: str
    why: str
    doubt: str = ""
    """What is to be said to the user, who may know better; "" where the model tells its template."""


def choose(names: Iterable[str], chat_template: str | None, has_token: Callable[[str], bool]) -> Choice:
    """The template of a model or a checkpoint that is not told by the name of one.

    Told by the Jinja template that it brings, which is looked at and never run; else by the names that it has, then by
    its vocabulary, of which `has_token` tells whether it has a token of this text; else ``vicuna_v1``, with `doubt`.
    """
    names = list(names)
    for name in names:
        if found := _hint(_TRAINED_OTHERWISE, name):
            return Choice(found, f"the name {plain(name)[:80]}")
    if chat_template and (known := recognised(chat_template)):
        is_base = known.name == "chatml_direct" and known.why != _TOLD and not has_token("<unk>")
        return Choice("chatml", _TOLD) if is_base else known
    doubt = "its chat template is none of those known here" if chat_template else ""
    for name in names:
        if found := _hint(_NAME_HINTS, name):
            return Choice(found, f"the name {plain(name)[:80]}", doubt)
    for tokens, template in _VOCABULARIES:
        if all(has_token(token) == there for token, there in tokens.items()):
            return Choice(template, "its vocabulary", doubt)
    return Choice(_USUAL, "nothing else said", doubt or "nothing in it tells its prompt template")


def recognised(chat_template: str) -> Choice | None:
    """The template whose turn marks stand in a Jinja template, or None.

    ChatML with a newline after each turn is the base model's; a LLaVA model on it was trained without.
    """
    text = _literals(chat_template)
    bare = "".join(text.split())
    for marks, name, other_space in _SIGNS:
        if all("".join(mark.split()) in bare for mark in marks):
            but = ", but for white space" if other_space and re.search(other_space, text) else ""
            return Choice(name, f"{_TOLD}{but}")
    return None


def system_told(chat_template: str) -> str:
    """The system message that a Jinja template in ChatML writes where a conversation brings none; "" if it has none."""
    found = re.search(r"<\|im_start\|>system\n([^<>{}'\"]*)<\|im_end\|>", _literals(chat_template))
    return found[1] if found else ""


def _literals(jinja: str) -> str:
    """A Jinja template without its comments, and with texts that it joins in one piece."""
    parts, at = [], 0
    while (start := jinja.find("{#", at)) >= 0 and (end := jinja.find("#}", start + 2)) >= 0:
        parts.append(jinja[at:start])
        at = end + 2
    text = "".join([*parts, jinja[at:]])
    return re.sub(r"['\"]\s*\+\s*['\"]", "", text.replace("\\n", "\n"))


def _hint(hints: Sequence[tuple[str, str]], name: str) -> str | None:
    name = name[:_LONGEST_NAME].lower().replace("_", "-")
    return next((template for part, template in hints if re.search(part, name)), None)


_LONGEST_NAME = 4096  # characters looked at: of what a file says, there may be any number
_USUAL = "vicuna_v1"
_TOLD = "its chat template"
_TRAINED_OTHERWISE = (  # than the model they were made from, whose marks they may bring
    ("bakllava", "vicuna_v1"),
    ("joy-?caption", "joycaption"),
    ("nanollava", "nanollava"),
    ("llava-onevision|llava-interleave", "qwen_1_5"),
    ("granite-vision|granite-?3.*vision", "granite_vision"),
    (r"(?<![a-z])yi-vl", "yi_vl"),
    ("vip-llava", "llava_v0"),
    ("llama-?3-llava-next", "llava_llama_3"),
)
_NAME_HINTS = (  # patterns in a model's name, in the order in which they are looked for
    *_TRAINED_OTHERWISE,
    ("vicuna", "vicuna_v1"),
    (r"(?<![0-9a-z])34b(?![0-9a-z])", "chatml_direct"),  # not in a hash
    ("mistral|llava-med", "mistral_instruct"),
    ("llama-2", "llava_llama_2"),
    (r"llama-?3(?![0-9])", "llama_3"),
    ("phi-?3", "phi_3"),
    ("qwen|llava-next-(72|110)b", "qwen_1_5"),
    (r"v1\.5|llava-?1\.5", "vicuna_v1"),
    ("mobilevlm|pyllava-demo", "vicuna_v1"),
)
_VOCABULARIES = (  # tokens that are there or not; a vocabulary of bytes has none for the unknown
    ({"<|start_header_id|>": True, "<|eot_id|>": True}, "llama_3"),
    ({"<|im_start|>": True, "<unk>": False, "<|endoftext|>": True}, "qwen_1_5"),
    ({"<|im_start|>": True}, "chatml_direct"),
    ({"<|user|>": True, "<|assistant|>": True, "<|end|>": True}, "phi_3"),
)
_OTHER_CHATML = r"<\|im_end\|>\n"
_OTHER_INST = r"\[INST\](?! )|(?<! )\[/INST\]"
_SIGNS = (  # turn marks that stand together in a Jinja template, first match; white space that is not the template's
    (("<|im_start|>", TEMPLATES["mpt"].system), "mpt", _OTHER_CHATML),
    (("<|im_start|>", TEMPLATES["qwen_1_5"].system), "qwen_1_5", ""),
    (
        ("<|im_start|>", f'system="{TEMPLATES["nanollava"].system}"'),
        "nanollava",
        "",
    ),  # as our converter writes it
    (("<|im_start|>", 'system="",'), "chatml", ""),  # likewise
    (("<|im_start|>",), "chatml_direct", _OTHER_CHATML),
    (("<|start_header_id|>", "<|reserved_special_token_70|>"), "joycaption", ""),
    (("<|start_header_id|>", TEMPLATES["llava_llama_3"].system), "llava_llama_3", ""),
    (("<|start_header_id|>", "<|eot_id|>"), "llama_3", ""),
    (("<|user|>", "<|assistant|>", "<|end|>"), "phi_3", ""),
    (("<|user|>", "<|assistant|>", TEMPLATES["granite_vision"].system), "granite_vision", ""),
    (("[INST]", "<<SYS>>", 'system="",'), "mistral_instruct", _OTHER_INST),  # likewise
    (("[INST]", "<<SYS>>"), "llava_llama_2", _OTHER_INST),
    (("[INST]",), "mistral_instruct", _OTHER_INST),
    (("### Human:", TEMPLATES["yi_vl"].system[:60]), "yi_vl", ""),
    (("###Human:",), "llava_v0", r"### "),
    (("ASSISTANT:", TEMPLATES["llava_v1"].system), "llava_v1", r"(USER|ASSISTANT):\n"),
    (("ASSISTANT:",), "vicuna_v1", r"(USER|ASSISTANT):\n"),
)
