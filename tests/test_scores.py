"""Scores of given answers: the numbers that generation reports, over a prompt that is computed once; and answers as JSON."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyllava
from pyllava import cli
from pyllava.templates import TEMPLATES

ROOT = Path(__file__).parent.parent
SCENE = ROOT / "examples" / "scene.png"
POSTER = ROOT / "examples" / "poster.png"
QUESTION = "What color is the star?"
COLORS = ["Red", "Green", "Blue", "Yellow", "Red and blue", "Light yellow"]


@pytest.fixture(scope="module")
def demo() -> Iterator[pyllava.Llava]:
    with pyllava.Llava() as model:
        yield model


def log_softmax(logits: np.ndarray) -> np.ndarray:
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


# --- the numbers ---


@pytest.mark.parametrize(("name", "precision"), [("demo", "fast"), ("demo", "exact"), ("demo-1.6", "fast")])
def test_a_given_answer_has_the_numbers_of_a_generated_one(name: str, precision: Any) -> None:
    with pyllava.Llava(name, precision=precision) as model:
        said = model.ask(POSTER, "Describe the image.", logprobs=3)
        assert len(said.tokens) > 10
        for answer in (said.text, said.tokens):
            found = model.loglikelihood(POSTER, "Describe the image.", answer, logprobs=3)
            assert found.logprobs == said.logprobs
            assert found.logprob == math.fsum(said.log_probs)
            assert found.end_logprob is None


def test_they_are_those_of_the_logits(demo: pyllava.Llava) -> None:
    ids = [entry.id for entry in demo.loglikelihood(SCENE, QUESTION, "Light yellow").logprobs]
    rows = log_softmax(demo.logits(SCENE, QUESTION, answer=ids))[-len(ids) - 1 :]
    found = demo.loglikelihood(SCENE, QUESTION, "Light yellow", with_end=True)
    expected = [rows[i, token] for i, token in enumerate(ids)]
    assert [entry.logprob for entry in found.logprobs] == pytest.approx(expected, abs=1e-5)
    assert found.end_logprob == pytest.approx(rows[-1, demo.info.eos_id], abs=1e-5)
    assert found.logprob == pytest.approx(sum(expected) + rows[-1, demo.info.eos_id], abs=1e-5)
    assert found.mean == pytest.approx(found.logprob / (len(ids) + 1))


@pytest.mark.parametrize("with_end", [True, False])
@pytest.mark.parametrize("normalize", ["sum", "mean"])
def test_choices_are_scored_as_each_alone(demo: pyllava.Llava, normalize: Any, with_end: bool) -> None:
    choices = COLORS if with_end else [choice for choice in COLORS if choice != "Red and blue"]
    scores = demo.score(SCENE, QUESTION, choices, normalize=normalize, with_end=with_end)
    alone = [demo.loglikelihood(SCENE, QUESTION, choice, with_end=with_end) for choice in choices]
    values = np.exp([one.mean if normalize == "mean" else one.logprob for one in alone])
    assert list(scores) == choices
    assert list(scores.values()) == pytest.approx(list(values / values.sum()), rel=1e-12)
    assert sum(scores.values()) == pytest.approx(1)
    assert [scores.loglikelihoods[choice] for choice in choices] == alone
    assert scores.best == "Yellow" == scores.answer.text


def test_a_choice_that_begins_another(demo: pyllava.Llava) -> None:
    """With its end it is another outcome; both together are at most the shorter one without its end."""
    one = demo.loglikelihood(SCENE, "Where is the star?", "At the bottom")
    scores = demo.score(SCENE, "Where is the star?", ["At the bottom", "At the bottom left"])
    assert scores["At the bottom left"] > 0.9
    both = sum(math.exp(found.logprob) for found in scores.loglikelihoods.values())
    assert both <= math.exp(one.logprob)
    with pytest.raises(ValueError, match=r"'At the bottom left' begins with 'At the bottom'.*with_end=True"):
        demo.score(SCENE, "Where is the star?", ["At the bottom", "At the bottom left"], with_end=False)


def test_what_stands_before_the_choices(demo: pyllava.Llava) -> None:
    """`start_with` and the choice are one answer, cut into tokens together."""
    whole = demo.loglikelihood(SCENE, QUESTION, "Light yellow").logprobs
    rest = demo.loglikelihood(SCENE, QUESTION, "yellow", start_with="Light ").logprobs
    assert [e.token for e in rest] == [e.token for e in whole[-len(rest) :]]
    spoken = demo.ask(SCENE, QUESTION, start_with="The star is", logprobs=0)
    answer = spoken.text.removeprefix("The star is ")
    assert demo.loglikelihood(SCENE, QUESTION, answer, start_with="The star is ").logprobs == spoken.logprobs


def test_a_raw_prompt_is_followed_by_the_answer_as_it_stands(demo: pyllava.Llava) -> None:
    text = "A chat. USER: <image>\nWhat color is the star? ASSISTANT:"
    said = demo.ask(SCENE, text, raw=True, logprobs=0)
    found = demo.loglikelihood(SCENE, text, f" {said}", raw=True)
    assert found.logprobs == said.logprobs
    with pytest.raises(ValueError, match="become one token"):
        demo.score(SCENE, text + " ", ["Red", "Blue"], raw=True)


def test_without_a_picture_and_with_two(demo: pyllava.Llava) -> None:
    assert sum(demo.score(None, "Is it red?", ["Yes", "No"]).values()) == pytest.approx(1)
    scores = demo.score([SCENE, POSTER], QUESTION, COLORS)
    assert scores.usage.image_tokens_each == (64, 64)


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_follow_every_template(template: str) -> None:
    with pyllava.Llava(template=template, n_ctx=512) as model:
        for answer in ("Yellow", "A large star, on the left."):
            found = model.loglikelihood(SCENE, QUESTION, answer, with_end=True)
            assert "".join(entry.token for entry in found.logprobs).strip() == answer
            assert math.isfinite(found.logprob)
        said = model.ask(SCENE, QUESTION, max_tokens=4, ignore_eos=True)
        assert model.loglikelihood(SCENE, QUESTION, said.tokens).logprob == math.fsum(said.log_probs)


# --- what is computed ---


def test_the_prompt_is_computed_once_and_each_choice_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    with pyllava.Llava() as model:
        steps: list[Any] = []
        step = model._engine.session.step
        monkeypatch.setattr(model._engine.session, "step", lambda runs: (steps.extend(runs), step(runs))[1])
        scores = model.score(SCENE, QUESTION, COLORS)
        n_tokens = sum(len(found.logprobs) for found in scores.loglikelihoods.values())
        computed = [(run.answer, sum(map(len, run.parts))) for run in steps]
        assert sum(n for answer, n in computed if not answer) == scores.usage.prompt_tokens
        assert sum(n for answer, n in computed if answer) == n_tokens
        # no logits but those after the prompt and after each token
        assert sum(run.n_rows for run in steps) == 1 + n_tokens
        assert scores.usage.cached_tokens == 0
        assert model.score(SCENE, QUESTION, COLORS).usage.cached_tokens == scores.usage.prompt_tokens - 1


def test_nothing_beside_it_changes_the_numbers(demo: pyllava.Llava) -> None:
    """Few cells for many choices, and answers in other threads."""
    expected = demo.score(SCENE, QUESTION, COLORS)
    with pyllava.Llava(kv_cells=160, n_ctx=160, n_parallel=4) as model:
        found: list[dict[str, float]] = []
        threads = [
            threading.Thread(target=lambda: found.append(model.score(SCENE, QUESTION, COLORS))),
            threading.Thread(target=lambda: found.append(model.score(SCENE, QUESTION, COLORS))),
            threading.Thread(target=lambda: model.ask(SCENE, "Is there a star?", max_tokens=20)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [expected, expected]


def test_a_cancelled_score_leaves_the_model_usable() -> None:
    def progress(stage: str, fraction: float) -> bool:
        return stage != "prefill" or not refuses

    refuses = True
    with pyllava.Llava(progress=progress) as model:
        with pytest.raises(pyllava.GenerationCancelled):
            model.score(SCENE, QUESTION, COLORS)
        refuses = False
        assert model.score(SCENE, QUESTION, COLORS).best == "Yellow"


@pytest.mark.parametrize(
    ("choices", "options", "error", "text"),
    [
        (["Red"], {}, ValueError, "choices: found 1, need 2 or more"),
        ("Red", {}, TypeError, "choices: found a text, need a list of texts"),
        (["Red", 1], {}, TypeError, "need a list of texts"),
        (None, {}, TypeError, "choices: found None, need a list of texts"),
        (iter(["Red", "Blue"]), {}, TypeError, "need a list of texts"),
        (["Red", "Blue"], {"logprobs": 1.5}, TypeError, "integer"),
        (["Red", "Blue"], {"start_with": None}, TypeError, "start_with: found NoneType, need a text"),
        (["Red", "Blue"], {"system": 3}, TypeError, "system: found int, need a text"),
        (["Red", " Red "], {}, ValueError, "'Red' and ' Red ': the same answer"),
        (["Red", ""], {}, ValueError, "answer '': empty, need a text"),
        (["Red", "Blue"], {"normalize": "max"}, ValueError, "normalize: found 'max', need 'sum' or 'mean'"),
        (["Red", "Blue"], {"logprobs": -1}, ValueError, "logprobs: found -1, need 0.."),
        (["Red", "x" * 9999], {}, pyllava.ContextOverflowError, "does not fit"),
    ],
)
def test_what_is_refused(
    demo: pyllava.Llava, choices: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        demo.score(SCENE, QUESTION, choices, **options)


@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        ([], ValueError, "answer: no tokens"),
        ([5, 10**6], ValueError, r"token 1: found 1000000, need 0\.\."),
        ([5, 10**600], ValueError, r"token 1: found 10\*\*20 or more"),
        ([5.5], TypeError, r"token 0: found 5\.5, need a whole number"),
        (b"Red", TypeError, "found b'Red', need token ids"),
        (None, TypeError, "found None, need token ids"),
    ],
)
def test_ids_that_are_refused(demo: pyllava.Llava, ids: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        demo.loglikelihood(SCENE, QUESTION, ids)
    if ids != []:
        with pytest.raises(error, match=text.removeprefix("found")):
            demo.logits(SCENE, QUESTION, answer=ids)


def test_a_question_in_the_place_of_the_picture(demo: pyllava.Llava) -> None:
    for name in ("score", "loglikelihood", "explain"):
        with pytest.raises(TypeError, match=rf"{name}\(images, prompt\): the images come first"):
            getattr(demo, name)(QUESTION, str(SCENE), ["Red", "Blue"])


# --- the demo exam ---


def test_the_probabilities_of_yes_and_no_are_calibrated(demo: pyllava.Llava) -> None:
    """A sample of the table in docs/scores.md."""
    pytest.importorskip("matplotlib")
    from examples.demo_model import calibration

    found = calibration.scored(demo, 4, 60)
    assert sum(one.is_right for one in found) >= 57, calibration.table(found)
    assert all(one.is_said for one in found)
    assert sum((one.probability - one.is_right) ** 2 for one in found) / len(found) < 0.04


# --- the command line ---


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([*map(str, arguments), "-p", "Is there a star?", "--log-disable"])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_json_of_a_question(demo: pyllava.Llava, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--image", SCENE, "--json", "--logprobs", 2)
    assert (code, err) == (0, "")
    found, said = json.loads(out), demo.ask(SCENE, "Is there a star?", logprobs=2)
    assert out.count("\n") == 1
    assert (found["text"], found["finish_reason"]) == (said.text, said.finish_reason)
    assert (found["picture"], found["prompt"]) == (str(SCENE), "Is there a star?")
    assert found["usage"]["prompt_tokens"] == said.usage.prompt_tokens
    assert found["timings"]["prefill"] > 0
    assert [entry["logprob"] for entry in found["logprobs"]] == list(said.log_probs)
    assert [bytes(entry["bytes"]) for entry in found["logprobs"]] == [entry.bytes for entry in said.logprobs]
    assert all(len(entry["alternatives"]) == 2 for entry in found["logprobs"])
    assert found["model"]["template"] == demo.template.name
    assert Path(found["model"]["file"]).is_file()
    assert "probabilities" not in found


def test_json_of_choices(demo: pyllava.Llava, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--image", SCENE, "--json", "--choices", "No, Yes")
    found = json.loads(out)
    assert code == 0
    assert found["probabilities"] == demo.score(SCENE, "Is there a star?", ["No", "Yes"])
    assert found["text"] == "Yes"
    assert "logprobs" not in found
    assert run(capsys, "--image", SCENE, "--choices", "No,Yes")[:2] == (0, "Yes\n")


def test_a_line_for_each_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "d\u00e4maged.png"
    damaged.write_bytes(SCENE.read_bytes()[:300])
    code, out, err = run(capsys, "--image", damaged, SCENE, POSTER, "--jsonl")
    first, second, third = map(json.loads, out.splitlines())
    assert code == 1
    assert first["picture"] == str(damaged)
    assert first["error"]["type"] == "ImageError"
    assert first["error"]["message"] in err
    assert "text" not in first
    assert (second["text"], third["text"]) == ("Yes", "No")
    assert out.isascii()


def test_one_picture_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--image", tmp_path / "none.png", "--jsonl")
    assert (code, json.loads(out)["error"]["type"]) == (1, "FileNotFoundError")
    assert run(capsys, "--image", tmp_path / "none.png", "--json")[:2] == (1, "")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--image", SCENE, "--image", POSTER, "--json"), "here are 2: --jsonl writes a line for each"),
        (("--image", SCENE, "--json", "--jsonl"), "--json and --jsonl: need one of them"),
        (("--image", SCENE, "--choices", "Yes"), "need two or more different answers"),
        (("--image", SCENE, "--choices", "Yes,,No"), "need two or more different answers"),
        (("--image", SCENE, "--choices", "Yes,Yes"), "need two or more different answers"),
    ],
)
def test_usage_errors(arguments: tuple[object, ...], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert text in err
