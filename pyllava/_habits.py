"""Calls as other libraries have them: the error says what is meant, and what it is called here.

The names are those of transformers, llama-cpp-python, ollama and OpenAI's clients.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

from ._named_pictures import SUFFIXES
from ._sources import is_data_url


def _table(*rows: tuple[str, str]) -> Mapping[str, str]:
    return MappingProxyType({name: told for names, told in rows for name in names.split()})


OUR_NAMES = _table(
    ("max_new_tokens max_length max_completion_tokens num_predict n_predict", "max_tokens"),
    ("temp", "temperature"),
    ("repetition_penalty frequency_repeat_penalty", "repeat_penalty"),
    ("typical", "typical_p"),
    ("stop_strings stop_sequences stop_words", "stop"),
    ("random_seed", "seed"),
    ("top_logprobs", "logprobs"),
    ("use_cache cache_prompt", "reuse"),
    ("system_prompt system_message", "system"),
    ("image image_path image_file picture", "images"),
    ("question query text", "prompt"),
    ("model_path model_file pretrained_model_name_or_path", "model"),
    ("clip_model_path mmproj_path projector", "mmproj"),
    ("num_ctx context_length max_model_len", "n_ctx"),
    ("num_thread num_threads threads", "n_threads"),
    ("num_gpu gpu_layers", "n_gpu_layers"),
    ("chat_format", "template"),
)
"""What arguments of other libraries are called here."""

INSTEAD = _table(
    ("do_sample", "temperature above 0 draws tokens, 0 (the default) takes the likeliest"),
    ("num_beams", "leave it out: answers are not searched with beams"),
    ("torch_dtype dtype", "leave it out: numbers are as in the file; type_k and type_v are the KV cache's"),
    ("device_map", "device names devices, n_gpu_layers says how many layers go there"),
    (
        "load_in_4bit load_in_8bit quantization_config",
        "`pyllava-cli quantize IN OUT q4_k_m` writes a smaller file",
    ),
    ("trust_remote_code low_cpu_mem_usage use_fast return_tensors use_mlock logits_all", "leave it out"),
    ("chat_handler", "leave it out: mmproj names the projector, and the template is told by the model"),
    ("verbose", 'logging.getLogger("pyllava") has the log, progress= is told of long stages'),
    ("streamer", "stream=True gives the pieces"),
    ("messages", "chat() has a conversation"),
    ("n num_return_sequences", "batch(samples=N) gives several answers"),
)
"""What to do instead, where they have no name here."""


def check_names(
    call: str, given: Iterable[str], known: Collection[str], elsewhere: Mapping[str, Collection[str]]
) -> None:
    """Raises TypeError for an argument that a call does not have; `elsewhere`: the calls that may have it."""
    for name in given:
        if name not in known:
            raise TypeError(f"{call}: no argument {name!r}{_told(name, known, elsewhere)}")


def _told(name: str, known: Collection[str], elsewhere: Mapping[str, Collection[str]]) -> str:
    ours = OUR_NAMES.get(name, name)
    if ours in known:
        return f"; it is called {ours} here"
    for call, names in elsewhere.items():
        if ours in names:
            return f"; it is one of {call}" if ours == name else f"; it is {ours}, one of {call}"
    if name in INSTEAD:
        return f"; {INSTEAD[name]}"
    from difflib import get_close_matches

    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def check_call(
    call: str, function: Callable[..., object], given: Iterable[str], elsewhere: Mapping[str, Collection[str]]
) -> None:
    """The same for a function, of a subclass perhaps, which may take any."""
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        check_names(call, given, parameters, elsewhere)


def arguments_of(function: Callable[..., object]) -> list[str]:
    """The names that a function takes."""
    return [name for name in inspect.signature(function).parameters if name != "self"]


def check_order(images: object, prompt: object, call: str = "ask") -> None:
    """ask(prompt, images) is an easy mistake, and a file that does not exist a poor hint."""
    texts = _texts(images)
    if not _are_questions(texts):
        return
    if not isinstance(prompt, str) or ("\n" not in prompt and os.path.isfile(prompt)):
        raise TypeError(
            f"{call}(images, prompt): the images come first, found prompt {_short(prompt)} and images {_short(images)}"
        )
    if len(texts) == 1 and " " in texts[0] and not texts[0].lower().endswith(SUFFIXES):
        raise TypeError(
            f"{call}(images, prompt): images: no file {_short(texts[0])}; {call}(None, prompt) asks without a picture"
        )


def without_prompt(images: object) -> TypeError:
    """What ask() with one argument is told."""
    texts = _texts(images)
    if (texts and not _are_questions(texts)) or not (texts or images is None):
        return TypeError("ask(images, prompt): no prompt, need a question about the images")
    found = f"found {_short(images)} alone" if texts else "no prompt"
    return TypeError(f"ask(images, prompt): {found}; ask(None, prompt) asks without a picture")


def _are_questions(texts: Sequence[str]) -> bool:
    return bool(texts) and not any(map(_is_file, texts))


def _texts(images: object) -> list[str]:
    """Images that are texts, all of them."""
    given = [images] if isinstance(images, str) else images
    if not isinstance(given, list | tuple):
        return []
    texts = [image for image in given if isinstance(image, str)]
    return texts if len(texts) == len(given) else []


def check_chat_order(prompt: object, images: object) -> None:
    """In a conversation the prompt comes first, for ask() has one without images."""
    if isinstance(images, str) and not _is_file(images) and (not isinstance(prompt, str) or _is_file(prompt)):
        raise TypeError(
            f"ask(prompt, images=...): the prompt comes first, found prompt {_short(prompt)} and images {_short(images)}"
        )


def check_sources(sources: object, prompt: object) -> None:
    """A text is many letters to Python, and one picture, or a question, to who calls."""
    if isinstance(sources, str | bytes | os.PathLike):
        raise TypeError(
            f"batch(sources, prompt): sources: found {_short(sources)}, need many of them; [source] for one"
        )
    if not (isinstance(prompt, str) or callable(prompt)):
        raise TypeError(
            f"batch(sources, prompt): prompt: found {_short(prompt)}, need a text, or a function of a source"
        )


def _is_file(text: object) -> bool:
    return isinstance(text, str) and (
        is_data_url(text) or os.path.exists(os.path.expanduser(text)) or "://" in text[:10]
    )


def _short(value: object) -> str:
    text = repr(value) if isinstance(value, str) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
