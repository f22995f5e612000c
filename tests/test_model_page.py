"""docs/model.md and the program: keys, tensors, names and shapes of intermediates, and every equation.

The page is read, not its author: model files are made from its tables of tensors, its equations are evaluated in double
precision, and the program's own trace is what both are compared with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny
import tiny_gguf
from reference import gates
from reference.subject import Subject, spans
from test_repo import asked_names
from tiny_gguf import Files, Gguf, gguf

from pyllava import PyllavaError, _lib

ROOT = Path(__file__).resolve().parents[1]
Floats = npt.NDArray[np.float64]
Traced = list[tuple[str, npt.NDArray[np.float32]]]

LANGUAGES, PROJECTORS = ("llama", "qwen2", "granite"), ("LLaVA-1.5", "LLaVA-1.6")
LANGUAGE = {"V": 384, "E": 64, "L": 2, "F": 160, "H": 4, "G": 2, "d": 24, "Q": 96, "K": 48, "d/2": 12}
TOWER = {
    "S": 56,
    "P": 14,
    "n": 4,
    "M": 16,
    "T": 17,
    "D": 32,
    "F": 96,
    "H": 2,
    "L": 2,
    "B": 3,
    "E": 64,
    "U": 8,
    "w": 2,
}
EPS, THETA, FACTOR = 0.01, 500.0, 3.0
# Of Granite: e, z, r and l.
SCALES = {"embedding_scale": 3.0, "attention.scale": 0.3, "residual_scale": 0.4, "logit_scale": 5.0}


# The page


@dataclass(frozen=True)
class Table:
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def read_tables(text: str) -> list[Table]:
    """Cells without their quotes."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = [tuple(cell.strip() for cell in line[1:-1].split("|")) for line in block.splitlines()]
        lines = [tuple(re.sub(r"^`([^`]*)`$", r"\1", cell) for cell in line) for line in lines]
        width = len(lines[0])
        assert all(len(line) == width for line in lines), block
        found.append(Table(lines[0], tuple(lines[2:])))
    return found


TABLES = read_tables((ROOT / "docs" / "model.md").read_text())


def tables(first: str, *header: str) -> list[Table]:
    return [t for t in TABLES if t.header[0] == first and set(header) <= set(t.header)]


@dataclass(frozen=True)
class Row:
    """Of a table of tensors; `presence`: needed, optional, ignored, refused, with `another`, one of the two."""

    name: str
    shape: str
    held: str
    presence: str


def tensors_of(variant: str) -> list[Row]:
    (table,) = tables("tensor", variant)
    column = table.header.index(variant)
    return [Row(row[0], row[1], row[2], row[column]) for row in table.rows]


def steps_of(prefix: str) -> list[Table]:
    """Tables of equations, in order: of the language model, of tower and projector."""
    in_tower = [
        any(re.match(r"v\.|mm\.", row[0]) for row in table.rows) for table in tables("name", "equation")
    ]
    wanted = prefix == "projector"
    return [t for t, is_tower in zip(tables("name", "equation"), in_tower, strict=True) if is_tower == wanted]


def axes(shape: str, sizes: dict[str, int]) -> tuple[int, ...]:
    def size(axis: str) -> int:
        return math.prod(int(symbol) if symbol.isdigit() else sizes[symbol] for symbol in axis.split())

    return tuple(size(axis) for axis in shape.strip("[]").split(", "))


# Files made from the page


def numbered(name: str) -> list[str]:
    return [name.replace(".N.", f".{i}.") for i in range(2)] if ".N." in name else [name]


def stored(name: str) -> list[str]:
    """Of a tower, also the layers after the one that is read."""
    n = TOWER["B"] if name.startswith("v.blk.") else 2
    return [name.replace(".N.", f".{i}.") for i in range(n)] if ".N." in name else [name]


def draw(rows: list[Row], sizes: dict[str, int]) -> dict[str, tiny_gguf.Tensor]:
    """Small random numbers, norms near 1, so that activations stay near 1; rotary factors from 1 to 2."""
    random = np.random.RandomState(1)
    out = {}
    for row in rows:
        for name in stored(row.name):
            shape = axes(row.shape, sizes)
            x = random.standard_normal(shape) * (0.3 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5)
            if "norm.weight" in name or re.search(r"ln\d?\.weight", name):
                x += 1.0
            out[name] = tiny_gguf.f32(1.0 + np.abs(x) if name == "rope_freqs.weight" else x)
    return out


