"""Prompts: the exact texts the models were trained with, and words that stay words."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllava._template_choice import choose, recognised
from pyllava.convert.chat_template import NAMES, jinja
from pyllava.models import names_in
from pyllava.templates import (
    TEMPLATES,
    ImageMark,
    Message,
    Part,
    Text,
    by_name,
    prompt_text,
    raw,
    render,
    unescape,
)

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAVA = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content "
    "that the user provides, and assist the user with a variety of tasks using natural language."
)
MPT = (
    "A conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
YI = "<|im_start|>system\nAnswer the questions.<|im_end|>"
USER_3, ASSISTANT_3 = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))
SYSTEM_3 = "<|start_header_id|>system<|end_header_id|>\n\n"
JOY = (
    SYSTEM_3 + "Cutting Knowledge Date: December 2023\nToday Date: 26 July 2024\n\n"
    "You are a helpful image captioner.<|eot_id|>"
)
JOY_IMAGE = "<|reserved_special_token_70|><image><|reserved_special_token_71|>"
QWEN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
YI_VL = (
    "This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI assistant. Read all the "
    "images carefully, and respond to the human's questions with informative, helpful, detailed and polite answers. "
    "这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。"
)
TURNS_3 = f"Q1<|eot_id|>{ASSISTANT_3}A1<|eot_id|>{USER_3}Q2<|eot_id|>{ASSISTANT_3}A2<|eot_id|>{USER_3}Q3<|eot_id|>{ASSISTANT_3}"
TURNS_CHATML = (
    "<|im_start|>user\n<image>\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n<|im_start|>user\nQ3<|im_end|>\n"
    "<|im_start|>assistant\n"
)

ONE_TURN = {
    "vicuna_v1": VICUNA + " USER: <image>\nQ1 ASSISTANT:",
    "llava_v1": LLAVA + " USER: <image>\nQ1 ASSISTANT:",
    "llava_v0": LLAVA + "###Human: <image>\nQ1###Assistant:",
    "mistral_instruct": "[INST] <image>\nQ1 [/INST]",
    "chatml_direct": YI + "<|im_start|>user\n<image>\nQ1<|im_end|><|im_start|>assistant\n",
    "llava_llama_2": "[INST] <<SYS>>\n" + LLAMA_2 + "\n<</SYS>>\n\n<image>\nQ1 [/INST]",
    "plain": "<image>Q1",
    "mpt": "<|im_start|>system\n"
    + MPT
    + "<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|><|im_start|>assistant\n",
    "llama_3": f"{USER_3}<image>\nQ1<|eot_id|>{ASSISTANT_3}",
    "llava_llama_3": f"{SYSTEM_3}{LLAMA_2}<|eot_id|>{USER_3}<image>\nQ1<|eot_id|>{ASSISTANT_3}",
    "joycaption": f"{JOY}{USER_3}{JOY_IMAGE}Q1<|eot_id|>{ASSISTANT_3}",
    "phi_3": "<|user|>\n<image>\nQ1<|end|>\n<|assistant|>\n",
    "qwen_1_5": QWEN + "<|im_start|>user\n<image>\nQ1<|im_end|>\n<|im_start|>assistant\n",
    "chatml": "<|im_start|>user\n<image>\nQ1<|im_end|>\n<|im_start|>assistant\n",
    "nanollava": "<|im_start|>system\nAnswer the question<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|>"
    "<|im_start|>assistant\n",
    "granite_vision": f"<|system|>\n{VICUNA}\n<|user|>\n<image>\nQ1\n<|assistant|>\n",
    "yi_vl": YI_VL + "\n\n### Human: <image>\nQ1\n### Assistant:",
}
THREE_TURNS = {
    "vicuna_v1": VICUNA + " USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>USER: Q3 ASSISTANT:",
    "llava_v1": LLAVA + " USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>USER: Q3 ASSISTANT:",
    "llava_v0": LLAVA
    + "###Human: <image>\nQ1###Assistant: A1###Human: Q2###Assistant: A2###Human: Q3###Assistant:",
    "mistral_instruct": "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST] A2 </s>[INST] Q3 [/INST]",
    "chatml_direct": YI + "<|im_start|>user\n<image>\nQ1<|im_end|><|im_start|>assistant\nA1<|im_end|>"
    "<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\nA2<|im_end|><|im_start|>user\nQ3<|im_end|><|im_start|>assistant\n",
    "llava_llama_2": "[INST] <<SYS>>\n"
    + LLAMA_2
    + "\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST] A2 </s>[INST] Q3 [/INST]",
    "plain": "<image>Q1A1\nQ2A2\nQ3",
    "mpt": "<|im_start|>system\n"
    + MPT
    + "<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|><|im_start|>assistant\nA1<|im_end|>"
    "<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\nA2<|im_end|><|im_start|>user\nQ3<|im_end|><|im_start|>assistant\n",
    "llama_3": f"{USER_3}<image>\n{TURNS_3}",
    "llava_llama_3": f"{SYSTEM_3}{LLAMA_2}<|eot_id|>{USER_3}<image>\n{TURNS_3}",
    "joycaption": f"{JOY}{USER_3}{JOY_IMAGE}{TURNS_3}",
    "phi_3": "<|user|>\n<image>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nQ2<|end|>\n<|assistant|>\nA2<|end|>\n"
    "<|user|>\nQ3<|end|>\n<|assistant|>\n",
    "qwen_1_5": QWEN + TURNS_CHATML,
    "chatml": TURNS_CHATML,
    "nanollava": "<|im_start|>system\nAnswer the question<|im_end|>"
    + TURNS_CHATML.replace("<|im_end|>\n", "<|im_end|>"),
    "granite_vision": f"<|system|>\n{VICUNA}\n<|user|>\n<image>\nQ1\n<|assistant|>\nA1<|end_of_text|>\n"
    "<|user|>\nQ2\n<|assistant|>\nA2<|end_of_text|>\n<|user|>\nQ3\n<|assistant|>\n",
    "yi_vl": YI_VL + "\n\n### Human: <image>\nQ1\n### Assistant: A1\n### Human: Q2\n### Assistant: A2\n"
    "### Human: Q3\n### Assistant:",
}
STOP = {
    "vicuna_v1": ("</s>",),
    "llava_v1": ("</s>",),
    "llava_v0": ("###",),
    "mistral_instruct": ("</s>",),
    "chatml_direct": ("<|im_end|>",),
    "llava_llama_2": ("</s>",),
    "plain": ("\n",),
    "mpt": ("<|im_end|>",),
    **dict.fromkeys(("llama_3", "llava_llama_3", "joycaption"), ("<|eot_id|>", "<|end_of_text|>")),
    "phi_3": ("<|end|>", "<|endoftext|>"),
    **dict.fromkeys(("qwen_1_5", "chatml", "nanollava"), ("<|im_end|>",)),
    "granite_vision": ("<|end_of_text|>",),
    "yi_vl": ("###",),
}
CONVERSATION = [
    Message("user", "Q1", images=1),
    Message("assistant", " A1\n"),
    Message("user", "Q2"),
    Message("assistant", "A2"),
    Message("user", "Q3"),
]

names = pytest.mark.parametrize("name", sorted(TEMPLATES))
vicuna = TEMPLATES["vicuna_v1"]


def test_every_template_is_listed() -> None:
    assert set(TEMPLATES) == set(ONE_TURN) == set(THREE_TURNS) == set(STOP)
    assert all(template.name == name for name, template in TEMPLATES.items())


@names
def test_one_turn(name: str) -> None:
    assert prompt_text(render(TEMPLATES[name], CONVERSATION[:1])) == ONE_TURN[name]


@names
def test_three_turns(name: str) -> None:
    assert prompt_text(render(TEMPLATES[name], CONVERSATION)) == THREE_TURNS[name]


@names
def test_stop(name: str) -> None:
    assert TEMPLATES[name].stop == STOP[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vicuna_v1", "Be brief. USER: Hi ASSISTANT:"),
        ("llava_v0", "Be brief.###Human: Hi###Assistant:"),
        ("mistral_instruct", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"),
        (
            "chatml_direct",
            "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n",
        ),
    ],
)
def test_own_system_message(name: str, expected: str) -> None:
    parts = render(TEMPLATES[name], [Message("user", "Hi")], system="Be brief.")
    assert prompt_text(parts) == expected
    assert Text("Be brief.", special=False) in parts


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vicuna_v1", "USER: Hi ASSISTANT:"),
        ("llava_v0", "###Human: Hi###Assistant:"),
        ("llava_llama_2", "[INST] Hi [/INST]"),
        ("chatml_direct", "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\n"),
    ],
)
def test_no_system_message(name: str, expected: str) -> None:
    assert prompt_text(render(TEMPLATES[name], [Message("user", "Hi")], system="")) == expected


def test_parts() -> None:
    assert render(vicuna, CONVERSATION[:3]) == [
        Text(VICUNA + " USER: "),
        ImageMark(0),
        Text("\n"),
        Text("Q1", special=False),
        Text(" ASSISTANT: "),
        Text("A1", special=False),
        Text("</s>USER: "),
        Text("Q2", special=False),
        Text(" ASSISTANT:"),
    ]


def turn(text: str, images: int) -> str:
    prompt = prompt_text(render(TEMPLATES["mistral_instruct"], [Message("user", text, images)]))
    return prompt.removeprefix("[INST] ").removesuffix(" [/INST]")


def test_where_images_go() -> None:
    assert turn("Compare.", 3) == "<image>\n<image>\n<image>\nCompare."
    assert turn("<image>\nCompare.", 1) == "<image>\nCompare."
    assert turn("<image> \n<image>\nCompare.", 2) == "<image> \n<image>\nCompare."
    assert turn("<image><image>\nCompare.", 2) == "<image><image>\nCompare."
    assert turn("This:\n<image>\r\nand this:\n<image>", 2) == "This:\n<image>\r\nand this:\n<image>"
    assert render(TEMPLATES["plain"], [Message("user", "Is\n <image>\nlike\n<image>", 2)]) == [
        Text("Is\n ", special=False),
        ImageMark(0),
        Text("\nlike\n", special=False),
        ImageMark(1),
    ]
    later = [Message("user", "a", 2), Message("assistant", "b"), Message("user", "<image>\nc", 1)]
    marks = [part.index for part in render(vicuna, later) if isinstance(part, ImageMark)]
    assert marks == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("What does the tag <image> mean?", 1),
        ("<image> is which tag?", 1),
        ("Is <image> like <image>?", 2),
        ("Is <image> like <image>?", 1),
        ("Write <image> or\n<image>\nor\n<image>", 1),
        ("<image> <image>", 1),
        ("<image>", 2),
        ("<image>\n<image><image>\n", 2),
        ("<Image>", 1),
    ],
)
def test_any_other_mark_is_a_word(text: str, images: int) -> None:
    """The pictures stand in front, and what the question says stays what it says."""
    parts = render(TEMPLATES["plain"], [Message("user", text, images)])
    assert parts == [*map(ImageMark, range(images)), Text(text, special=False)]


def test_a_mark_and_a_word() -> None:
    assert render(TEMPLATES["plain"], [Message("user", "<image>\nWhat does <image> mean?", 1)]) == [
        ImageMark(0),
        Text("\nWhat does <image> mean?", special=False),
    ]


def test_a_mark_without_an_image_is_text() -> None:
    for text in ("What does <image> mean?", "<image>", "a\n<image>\nb"):
        parts = render(vicuna, [Message("user", text)])
        assert Text(text, special=False) in parts
        assert not any(isinstance(part, ImageMark) for part in parts)


@pytest.mark.parametrize(("text", "images"), [("<image> <image>", 1), ("<image>", 2)])
def test_marks_and_images_must_agree_where_every_mark_counts(text: str, images: int) -> None:
    n_marks = text.count("<image>")
    with pytest.raises(ValueError, match=rf"has {n_marks} <image> marks?, images given: {images}"):
        raw(text, images)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [Message("assistant", "a")],
        [Message("user", "q"), Message("assistant", "a")],
        [Message("user", "q"), Message("user", "q"), Message("user", "q")],
        [Message("user", "q"), Message("assistant", "a", images=1), Message("user", "q")],
        [Message("user", "q", images=-1)],
    ],
)
def test_wrong_conversations(messages: list[Message]) -> None:
    with pytest.raises(ValueError, match="message"):
        render(vicuna, messages)


def test_raw() -> None:
    assert raw("<image>\nUSER:\nHi.\nASSISTANT:\n", 1) == [ImageMark(0), Text("\nUSER:\nHi.\nASSISTANT:\n")]
    assert raw("a<image>b<image></s>", 2) == [Text("a"), ImageMark(0), Text("b"), ImageMark(1), Text("</s>")]
    assert raw("a <image> b", 0) == [Text("a <image> b")]
    assert raw("", 0) == []
    with pytest.raises(ValueError, match="has 0 <image> marks, images given: 1"):
        raw("no mark", 1)


# --- properties ---

words = st.lists(
    st.sampled_from(
        [
            "</s>",
            "<s>",
            "<image>",
            "<|im_end|>",
            "<|im_start|>",
            "[INST]",
            "###",
            "USER:",
            "<unk>",
            " ",
            "\n",
            "é",
        ]
    )
    | st.text(max_size=5),
    max_size=6,
).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    messages = []
    for _ in range(draw(st.integers(0, 2))):
        messages += [Message("user", draw(words), draw(st.integers(0, 2))), Message("assistant", draw(words))]
    return [*messages, Message("user", draw(words), draw(st.integers(0, 2)))]


@given(st.sampled_from(sorted(TEMPLATES)), conversations(), st.none() | words)
def test_words_never_become_special(name: str, messages: list[Message], system: str | None) -> None:
    parts = render(TEMPLATES[name], messages, system=system)
    spaced = render(TEMPLATES[name], [Message(m.role, "", m.images) for m in messages], system=system and "-")
    assert special_text(parts) == special_text(spaced)
    marks = [part.index for part in parts if isinstance(part, ImageMark)]
    assert marks == list(range(sum(m.images for m in messages)))
    assert all(isinstance(part, ImageMark) or part.text for part in parts)
    assert all(
        not (isinstance(a, Text) and isinstance(b, Text) and a.special == b.special)
        for a, b in itertools.pairwise(parts)
    )


def special_text(parts: list[Part]) -> str:
    """What the tokenizer may find special tokens in, without newlines: one follows an image in front of its text."""
    text = "".join(part.text for part in parts if isinstance(part, Text) and part.special)
    return text.replace("\n", "")


@given(words, st.integers(0, 3))
def test_raw_keeps_every_character(text: str, n_images: int) -> None:
    if n_images and text.count("<image>") != n_images:
        with pytest.raises(ValueError, match="images given"):
            raw(text, n_images)
        return
    parts = raw(text, n_images)
    assert prompt_text(parts) == text
    assert sum(isinstance(part, ImageMark) for part in parts) == n_images
    assert all(isinstance(part, ImageMark) or part.special for part in parts)


# --- choosing a template ---

MISTRAL = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
CHATML = "{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n'}}"
VICUNA_HF = "{{ m['role'].upper() + ': ' }}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
LLAMA_2_CHAT = "{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{{ bos_token + '[INST] ' + c + ' [/INST]' }}"
PHI_3 = (
    "{{'<|' + m['role'] + '|>' + '\\n' + m['content'] + '<|end|>\\n'}}{{ '<|user|>' }}{{'<|assistant|>\\n' }}"
)
GRANITE = "{{ '<|system|>\\n" + VICUNA + "\\n' }}{{ '<|user|>\\n' + c }}{{ '\\n<|assistant|>\\n' }}"
LLAMA_3 = "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] + '<|eot_id|>' }}"


@pytest.mark.parametrize(
    ("chat_template", "expected", "why"),
    [
        (MISTRAL, "mistral_instruct", "its chat template"),
        (
            MISTRAL.replace(" [/INST]", "[/INST]"),
            "mistral_instruct",
            "its chat template, but for white space",
        ),
        ("{{ '[INST]' + m + '[/INST]' }}", "mistral_instruct", "its chat template, but for white space"),
        ("{#- ASSISTANT: and <|im_start|> -#}" + MISTRAL, "mistral_instruct", "its chat template"),
        (CHATML, "chatml_direct", "its chat template, but for white space"),
        (CHATML.replace(" + '\\n'}}", "}}"), "chatml_direct", "its chat template"),
        (MPT + CHATML, "mpt", "its chat template, but for white space"),
        (VICUNA_HF, "vicuna_v1", "its chat template"),
        (VICUNA + " {{ 'USER: ' + m }} {{ 'ASSISTANT: ' }}", "vicuna_v1", "its chat template"),
        (LLAVA + " {{ 'USER: ' + m }} {{ 'ASSISTANT: ' }}", "llava_v1", "its chat template"),
        ("USER:\n{{ m }}\nASSISTANT:\n", "vicuna_v1", "its chat template, but for white space"),
        ("{{ '###Human: ' + m + '###Assistant:' }}", "llava_v0", "its chat template"),
        ("{{ '### Human: ' + m + '### Assistant:' }}", "llava_v0", "its chat template, but for white space"),
        (LLAMA_2_CHAT, "llava_llama_2", "its chat template"),
        (LLAMA_3, "llama_3", "its chat template"),
        (LLAMA_3 + "{{ '<|reserved_special_token_70|>' }}", "joycaption", "its chat template"),
        (PHI_3, "phi_3", "its chat template"),
        (QWEN + CHATML, "qwen_1_5", "its chat template"),
        (GRANITE, "granite_vision", "its chat template"),
    ],
)
def test_a_chat_template_is_recognised_by_its_marks(chat_template: str, expected: str, why: str) -> None:
    assert choose(["ggml-model-q4_k.gguf"], chat_template, ["<unk>"].__contains__) == (expected, why, "")


@pytest.mark.parametrize("name", NAMES)
def test_our_own_chat_templates_are_recognised(name: str) -> None:
    assert recognised(jinja(name)) == (name, "its chat template", "")


@pytest.mark.parametrize(
    "chat_template", ["{{ '<|turn|>' }}", "{{ '<start_of_turn>' }}", "{# [INST] #}{{ m }}", "{{ own }}"]
)
def test_an_unknown_chat_template(chat_template: str) -> None:
    assert recognised(chat_template) is None
    found = choose(["my-model"], chat_template, ().__contains__)
    assert found.name == "vicuna_v1"
    assert found.doubt == "its chat template is none of those known here"
    assert choose(["llava-v1.6-mistral-7b"], chat_template, ().__contains__).name == "mistral_instruct"
    assert choose(["llava-v1.6-mistral-7b"], chat_template, ().__contains__).doubt


def test_a_hostile_chat_template_is_only_looked_at() -> None:
    for text in (
        "{#" * (1 << 19),
        "'+" * (1 << 19),
        "' " * (1 << 19),
        "{{ 1/0 }}{% raise %}",
        "'" + " " * (1 << 20),
    ):
        started = time.perf_counter()
        assert recognised(text) is None
        assert time.perf_counter() - started < 2


def test_a_hostile_name_takes_no_time() -> None:
    started = time.process_time()
    assert choose(["granite3" * (1 << 17)], None, ().__contains__).doubt
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], None),
        (["llava-v1.5-7b", "ggml-model-q4_k.gguf"], "vicuna_v1"),
        (["llava-v1.5-7b", "mistral.gguf"], "vicuna_v1"),
        (["LLaMA v2", "ggml-model-f16.gguf"], None),
        (["llava-v1.6-vicuna-13b", "llava-v1.6-vicuna-13b.Q4_K_M.gguf"], "vicuna_v1"),
        (["llava-v1.6-mistral-7b"], "mistral_instruct"),
        (["ggml-model-q4_k.gguf", "llava-1.6-mistral-7b-gguf"], "mistral_instruct"),
        (["ggml-model-q4_k.gguf", "llava_1.5_7b"], "vicuna_v1"),
        (["BakLLaVA-1-Mistral-7B.gguf"], "vicuna_v1"),
        (["some-vicuna-34b"], "vicuna_v1"),
        (["LLaVA-v1.6-Mistral-7b.Q3_K_XS.gguf"], "mistral_instruct"),
        (["models", "llava-v1.6-34b.Q4_K_M.gguf"], "chatml_direct"),
        (["model.gguf", "9f34b07c1"], None),
        (["llava-llama-2-13b-chat-lightning-preview"], "llava_llama_2"),
        (["BakLLaVA-1", "ggml-model-f16.gguf"], "vicuna_v1"),
        (["BakLLaVA-1", "Mistral-7B-v0.1"], "vicuna_v1"),
        (["my-model", "Mistral-7B-Instruct-v0.2"], "mistral_instruct"),
        (["pyllava-demo"], "vicuna_v1"),
        (["llama-joycaption-beta-one-hf-llava.Q4_K_M.gguf"], "joycaption"),
        (["llava-llama-3-8b-v1_1-int4.gguf"], "llama_3"),
        (["llama3-llava-next-8b-hf"], "llava_llama_3"),
        (["llava-phi-3-mini-int4.gguf"], "phi_3"),
        (["llava-onevision-qwen2-7b-ov-hf"], "qwen_1_5"),
        (["llava-interleave-qwen-0.5b-hf"], "qwen_1_5"),
        (["llava-next-72b"], "qwen_1_5"),
        (["nanoLLaVA-1.5"], "nanollava"),
        (["granite-vision-3.2-2b-Q8_0.gguf"], "granite_vision"),
        (["granite3.2-vision"], "granite_vision"),
        (["Yi-VL-34B"], "yi_vl"),
        (["vip-llava-7b-hf"], "llava_v0"),
        (["llava-med-v1.5-mistral-7b"], "mistral_instruct"),
    ],
)
def test_choice_by_names(names: list[str], expected: str | None) -> None:
    found = choose(names, None, ().__contains__)
    assert found.name == (expected or "vicuna_v1")
    assert bool(found.doubt) == (expected is None)


@pytest.mark.parametrize(
    ("names", "template", "tokens", "wanted"),
    [
        (["llava-v1.6-34b-hf"], MISTRAL, (), "mistral_instruct"),
        (["BakLLaVA-1"], MISTRAL, (), "vicuna_v1"),  # on Mistral, trained as Vicuna
        (["my-model"], None, ("<|im_start|>",), "chatml_direct"),
        (["llava-v1.5-7b"], None, ("<|im_start|>",), "vicuna_v1"),
        (["nanoLLaVA"], QWEN + CHATML, (), "nanollava"),  # on Qwen, whose template its file may bring
        (["llama-joycaption"], LLAMA_3, (), "joycaption"),
        (["my-model"], None, ("<|im_start|>", "<|endoftext|>"), "qwen_1_5"),
        (["my-model"], None, ("<|im_start|>", "<|endoftext|>", "<unk>"), "chatml_direct"),
        (["my-model"], CHATML, ("<|im_start|>", "<unk>"), "chatml_direct"),
        (["SmolLM2"], CHATML, ("<|im_start|>",), "chatml"),
        (["my-model"], None, ("<|start_header_id|>", "<|eot_id|>"), "llama_3"),
        (["my-model"], None, ("<|user|>", "<|assistant|>", "<|end|>"), "phi_3"),
    ],
)
def test_what_tells_most(
    names: list[str], template: str | None, tokens: tuple[str, ...], wanted: str
) -> None:
    assert choose(names, template, [*tokens].__contains__).name == wanted


def test_names_of_a_model(tmp_path: Path) -> None:
    metadata = {
        "general.base_model.0.name": "Mistral 7B",
        "general.name": "my-llava",
        "general.description": "as good as a 34b",
        "general.finetune": 3,
    }
    path = tmp_path / "llava-1.5" / "model.gguf"
    assert names_in(path, metadata) == ["my-llava", "model.gguf", "llava-1.5", "Mistral 7B"]
    cached = tmp_path / "models--me--llava-v1.6-34b" / "snapshots" / "0123abc" / "model.gguf"
    assert names_in(cached, {}) == ["model.gguf", "models--me--llava-v1.6-34b"]


def test_no_such_template() -> None:
    with pytest.raises(ValueError, match="'auto'"):
        by_name("auto")


# --- escapes ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"a\nb\rc\td", "a\nb\rc\td"),
        (r"\'\"\\", "'\"\\"),
        (r"\\n", r"\n"),
        (r"\x41\x0a\x7e", "A\n~"),
        (r"\xc3\xa9", "é"),
        (r"é\xE2\x82\xac", "é€"),
        (r"\q \x4 \xg1 \x", r"\q \x4 \xg1 \x"),
        ("end\\", "end\\"),
        (r"\x4", r"\x4"),
        ("", ""),
    ],
)
def test_unescape(text: str, expected: str) -> None:
    assert unescape(text) == expected


def test_unescape_to_no_text() -> None:
    with pytest.raises(ValueError, match=r"\\xff is not UTF-8"):
        unescape(r"a\xff")


@given(st.text())
def test_unescape_undoes_doubled_backslashes(text: str) -> None:
    assert unescape(text.replace("\\", "\\\\")) == text
