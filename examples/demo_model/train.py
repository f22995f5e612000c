"""Training: python -m examples.demo_model.train --minutes 110 --out DIR    (goes on where DIR left off)

Stage A teaches the vision tower alone: every patch says what covers it. Stage B trains all on questions
and answers; the questions of one scene share its beginning (system text and image) and do not see each other,
which equals separate samples at a much lower price. On answers alone the model never learns to see.

Processes with one thread each share the weights; each takes small batches until the step has enough, and then
updates a part of the parameters (Muon for matrices, Adam for the rest).
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from . import scenes, tokenizer
from .evaluate import exam
from .model import MEAN, STD, Llava

PATCH, GRID = 14, 8
COLOR_ID = {name: i for i, name in enumerate(scenes.COLORS)}
SHAPE_ID = {name: i + 1 for i, name in enumerate(scenes.SHAPES)}
WORD_ID = {name: i for i, name in enumerate(scenes.WORDS)}
KIND_WORD = len(SHAPE_ID) + 1  # kind of a patch: 0 nothing, shapes, word
HEADS = {"kind": KIND_WORD + 1, "color": 8, "size": 2, "background": 8, "word": len(WORD_ID)}
HEADS |= {"letter left": 27, "letter right": 27}  # in the two halves of a patch; 0 beside the word
HEADS |= {"place": len(scenes.PLACES)}  # of the whole shape or word
HEADS |= {"same kind": 5, "same color": 5}  # how many shapes there are like this one
WEIGHT = {"kind": 1.0, "color": 1.0, "size": 0.3, "background": 0.3, "word": 2.0}
WEIGHT |= {"letter left": 1.0, "letter right": 1.0, "place": 1.0}
WEIGHT |= {"same kind": 1.0, "same color": 1.0}
MICRO = {"A": 16, "B": 4}  # scenes per small batch
STEP = {"A": 128, "B": 32}  # scenes per step
RATE = {"A": (3e-3, 1.5e-3), "B": (3e-3, 1.5e-3)}  # Muon, Adam
TOWER_RATE = 0.5  # of Muon's rate, in stage B
Counts = dict[str, list[int]]  # right and total by kind


# --- pictures ---------------------------------------------------------------------------------------------


def preprocess(image: Image.Image) -> np.ndarray:
    """LLaVA-1.5: pad to a square, bicubic to 112, normalise. -> [3, 112, 112]"""
    side = max(image.size)
    if image.size != (side, side):
        square = Image.new("RGB", (side, side), (122, 116, 104))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    small = image.resize((scenes.SIDE, scenes.SIDE), Image.Resampling.BICUBIC)
    pixels = (np.asarray(small, np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def patch_labels(scene: scenes.Scene) -> dict[str, np.ndarray]:
    """What every patch shows; -1 where it does not apply. Each [64]."""
    items = [*scene.shapes, *scene.words]
    mask = Image.new("L", (scenes.SIDE, scenes.SIDE))
    canvas = ImageDraw.Draw(mask)
    for number, item in enumerate(items, 1):
        if isinstance(item, scenes.Shape):
            scenes.draw_shape(canvas, item, number, 1.0)
        else:
            canvas.rectangle(item.box, fill=number)
    patches = (
        np.asarray(mask).reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
    )
    areas = np.stack([(patches == number).sum(1) for number in range(1, len(items) + 1)])
    owner, area = areas.argmax(0), areas.max(0)
    out = {name: np.full(GRID * GRID, -1, np.int64) for name in HEADS}
    out["background"][:] = COLOR_ID[scene.background]
    out["kind"][area == 0] = 0
    for number, item in enumerate(items):
        mine = (owner == number) & (area >= 14)
        out["color"][mine] = COLOR_ID[item.color]
        out["place"][mine] = list(scenes.PLACES).index(scenes.cell(item))
        if isinstance(item, scenes.Shape):
            out["kind"][mine] = SHAPE_ID[item.kind]
            out["size"][mine] = scenes.SIZES.index(item.size)
            out["same kind"][mine] = min(4, sum(s.kind == item.kind for s in scene.shapes))
            out["same color"][mine] = min(4, sum(s.color == item.color for s in scene.shapes))
        else:
            out["kind"][mine] = KIND_WORD
            out["word"][mine] = WORD_ID[item.text]
    for word in scene.words:
        _, top, _, bottom = word.box
        edges = word.letter_edges()
        for half, name in enumerate(("letter left", "letter right")):
            for column in range(GRID):
                x = column * PATCH + (half + 0.5) * PATCH / 2
                inside = [
                    ord(c) - 96 for c, a, b in zip(word.text, edges, edges[1:], strict=False) if a <= x < b
                ]
                for row in range(GRID):
                    at = row * GRID + column
                    if out["word"][at] == WORD_ID[word.text] and (
                        min(bottom, row * PATCH + PATCH) - max(top, row * PATCH) > 0.3 * (bottom - top)
                    ):
                        out[name][at] = inside[0] if inside else 0
    return out


def collate(drawn: list[scenes.Scene], pixels: int = 3 * scenes.SIDE) -> tuple[Tensor, dict[str, Tensor]]:
    images = torch.from_numpy(np.stack([preprocess(scenes.draw(s, pixels)) for s in drawn]))
    labels = [patch_labels(s) for s in drawn]
    return images, {name: torch.from_numpy(np.stack([one[name] for one in labels])) for name in HEADS}


def aux_loss(model: Llava, features: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, Counts]:
    """The dense loss, and right/total of every head."""
    total, counts = torch.zeros(()), {}
    logits = model.aux(features.float()).split(list(HEADS.values()), -1)
    for name, got in zip(HEADS, logits, strict=True):
        want = labels[name]
        known = want >= 0
        if known.any():  # a batch may have no word
            total = total + WEIGHT[name] * F.cross_entropy(got[known], want[known])
        counts[name] = [int((got.detach().argmax(-1) == want)[known].sum()), int(known.sum())]
    return total, counts


# --- questions --------------------------------------------------------------------------------------------


class Prompts:
    """Token ids as LLaVA makes them: the texts before and after the image are tokenized each on its own."""

    def __init__(self, path: Path) -> None:
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.system = [1, *self.sp.encode(tokenizer.SYSTEM)]

    def branch(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Of (question, answer) turns the ids after the image, and the id to predict at each (-100: none)."""
        ids: list[int] = []
        want: list[int] = []
        for number, (question, answer) in enumerate(turns):
            ask = self.sp.encode(("\n" if number == 0 else "USER: ") + question + " ASSISTANT:")
            reply = [*self.sp.encode(answer), 2]
            ids += ask + reply
            want += [-100] * (len(ask) - 1) + reply + [-100]
        return ids[:-1], want[:-1]