def in_the_file(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.presence != "refused"]


def language_keys(base: Gguf, family: str) -> Gguf:
    kinds = gguf.GGUFValueType
    u32 = {
        "attention.key_length": "d",
        "attention.value_length": "d",
        "rope.dimension_count": "d",
        "attention.head_count": "H",
        "attention.head_count_kv": "G",
        "block_count": "L",
        "feed_forward_length": "F",
        "embedding_length": "E",
    }
    keys: dict[str, Any] = {
        f"{family}.{k}": (LANGUAGE[symbol], kinds.UINT32, None) for k, symbol in u32.items()
    }
    for name, value in (
        ("attention.layer_norm_rms_epsilon", EPS),
        ("rope.freq_base", THETA),
        ("rope.scaling.factor", FACTOR),
        *(SCALES.items() if family == "granite" else ()),
    ):
        keys[f"{family}.{name}"] = (value, kinds.FLOAT32, None)
    return replace(base, keys=base.keys | keys)


def projector_keys(base: Gguf, variant: str) -> Gguf:
    kinds = gguf.GGUFValueType
    side = TOWER["S"]
    if variant == "LLaVA-1.6":
        base = tiny_gguf.next_projector(base, [(side, 2 * side)], np.zeros(1, np.float32))
    keys: dict[str, Any] = {
        "clip.vision.feature_layer": ([TOWER["L"]], kinds.ARRAY, kinds.INT32),
        "clip.vision.attention.layer_norm_epsilon": (EPS, kinds.FLOAT32, None),
    }
    return replace(base, keys=base.keys | keys)


SPEC = tiny.TinySpec(v_ff=TOWER["F"], v_layer=TOWER["B"])


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Files]:
    """Whose vocabulary and other settings the files made here take over."""
    made: dict[str, Files] = {}

    def get(family: str) -> Files:
        if family not in made:
            spec = replace(SPEC, family=family)
            made[family] = tiny_gguf.convert(tmp_path_factory.mktemp(family), spec)
        return made[family]

    return get


class Maker:
    """A pair of files, one of them of the variant in question and made from the page."""

    def __init__(self, variant: str, converted: Callable[[str], Files], folder: Path) -> None:
        self.variant, self.path = variant, folder / "made.gguf"
        self.is_language = variant in LANGUAGES
        self.other = converted(variant if self.is_language else "llama")
        base = tiny_gguf.read(self.other.model if self.is_language else self.other.mmproj)
        keys = (language_keys if self.is_language else projector_keys)(base, variant)
        self.sizes = LANGUAGE if self.is_language else TOWER
        self.rows = tensors_of(variant)
        self.file = replace(keys, tensors=draw(in_the_file(self.rows), self.sizes))

    def write(self, file: Gguf) -> Files:
        tiny_gguf.write(self.path, file)
        return Files(self.path, self.other.mmproj) if self.is_language else Files(self.other.model, self.path)

    def load(self, file: Gguf) -> str:
        """The error of loading it; "" where there is none."""
        files = self.write(file)
        try:
            _lib.ModelHandle(files.model, None if self.is_language else files.mmproj).close()
        except PyllavaError as error:
            return str(error)
        return ""

    def without(self, *names: str) -> Gguf:
        assert set(names) <= set(self.file.tensors)
        file = replace(self.file, tensors={k: v for k, v in self.file.tensors.items() if k not in names})
        if "v.class_embd" in names:
            table = tiny_gguf.f32(file.tensors["v.position_embd.weight"].data[1:])
            file = file.with_tensors({"v.position_embd.weight": table})
        return file


@pytest.fixture(params=[*LANGUAGES, *PROJECTORS])
def maker(request: pytest.FixtureRequest, converted: Callable[[str], Files], tmp_path: Path) -> Maker:
    return Maker(request.param, converted, tmp_path)


# Keys


