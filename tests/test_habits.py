"""Calls as people make them by habit, from other libraries or in the wrong order: what the errors say."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pyllava
from pyllava import _habits, sampling

SCENE = str(Path(__file__).parent.parent / "examples" / "scene.png")
Q = "What is in the picture?"


@pytest.fixture(scope="module")
def m() -> Iterator[pyllava.Llava]:
    with pyllava.Llava(n_threads=1) as model:
        yield model


WRONG_ORDER = r"ask\(images, prompt\): the images come first, found prompt .* and images "


@pytest.mark.parametrize("images", [Q, [Q], (Q,)])
@pytest.mark.parametrize(
    "prompt",
    [
        SCENE,
        Path(SCENE),
        Path(SCENE).read_bytes(),
        Image.new("RGB", (8, 8)),
        np.zeros((8, 8, 3), np.uint8),
        [SCENE],
        (SCENE, SCENE),
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_the_prompt_before_the_images(m: pyllava.Llava, images: Any, prompt: Any) -> None:
    with pytest.raises(TypeError, match=WRONG_ORDER):
        m.ask(images, prompt)


def test_what_is_in_order(m: pyllava.Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("Is it red").write_bytes(Path(SCENE).read_bytes())
    expected = m.ask(SCENE, "Is it red").tokens
    assert m.ask("Is it red", "Is it red").tokens == expected  # a file with a strange name
    assert m.ask(images=[SCENE], prompt="Is it red").tokens == expected
    for missing in ("no.png", "my holiday.png", ["no.png", "no such.png"]):
        with pytest.raises(FileNotFoundError):
            m.ask(missing, Q)
    with pytest.raises(FileNotFoundError):
        m.ask("no.png", "")


CALLS: list[tuple[Callable[[pyllava.Llava], object], type[Exception], str]] = [
    (lambda m: m.ask(Q), TypeError, f"found '{Q}' alone; ask(None, prompt) asks without a picture"),
    (lambda m: m.ask(None), TypeError, "no prompt; ask(None, prompt) asks without a picture"),
    (lambda m: m.ask(SCENE), TypeError, "no prompt, need a question about the images"),
    (lambda m: m.ask(Path(SCENE)), TypeError, "no prompt, need a question about the images"),
    (lambda m: m.ask(SCENE, []), TypeError, "prompt: found list, need a text"),
    (lambda m: m.ask(Q, "Hi"), TypeError, f"images: no file '{Q}'; ask(None, prompt) asks without a picture"),
    (lambda m: m.ask(SCENE, Q, max_new_tokens=5), TypeError, "it is called max_tokens here"),
    (lambda m: m.ask(SCENE, Q, num_predict=5), TypeError, "it is called max_tokens here"),
    (lambda m: m.ask(SCENE, Q, temprature=1), TypeError, "did you mean temperature?"),
    (lambda m: m.ask(SCENE, Q, do_sample=True), TypeError, "temperature above 0 draws tokens"),
    (lambda m: m.ask(SCENE, Q, num_beams=2), TypeError, "answers are not searched with beams"),
    (lambda m: m.ask(SCENE, Q, n_ctx=5), TypeError, "ask(): no argument 'n_ctx'; it is one of Llava()"),
    (lambda m: m.ask(SCENE, Q, num_ctx=5), TypeError, "'num_ctx'; it is n_ctx, one of Llava()"),
    (lambda m: m.ask(SCENE, Q, xyzzy=5), TypeError, "ask(): no argument 'xyzzy'"),
    (
        lambda m: m.ask(SCENE, Q, temperature=-1),
        ValueError,
        "temperature: found -1, need a number of at least 0",
    ),
    (lambda m: m.ask(SCENE, Q, temperature="0.1"), TypeError, "temperature: found '0.1', need a number"),
    (lambda m: m.ask(SCENE, Q, max_tokens=5.0), TypeError, "max_tokens: found 5.0, need an integer"),
    (lambda m: m.ask(SCENE, Q, top_k="5"), TypeError, "top_k: found '5', need an integer"),
    (lambda m: m.ask(SCENE, Q, timeout="5"), TypeError, "timeout: found '5', need a number"),
    (lambda m: m.ask(SCENE, Q, seed="5"), TypeError, "seed: found '5', need an integer"),
    (lambda m: m.ask(SCENE, Q, stop=iter("x")), TypeError, "need a list of texts"),
    (lambda m: m.ask(SCENE, Q, stop=[b"x"]), TypeError, "stop: found [b'x'], need a list of texts"),
    (lambda m: m.ask(SCENE, Q, stop="x"), TypeError, "stop: found a text, need a list of texts"),
    (lambda m: m.chat().ask(SCENE, images=Q), TypeError, "the prompt comes first, found prompt"),
    (lambda m: m.chat().ask([SCENE], images=Q), TypeError, "the prompt comes first, found prompt list"),
    (lambda m: m.chat([{"role": "user", "content": Q}]), TypeError, "chat(system): found list, need a text"),
    (lambda m: m.batch(Q, [SCENE]), TypeError, f"sources: found '{Q}', need many of them; [source] for one"),
    (lambda m: m.batch(SCENE, Q), TypeError, "need many of them"),
    (lambda m: m.batch(Path(SCENE), Q), TypeError, "need many of them"),
    (
        lambda m: m.batch([SCENE], [Q]),
        TypeError,
        "prompt: found list, need a text, or a function of a source",
    ),
    (
        lambda m: pyllava.Llava(torch_dtype="auto"),
        TypeError,
        "Llava(): no argument 'torch_dtype'; leave it out",
    ),
    (lambda m: pyllava.Llava(model_path="x"), TypeError, "it is called model here"),
    (lambda m: pyllava.Llava(clip_model_path="x"), TypeError, "it is called mmproj here"),
    (lambda m: pyllava.Llava(chat_handler=1), TypeError, "mmproj names the projector"),
    (lambda m: pyllava.Llava(load_in_4bit=True), TypeError, "`pyllava-cli quantize IN OUT q4_k_m`"),
    (lambda m: pyllava.Llava(temperature=1), TypeError, "'temperature'; it is one of ask()"),
    (lambda m: pyllava.Llava(device_map="auto"), TypeError, "device names devices"),
    (lambda m: pyllava.Llava(device="cuda:9"), pyllava.DeviceError, "device: found 'cuda:9', there are: "),
    (lambda m: pyllava.Llava(SCENE), pyllava.ModelFileError, "a picture, need a GGUF model"),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS, ids=[row[2][:40] for row in CALLS])
def test_what_errors_say(
    m: pyllava.Llava, call: Callable[[pyllava.Llava], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(m)


def test_habits_lead_to_what_there_is() -> None:
    """A name to use instead is one that ask() or Llava() has; none of ours is called a habit."""
    ours = {*pyllava.Options.__annotations__, *_habits.arguments_of(pyllava.Llava.__init__)}
    ours |= set(_habits.arguments_of(pyllava.Llava.ask))
    assert set(_habits.OUR_NAMES.values()) <= ours
    assert not ours & {*_habits.OUR_NAMES, *_habits.INSTEAD}


def test_options_stay_data(m: pyllava.Llava) -> None:
    """What checks their names does not get in the way of copies."""
    options = sampling.Sampling(max_tokens=5, temperature=np.float32(0.5), top_k=np.int64(3))
    assert pickle.loads(pickle.dumps(options)) == options
    with pytest.raises(TypeError, match="did you mean max_tokens"):
        sampling.Sampling(max_tokns=5)  # type: ignore[call-arg]

    class Mine(pyllava.Llava):
        def __init__(self, name: str) -> None:
            super().__init__(n_threads=1)
            self.name = name

    class Any_(pyllava.Llava):
        def __init__(self, **anything: Any) -> None:
            super().__init__(n_threads=anything["threads"])

    Any_(threads=1).close()
    with Mine(name="x") as mine:
        assert mine.ask(SCENE, Q).tokens == m.ask(SCENE, Q).tokens
