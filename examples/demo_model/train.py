"""Training: python -m examples.demo_model.train --minutes 110 --out DIR    (goes on where DIR left off)

Stage A teaches the vision tower alone: every patch says what covers it. Stage B trains all on questions
and answers; the questions of one scene share its beginning (system text and image) and do not see each other,
which equals separate samples at a much lower price. On answers alone the model never learns to see.

With --variant 1.6 it goes on from the weights of a 1.5 (--start), with tiles, newline and posters, in stage B alone.

Processes with one thread each share the weights; each takes small batches until the step has enough, and then
updates a part of the parameters (Muon for matrices, Adam for the rest).
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from . import anyres, data, posters, scenes, tokenizer
from .data import HEADS, ROW_HEADS, Counts, Prompts, Sample, chat_batch, chat_counts, chat_forward
from .evaluate import exam
from .model import Llava

MICRO = {"A": 16, "B": 4}  # scenes per small batch
STEP = {"A": 128, "B": 32}  # scenes per step
RATE = {"A": (3e-3, 1.5e-3), "B": (3e-3, 1.5e-3)}  # Muon, Adam
TILED = {"micro": 2, "step": 16}  # those of stage B with the many rows of a 1.6
TOWER_RATE = {"1.5": 0.5, "1.6": 0.2}  # of Muon's rate, in stage B


# --- training ---------------------------------------------------------------------------------------------


def add(into: Counts, more: Counts) -> None:
    for name, (good, total) in more.items():
        into.setdefault(name, [0, 0])
        into[name][0] += good
        into[name][1] += total


def table(counts: Counts) -> str:
    return " ".join(f"{name} {100 * good / max(1, total):.1f}" for name, (good, total) in counts.items())


@torch.no_grad()
def examine(model: Llava, prompts: Prompts, seed: int, count: int, variant: str) -> Counts:
    """Right/total by kind on the scenes of `evaluate --seed`, and for a 1.6 on posters ("P ...")."""
    tiled = variant == "1.6"
    counts: Counts = {}

    def grade(samples: list[Sample], mark: str) -> None:
        batch = chat_batch(prompts, samples)
        got = chat_counts(batch, chat_forward(model, prompts, batch).logits)
        add(counts, {mark + kind: value for kind, value in got.items()})

    papers = [
        Sample(data.picture(scene, scenes.draw(scene), tiled), [[q] for q in questions])
        for scene, questions in exam(seed, count)
    ]
    for first in range(0, count, 10):
        grade(papers[first : first + 10], "")
    if tiled:
        for scene, questions in posters.exam(seed, count):
            grade([Sample(data.picture(scene, posters.draw(scene), True), [[q] for q in questions])], "P ")
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


HARD = ("P color of word", "P place of word")  # slow to learn: by their weight they would crowd out the rest
PRACTISED = (*scenes.KINDS[1:], *("P " + kind for kind in posters.KINDS[1:]))  # all but "describe"


def chat_weights(last: Counts) -> list[float]:
    """More questions of the kinds that are still wrong; in the order of PRACTISED."""
    rates = [last[k][0] / max(1, last[k][1]) if k in last else 0.0 for k in PRACTISED]
    return [
        (0.2 + 3 * (1 - rate)) * (0.3 if k in HARD else 1) for k, rate in zip(PRACTISED, rates, strict=True)
    ]


def samples_1_6(rng: random.Random, square: dict[str, float], poster: dict[str, float]) -> list[Sample]:
    """A small batch of pictures of one format, so that little is padding."""
    roll = rng.random()
    if roll < 0.25:
        pixels = 112 if roll < 0.12 else 336 if roll < 0.21 else rng.randint(120, 340)
        return [data.practice(rng, square, pixels, True) for _ in range(TILED["micro"])]
    shape = rng.choices(anyres.PINPOINTS, (7, 7, 4, 2, 2))[0]
    return [data.poster_practice(rng, poster, shape) for _ in range(TILED["micro"])]


def worker(
    rank: int, world: int, model: Llava, grads: list[Tensor], shared, options: argparse.Namespace
) -> None:
    torch.set_num_threads(1)
    tiled = options.variant == "1.6"
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
            rate = (
                options.peak
                * min(1.0, (state["stage_step"] + 1) / 60)
                * (floor + (1 - floor) * min(1.0, 1.25 * (1 - done)))
            )
            shared.info[0], shared.info[1], shared.info[2] = float(stage == "B"), rate, total
            shared.info[3] = float(done >= 1 and stage == "B")
            shared.info[4] = float(now - last_save > 300 or (done >= 1 and stage == "B"))
            shared.info[5] = state["stage_step"]
            shared.counter.value = 0
            if stage == "B":
                shared.info[8 : 8 + len(PRACTISED)] = torch.tensor(chat_weights(last_exam))
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
        weights = dict(zip(PRACTISED, shared.info[8:].tolist(), strict=False))
        square = {kind: weights[kind] for kind in scenes.KINDS[1:]}
        poster = {kind: weights["P " + kind] for kind in posters.KINDS[1:]}
        grads[rank].zero_()
        n_step = TILED["step"] if tiled else STEP[stage]
        n_micro = n_step // (TILED["micro"] if tiled else MICRO[stage])
        while True:
            with shared.counter.get_lock():
                index = shared.counter.value
                shared.counter.value += 1
            if index >= n_micro:
                break
            rng = random.Random((state["step"] * 1000 + index) * 7919 + options.seed)
            if stage == "A":
                drawn = [scenes.busy_scene(rng) for _ in range(MICRO["A"])]
                pictures = [data.picture(one, scenes.draw(one, 2 * scenes.SIDE), False) for one in drawn]
                batch = data.collate(pictures)
                with torch.autocast("cpu", torch.bfloat16):
                    features = model.tower(batch.views)
                loss, more = data.dense_loss(model.aux(features.float()), HEADS, batch.labels, data.WEIGHT)
                sums[1] += float(loss)
            else:
                samples = (
                    samples_1_6(rng, square, poster)
                    if tiled
                    else [data.practice(rng, square) for _ in range(MICRO["B"])]
                )
                batch = chat_batch(prompts, samples)
                with torch.autocast("cpu", torch.bfloat16):
                    seen = chat_forward(model, prompts, batch, options.freeze_tower)
                extra, more = data.dense_loss(
                    model.aux(seen.features.float()), HEADS, batch.pictures.labels, data.WEIGHT
                )
                if options.freeze_tower:
                    extra = extra.detach()
                if tiled:
                    rows, found = data.dense_loss(
                        model.aux_rows(seen.image.float()), ROW_HEADS, batch.pictures.row_labels, data.WEIGHT
                    )
                    extra = extra + options.rows_weight * rows
                    more |= {"row " + name: value for name, value in found.items()}
                weight = batch.weight[batch.want >= 0]
                answer = (
                    F.cross_entropy(seen.logits.float(), seen.want, reduction="none") * weight
                ).sum() / weight.sum()
                loss = answer + 0.5 * extra
                sums[0] += float(answer)
                sums[1] += float(extra)
                shown = ("kind", "color", "word", "place", "same kind", "same color", "row place", "row word")
                more = {name: more[name] for name in shown if name in more}
                marks = "P " if samples[0].poster else "Q "
                add(more, {marks + k: v for k, v in chat_counts(batch, seen.logits.detach()).items()})
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
        frozen = options.freeze_tower
        sees = {n for n in mine if n.startswith(("tower.", "aux."))}
        idle = mine.keys() - sees if stage == "A" else sees if frozen else set()
        kept = {n: mine[n].grad for n in idle}
        for name in kept:
            params[name].grad = None
        for group, factor in zip(
            muon.param_groups, (1.0 if stage == "A" else TOWER_RATE[options.variant], 1.0), strict=True
        ):
            group["lr"] = RATE[stage][0] * rate * factor
        for group in adam.param_groups:
            group["lr"] = RATE[stage][1] * rate
        muon.step()
        adam.step()
        for name, gradient in kept.items():
            params[name].grad = gradient
        state["step"] += 1
        state["stage_step"] += 1
        if rank == 0 and state["step"] % options.report == 0:
            seconds = time.time() - clock
            print(
                f"{total / 60:6.1f} min {stage} step {state['stage_step']} rate {rate:.3f} "
                f"{options.report * n_step / seconds:.1f} scenes/s "
                f"answer {sums[0] / sums[2]:.3f} dense {sums[1] / sums[2]:.3f} "
                f"norm {math.sqrt(sum(shared.norms)):.2f} | {table(counts)}",
                flush=True,
            )
            counts, sums, clock = {}, [0.0, 0.0, 0], time.time()
        shared.barrier.wait()
        if stage == "B" and rank == 0 and time.time() - last_exam_time > options.exam_every:
            last_exam = examine(model, prompts, 1000, options.exam, options.variant)
            last_exam_time = time.time()
            print(
                f"{total / 60:6.1f} min exam ({options.exam} unseen scenes): {table(last_exam)}", flush=True
            )


class Shared:
    def __init__(self, world: int) -> None:
        context = mp.get_context("spawn")
        self.barrier = context.Barrier(world)
        self.counter = context.Value("i", 0)
        self.info = torch.zeros(8 + len(PRACTISED), dtype=torch.float64).share_memory_()
        self.norms = torch.zeros(world, dtype=torch.float64).share_memory_()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=110, help="length of the whole training")
    parser.add_argument("--stage-a", type=float, default=27, help="minutes of stage A")
    parser.add_argument("--deadline", type=float, default=0, help="Unix time to end at, instead of --minutes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variant", choices=("1.5", "1.6"), default="1.5")
    parser.add_argument("--start", type=Path, help="the --out of the 1.5 that a 1.6 starts from")
    parser.add_argument("--peak", type=float, default=1.0, help="factor of the learning rate")
    parser.add_argument("--exam", type=int, default=100, help="unseen scenes to try now and then")
    parser.add_argument("--freeze-tower", action="store_true", help="the vision tower learns no more")
    parser.add_argument(
        "--rows-weight", type=float, default=1.0, help="of the dense loss on the image's rows"
    )
    parser.add_argument("--report", type=int, default=50, help="steps between lines of the log")
    parser.add_argument("--exam-every", type=float, default=420, help="seconds")
    parser.add_argument("--last-exam", type=int, default=500)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.start and not (options.out / "tokenizer.model").exists():
        shutil.copyfile(options.start / "tokenizer.model", options.out / "tokenizer.model")
    if not (options.out / "tokenizer.model").exists():
        tokenizer.train(options.out / "tokenizer.model")
    torch.manual_seed(options.seed)
    tiled = options.variant == "1.6"
    model = Llava(aux=sum(HEADS.values()), aux_rows=sum(ROW_HEADS.values()) if tiled else 0)
    if options.start:
        missing = model.load_state_dict(torch.load(options.start / "model.pt"), strict=False)
        print("new:", *missing.missing_keys, flush=True)
    if (options.out / "model.pt").exists():
        model.load_state_dict(torch.load(options.out / "model.pt"))
    model.share_memory()
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f} M parameters", flush=True)
    grads = [torch.zeros(size).share_memory_() for _ in range(options.processes)]
    shared = Shared(options.processes)
    mp.spawn(worker, (options.processes, model, grads, shared, options), nprocs=options.processes)
    prompts = Prompts(options.out / "tokenizer.model")
    print(
        f"final exam ({options.last_exam} unseen scenes):",
        table(examine(model, prompts, 2000, options.last_exam, options.variant)),
        flush=True,
    )


if __name__ == "__main__":
    main()