def test_keys_are_those_that_are_asked_for() -> None:
    sources = [
        *ROOT.glob("csrc/files/*hparams.c"),
        *(ROOT / "csrc/net" / f"{n}.c" for n in ("projector", "vision")),
    ]
    asked = set()
    for path in sources:
        text = path.read_text()
        asked |= set(re.findall(r'\bgguf_get_\w+\(\w+, "([^"]+)"', text))
        asked |= {f"A.{key}" for key in re.findall(r'\b(?:get_\w+|has)\(&?s, "([^"]+)"', text)}
    assert asked == {row[0] for table in tables("key") for row in table.rows}


def test_keys_are_needed_where_the_page_says(maker: Maker) -> None:
    of_projector, of_language = tables("key")
    for row in (of_language if maker.is_language else of_projector).rows:
        key, needed = (
            row[0].replace("A.", f"{maker.variant}."),
            row[2].startswith(("needed", f"{maker.variant}: needed")),
        )
        if key not in maker.file.keys:
            assert not needed, key
            continue
        error = maker.load(maker.file.without_keys(key))
        missing = f"{key} is missing" in error or f"{key} is not true" in error or ": 0 and 3" in error
        assert (missing or ": 3 and 0" in error) == needed, f"{key}: {error}"


# Tensors


def test_tensors_are_those_that_are_asked_for() -> None:
    page = {row.name for variant in (*LANGUAGES, *PROJECTORS) for row in tensors_of(variant)}
    asked = {name.replace("%d", "N") for name in asked_names()}
    not_asked = {row.name for v in (*LANGUAGES, *PROJECTORS) for row in tensors_of(v) if row.held == "-"}
    assert page - not_asked == asked - not_asked


def test_tensors_that_are_ignored() -> None:
    """The loader knows them by what their names begin with."""
    text = "".join(path.read_text() for path in ROOT.glob("csrc/net/*.c"))
    starts = re.findall(r'weights_ignore\(w, "([^"]+)"', text)
    starts += re.findall(r'"([^"]+)", i\);.*\n *weights_ignore\(w, name\)', text)
    starts = [start.replace("%d", "N") for start in starts]
    starts.remove("v.blk.N.")  # the layers after the one that is read: complete, and not read
    page = [row.name for v in (*LANGUAGES, *PROJECTORS) for row in tensors_of(v) if row.presence == "ignored"]
    assert {s for s in starts if any(name.startswith(s) for name in page)} == set(starts)
    assert all(name.startswith(tuple(starts)) for name in page)


def test_a_file_of_the_page_s_tensors_loads(maker: Maker) -> None:
    assert maker.load(maker.file) == ""


def test_every_tensor_left_out(maker: Maker) -> None:
    """Of layers, that of the last one."""
    for row in in_the_file(maker.rows):
        name = numbered(row.name)[-1]
        error = maker.load(maker.without(name, *dependents(maker.rows, name)))
        if row.presence == "needed":
            assert re.search(rf"missing tensor {re.escape(name)}$", error), f"{name}: {error}"
        elif row.presence.startswith("with "):
            assert error.endswith(f"missing tensor {name}"), f"{name}: {error}"
        else:
            assert row.presence in ("optional", "ignored", "one of the two"), name
            assert error == "", f"{name}: {error}"
    pair = [row.name for row in maker.rows if row.presence == "one of the two"]
    assert not pair or "image_newline" in maker.load(maker.without(*pair))


def dependents(rows: list[Row], name: str) -> list[str]:
    return [row.name for row in rows if row.presence == f"with `{name}`"]


def test_every_tensor_of_another_shape(maker: Maker) -> None:
    for row in in_the_file(maker.rows):
        name = numbered(row.name)[-1]
        data = maker.file.tensors[name].data
        wrong = np.concatenate([data, data[..., :1]], -1)
        error = maker.load(maker.file.with_tensors({name: tiny_gguf.f32(wrong)}))
        # Of two newlines one is read.
        not_read = row.presence == "ignored" or (maker.variant, name) == ("LLaVA-1.6", "model.image_newline")
        assert (f"{name}: shape" in error) != not_read, f"{name}: {error}"


def test_refused_tensors(maker: Maker) -> None:
    for row in maker.rows:
        if row.presence == "refused":
            error = maker.load(maker.file.with_tensors(draw([row], maker.sizes)))
            assert re.search(r"unused, such as|missing tensor mm\.1\.weight", error), f"{row.name}: {error}"