Turns = list[list[scenes.Question]]  # chats, each of one or more turns


def vary(text: str, rng: random.Random) -> str:
    """Questions as people type them."""
    roll = rng.random()
    if roll < 0.05:
        text = text.lower()
    elif roll < 0.10:
        text = text.rstrip("?.")
    elif roll < 0.15:
        text = text.lower().rstrip("?.")
    if roll > 0.9:
        text = text.replace("color", "colour")
    return text


@dataclass
class Batch:
    images: Tensor
    labels: dict[str, Tensor]
    ids: Tensor  # [batch, tokens] after the image
    want: Tensor  # [batch, tokens]
    weight: Tensor  # [batch, tokens] in the loss, so that a long answer does not drown the short ones
    branch: Tensor  # [batch, tokens], 1.. ; 0 is padding
    positions: Tensor  # [batch, tokens] counted from the first token after the image
    kinds: list[list[str]]  # kind of every branch's first question


def practice(rng: random.Random, weights: dict[str, float]) -> tuple[scenes.Scene, Turns]:
    """A scene and four or five chats about it, some of two turns."""
    scene = scenes.random_scene(rng, 0.7)
    kinds = ["describe"] * (rng.random() < 0.5) + rng.choices(list(weights), list(weights.values()), k=8)
    asked = [q for q in (scenes.ask(scene, kind, rng) for kind in kinds) if q is not None][:7]
    chats = [[q] for q in asked[:5]]
    for chat, question in zip(chats, asked[5:], strict=False):
        chat.append(question)
    return scene, [[scenes.Question(q.kind, vary(q.text, rng), q.answer) for q in chat] for chat in chats]


