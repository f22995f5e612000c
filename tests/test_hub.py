"""Models of the Hugging Face Hub: what is chosen, fetched, resumed, compared, found again; with the real client and a server here."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
from hub_server import Hub, Repo, commit

import pyllava
from pyllava import _aliases, _hub_cache, _hub_client, cli, hub
from pyllava.compat import Llama, Llava15ChatHandler
from pyllava.models import find

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")

MODELS = Path(pyllava.__file__).parent / "models"
LANGUAGE = (MODELS / "demo-q8_0.gguf").read_bytes()
PROJECTOR = (MODELS / "demo-mmproj-q8_0.gguf").read_bytes()
OTHER = LANGUAGE[:-1] + bytes([LANGUAGE[-1] ^ 1])  # a model as sound, with another weight
PAIR = {"llava-Q4_K_M.gguf": LANGUAGE, "mmproj-model-f16.gguf": PROJECTOR, "README.md": b"A model."}
REPO = "owner/llava-gguf"


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A server with one model, and a client that knows no other and has an empty cache."""
    with Hub() as running:
        running.repos[REPO] = Repo([dict(PAIR)])
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("time.sleep", lambda _: None)  # of the client, between tries
        yield running


def spec(name: str = REPO) -> _aliases.Spec:
    return hub.parsed(name)


def offered(name: str = REPO, revision: str | None = None) -> hub.Offer:
    found = hub.offer(spec(name), revision)
    assert isinstance(found, hub.Offer)
    return found


def _listing_of(**file: Any) -> bytes:
    files = [{"rfilename": "a.gguf", **file}]
    return json.dumps({"id": REPO, "sha": "a" * 40, "siblings": files}).encode()


# --- what is fetched ---


def test_a_model_is_fetched_once_and_answers(server: Hub) -> None:
    with pyllava.Llava.from_pretrained(REPO, n_threads=1) as model:
        assert model.info.has_vision
        first = model.ask(None, "the", max_tokens=4).tokens
    n_requests = len(server.requests)
    with pyllava.Llava.from_pretrained(REPO, n_threads=1) as model:
        assert model.ask(None, "the", max_tokens=4).tokens == first
        assert model.files.model.read_bytes() == LANGUAGE
    assert len(server.requests) == n_requests  # the second time there was no question to the network


def test_llama_cpp_python_s_names_fetch_too(server: Hub) -> None:
    handler = Llava15ChatHandler.from_pretrained(repo_id=REPO, filename="*mmproj*", verbose=False)
    with Llama.from_pretrained(REPO, "llava-*.gguf", chat_handler=handler, n_ctx=256, n_threads=1) as llm:
        assert llm.llava.files.model.read_bytes() == LANGUAGE
        assert llm.llava.info.has_vision
        assert Path(llm.model_path).name == "llava-Q4_K_M.gguf"
    Llama.from_pretrained(REPO, "llava-*", additional_files=["README*"], chat_handler=handler).close()
    for pattern, n_found in (("*.gguf", 2), ("*.bin", 0)):
        with pytest.raises(
            ValueError, match=rf"owner/llava-gguf: {n_found} files for .*, need one of llava-Q4_K_M"
        ):
            Llama.from_pretrained(REPO, pattern)
    with pytest.raises(ValueError, match="local_dir, cache_dir: the environment says"):
        Llava15ChatHandler.from_pretrained(REPO, "*mmproj*", local_dir=".")


def test_a_model_for_asyncio_is_fetched(server: Hub) -> None:
    async def main() -> str:
        async with pyllava.AsyncLlava.from_pretrained(REPO, n_threads=1) as model:
            return (await model.load()).files.model.name

    assert asyncio.run(main()) == "llava-Q4_K_M.gguf"


def test_only_what_is_needed_comes(server: Hub, tmp_path: Path) -> None:
    server.repos[REPO].commits[0]["llava-Q8_0.gguf"] = OTHER
    hub.get(REPO)
    kept = sorted(path.name for path in (tmp_path / "cache").rglob("snapshots/*/*"))
    assert kept == ["llava-Q4_K_M.gguf", "mmproj-model-f16.gguf"]


def test_headers_are_read_before_the_files_come(server: Hub) -> None:
    found = offered()
    assert found.n_bytes == len(LANGUAGE) + len(PROJECTOR)
    ranges = [one.range for one in server.asked("GET", "/blobs/")]
    assert ranges == ["bytes=0-1048575"] * 2
    assert found.licence == "apache-2.0"
    assert found.n_memory > found.n_bytes