def test_types(maker: Maker) -> None:
    """f16 throughout, as a matrix and widened; integers nowhere."""
    halves = {
        name: tiny_gguf.quantized(tensor.data, gguf.GGMLQuantizationType.F16)
        for name, tensor in maker.file.tensors.items()
    }
    assert maker.load(maker.file.with_tensors(halves)) == ""
    for name in ("token_embd.weight", "output_norm.weight", "mm.0.weight", "mm.0.bias"):
        if name in maker.file.tensors:
            data = maker.file.tensors[name].data.astype(np.int32)
            integers = tiny_gguf.Tensor(data, gguf.GGMLQuantizationType.I32)
            assert "cannot hold weights" in maker.load(maker.file.with_tensors({name: integers}))


# Equations


def norm(x: Floats) -> Floats:
    return np.asarray((x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS))


def sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-x)))


def gelu(x: Floats) -> Floats:
    return np.asarray(x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2)


def attention(
    q: Floats, k: Floats, v: Floats, n_head: int, shared: int, causal: bool, scale: float | None = None
) -> Floats:
    """Rows of one sequence or view; `shared`: heads of q for each of k and v; `scale`: instead of 1 / sqrt(d)."""
    out = np.empty_like(q)
    d = q.shape[1] // n_head
    for h in range(n_head):
        own, theirs = slice(h * d, h * d + d), slice(h // shared * d, h // shared * d + d)
        scores = q[:, own] @ k[:, theirs].T * (scale or 1 / math.sqrt(d))
        if causal:
            scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, own] = weights / weights.sum(-1, keepdims=True) @ v[:, theirs]
    return out


class Evaluator:
    """What the page's equations are made of."""

    def __init__(self, file: Gguf, prefix: str) -> None:
        self.file = {name: np.asarray(t.data, np.float64) for name, t in file.tensors.items()}
        self.prefix, self.layer = prefix, ""
        self.names: dict[str, Any] = {
            "linear": self.linear,
            "rms": lambda t, x: x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * self.weight(t),
            "layernorm": lambda t, x: norm(x) * self.weight(t) + self.file[self.full(t) + ".bias"],
            "silu": lambda x: x * sigmoid(x),
            "gelu": gelu,
            "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
            "quick_gelu": lambda x: x * sigmoid(1.702 * x),
        }

    def full(self, name: str) -> str:
        for start in (self.layer, self.prefix, ""):
            if any(tensor.startswith(f"{start}{name}") for tensor in self.file):
                return start + name
        raise AssertionError(f"no tensor for {name}")

    def weight(self, name: str) -> Floats:
        w = self.file[self.full(name) + ".weight"]
        return w.reshape(len(w), -1) if w.ndim > 2 else w

    def linear(self, name: str, x: Floats) -> Floats:
        return np.asarray(x @ self.weight(name).T + self.file.get(self.full(name) + ".bias", 0.0))

    def run(self, steps: list[Table], n_layer: int) -> Iterator[tuple[str, str, Floats]]:
        """Name ("" for none), shape and value of each step."""
        for table in steps:
            in_layers = any(".N." in row[0] for row in table.rows)
            for i in range(n_layer if in_layers else 1):
                self.layer = f"{self.prefix}blk.{i}." if in_layers else ""
                for name, equation, shape, *_ in table.rows:
                    target, _, value = equation.partition(" = ")
                    self.names[target] = eval(self.quoted(value), {"__builtins__": {}}, self.names)
                    yield name.replace(".N.", f".{i}."), shape, self.names[target]

    def quoted(self, text: str) -> str:
        """Tensors as strings: the first argument of what takes one."""
        return re.sub(r"\b(linear|rms|layernorm)\(([\w.]+),", r'\1("\2",', text)


