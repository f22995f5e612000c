"""Every sentence that a person sees when a command is mistyped, or typed as another program has it.

The table is the page docs/mistakes.md, too: ``python -m tests.test_cli_mistakes`` writes it again.
"""

from __future__ import annotations

import io
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from pyllava import _habits, cli
from pyllava.cli import chat, mistakes
from pyllava.cli.main import COMMANDS
from pyllava.cli.options import ask_parser, chat_parser

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "mistakes.md"
CONVERSATION = "In a conversation"

Row = tuple[str, int, str]
ROWS: Mapping[str, Sequence[Row]] = {
    "llama.cpp": (
        (
            "-hff model.gguf scene.png",
            2,
            "-hff: no such option; -hf REPO[:QUANT] fetches a model, other files are fetched by hand and named with -m "
            "and --mmproj",
        ),
        ("--offline scene.png", 2, "--offline: no such option; HF_HUB_OFFLINE=1 in the environment does it"),
        ("-m real.gguf -hf owner/name scene.png", 2, "-m and -hf: need one of them"),
        ("-i", 2, "-i: no such option; pyllava-cli chat has a conversation"),
        ("-cnv -m model.gguf", 2, "-cnv: no such option; pyllava-cli chat has a conversation"),
        (
            "--jinja scene.png",
            2,
            "--jinja: no such option; --template names one of the templates that are here",
        ),
        ("--mmproj p.gguf scene.png", 2, "--mmproj: needs -m, the model it belongs to"),
        ("model.gguf scene.png Hello", 2, "model.gguf: a model, no picture: -m names it"),
        ("-n5 scene.png", 2, "-n5: no such option; did you mean -n 5?"),
        ("-t4 scene.png", 2, "-t4: no such option; did you mean -t 4?"),
        ("--temp -hot scene.png", 2, "argument --temp: '-hot', need a number"),
        ("-n 0 scene.png", 2, "argument -n/--predict/--n-predict: '0', need an integer of at least 1, or -1"),
        (
            "-n many scene.png",
            2,
            "argument -n/--predict/--n-predict: 'many', need an integer of at least 1, or -1",
        ),
        (
            "-ngl many scene.png",
            2,
            "argument -ngl/--gpu-layers/--n-gpu-layers: 'many', need an integer of at least -1",
        ),
        ("--top-p 95 scene.png", 2, "argument --top-p: '95', need a number in 0..1"),
        ("-ub 512 scene.png", 2, "-ub: no such option; -b is the one size of batches"),
        ("-tb 4 scene.png", 2, "-tb: no such option; -t holds for prompts and answers"),
        ("--mlock scene.png", 2, "--mlock: no such option; not needed here, leave it out"),
        (
            "--lora a.gguf scene.png",
            2,
            "--lora: no such option; merge the adapter into its base model, and convert that",
        ),
        (
            "--rope-freq-base 10000 scene.png",
            2,
            "--rope-freq-base: no such option; the file says it, leave it out",
        ),
        ("--audio a.wav", 2, "--audio: no such option; only pictures are seen, with --image"),
        (
            "--no-display-prompt scene.png",
            2,
            "--no-display-prompt: no such option; not needed here, leave it out",
        ),
        ("--color scene.png", 2, "--color: no such option; not needed here, leave it out"),
        (
            "--host 0.0.0.0 --port 8080",
            2,
            "--host: no such option; there is no server; in Python, pyllava.Llava answers several threads at once",
        ),
        (
            "-ctk fp16 scene.png",
            2,
            "argument -ctk/--cache-type-k: 'fp16', need one of f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl; did you mean f16?",
        ),
        ("-fa 1 scene.png", 2, "argument -fa/--flash-attn: '1', need one of on, off, auto"),
        (
            "--template vicuna-v1 scene.png",
            2,
            "argument --template: 'vicuna-v1', need one of auto, vicuna_v1, ...; did you mean vicuna_v1?",
        ),
        (
            "--samplers topk scene.png",
            2,
            "argument --samplers: 'topk', need names with semicolons between them: penalties, dry, top_n_sigma, top_k, typ_p, top_p, min_p, xtc, temperature, adaptive_p",
        ),
        ("-p Hi -f notes.txt scene.png", 2, "-p and -f: need one of them"),
    ),
    "ollama": (
        (
            'run llava "What is this?" ./scene.png',
            2,
            'run: no such command; `pyllava-cli -m MODEL IMAGE "QUESTION"` asks, `pyllava-cli chat -m MODEL IMAGE` has a conversation',
        ),
        (
            "serve",
            2,
            "serve: no such command; there is no server; in Python, pyllava.Llava answers several threads at once",
        ),
        (
            "list",
            2,
            "list: no such command; `pyllava-cli models` lists the models that are here",
        ),
        (
            "ps",
            2,
            "ps: no such command; -m names a model, and each command loads its own",
        ),
        ("show llava", 2, "show: no such command; `pyllava-cli info FILE` says what is in a file"),
        (
            "create mine",
            2,
            "create: no such command; `pyllava-cli convert DIR` makes GGUF files from a checkpoint",
        ),
        (
            "stop llava",
            2,
            "stop: no such command; there is no server; in Python, pyllava.Llava answers several threads at once",
        ),
        (
            "--keepalive 5m scene.png",
            2,
            "--keepalive: no such option; a model lives as long as its command; pyllava-cli chat keeps it for many questions",
        ),
        (
            "run",
            2,
            'run: no such command; `pyllava-cli -m MODEL IMAGE "QUESTION"` asks, `pyllava-cli chat -m MODEL IMAGE` has a conversation',
        ),
    ),
    "LLaVA and transformers": (
        (
            "--model-base lmsys/vicuna scene.png",
            2,
            "--model-base: no such option; merge the adapter into its base model, and convert that",
        ),
        (
            "--load-4bit scene.png",
            2,
            "--load-4bit: no such option; `pyllava-cli quantize IN OUT q4_k_m` writes a smaller file, -m names it",
        ),
        (
            "--num_beams 5 scene.png",
            2,
            "--num_beams: no such option; answers are not searched with beams; without --temp each token is the likeliest",
        ),
        ("--do_sample scene.png", 2, "--do_sample: no such option; --temp above 0 draws tokens at random"),
        (
            "--torch_dtype float16 scene.png",
            2,
            "--torch_dtype: no such option; numbers are as in the file, -ctk and -ctv set the KV cache's; `pyllava-cli quantize IN OUT q4_k_m` writes a smaller file, -m names it",
        ),
        (
            "--device_map auto scene.png",
            2,
            "--device_map: no such option; -dev names devices, -ngl how many layers go there",
        ),
        (
            "--trust_remote_code scene.png",
            2,
            "--trust_remote_code: no such option; no code of a model is ever run, leave it out",
        ),
        (
            "generate scene.png",
            2,
            'generate: no such command; a question needs no command, `pyllava-cli -m MODEL IMAGE "QUESTION"` asks it',
        ),
        ("train", 2, "train: no such command; models are run here, not trained"),
        (
            "eval scene.png",
            2,
            'eval: no such command; a question needs no command, `pyllava-cli -m MODEL IMAGE "QUESTION"` asks it',
        ),
        ("finetune", 2, "finetune: no such command; models are run here, not trained"),
    ),
    "LM Studio": (
        (
            "load llava",
            2,
            "load: no such command; -m names a model, and each command loads its own",
        ),
        (
            "ls",
            2,
            "ls: no such command; `pyllava-cli models` lists the models that are here",
        ),
        (
            "server start",
            2,
            "server: no such command; there is no server; in Python, pyllava.Llava answers several threads at once",
        ),
        (
            "get llava",
            2,
            "get: no such command; `pyllava-cli pull REPO` fetches a model",
        ),
        (
            "import model.gguf",
            2,
            "import: no such command; `pyllava-cli convert DIR` makes GGUF files from a checkpoint",
        ),
        (
            "unload",
            2,
            "unload: no such command; -m names a model, and each command loads its own",
        ),
    ),
    "OpenAI's clients": (
        (
            "api chat.completions.create -m gpt-4o",
            2,
            "api: no such command; there is no server; in Python, pyllava.Llava answers several threads at once",
        ),
        (
            "--api-key sk-1 scene.png",
            2,
            "--api-key: no such option; there is no server; in Python, pyllava.Llava answers several threads at once",
        ),
        (
            "--base-url http://localhost",
            2,
            "--base-url: no such option; there is no server; in Python, pyllava.Llava answers several threads at once",
        ),
        (
            "--n 3 scene.png",
            2,
            "--n: no such option; pyllava-cli caption --samples N gives several answers about a picture",
        ),
        ("--stream scene.png", 2, "--stream: no such option; leave it out: answers appear as they are made"),
        (
            "scene.png --output answer.txt",
            2,
            "--output: no such option; the answer goes to stdout, > FILE keeps it; pyllava-cli caption writes many to a file",
        ),
        (
            "--image-url https://example.org/a.png",
            1,
            "https://example.org/a.png: a web address: fetch it first, and give the file or its bytes",
        ),
    ),
    "Slips": (
        ("caht", 2, "caht: no such command; did you mean chat?"),
        ("quantise a.gguf b.gguf q8_0", 2, "quantise: no such command; did you mean quantize?"),
        ("captions pictures", 2, "captions: no such command; did you mean caption?"),
        ("benchmark", 2, "benchmark: no such command; did you mean bench?"),
        ("frobnicate", 2, "frobnicate: no such command, and no such file"),
        ("scen.png", 1, "scen.png: No such file or directory"),
        (
            "scene.png What is this?",
            2,
            "'What' and 'is': need one question, with quotes around it, and pictures that are there",
        ),
        ('scene.png "What is this?" -p "What is that?"', 2, "'What is this?' and -p: need one question"),
        ("--promt Hi scene.png", 2, "--promt: no such option; did you mean --prompt?"),
        ("--imgae scene.png", 2, "--imgae: no such option; did you mean --image?"),
        ("--temperatur 0.5 scene.png", 2, "--temperatur: no such option; did you mean --temp?"),
        ("-image scene.png", 2, "-image: no such option; did you mean --image?"),
        ("-m", 2, "argument -m: needs a value"),
        ("--no-perf=yes scene.png", 2, "--no-perf: takes no value, found 'yes'"),
        (
            '"What is in the picture?"',
            1,
            'no image: need its FILE, as in `pyllava-cli IMAGE "QUESTION"`; `pyllava-cli chat` talks without pictures, too',
        ),
        ("notes.txt", 1, "notes.txt: not a JPEG, PNG, WebP, GIF, BMP or TIFF image"),
        (
            "pictures",
            1,
            "pictures: a folder without pictures (.jpg, .jpeg, .png, .webp, .gif, .bmp, .tif, .tiff, .avif, .heic, .heif)",
        ),
        ("empty.png", 1, "empty.png: empty"),
        ("-m scene.png scene.png", 1, "scene.png: a picture, need a GGUF model"),
        (
            "--image model.gguf",
            1,
            "model.gguf: not a JPEG, PNG, WebP, GIF, BMP or TIFF image but a GGUF model: -m names it, or model= in Python",
        ),
        ("weights scene.png", 2, "weights: a model, no picture: -m names it"),
        (
            "--gpu scene.png",
            2,
            "--gpu: no such option; a GPU is used where there is one; -dev names devices, --list-devices shows them",
        ),
        ("help frobnicate", 2, "frobnicate: no such command, and no such file"),
        ("help caht", 2, "caht: no such command; did you mean chat?"),
        (
            "-p Hi",
            1,
            'no image: need its FILE, as in `pyllava-cli IMAGE "QUESTION"`; `pyllava-cli chat` talks without pictures, too',
        ),
        (
            "https://example.org/a.png",
            1,
            "https://example.org/a.png: a web address: fetch it first, and give the file or its bytes",
        ),
        ('-p "<image><image>" scene.png', 1, "the prompt has 2 <image> marks, images given: 1"),
    ),
    "Commands": (
        ("info", 2, "info needs FILE"),
        ("info a.gguf b.gguf", 2, "'b.gguf': too many words, need FILE alone"),
        ("info -m model.gguf", 2, "-m: no such option; the file is named without it"),
        ("quantize model.gguf small.gguf", 2, "quantize needs TYPE"),
        (
            "quantize model.gguf small.gguf int4",
            2,
            "argument TYPE: 'int4', need one of f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k_s, q3_k_m, q3_k_l, q4_k_s, q4_k_m, q5_k_s, q5_k_m, q6_k, q3_k, q4_k, q5_k",
        ),
        (
            "quantize model.gguf small.gguf q4",
            2,
            "argument TYPE: 'q4', need one of f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k_s, q3_k_m, q3_k_l, q4_k_s, q4_k_m, q5_k_s, q5_k_m, q6_k, q3_k, q4_k, q5_k; did you mean q4_k?",
        ),
        (
            "quantize real.gguf model.gguf q8_0",
            1,
            "model.gguf: exists already; --force, in Python overwrite=True, replaces it",
        ),
        ("quantize model.gguf nowhere/small.gguf q8_0", 1, "model.gguf: header needs 24 bytes, file has 4"),
        ("convert", 2, "convert needs DIR"),
        ("convert nowhere", 1, "nowhere: not a folder"),
        ("convert pictures", 1, "pictures: no config.json; need the folder of a LLaVA model"),
        (
            "convert pictures --outtype int8",
            2,
            "argument --outtype: 'int8', need one of f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k_s, q3_k_m, q3_k_l, q4_k_s, q4_k_m, q5_k_s, q5_k_m, q6_k",
        ),
        ("caption pictures", 2, "need -o FILE, or --write txt for texts beside the pictures alone"),
        ("caption --image scene.png -o a.jsonl", 2, "--image: no such option; pictures are named without it"),
        (
            "caption pictures -o a.txt",
            2,
            "argument -o: 'a.txt', need a name that ends in .jsonl, .csv or .parquet",
        ),
        (
            "caption pictures -o a.jsonl --samples 3",
            2,
            "--samples: needs --temp above 0, without it they are all the same",
        ),
        (
            "chat llava",
            2,
            "'llava': no such picture; -m names a model, and questions are typed when the model is there",
        ),
        ("chat -p Hi", 2, "-p: no such option; questions are typed in a conversation, or piped into it"),
        ("bench --repeat 0", 2, "argument --repeat: '0', need a number from 1 to 999999"),
        ("explain scene.png", 2, "explain needs QUESTION"),
        ("models --yes", 2, "--yes: no such option"),
        ("completion", 2, "completion needs SHELL"),
        ("completion tcsh", 2, "argument SHELL: 'tcsh', need one of bash, zsh, fish"),
    ),
    "In a conversation": (
        (
            "/show info",
            1,
            "/show: no such command; /system shows the system message, `pyllava-cli info FILE` what is in a model",
        ),
        (
            "/set temperature 1",
            1,
            "/set: no such command; options are given when a conversation begins: pyllava-cli chat --temp 0.5",
        ),
        ("/load llava", 1, "/load: no such command; -m names the model when a conversation begins"),
        ("/imge scene.png", 1, "/imge: no such command; did you mean /image?"),
        ("/image", 1, "/image: need a FILE"),
        ("/image nowhere.png", 1, "nowhere.png: No such file or directory"),
        ("nowhere/scene.png", 1, "nowhere/scene.png: no such picture"),
        (
            "/home/me/scene.png",
            1,
            "/home/me/scene.png: no such command, and no such picture; /help lists them, //... asks what starts with a slash",
        ),
        (
            "/regenerate",
            1,
            "/regenerate: no such command; /help lists them, //... asks what starts with a slash",
        ),
        ("/read notes.txt", 1, "/read: no such command; paste the text; TEXT\\ goes on in the next line"),
        ("/save", 1, "/save: no answer yet"),
        (
            "/undo",
            1,
            "/undo: no such command; /drop takes a picture back that was not asked about, /clear forgets the conversation",
        ),
    ),
}
"""What is typed, the exit code, and what is said, without the name of the program before it and the hint at --help behind
it; three dots stand for a long list. In the current directory are scene.png, notes.txt, empty.png, model.gguf (damaged),
real.gguf, weights/ with a model in it and pictures/ with nothing."""