def test_a_long_header_is_read_in_steps(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hub_client, "_HEAD_BYTES", (1000, 20_000, 1 << 20))
    assert offered().mmproj is not None
    ranges = [one.range for one in server.asked("GET", "/blobs/")]
    assert ranges[:3] == ["bytes=0-999", "bytes=0-19999", "bytes=0-1048575"]


@pytest.mark.parametrize("data", [LANGUAGE, PROJECTOR], ids=["language", "projector"])
def test_a_header_that_is_cut_tells_nothing_wrong(data: bytes) -> None:
    """Behind the cut are zeros, which are lengths and types, too."""
    whole = _hub_client.facts_of_start(data[: 1 << 20], len(data))
    n_refused = 0
    for n_bytes in (*range(0, 3000, 61), *range(3000, 60_000, 997)):
        try:
            assert _hub_client.facts_of_start(data[:n_bytes], len(data)) == whole
        except pyllava.ModelFileError:
            n_refused += 1
    assert n_refused > 30


@pytest.mark.parametrize(
    ("names", "asked", "chosen"),
    [
        (["m-Q4_K_M.gguf", "m-Q8_0.gguf"], "", "m-Q4_K_M.gguf"),
        (["m-Q4_K_M.gguf", "m-Q8_0.gguf"], ":q8_0", "m-Q8_0.gguf"),
        (["m-Q4_K_S.gguf", "m-Q4_K_M.gguf"], ":q4_k", "m-Q4_K_M.gguf"),
        (["m-Q4_K_S.gguf", "m-Q4_0.gguf"], ":Q4_K", "m-Q4_K_S.gguf"),
        (["m-int4.gguf", "m-f16.gguf"], "", "m-int4.gguf"),
        (["m-f16.gguf", "m-f32.gguf"], "", "m-f16.gguf"),
        (["m.Q6_K.gguf", "v1.Q6_K.gguf", "v1.Q4_K_M.gguf"], "", "v1.Q4_K_M.gguf"),
        (["a-v1.6.Q6_K.gguf", "a-v1.6.Q8_0.gguf", "a-1.6.Q6_K.gguf"], ":q6_k", "a-v1.6.Q6_K.gguf"),
        (["m.imatrix.gguf", "m-Q8_0.gguf"], "", "m-Q8_0.gguf"),
    ],
)
def test_which_quantisation(server: Hub, names: list[str], asked: str, chosen: str) -> None:
    server.repos[REPO].commits = [{**dict.fromkeys(names, LANGUAGE), "x-mmproj-f16.gguf": PROJECTOR}]
    assert offered(REPO + asked).model.name == chosen


def test_a_quantisation_that_is_not_there(server: Hub) -> None:
    with pytest.raises(
        pyllava.ModelMismatchError, match=r"owner/llava-gguf: no file of q6_k; there are: q4_k_m"
    ):
        offered(f"{REPO}:q6_k")


def test_names_that_tell_nothing_headers_tell(server: Hub) -> None:
    server.repos[REPO].commits = [{"a.gguf": PROJECTOR, "b.gguf": LANGUAGE}]
    found = offered()
    assert (found.model.name, found.mmproj and found.mmproj.name) == ("b.gguf", "a.gguf")


def test_several_formats_of_a_projector(server: Hub) -> None:
    files = dict.fromkeys(("mmproj-f32.gguf", "mmproj-f16.gguf", "mmproj-Q8_0.gguf"), PROJECTOR)
    server.repos[REPO].commits = [{"m-Q4_K_M.gguf": LANGUAGE, **files}]
    found = offered()
    assert found.mmproj is not None
    assert found.mmproj.name == "mmproj-f16.gguf"