class Tower(Evaluator):
    def __init__(self, file: Gguf, views: Floats, act: str) -> None:
        super().__init__(file, "v.")
        n, side = TOWER["n"], TOWER["P"]
        cut = views.reshape(-1, 3, n, side, n, side).transpose(0, 2, 4, 1, 3, 5)
        self.names |= {
            "views": cut.reshape(-1, 3 * side * side),
            "patches": lambda views: views,
            "prepend": self.prepend,
            "class_embd": self.file.get("v.class_embd"),
            "position_embd": self.file["v.position_embd.weight"],
            "attend": self.attend,
            "drop_first": lambda x: x.reshape(TOWER["w"], -1, TOWER["D"])[:, 1:].reshape(-1, TOWER["D"]),
            "act": self.names[act],
        }

    def full(self, name: str) -> str:
        return super().full({"fc1": "ffn_down", "fc2": "ffn_up"}.get(name, name))

    def prepend(self, row: Floats, x: Floats) -> Floats:
        w, d = TOWER["w"], TOWER["D"]
        return np.concatenate([np.broadcast_to(row, (w, 1, d)), x.reshape(w, -1, d)], 1)

    def attend(self, *qkv: Floats) -> Floats:
        w = TOWER["w"]
        views = [[x.reshape(w, -1, TOWER["D"])[i] for x in qkv] for i in range(w)]
        return np.concatenate([attention(q, k, v, TOWER["H"], 1, False) for q, k, v in views])

    def run(self, steps: list[Table], n_layer: int) -> Iterator[tuple[str, str, Floats]]:
        for name, shape, x in super().run(steps, n_layer):
            if name == "v.embd":
                self.names["x"] = x.reshape(-1, TOWER["D"])
            yield name, shape, x


