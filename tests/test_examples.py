"""The examples that build on other packages, with those packages; each is skipped where its package lacks."""

from __future__ import annotations

import base64
import importlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pages
import pytest

ROOT = Path(__file__).parent.parent
SCENE = ROOT / "examples" / "scene.png"


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delenv("MODEL", raising=False)


@pytest.mark.usefixtures("at_root")
def test_a_service() -> None:
    for package in ("fastapi", "httpx", "multipart"):
        pytest.importorskip(package, reason="needs pip install fastapi httpx python-multipart")
    from fastapi.testclient import TestClient

    from examples.service import app

    def ask(data: bytes, question: str) -> tuple[int, dict[str, str]]:
        done = client.post("/ask", files={"image": data}, data={"question": question})
        return done.status_code, done.json()

    scene = SCENE.read_bytes()
    questions = ["How many shapes are there?", "What is the word?", "What colour is the star?"] * 4
    with TestClient(app) as client:
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda question: ask(scene, question), questions))
        assert [found["answer"] for _, found in answers] == ["4", "milk", "Yellow"] * 4
        status, found = ask(scene[:1000], "What is the word?")
        assert status == 422
        assert "image" in found["detail"]
        assert ask(b"\0" * 20_000_001, "What?")[0] == 413
        assert ask(scene, "What is the word?") == (200, {"answer": "milk", "finish_reason": "stop"})


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a plug-in's module, which can be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "plugins" / request.param))
    return str(request.param).replace("-", "_")


@pytest.mark.parametrize("plugin", ["llm-pyllava"], indirect=True)
def test_a_plug_in_of_llm(plugin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "user"))
    monkeypatch.setenv("LLM_PYLLAVA_MODELS", str(tmp_path))
    llm = pytest.importorskip("llm", reason="needs pip install llm")
    from click.testing import CliRunner
    from llm import cli, plugins

    place = tmp_path / "mine"
    place.mkdir()
    for path in (ROOT / "pyllava" / "models").glob("demo-[mq]*.gguf"):
        (place / path.name).symlink_to(path)

    def run(*words: object) -> str:
        done = CliRunner().invoke(cli.cli, [*map(str, words)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    found = importlib.import_module(plugin)
    plugins.load_plugins()
    plugins.pm.register(found)
    try:
        about = ("-a", SCENE)
        assert run("-m", "pyllava/demo", "How many shapes are there?", *about) == "4\n"
        assert run("-c", "What is the word?") == "milk\n"
        words = ("-m", "pyllava/mine", "What is in the picture?", *about)
        assert run(*words, "-o", "max_tokens", 3) == "There is a\n"
        answer = llm.get_model("pyllava/demo-1.6").prompt(
            "What is the word?", attachments=[llm.Attachment(path=SCENE)]
        )
        assert answer.text() == "milk"
        assert answer.usage().output > 0
        with pytest.raises(ValueError, match="audio"):
            llm.get_model("pyllava/demo").prompt(
                "What?", attachments=[llm.Attachment(type="audio/mpeg", content=b"x")]
            ).text()
    finally:
        plugins.pm.unregister(found)


@pytest.mark.parametrize("plugin", ["langchain-pyllava"], indirect=True)
def test_a_chat_model_of_langchain(plugin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("langchain_core", minversion="1.0", reason="needs pip install langchain-core")
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

    data = base64.b64encode(SCENE.read_bytes()).decode()
    blocks = (
        {"type": "image", "base64": data, "mime_type": "image/png"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
    )
    model = importlib.import_module(plugin).ChatPyllava()
    for block in blocks:
        asked = HumanMessage([{"type": "text", "text": "How many shapes are there?"}, block])
        answer = model.invoke([SystemMessage("Be brief."), asked])
        assert answer.text == "4"
        assert answer.usage_metadata["output_tokens"] > 0
        assert answer.response_metadata["finish_reason"] == "stop"
        assert model.invoke([asked, AIMessage("4"), HumanMessage("What is the word?")]).text == "milk"
    pieces = [
        piece.text
        for piece in model.stream([HumanMessage([{"type": "text", "text": "Describe it."}, blocks[0]])])
    ]
    assert len(pieces) > 5
    question = [HumanMessage([{"type": "text", "text": "What is in the picture?"}, blocks[0]])]
    assert model.invoke(question, stop=[" orange"]).text == "There is a large"
    assert len(model.invoke(question, max_tokens=4).text) < 30
    with pytest.raises(ValueError, match="found human, human"):
        model.invoke([asked, asked])
    with pytest.raises(ValueError, match="need text, or an image with its bytes"):
        model.invoke([HumanMessage([{"type": "image", "url": "https://example.org/a.png"}])])
    folder = ROOT / "examples" / "plugins" / "langchain-pyllava"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    [example] = [item for item in pages.examples(folder / "README.md") if item.language == "python"]
    place = pages.workplace(tmp_path)
    assert pages.run_python([("README.md", example.code)], place) == [example.printed]