def chat_batch(prompts: Prompts, samples: list[tuple[scenes.Scene, Turns]]) -> Batch:
    images, labels = collate([scene for scene, _ in samples])
    rows = [[prompts.branch([(q.text, q.answer) for q in chat]) for chat in chats] for _, chats in samples]
    kinds = [[chat[0].kind for chat in chats] for _, chats in samples]
    count = len(samples)
    width = max(sum(len(ids) for ids, _ in row) for row in rows)
    ids = torch.zeros(count, width, dtype=torch.long)
    want, branch, positions = torch.full_like(ids, -100), torch.zeros_like(ids), torch.zeros_like(ids)
    weight = torch.zeros(ids.shape)
    for r, row in enumerate(rows):
        at = 0
        for number, (tokens, targets) in enumerate(row, 1):
            here = slice(at, at + len(tokens))
            ids[r, here], want[r, here] = torch.tensor(tokens), torch.tensor(targets)
            branch[r, here], positions[r, here] = number, torch.arange(len(tokens))
            weight[r, here] = sum(target >= 0 for target in targets) ** -0.5
            at += len(tokens)
    return Batch(images, labels, ids, want, weight, branch, positions, kinds)


def chat_forward(model: Llava, prompts: Prompts, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """-> tower features, logits [answers, vocab] and the wanted ids [answers]."""
    features = model.tower(batch.images)
    image = model.projector(features)
    system = torch.tensor([prompts.system])
    start = system.shape[1]
    _, past = model.model(model.model.embed_tokens(system), torch.arange(start)[None])
    count, n_patch = image.shape[:2]
    x = torch.cat([image.float(), model.model.embed_tokens(batch.ids)], 1)
    positions = torch.cat([torch.arange(n_patch).expand(count, -1), batch.positions + n_patch], 1) + start
    group = torch.cat([torch.zeros(count, n_patch, dtype=torch.long), batch.branch], 1)
    order = torch.arange(x.shape[1])
    group_key = group.clone()
    group_key[:, n_patch:][batch.branch == 0] = -1  # nobody looks at padding
    seen = (group_key[:, None] == 0) | (group_key[:, None] == group[..., None])
    seen = seen & (order[None, :] <= order[:, None])
    mask = F.pad(torch.where(seen, 0.0, -1e4), (start, 0))[:, None]
    states, _ = model.model(x, positions, mask, past)
    answers = batch.want >= 0
    return features, model.lm_head(states[:, n_patch:][answers]), batch.want[answers]


def chat_counts(batch: Batch, logits: Tensor) -> Counts:
    """Right/total by kind: a branch is right when greedy decoding would give exactly its answers."""
    answers = batch.want >= 0
    good = torch.ones_like(answers)
    good[answers] = logits.argmax(-1) == batch.want[answers]
    counts: Counts = defaultdict(lambda: [0, 0])
    for r, names in enumerate(batch.kinds):
        for number, kind in enumerate(names, 1):
            counts[kind][0] += bool(good[r][batch.branch[r] == number].all())
            counts[kind][1] += 1
    return counts


# --- training ---------------------------------------------------------------------------------------------


def add(into: Counts, more: Counts) -> None:
    for name, (good, total) in more.items():
        into.setdefault(name, [0, 0])
        into[name][0] += good
        into[name][1] += total


def table(counts: Counts) -> str:
    return " ".join(f"{name} {100 * good / max(1, total):.1f}" for name, (good, total) in counts.items())


@torch.no_grad()
def examine(model: Llava, prompts: Prompts, seed: int, count: int) -> Counts:
    """Right/total by kind on the scenes of `evaluate --seed`."""
    papers = [(scene, [[q] for q in questions]) for scene, questions in exam(seed, count)]
    counts: Counts = {}
    for first in range(0, count, 10):
        batch = chat_batch(prompts, papers[first : first + 10])
        add(counts, chat_counts(batch, chat_forward(model, prompts, batch)[1]))
    return counts


def split(model: Llava, rank: int, world: int) -> tuple[list[str], list[str]]:
    """Names of the matrices and of the other parameters that this process updates."""
    named = sorted(model.named_parameters(), key=lambda item: -item[1].numel())
    matrices = [
        n
        for n, p in named
        if p.ndim == 2 and not n.startswith(("aux", "lm_head", "model.embed")) and "position" not in n
    ]
    chosen = set(matrices)
    return matrices[rank::world], [n for n, _ in named if n not in chosen][rank::world]


def chat_weights(last: Counts) -> dict[str, float]:
    """More questions of the kinds that are still wrong."""
    rates = {k: (last[k][0] / max(1, last[k][1]) if k in last else 0.0) for k in scenes.KINDS}
    return {k: 0.2 + 3 * (1 - rates[k]) for k in scenes.KINDS if k != "describe"}


def worker(
    rank: int, world: int, model: Llava, grads: list[Tensor], shared, options: argparse.Namespace
) -> None:
    torch.set_num_threads(1)
    prompts = Prompts(options.out / "tokenizer.model")
    params = dict(model.named_parameters())
    offsets, at = {}, 0
    for name, parameter in params.items():
        parameter.grad = grads[rank][at : at + parameter.numel()].view_as(parameter)
        offsets[name] = at
        at += parameter.numel()
    muon_names, adam_names = split(model, rank, world)
    tower_names = [n for n in muon_names if n.startswith("tower")]
    other_names = [n for n in muon_names if not n.startswith("tower")]
    groups = [{"params": [params[n] for n in names]} for names in (tower_names, other_names)]
    muon = torch.optim.Muon(groups, lr=1e-3, weight_decay=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW([params[n] for n in adam_names], lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    state = {"stage": "A", "step": 0, "stage_step": 0, "spent": 0.0, "stage_spent": 0.0}
    saved = options.out / f"state-{rank}.pt"
    if saved.exists():
        loaded = torch.load(saved, weights_only=False)
        muon.load_state_dict(loaded["muon"])
        if "adam" in loaded:
            adam.load_state_dict(loaded["adam"])
        state.update(loaded["state"])
    last_exam: Counts = loaded.get("exam", {}) if saved.exists() else {}
    counts: Counts = {}
    sums, clock, last_save, last_exam_time = [0.0, 0.0, 0], time.time(), time.time(), time.time()
    started = clock

    def save() -> None:
        payload = {"muon": muon.state_dict(), "adam": adam.state_dict(), "state": state, "exam": last_exam}
        torch.save(payload, f"{saved}.tmp")
        if rank == 0:
            torch.save(model.state_dict(), options.out / "model.pt.tmp")
        shared.barrier.wait()
        os.replace(f"{saved}.tmp", saved)
        if rank == 0:
            os.replace(options.out / "model.pt.tmp", options.out / "model.pt")

    while True:
        # one clock for all: rank 0 says where we are
        if rank == 0:
            now = time.time()
            total = state["spent"] + now - started
            stage = "A" if total < 60 * options.stage_a else "B"
            if stage == "B" and state["stage"] == "A":
                state["stage_step"] = 0
            begin, end = (
                (0.0, 60 * options.stage_a) if stage == "A" else (60 * options.stage_a, 60 * options.minutes)
            )
            if options.deadline:
                left = options.deadline - now
                end = total + left if stage == "B" else end
            done = min(1.0, (total - begin) / max(1.0, end - begin))
            floor = 0.25 if stage == "A" else 0.01
            rate = min(1.0, (state["stage_step"] + 1) / 60) * (
                floor + (1 - floor) * min(1.0, 1.25 * (1 - done))
            )
            shared.info[0], shared.info[1], shared.info[2] = float(stage == "B"), rate, total
            shared.info[3] = float(done >= 1 and stage == "B")
            shared.info[4] = float(now - last_save > 300 or (done >= 1 and stage == "B"))
            shared.info[5] = state["stage_step"]
            shared.counter.value = 0
            if stage == "B":
                for i, weight in enumerate(chat_weights(last_exam).values()):
                    shared.info[8 + i] = weight
        shared.barrier.wait()
        state["stage"] = "B" if shared.info[0] else "A"
        state["stage_step"] = int(shared.info[5])
        stage, rate, total = state["stage"], float(shared.info[1]), float(shared.info[2])
        if shared.info[4]:
            kept = state["spent"]
            state["spent"] = total
            save()
            state["spent"] = kept
            last_save = time.time()
        if shared.info[3]:
            return
        kinds = [k for k in scenes.KINDS if k != "describe"]
        weights = {k: float(shared.info[8 + i]) for i, k in enumerate(kinds)}
        grads[rank].zero_()
        n_micro = STEP[stage] // MICRO[stage]
        while True:
            with shared.counter.get_lock():
                index = shared.counter.value
                shared.counter.value += 1
            if index >= n_micro:
                break
            rng = random.Random((state["step"] * 1000 + index) * 7919 + options.seed)
            if stage == "A":
                images, labels = collate([scenes.busy_scene(rng) for _ in range(MICRO["A"])], 2 * scenes.SIDE)
                with torch.autocast("cpu", torch.bfloat16):
                    features = model.tower(images)
                loss, more = aux_loss(model, features, labels)
                sums[1] += float(loss)
            else:
                batch = chat_batch(prompts, [practice(rng, weights) for _ in range(MICRO["B"])])
                with torch.autocast("cpu", torch.bfloat16):
                    features, logits, want = chat_forward(model, prompts, batch)
                extra, more = aux_loss(model, features, batch.labels)
                weight = batch.weight[batch.want >= 0]
                answer = (
                    F.cross_entropy(logits.float(), want, reduction="none") * weight
                ).sum() / weight.sum()
                loss = answer + 0.5 * extra
                sums[0] += float(answer)
                sums[1] += float(extra)
                more = {
                    name: more[name] for name in ("kind", "color", "word", "place", "same kind", "same color")
                }
                add(more, {"Q " + k: v for k, v in chat_counts(batch, logits.detach()).items()})
            (loss / n_micro).backward()
            sums[2] += 1
            add(counts, more)
        shared.norms[rank] = 0.0
        shared.barrier.wait()
        mine = {n: params[n] for n in muon_names + adam_names}
        square = 0.0
        for name, parameter in mine.items():
            here = slice(offsets[name], offsets[name] + parameter.numel())
            for other in range(world):
                if other != rank:
                    grads[rank][here] += grads[other][here]
            square += float(grads[rank][here].square().sum())
        shared.norms[rank] = square
        shared.barrier.wait()
        scale = min(1.0, 2.0 / (math.sqrt(sum(shared.norms)) + 1e-9))
        for name in mine:
            params[name].grad.mul_(scale)
        idle = (lambda n: not n.startswith(("tower", "aux"))) if stage == "A" else (lambda n: False)
        kept = {n: p.grad for n, p in mine.items() if idle(n)}
        for name in kept:
            params[name].grad = None
        for group, factor in zip(muon.param_groups, (1.0 if stage == "A" else TOWER_RATE, 1.0), strict=True):
            group["lr"] = RATE[stage][0] * rate * factor
        for group in adam.param_groups:
            group["lr"] = RATE[stage][1] * rate
        muon.step()
        adam.step()
        for name, gradient in kept.items():
            params[name].grad = gradient
        state["step"] += 1
        state["stage_step"] += 1
        if rank == 0 and state["step"] % 50 == 0:
            seconds = time.time() - clock
            print(
                f"{total / 60:6.1f} min {stage} step {state['stage_step']} rate {rate:.3f} "
                f"{50 * STEP[stage] / seconds:.1f} scenes/s "
                f"answer {sums[0] / sums[2]:.3f} dense {sums[1] / sums[2]:.3f} "
                f"norm {math.sqrt(sum(shared.norms)):.2f} | {table(counts)}",
                flush=True,
            )
            counts, sums, clock = {}, [0.0, 0.0, 0], time.time()
        shared.barrier.wait()
        if stage == "B" and rank == 0 and time.time() - last_exam_time > 420:
            last_exam = examine(model, prompts, 1000, 100)
            last_exam_time = time.time()
            print(f"{total / 60:6.1f} min exam (100 unseen scenes): {table(last_exam)}", flush=True)


class Shared:
    def __init__(self, world: int) -> None:
        context = mp.get_context("spawn")
        self.barrier = context.Barrier(world)
        self.counter = context.Value("i", 0)
        self.info = torch.zeros(24, dtype=torch.float64).share_memory_()
        self.norms = torch.zeros(world, dtype=torch.float64).share_memory_()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=110, help="length of the whole training")
    parser.add_argument("--stage-a", type=float, default=27, help="minutes of stage A")
    parser.add_argument("--deadline", type=float, default=0, help="Unix time to end at, instead of --minutes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.out / "tokenizer.model").exists():
        tokenizer.train(options.out / "tokenizer.model")
    torch.manual_seed(options.seed)
    model = Llava(aux=sum(HEADS.values()))
    if (options.out / "model.pt").exists():
        model.load_state_dict(torch.load(options.out / "model.pt"))
    model.share_memory()
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f} M parameters", flush=True)
    grads = [torch.zeros(size).share_memory_() for _ in range(options.processes)]
    shared = Shared(options.processes)
    mp.spawn(worker, (options.processes, model, grads, shared, options), nprocs=options.processes)
    prompts = Prompts(options.out / "tokenizer.model")
    print("final exam (500 unseen scenes):", table(examine(model, prompts, 2000, 500)), flush=True)


if __name__ == "__main__":
    main()