BEGIN = """\
pyllava-cli answers questions about pictures. To begin:
  pyllava-cli IMAGE "QUESTION"              asks the small demo model of the package, which knows drawn scenes
  pyllava-cli -m MODEL IMAGE "QUESTION"     asks a LLaVA model: a GGUF file, or the folder with it and its projector
  pyllava-cli chat -m MODEL IMAGE           has a conversation
  pyllava-cli help                          shows all options and commands
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYLLAVA_DEVICE", raising=False)
    shutil.copy(ROOT / "examples" / "scene.png", "scene.png")
    shutil.copy(ROOT / "pyllava" / "models" / "demo-q8_0.gguf", "real.gguf")
    Path("notes.txt").write_text("mine")
    Path("empty.png").touch()
    for folder in ("pictures", "weights"):
        Path(folder).mkdir()
    for model in ("model.gguf", "weights/a.gguf"):
        Path(model).write_bytes(b"GGUF")
    return tmp_path


@pytest.mark.parametrize(
    ("section", "typed", "code", "said"),
    [(section, *row) for section, rows in ROWS.items() for row in rows],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_said(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    section: str,
    typed: str,
    code: int,
    said: str,
) -> None:
    argv = ["chat", "-t", "1", "--log-disable"] if section == CONVERSATION else shlex.split(typed)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{typed}\n"))
    assert cli.main(argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    line = re.sub(r"^pyllava-cli( convert)?: error: ", "", err.rstrip())
    if code == 2:  # wrong usage: where the options are told
        line, hint = re.fullmatch(r"(.*) \(pyllava-cli( [a-z]+)? --help shows the options\)", line).groups()
        assert hint is None or hint.strip() in COMMANDS
    expected = re.escape(said).replace(re.escape("..."), ".*")
    assert re.fullmatch(expected, line), line


def test_a_bare_call_shows_how_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["ask"]):
        assert cli.main(argv) == 2
        assert capsys.readouterr() == ("", BEGIN)


def test_what_simply_works(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = "How many shapes are there?"
    assert cli.main(["--image", "scene.png", "-p", question]) == 0
    answer = capsys.readouterr().out
    assert answer.strip()
    for argv in (
        ["scene.png", question],
        [question, "scene.png"],
        ["ask", "scene.png", question],
        ["--image", "scene.png", question],
        ["-t", "1", "scene.png", "--no-perf", question],
        ["--no-perf", "--", "scene.png", question],
        ["--images", "scene.png", "--query", question, "--max_new_tokens", "50"],
        ["-ngl", "all", "scene.png", question],
    ):
        assert cli.main(argv) == 0
        assert capsys.readouterr().out == answer, argv
    assert cli.main(["scene.png", "scene.png", question]) == 0
    assert capsys.readouterr().out == 2 * answer
    assert cli.main(["--image", "scene.png", "./scene.png", question]) == 0
    assert capsys.readouterr().out == 2 * answer
    assert cli.main(["scene.png", question, "--stop", answer[:1]]) == 0
    assert capsys.readouterr().out == "\n"
    for argv in (["help"], ["help", "chat"], ["-?"]):
        assert cli.main(argv) == 0
        assert capsys.readouterr().out.startswith("usage: pyllava-cli")
    for argv in (["version"], ["-V"], ["chat", "-V"]):
        assert cli.main(argv) == 0
        assert capsys.readouterr().out.startswith("pyllava ")


def test_habits_lead_to_what_there_is() -> None:
    """Names to use instead are there; what has another name, or advice, has not got its own."""
    for parser in (ask_parser(), chat_parser()):
        names = set(parser._option_string_actions)
        assert not names & mistakes.SYNONYMS.keys()
    names = set(ask_parser()._option_string_actions)
    assert set(mistakes.SYNONYMS.values()) <= names
    assert names & mistakes.ADVICE.keys() <= {"-p", "--prompt", "-f", "--file", "-m", "--model", "--image"}
    assert not mistakes.SYNONYMS.keys() & mistakes.ADVICE.keys()
    assert not {*COMMANDS, *mistakes.FIRST_WORDS} & mistakes.COMMAND_ADVICE.keys()
    assert set(mistakes.SLASH_SYNONYMS.values()) <= chat.COMMANDS.keys()
    assert not chat.COMMANDS.keys() & {*mistakes.SLASH_SYNONYMS, *mistakes.SLASH_ADVICE}


# --- the page ---

_HEAD = """\
# What is said when a command is mistyped