class Decoder(Evaluator):
    def __init__(self, file: Gguf, ids: list[int], family: str, wanted: slice) -> None:
        super().__init__(file, "")
        self.neox = family == "qwen2"
        scales = SCALES if family == "granite" else {}
        self.attention_scale = scales.get("attention.scale")
        self.file.setdefault("output.weight", self.file["token_embd.weight"])
        self.names |= {
            "x": scales.get("embedding_scale", 1.0) * self.file["token_embd.weight"][ids],
            "r": scales.get("residual_scale", 1.0),
            "l": scales.get("logit_scale", 1.0),
            "rope": self.rope,
            "attend": self.attend,
            "wanted": lambda x: x[wanted],
        }

    def attend(self, q: Floats, k: Floats, v: Floats) -> Floats:
        shared = LANGUAGE["H"] // LANGUAGE["G"]
        return attention(q, k, v, LANGUAGE["H"], shared, True, self.attention_scale)

    def rope(self, u: Floats) -> Floats:
        d = LANGUAGE["d"]
        i = np.arange(d // 2)
        divisor = THETA ** (2 * i / d) * FACTOR * self.file.get("rope_freqs.weight", 1.0)
        angle = (np.arange(len(u))[:, None] / divisor)[:, None]
        first, second = (i, i + d // 2) if self.neox else (2 * i, 2 * i + 1)
        heads, out = u.reshape(len(u), -1, d), np.empty((len(u), u.shape[1] // d, d))
        a, b = heads[..., first], heads[..., second]
        out[..., first] = a * np.cos(angle) - b * np.sin(angle)
        out[..., second] = a * np.sin(angle) + b * np.cos(angle)
        return out.reshape(u.shape)


IDS = [1, *np.random.RandomState(3).randint(3, LANGUAGE["V"], 40).tolist()]
VIEWS = np.random.RandomState(4).randn(TOWER["w"], 3, TOWER["S"], TOWER["S"]).astype(np.float32)


def traced(maker: Maker, file: Gguf, precision: str = "exact") -> Traced:
    files = maker.write(file)
    subject = Subject(files, n_views=TOWER["w"], precision=precision)
    found: Traced = []

    def run() -> None:
        if maker.is_language:
            subject.session.logits(spans([IDS]))
        else:
            subject.session.encode(VIEWS)

    subject.session.trace(run, lambda name, x: found.append((name, x)))
    subject.close()
    return found


def evaluated(maker: Maker, file: Gguf, act: str = "quick_gelu") -> list[tuple[str, str, Floats]]:
    if maker.is_language:
        return list(Decoder(file, IDS, maker.variant, slice(None)).run(steps_of("language"), LANGUAGE["L"]))
    return list(Tower(file, VIEWS.astype(np.float64), act).run(steps_of("projector"), TOWER["L"]))


def compare(maker: Maker, file: Gguf, steps: list[tuple[str, str, Floats]]) -> None:
    found = traced(maker, file)
    assert len({name for name, _ in found}) == len(found)
    expected = {name: x.astype(np.float32) for name, _, x in steps if name}
    gates.check_all(gates.INTERMEDIATE, expected, dict(found))


def test_intermediates_and_equations(maker: Maker) -> None:
    """Names both ways, shapes, and numbers."""
    steps = evaluated(maker, maker.file)
    sizes = {**maker.sizes, "r": len(IDS), "m": len(IDS)}
    for name, shape, x in steps:
        assert x.shape == axes(shape, sizes), f"{name}: {shape}"
    compare(maker, maker.file, steps)


def test_equations_without_what_may_be_absent(maker: Maker) -> None:
    """Steps whose tensor is not there are left out."""
    optional = [
        row for row in in_the_file(maker.rows) if row.presence == "optional" or row.presence[:5] == "with "
    ]
    file = maker.without(*[name for row in optional for name in numbered(row.name)])
    if maker.is_language:
        compare(maker, file, evaluated(maker, file))
        return
    _, done = without_steps(file, "quick_gelu", "prepend(", "drop_first(", "pre_ln,")
    found = {name: x.reshape(-1, x.shape[-1]) for name, x in traced(maker, file)}
    gates.check_all(gates.INTERMEDIATE, done, found)


def without_steps(file: Gguf, act: str, *absent: str) -> tuple[Tower, gates.Arrays]:
    """The intermediates of a tower whose views have no row before their patches."""
    steps = [
        Table(table.header, tuple(row for row in table.rows if not any(word in row[1] for word in absent)))
        for table in steps_of("projector")
    ]
    tower = Tower(file, VIEWS.astype(np.float64), act)
    tower.names["position_embd"] = np.tile(tower.file["v.position_embd.weight"], (TOWER["w"], 1))
    last = f"v.blk.{TOWER['L'] - 1}.out"
    done = {"v.features" if name == last else name: x for name, _, x in tower.run(steps, TOWER["L"]) if name}
    return tower, {name: x.astype(np.float32) for name, x in done.items()}


def test_siglip(converted: Callable[[str], Files], tmp_path: Path) -> None:
    """Told by its tensors, not by the keys; CLIP's steps for the class token and the norm are left out."""
    maker = Maker("LLaVA-1.5", converted, tmp_path)
    file = maker.without("v.class_embd", "v.pre_ln.weight", "v.pre_ln.bias")
    tower, done = without_steps(file, "gelu_tanh", "prepend(", "drop_first(", "pre_ln,")
    assert "v.patch_embd.bias" in tower.file
    found = {name: x.reshape(-1, x.shape[-1]) for name, x in traced(maker, file)}
    gates.check_all(gates.INTERMEDIATE, done, found)


@pytest.mark.parametrize(("key", "act"), [("clip.use_gelu", "gelu"), ("clip.use_silu", "silu")])
def test_activations(key: str, act: str, converted: Callable[[str], Files], tmp_path: Path) -> None:
    maker = Maker("LLaVA-1.5", converted, tmp_path)
    file = replace(maker.file, keys=maker.file.keys | {key: (True, gguf.GGUFValueType.BOOL, None)})
    compare(maker, file, evaluated(maker, file, act))


def test_what_the_fast_mode_joins(maker: Maker) -> None:
    found = dict(traced(maker, maker.file, "fast"))
    column, joined = 3, set()
    for table in steps_of("language" if maker.is_language else "projector"):
        assert table.header[column] == "in the fast mode"
        words = ("joined",) if maker.variant == "granite" else ("joined", "joined where r = 1")
        joined |= {name for row in table.rows if row[column] in words for name in numbered(row[0])}
    steps = {name: x for name, _, x in evaluated(maker, maker.file) if name}
    assert joined == set(steps) - set(found)
    if not maker.is_language:  # a sum under the name of one of its parts
        total = steps["v.pre_ln"] + steps["v.blk.0.attn_out"]
        assert gates.row_cosines(total, found["v.blk.0.attn_out"]).min() > 0.999
