"""What people type by habit, from other programs: what it is called here, or what to do instead. Data alone.

`docs/mistakes.md` shows what is said of them; `tests/test_cli_mistakes.py` holds the sentences.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

ASK = 'pyllava-cli -m MODEL IMAGE "QUESTION"'
CHAT = "pyllava-cli chat -m MODEL IMAGE"


def _table(*rows: tuple[str, str]) -> Mapping[str, str]:
    """From rows of names, with spaces between them, and what holds for each of these."""
    return MappingProxyType({name: told for names, told in rows for name in names.split()})


# --- options ---

SYNONYMS = _table(
    ("--max-tokens --max-new-tokens --max-completion-tokens --max-length --num-predict", "--predict"),
    ("--temperature", "--temp"),
    ("--stop-sequence --stop-sequences --stop-words", "--stop"),
    ("--repetition-penalty", "--repeat-penalty"),
    ("--images --image-file --image-path --image-url --img --picture --pictures", "--image"),
    ("--query --question --text --message", "--prompt"),
    ("--prompt-file", "--file"),
    ("--model-path", "--model"),
    ("--clip --clip-model-path --projector", "--mmproj"),
    ("--n-ctx --num-ctx --context --context-length --max-model-len", "--ctx-size"),
    ("--n-batch --num-batch", "--batch-size"),
    ("--n-threads --num-thread --num-threads", "--threads"),
    ("--num-gpu --ngl", "--gpu-layers"),
    ("--n-parallel", "--parallel"),
    ("--chat-template --conv-mode", "--template"),
    ("--system-prompt --system-message", "--system"),
    ("--log-verbose", "--verbose"),
    ("--quiet --silent", "--log-disable"),
    ("--no-timings", "--no-perf"),
    ("-V", "--version"),
    ("-?", "--help"),
)
"""Options of llama.cpp, its Python bindings, ollama, LLaVA, transformers and OpenAI's clients, and their names here."""

_FETCH = "-hf REPO[:QUANT] fetches a model, other files are fetched by hand and named with -m and --mmproj"
_NO_SERVER = "there is no server; in Python, pyllava.Llava answers several threads at once"
_FEWER_BITS = "`pyllava-cli quantize IN OUT q4_k_m` writes a smaller file, -m names it"

ADVICE = _table(
    ("-hff --hf-file -mu --model-url -mmu --mmproj-url", _FETCH),
    ("-hft --hf-token", "the environment has it, in HF_TOKEN"),
    ("--offline", "HF_HUB_OFFLINE=1 in the environment does it"),
    ("-cnv --conversation -i --interactive --chat", "pyllava-cli chat has a conversation"),
    ("-sysf --system-prompt-file", "--system takes the text itself"),
    ("--jinja --chat-template-file", "--template names one of the templates that are here"),
    ("--audio --video", "only pictures are seen, with --image"),
    ("--host --port --api-key --base-url", _NO_SERVER),
    ("--load-4bit --load-8bit --load-in-4bit --load-in-8bit", _FEWER_BITS),
    ("--dtype --torch-dtype", f"numbers are as in the file, -ctk and -ctv set the KV cache's; {_FEWER_BITS}"),
    ("--lora --model-base --adapter", "merge the adapter into its base model, and convert that"),
    (
        "--num-beams --beam-size",
        "answers are not searched with beams; without --temp each token is the likeliest",
    ),
    ("--do-sample --sample", "--temp above 0 draws tokens at random"),
    ("--stream --no-stream", "leave it out: answers appear as they are made"),
    (
        "--output --output-file",
        "the answer goes to stdout, > FILE keeps it; pyllava-cli caption writes many to a file",
    ),
    (
        "--gpu --cuda --use-gpu",
        "a GPU is used where there is one; -dev names devices, --list-devices shows them",
    ),
    ("--cpu --no-gpu", "-dev cpu computes on the CPU alone"),
    ("--device-map", "-dev names devices, -ngl how many layers go there"),
    ("--trust-remote-code", "no code of a model is ever run, leave it out"),
    ("-tb --threads-batch", "-t holds for prompts and answers"),
    ("-ub --ubatch-size", "-b is the one size of batches"),
    (
        "--mlock --numa --no-warmup --simple-io --no-display-prompt -co --color",
        "not needed here, leave it out",
    ),
    ("--rope-scaling --rope-scale --rope-freq-base --rope-freq-scale", "the file says it, leave it out"),
    (
        "--keepalive --keep-alive",
        "a model lives as long as its command; pyllava-cli chat keeps it for many questions",
    ),
    ("--best-of --n", "pyllava-cli caption --samples N gives several answers about a picture"),
    ("-p --prompt -f --file", "questions are typed in a conversation, or piped into it"),
    ("-m --model", "the file is named without it"),
    ("--image", "pictures are named without it"),
    ("--batch", "several pictures are named one after the other; pyllava-cli caption is for very many"),
)
"""What to say of options of other programs that are none here, nor have another name."""

# --- commands ---

FIRST_WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"help": ("--help",), "version": ("--version",), "ask": ()}
)
"""First words that are no commands, and what they stand for."""

COMMAND_ADVICE = _table(
    ("run", f"`{ASK}` asks, `{CHAT}` has a conversation"),
    ("generate query predict infer vision vqa mtmd eval", f"a question needs no command, `{ASK}` asks it"),
    ("cli repl talk interactive conversation", f"`{CHAT}` has a conversation"),
    ("serve server start stop api", _NO_SERVER),
    ("list ls", "`pyllava-cli models` lists the models that are here"),
    ("ps load unload", "-m names a model, and each command loads its own"),
    ("download get fetch", "`pyllava-cli pull REPO` fetches a model"),
    ("remove delete", "`pyllava-cli rm REPO` removes a fetched model"),
    ("show inspect dump gguf", "`pyllava-cli info FILE` says what is in a file"),
    ("create export import", "`pyllava-cli convert DIR` makes GGUF files from a checkpoint"),
    ("finetune train", "models are run here, not trained"),
    ("install update upgrade", "`pip install --upgrade pyllava` does that"),
    ("batch annotate label", "`pyllava-cli caption FOLDER -o captions.jsonl` is for many pictures"),
)
"""What to say of a first word that is a command elsewhere."""

# --- lines of a conversation ---

SLASH_SYNONYMS = _table(
    ("/exit /bye /q", "/quit"),
    ("/? /h", "/help"),
    ("/img /picture /pic", "/image"),
    ("/reset /new", "/clear"),
)
"""What commands of other conversations are called here."""

SLASH_ADVICE = _table(
    ("/show", "/system shows the system message, `pyllava-cli info FILE` what is in a model"),
    ("/load /model", "-m names the model when a conversation begins"),
    ("/set", "options are given when a conversation begins: pyllava-cli chat --temp 0.5"),
    ("/regen /retry", "ask again; /clear forgets the conversation"),
    ("/undo", "/drop takes a picture back that was not asked about, /clear forgets the conversation"),
    ("/read /file", "paste the text; TEXT\\ goes on in the next line"),
    ("/audio /video", "only pictures are seen, with /image"),
)
"""What to say of those that are none here."""