Every sentence that follows is printed by the program and held by `tests/test_cli_mistakes.py`, which writes this page: `python -m
tests.test_cli_mistakes`. Before each stands `pyllava-cli: error: `, and behind those about usage `(pyllava-cli --help shows the options)`.
The exit code is 2 for wrong usage and 1 for anything else. Three dots stand for a long list.
"""


def page() -> str:
    parts = [_HEAD, "```\n$ pyllava-cli\n" + BEGIN + "```\n"]
    for section, rows in ROWS.items():
        prompt = "> " if section == CONVERSATION else "$ pyllava-cli "
        lines = [f"{prompt}{typed}\n{said}" for typed, _, said in rows]
        parts.append(f"## {section}\n\n```\n" + "\n\n".join(lines) + "\n```\n")
    parts.append(
        "## What is called otherwise here\n\nThese work as they are.\n\n" + _table(mistakes.SYNONYMS)
    )
    parts.append(_table(mistakes.SLASH_SYNONYMS, "in a conversation"))
    parts.append(
        "## In Python\n\nThe arguments of other libraries are errors that name ours: `ask(): no argument 'max_new_tokens'; it is called "
        "max_tokens here`.\n\n" + _table(_habits.OUR_NAMES, "argument")
    )
    parts.append(_table(_habits.INSTEAD, "argument", "instead", quoted=False))
    return "\n".join(parts)


def _table(told: Mapping[str, str], there: str = "there", here: str = "here", *, quoted: bool = True) -> str:
    names: dict[str, list[str]] = {}
    for name, ours in told.items():
        names.setdefault(ours, []).append(f"`{name}`")
    rows = [f"| {there} | {here} |", "|---|---|"]
    rows += [f"| {' '.join(theirs)} | {f'`{ours}`' if quoted else ours} |" for ours, theirs in names.items()]
    return "\n".join(rows) + "\n"


def test_the_page_is_what_is_said() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.test_cli_mistakes writes it again"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