def test_a_projector_in_another_repository(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos["a/lang"] = Repo([{"m.Q4_K_M.gguf": LANGUAGE}])
    server.repos["b/proj"] = Repo([{"m-mmproj-f16.gguf": PROJECTOR}])
    alias = _aliases.Alias("a/lang", "", 1.0, 1.0, "", mmproj_repo="b/proj")
    monkeypatch.setattr(_aliases, "ALIASES", {"two": alias})
    files = hub.get("two")
    assert files.mmproj is not None
    assert "b--proj" in str(files.mmproj)
    assert hub.cached(spec("two")) == files
    assert cli.main(["rm", "two", "--yes"]) == 0
    assert not _hub_cache.models()


def test_a_split_model_comes_whole(server: Hub, tmp_path: Path) -> None:
    import tiny_gguf

    first = tiny_gguf.write(tmp_path / "m-Q4_K_M.gguf", tiny_gguf.read(MODELS / "demo-q8_0.gguf"), split=12)
    parts = {path.name: path.read_bytes() for path in tmp_path.glob("m-Q4_K_M-*.gguf")}
    assert len(parts) > 2
    server.repos[REPO].commits = [{**parts, "mmproj-f16.gguf": PROJECTOR}]
    found = offered()
    assert found.files[-1].name == first.name  # last: what has it has everything
    assert found.n_bytes == sum(map(len, parts.values())) + len(PROJECTOR)
    with pyllava.Llava.from_pretrained(REPO, n_threads=1) as model:
        assert model.ask(None, "the", max_tokens=2).tokens
    del parts[sorted(parts)[1]]
    server.repos[REPO].commits = [{**parts, "mmproj-f16.gguf": PROJECTOR}]
    with pytest.raises(
        pyllava.HubError, match=r"no language model in it: .*-00002-of-\d{5}\.gguf is not there"
    ):
        offered()
    server.repos[REPO].commits[0]["m-Q8_0.gguf"] = LANGUAGE
    assert offered().model.name == "m-Q8_0.gguf"
    server.repos[REPO].commits = [{"mmproj-f16.gguf": PROJECTOR}]
    with pytest.raises(pyllava.HubError, match=r"no language model in it$"):
        offered()


def test_parts_that_do_not_fit_are_refused_before_they_come(server: Hub) -> None:
    import tiny
    import tiny_gguf

    folder = Path.cwd()
    wide = tiny_gguf.convert(folder / "t", tiny.TinySpec(seed=3), outtype="f32")
    server.repos[REPO].commits = [{"m.gguf": wide.model.read_bytes(), "mmproj.gguf": PROJECTOR}]
    with pytest.raises(pyllava.HubError, match=r"mmproj\.gguf does not fit m\.gguf: its width is 256, the"):
        hub.get(REPO)
    server.repos[REPO].commits = [{"m.gguf": b"<html>", "mmproj.gguf": PROJECTOR}]
    with pytest.raises(pyllava.HubError, match=r"m\.gguf is no GGUF file that can be read"):
        hub.get(REPO)
    assert not list(folder.glob("cache/**/snapshots/*/*"))


def test_a_checkpoint_is_offered_for_conversion(server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "config.json": b"{}",
        "model-1.safetensors": b"w" * 5000,
        "pytorch_model.bin": b"w",
        "a.png": b"p",
    }
    server.repos[REPO].commits = [files]
    with pytest.raises(
        pyllava.HubError, match=r"a checkpoint, no GGUF files in it: `pyllava-cli pull owner/"
    ):
        hub.get(REPO)
    assert cli.main(["pull", REPO]) == 0
    out, err = capsys.readouterr()
    assert sorted(path.name for path in Path(out.strip()).iterdir()) == ["config.json", "model-1.safetensors"]
    assert f"pyllava-cli convert {out.strip()} -o DIR" in err
    server.repos[REPO].commits = [{"README.md": b""}]
    with pytest.raises(pyllava.HubError, match="no GGUF file in it, and no checkpoint"):
        hub.get(REPO)


# --- how it comes ---


def test_a_token_goes_to_the_endpoint_and_nowhere_else(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos[REPO].token = "hf_secret"
    with pytest.raises(
        pyllava.HubError, match=r"no such repository at http://127.*, or a private one: .* HF_TOKEN"
    ):
        hub.get(REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.get(REPO)
    of_bytes = server.asked("GET", "/blobs/")
    assert of_bytes
    assert not any(one.token for one in of_bytes)
    assert {one.token for one in server.asked("GET", "/api/")} == {"", "hf_secret"}


def test_a_line_that_breaks_is_taken_up_again(server: Hub) -> None:
    found = offered()
    server.faults = hub_server.Faults(cut_after=100_000, n_cuts=3)
    hub.fetch_all(found)
    assert hub.files_of(found).model.read_bytes() == LANGUAGE
    resumed = [one.range for one in server.asked("GET", "/blobs/") if one.range.endswith("-")]
    assert [one for one in resumed if one != "bytes=0-"] == [
        f"bytes={n << 16}-" for n in (1, 2, 3)
    ]  # whole chunks of what came


def test_a_fetch_that_failed_goes_on_where_it_was(server: Hub) -> None:
    with pytest.raises(pyllava.GenerationCancelled, match="what has come is kept"):
        hub.get(REPO, progress=lambda stage, fraction: fraction < 0.02)
    (kept,) = Path("cache").rglob("*.incomplete")
    size = kept.stat().st_size
    told = _hub_cache.removal(spec())
    assert (told.names, told.n_bytes) == ((kept.name,), size)
    assert 0 < size < len(LANGUAGE) + len(PROJECTOR)
    server.requests.clear()
    done: list[tuple[str, float]] = []
    files = hub.get(REPO, progress=lambda stage, fraction: done.append((stage, fraction)))
    assert files.model.read_bytes() == LANGUAGE
    assert f"bytes={size}-" in [one.range for one in server.asked("GET", "/blobs/")]
    assert done[-1] == ("verify", 1.0)
    assert not list(Path("cache").rglob("*.incomplete"))


def test_a_server_without_ranges(server: Hub) -> None:
    server.faults = hub_server.Faults(no_ranges=True)
    found = offered()
    server.faults = hub_server.Faults(cut_after=100_000, n_cuts=2, no_ranges=True)
    hub.fetch_all(found)
    assert hub.files_of(found).model.read_bytes() == LANGUAGE


def test_what_is_not_what_was_listed_is_thrown_away(server: Hub) -> None:
    server.repos[REPO].listed["mmproj-model-f16.gguf"] = "c" * 64
    with pytest.raises(
        pyllava.HubError, match=r"mmproj-model-f16\.gguf came with the SHA-256 [0-9a-f]{64}, need c{64}"
    ):
        hub.get(REPO)
    assert not list(Path("cache").rglob("*.incomplete"))
    assert hub.cached(spec()) is None


def test_an_answer_without_an_end(server: Hub) -> None:
    server.faults.no_end = True
    with pytest.raises(pyllava.HubError, match="it is thrown away"):
        hub.get(REPO)
    assert server.n_beyond < 1 << 25  # what the line holds, and no more
    assert not list(Path("cache").rglob("*.incomplete"))


@pytest.mark.parametrize(
    ("told", "text"),
    [
        (b"<html>log in first</html>", "Expecting value"),
        (b"[1]", "no list of files"),
        (b'{"id": "a/b", "sha": null, "siblings": []}', "commit None, need 40 digits"),
        (b'{"id": "a/b", "sha": "../..", "siblings": []}', "commit '../..'"),
        (_listing_of(size=-1), "'a.gguf' of -1 bytes"),
        (_listing_of(size="5"), "'a.gguf' of '5' bytes"),
        (_listing_of(lfs={"sha256": "../x", "size": 5, "pointerSize": 9}), "the SHA-256 '../x'"),
    ],
)
def test_what_is_no_list_of_files(server: Hub, told: bytes, text: str) -> None:
    server.faults.listing = told
    with pytest.raises(pyllava.HubError, match=re.escape(text)) as raised:
        hub.get(REPO)
    assert str(raised.value).startswith(f"{REPO}: {server.url} answers with what is no list of files: ")


def test_a_branch_that_moves(server: Hub) -> None:
    """What was fetched is used until `pull` is told to look; a commit stays what it is."""
    first = hub.get(REPO)
    changed = OTHER
    server.repos[REPO].commits.append({**PAIR, "llava-Q4_K_M.gguf": changed})
    assert hub.get(REPO) == first
    assert hub.get(REPO, revision=commit(REPO, 0)) == first
    assert cli.main(["pull", REPO, "--log-disable"]) == 0
    assert hub.get(REPO).model.read_bytes() == changed
    assert hub.get(REPO, revision=commit(REPO, 0)).model.read_bytes() == LANGUAGE


def test_a_branch_that_moves_meanwhile(server: Hub) -> None:
    found = offered()
    server.repos[REPO].commits.append({**PAIR, "llava-Q4_K_M.gguf": b"another"})
    hub.fetch_all(found)
    assert hub.files_of(found).model.read_bytes() == LANGUAGE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repo": "owner/none"}, r"owner/none: no such repository at http://127\.0\.0\.1"),
        ({"revision": "v9"}, "owner/llava-gguf: no revision 'v9'"),
        ({"faults": (503, 99)}, "answers 503 Service Unavailable: try again later"),
        ({"faults": (403, 99)}, "answers 403 Forbidden: a token that may read it is needed"),
        ({"faults": (404, 99)}, "answers 404 Not Found: is that a hub's address"),
        ({"gated": True}, r"gated: accept its terms at http://127.*/owner/llava-gguf, and set HF_TOKEN"),
        ({"closed": True}, r"cannot be reached \(Connect\w*: .*\): what has come is kept, try again"),
        ({"offline": True}, "owner/llava-gguf: not in the cache, and HF_HUB_OFFLINE is set"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_faults_are_one_line(
    server: Hub, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    if isinstance(faults := change.get("faults"), tuple):
        server.faults = hub_server.Faults(status=faults[0], n_failing=faults[1])
    if "gated" in change:
        server.repos[REPO].token, server.repos[REPO].gated = "x", True
    if "closed" in change:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", "offline" in change)
    with pytest.raises(pyllava.HubError, match=message) as caught:
        hub.get(str(change.get("repo", REPO)), revision=change.get("revision"))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_server_that_fails_now_and_then(server: Hub) -> None:
    found = offered()
    server.faults = hub_server.Faults(status=503, n_failing=1)
    with pytest.raises(pyllava.HubError, match="answers 503"):  # at the first question for a file
        hub.fetch_all(found)
    hub.fetch_all(found)
    assert hub.files_of(found).model.read_bytes() == LANGUAGE


def test_a_file_that_is_gone(server: Hub) -> None:
    found = offered()
    server.repos[REPO].commits[0].pop("llava-Q4_K_M.gguf")
    with pytest.raises(
        pyllava.HubError, match=r"^owner/llava-gguf: .*[Nn]ot [Ff]ound.*llava-Q4_K_M\.gguf\.?$"
    ):
        hub.fetch_all(found)
    assert hub.cached(spec()) is None  # the projector alone is no model


def test_a_system_without_links(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is there once."""
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *_: False)
    files = hub.get(REPO)
    large = [path for path in Path("cache").rglob("*") if path.is_file() and path.stat().st_size > 1e6]
    assert sorted(large) == sorted(
        path.relative_to(Path.cwd()) for path in (files.model, files.mmproj) if path
    )
    assert hub.cached(spec()) == files
    assert cli.main(["rm", REPO, "--yes"]) == 0
    assert not _hub_cache.models()


def test_a_disk_without_room(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = offered()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 1000})())
    with pytest.raises(pyllava.HubError, match=r"needs 0\.0 GB, 0\.0 GB are free"):
        hub.fetch_all(found)


# --- names ---


@pytest.mark.parametrize(
    ("text", "repo", "quant"),
    [
        ("owner/name", "owner/name", None),
        ("owner/name:Q4_K_M", "owner/name", "Q4_K_M"),
        ("hf.co/owner/name:q8_0", "owner/name", "q8_0"),
        ("https://huggingface.co/owner/name", "owner/name", None),
        ("llava-1.5-7b", "second-state/Llava-v1.5-7B-GGUF", None),
        ("LLaVA-1.5-7B:q8_0", "second-state/Llava-v1.5-7B-GGUF", "q8_0"),
    ],
)
def test_names_of_repositories(text: str, repo: str, quant: str | None) -> None:
    found = _aliases.spec_of(text)
    assert found is not None
    assert (found.repo, found.quant) == (repo, quant)


@pytest.mark.parametrize(
    "text",
    [
        "model",
        "model.gguf",
        "owner/model.gguf",
        "./owner/name",
        "/owner/name",
        "../a/b",
        "a/b/c",
        "~/a",
        "",
        "a/",
        "a b/c",
    ],
)
def test_names_that_are_paths(text: str) -> None:
    assert _aliases.spec_of(text) is None


def test_names_that_are_misspelt() -> None:
    with pytest.raises(
        ValueError, match=r"'lava-1.6-mistral-7b', did you mean llava-1\.6-mistral-7b\? Need owner/name"
    ):
        hub.parsed("lava-1.6-mistral-7b")
    with pytest.raises(ValueError, match=r"'model\.gguf', need owner/name of a repository, or a name that"):
        hub.get("model.gguf")


def test_a_path_comes_first(tmp_path: Path) -> None:
    (tmp_path / "owner").mkdir()
    assert _aliases.spec_of("owner/name") is None  # a folder of that owner's name: a path that is misspelt
    assert _aliases.spec_of("hf.co/owner/name") is not None


def test_python_fetches_nothing_by_itself(server: Hub) -> None:
    for name in (REPO, "llava-1.5-7b"):
        with pytest.raises(
            FileNotFoundError, match=f"pyllava-cli pull {name}`, in Python Llava.from_pretrained"
        ):
            pyllava.Llava(name)
    assert not server.requests


def test_every_alias_is_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    for name, alias in _aliases.ALIASES.items():
        row = f"| `{name}` | [{alias.repo}](https://huggingface.co/{alias.repo})"
        (line,) = [line for line in page.splitlines() if line.startswith(row)]
        assert f"| {alias.gb} GB | {alias.memory_gb} GB | {alias.licence} |" in line
        assert alias.mmproj_repo in line
        assert _aliases.spec_of(name)


# --- the command line ---


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_pull_models_rm(server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no model in the cache" in run(capsys, "models")[1]
    code, out, err = run(capsys, "pull", REPO)
    assert code == 0
    assert [Path(line).name for line in out.splitlines()] == ["llava-Q4_K_M.gguf", "mmproj-model-f16.gguf"]
    assert "owner/llava-gguf (apache-2.0): mmproj-model-f16.gguf, llava-Q4_K_M.gguf, into" in err
    assert "GB of memory" in err
    assert run(capsys, "pull", REPO)[:2] == (0, out)
    shown = run(capsys, "models")[1]
    assert "owner/llava-gguf  q4_k_m" in shown
    assert "  llava-1.6-34b " in shown
    told = json.loads(run(capsys, "models", "--json")[1])
    (one,) = told["cached"]
    assert one["repo"] == REPO
    assert one["bytes"] == len(LANGUAGE) + len(PROJECTOR)
    assert {file["name"]: file["projector"] for file in one["files"]} == {
        "llava-Q4_K_M.gguf": False,
        "mmproj-model-f16.gguf": True,
    }
    assert told["names"]["joycaption"]["mmproj_repo"].startswith("concedo/")
    code, out, err = run(capsys, "rm", REPO)
    assert code == 1
    assert "would be removed: --yes does it" in err
    assert run(capsys, "rm", REPO, "-y")[0] == 0
    assert "no model in the cache" in run(capsys, "models")[1]
    assert not [path for path in Path("cache").rglob("*") if path.is_file() and path.stat().st_size > 1000]
    assert run(capsys, "rm", REPO, "-y")[0] == 1
    assert not list(Path("cache").glob("models--*"))


def test_one_quantisation_is_removed(server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    server.repos[REPO].commits[0]["llava-Q8_0.gguf"] = OTHER
    for quant in ("q4_k_m", "q8_0"):
        assert run(capsys, "pull", f"{REPO}:{quant}")[0] == 0
    assert "q4_k_m, q8_0" in run(capsys, "models")[1]
    code, _, err = run(capsys, "rm", f"{REPO}:q8_0", "--yes")
    if not hasattr(huggingface_hub.HFCacheInfo, "delete_files"):
        assert "needs a newer huggingface-hub" in err
        return
    assert code == 0
    assert "q8_0" not in run(capsys, "models")[1].partition("short names")[0]
    assert hub.cached(spec(f"{REPO}:q4_k_m")) is not None
    assert "no file of q8_0 in the cache" in run(capsys, "rm", f"{REPO}:q8_0", "--yes")[2]


SCENE = str(Path(__file__).parent.parent / "examples" / "scene.png")
QUESTION = ("--image", SCENE, "-p", "What is in the picture?", "-n", "8", "-t", "1", "--no-perf")


def test_a_question_to_a_model_of_the_hub(server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "-m", f"{REPO}:q4_k_m", *QUESTION)
    assert (code, out) == (1, "")
    assert f"are to be fetched: `pyllava-cli pull {REPO}:q4_k_m` does it, or --yes" in err
    code, out, err = run(capsys, "-m", "models/llava", *QUESTION)
    assert (code, out) == (1, "")
    assert "models/llava: no such file or folder; as a repository, models/llava: no such repository" in err
    code, out, err = run(capsys, "-hf", f"{REPO}:Q4_K_M", *QUESTION)
    assert code == 0
    assert out.strip()
    n_requests = len(server.requests)
    assert run(capsys, "-m", REPO, *QUESTION)[:2] == (0, out)  # it is here: no question, no network
    assert run(capsys, *QUESTION)[:2] == (0, out)  # the demo model's files, under another name
    assert len(server.requests) == n_requests


def test_every_command_takes_the_name(server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """One rule: what -m takes for a question, the others take too."""
    assert run(capsys, "caption", "-hf", REPO, SCENE, "-o", "rows.jsonl", "-n", "4", "-t", "1")[0] == 0
    assert json.loads(Path("rows.jsonl").read_text().splitlines()[0])["status"] == "ok"
    code, out, _ = run(capsys, "bench", "-m", REPO, "-p", "8", "-n", "2", "--repeat", "1", "--json")
    assert code == 0
    assert json.loads(out)["model"].endswith("llava-Q4_K_M.gguf")
    code, out, _ = run(capsys, "info", REPO)
    assert code == 0
    assert "the two fit" in out
    assert run(capsys, "info", "owner/other")[0] == 1


def test_yes_fetches(server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "-m", REPO, "--yes", *QUESTION)[0] == 0


CHILD = """
import sys
from pyllava.cli import main
sys.exit(main(sys.argv[1:]))
"""


def child(server: Hub, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, which knows the server by its environment alone."""
    environment = {"HF_HOME": str(Path.cwd() / "home"), "HF_ENDPOINT": server.url, **environment}
    known = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return subprocess.run(
        [sys.executable, "-c", CHILD, *argv],
        env={**known, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        timeout=120,
    )


def test_the_environment_is_respected(server: Hub) -> None:
    """HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE, as the client reads them."""
    server.repos[REPO].token = "hf_mine"
    done = child(server, "-hf", REPO, *QUESTION)
    assert done.returncode == 1
    assert "no such repository" in done.stderr
    done = child(server, "-hf", REPO, *QUESTION, HF_TOKEN="hf_mine")
    assert done.returncode == 0, done.stderr
    assert list(Path("home/hub").glob("models--owner--llava-gguf/snapshots/*/llava-Q4_K_M.gguf"))
    n_requests = len(server.requests)
    again = child(server, "-m", REPO, *QUESTION, HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout) == (0, done.stdout)
    pulled = child(server, "pull", REPO, HF_HUB_OFFLINE="1")
    assert pulled.returncode == 0, pulled.stderr
    missing = child(server, "-hf", "owner/other", *QUESTION, HF_HUB_OFFLINE="1")
    assert missing.returncode == 1
    assert "owner/other: not in the cache, and HF_HUB_OFFLINE is set: nothing is fetched" in missing.stderr
    assert len(server.requests) == n_requests


def test_without_the_client(server: Hub) -> None:
    hidden = "import sys\nsys.modules['huggingface_hub'] = None\n" + CHILD
    for argv, code in ((["pull", REPO], 1), (["-hf", REPO, *QUESTION], 1), (["models"], 0)):
        done = subprocess.run(
            [sys.executable, "-c", hidden, *argv], capture_output=True, text=True, check=False
        )
        assert done.returncode == code
        assert "pip install 'pyllava[hub]', or fetch the files by hand" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert "llava-1.6-mistral-7b" in done.stdout


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 1), ("", 0)])
def test_at_a_terminal_it_asks(server: Hub, answer: str, code: int) -> None:
    """A real terminal: the size and the memory are shown, and nothing comes before the answer."""
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    environment = {**os.environ, "HF_HOME": str(Path.cwd() / "home"), "HF_ENDPOINT": server.url}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, "-m", REPO, *QUESTION],
        env=environment,
        stdin=follower,
        stdout=subprocess.PIPE,
        stderr=follower,
        text=True,
    )
    os.close(follower)
    shown = b""
    while b"[Y/n]" not in shown:
        shown += os.read(leader, 4096)
    assert b"GB of memory" in shown
    assert not list(Path("home").rglob("blobs/*"))
    os.write(leader, answer.encode() + b"\n")
    out = process.communicate(timeout=120)[0]
    os.close(leader)
    assert process.returncode == code
    assert bool(out.strip()) == (code == 0)
    assert bool(list(Path("home").rglob("blobs/*"))) == (code == 0)


def test_find_takes_a_folder_of_the_cache(server: Hub) -> None:
    """One rule: what was fetched is found as any folder is."""
    files = hub.get(REPO)
    assert find(files.model.parent, None) == files
