"""Training batches: pictures as the model sees them, what every patch shows, and chats as token ids."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from pyllava.views import ImageSpec, preprocess

from . import anyres, posters, scenes, tokenizer
from .model import MEAN, STD, Llava

PAD = ImageSpec(scenes.SIDE, MEAN, STD, "pad")  # LLaVA-1.5
TILES = ImageSpec(scenes.SIDE, MEAN, STD, "anyres", anyres.PINPOINTS)  # LLaVA-1.6

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
ROW_HEADS = {
    "place": len(scenes.PLACES),
    "word": len(WORD_ID),
}  # what the language model makes of a tile's patch
WHOLE = ("size", "place", "same kind", "same color")  # what only the whole picture shows, not a tile
Counts = dict[str, list[int]]  # right and total by kind
Labels = dict[str, np.ndarray]


# --- pictures ---------------------------------------------------------------------------------------------


def number_mask(scene: scenes.Scene) -> Image.Image:
    """At every pixel the number of the item there, from 1, shapes first; 0 is the background."""
    mask = Image.new("L", scene.size)
    canvas = ImageDraw.Draw(mask)
    for number, item in enumerate([*scene.shapes, *scene.words], 1):
        if isinstance(item, scenes.Shape):
            scenes.draw_shape(canvas, item, number, 1.0)
        else:
            canvas.rectangle(item.box, fill=number)
    return mask


@dataclass(frozen=True)
class Frame:
    """Where the scene lies on a canvas of whole patches."""

    size: tuple[int, int]  # canvas
    scaled: tuple[int, int]  # scene on it, in the middle

    @property
    def corner(self) -> tuple[int, int]:
        return (self.size[0] - self.scaled[0]) // 2, (self.size[1] - self.scaled[1]) // 2


def patch_labels(scene: scenes.Scene, frame: Frame) -> Labels:
    """What every patch of the canvas shows; -1 where it does not apply. Each [rows, columns]."""
    items = [*scene.shapes, *scene.words]
    (width, height), (left, top) = frame.size, frame.corner
    scale_x, scale_y = (a / b for a, b in zip(frame.scaled, scene.size, strict=True))
    mask = Image.new("L", frame.size, 255)
    mask.paste(number_mask(scene).resize(frame.scaled, Image.Resampling.NEAREST), (left, top))
    shape = rows, columns = height // PATCH, width // PATCH
    patches = np.asarray(mask).reshape(rows, PATCH, columns, PATCH).transpose(0, 2, 1, 3).reshape(*shape, -1)
    areas = np.stack([(patches == number).sum(-1) for number in range(1, len(items) + 1)])
    owner, area = areas.argmax(0), areas.max(0)
    out = {name: np.full(shape, -1, np.int64) for name in HEADS}
    out["background"][(patches != 255).any(-1)] = COLOR_ID[scene.background]
    out["kind"][area == 0] = 0
    for number, item in enumerate(items):
        mine = (owner == number) & (area >= 14)
        out["color"][mine] = COLOR_ID[item.color]
        out["place"][mine] = list(scenes.PLACES).index(scenes.cell(item, scene.size))
        if isinstance(item, scenes.Shape):
            out["kind"][mine] = SHAPE_ID[item.kind]
            out["size"][mine] = scenes.SIZES.index(item.size)
            out["same kind"][mine] = min(4, sum(s.kind == item.kind for s in scene.shapes))
            out["same color"][mine] = min(4, sum(s.color == item.color for s in scene.shapes))
        else:
            out["kind"][mine] = KIND_WORD
            if item.points / 3 * scale_y > 12 and 0.7 < scale_x / scale_y < 1.4:  # not too small to read
                out["word"][mine] = WORD_ID[item.text]
                edges = [left + x * scale_x for x in item.letter_edges()]
                ends = top + item.box[1] * scale_y, top + item.box[3] * scale_y
                _letters(out, item.text, edges, ends, mine)
    return out


def _letters(out: Labels, text: str, edges: list[float], ends: tuple[float, float], mine: np.ndarray) -> None:
    """The letters in the halves of the patches of one word."""
    rows, columns = mine.shape
    top, bottom = ends
    inside = [
        row
        for row in range(max(0, int(top // PATCH)), min(rows, int(bottom // PATCH) + 1))
        if min(bottom, row * PATCH + PATCH) - max(top, row * PATCH) > 0.3 * (bottom - top)
    ]
    for half, name in enumerate(("letter left", "letter right")):
        for column in range(max(0, int(edges[0] // PATCH) - 1), min(columns, int(edges[-1] // PATCH) + 2)):
            x = column * PATCH + (half + 0.5) * PATCH / 2
            found = [ord(c) - 96 for c, a, b in zip(text, edges, edges[1:], strict=False) if a <= x < b]
            for row in inside:
                if mine[row, column]:
                    out[name][row, column] = found[0] if found else 0


def tile_labels(scene: scenes.Scene, frame: Frame, grid: anyres.Size) -> tuple[Labels, Labels]:
    """Labels for the tower, which sees one tile, and for the language model, which sees all; [tiles * 64]."""
    whole = patch_labels(scene, frame)
    seen = {name: anyres.to_tiles(whole[name], grid) for name in HEADS}
    rows = {name: seen[name].copy() for name in ROW_HEADS}
    for name in WHOLE:
        seen[name][:] = -1
    # a word that lies on several tiles is not to be read in one
    (left, top), scale = frame.corner, frame.scaled[0] / scene.size[0]
    for word in scene.words:
        box = [side * scale + offset for side, offset in zip(word.box, (left, top) * 2, strict=True)]
        first, last = ((box[n] // scenes.SIDE, box[n + 1] // scenes.SIDE) for n in (0, 2))
        if first != last:
            seen["word"][seen["word"] == WORD_ID[word.text]] = -1
    return seen, rows


@dataclass
class Picture:
    views: np.ndarray  # [views, 3, 112, 112]
    labels: Labels  # [views * 64]
    row_labels: Labels  # [views * 64], those of ROW_HEADS
    rows: np.ndarray  # which patch of the views the language model sees at each of its rows; -1: newline


def picture(scene: scenes.Scene, image: Image.Image, tiled: bool) -> Picture:
    views = preprocess(image, TILES if tiled else PAD)
    labels = {k: v.reshape(-1) for k, v in patch_labels(scene, Frame(scenes.SQUARE, scenes.SQUARE)).items()}
    blank = {name: np.full(GRID * GRID, -1, np.int64) for name in ROW_HEADS}
    if not tiled:
        return Picture(views.pixels, labels, blank, np.arange(GRID * GRID))
    canvas = views.grid[0] * scenes.SIDE, views.grid[1] * scenes.SIDE
    more, rows = tile_labels(scene, Frame(canvas, anyres.fit(image.size, canvas)), views.grid)
    return Picture(
        views.pixels,
        {name: np.concatenate([labels[name], more[name]]) for name in HEADS},
        {name: np.concatenate([blank[name], rows[name]]) for name in ROW_HEADS},
        anyres.merge(image.size, views.grid),
    )


@dataclass
class Pictures:
    views: Tensor  # [all views, 3, 112, 112]
    labels: dict[str, Tensor]  # [all views, 64]
    rows: Tensor  # [pictures, rows] index into all patches; n: the newline; n + 1: padding (n: all patches)
    row_labels: dict[str, Tensor]  # [pictures, rows]


def collate(pictures: list[Picture]) -> Pictures:
    views = torch.from_numpy(np.concatenate([p.views for p in pictures]))
    n_patch = len(views) * GRID * GRID
    n_rows = max(len(p.rows) for p in pictures)
    rows = np.full((len(pictures), n_rows), n_patch + 1)
    row_labels = {name: np.full(rows.shape, -1) for name in ROW_HEADS}
    start = 0
    for number, one in enumerate(pictures):
        here, patch = slice(len(one.rows)), one.rows >= 0
        rows[number, here] = np.where(patch, one.rows + start, n_patch)
        for name in ROW_HEADS:
            row_labels[name][number, here] = np.where(patch, one.row_labels[name][one.rows], -1)
        start += len(one.views) * GRID * GRID
    labels = {k: np.concatenate([p.labels[k] for p in pictures]).reshape(len(views), -1) for k in HEADS}
    return Pictures(
        views,
        {name: torch.from_numpy(value) for name, value in labels.items()},
        torch.from_numpy(rows),
        {name: torch.from_numpy(value) for name, value in row_labels.items()},
    )


def dense_loss(
    logits: Tensor, sizes: dict[str, int], labels: dict[str, Tensor], weight: dict[str, float]
) -> tuple[Tensor, Counts]:
    """What every patch says of itself: the loss, and right/total of every head."""
    total, counts = torch.zeros(()), {}
    for name, got in zip(sizes, logits.split(list(sizes.values()), -1), strict=True):
        want = labels[name]
        known = want >= 0
        if known.any():  # a batch may have no word
            total = total + weight[name] * F.cross_entropy(got[known], want[known])
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


@dataclass
class Sample:
    picture: Picture
    chats: Turns
    poster: bool = False


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


def practice(
    rng: random.Random, weights: dict[str, float], pixels: int = 3 * scenes.SIDE, tiled: bool = False
) -> Sample:
    """A square scene and five chats about it (ten of a tiled one), some of two turns."""
    scene = scenes.random_scene(rng, 0.7)
    count = 10 if tiled else 5  # the more rows a picture has, the more questions it should answer for
    kinds = ["describe"] * (rng.random() < 0.5) + rng.choices(
        list(weights), list(weights.values()), k=2 * count - 2
    )
    asked = [q for q in (scenes.ask(scene, kind, rng) for kind in kinds) if q is not None][: count + 2]
    chats = [[q] for q in asked[:count]]
    for chat, question in zip(chats, asked[count:], strict=False):
        chat.append(question)
    return Sample(picture(scene, scenes.draw(scene, pixels), tiled), varied(chats, rng))


def poster_practice(rng: random.Random, weights: dict[str, float], shape: scenes.Size) -> Sample:
    """A poster and some fourteen chats about it: every word is asked for, and other things."""
    scene = posters.random_poster(rng, shape)
    chats = [[posters.word_question(scene, word, rng)] for word in scene.words]
    kinds = ["describe"] * (rng.random() < 0.4) + rng.choices(list(weights), list(weights.values()), k=24)
    asked = [q for q in (posters.ask(scene, kind, rng) for kind in kinds) if q is not None]
    chats += [[q] for q in asked[:11]]
    for chat, question in zip(chats, asked[11:13], strict=False):
        chat.append(question)
    return Sample(picture(scene, posters.draw(scene), True), varied(chats, rng), True)


def varied(chats: Turns, rng: random.Random) -> Turns:
    return [[scenes.Question(q.kind, vary(q.text, rng), q.answer) for q in chat] for chat in chats]


@dataclass
class Batch:
    pictures: Pictures
    ids: Tensor  # [batch, tokens] after the image
    want: Tensor  # [batch, tokens]
    weight: Tensor  # [batch, tokens] in the loss, so that a long answer does not drown the short ones
    branch: Tensor  # [batch, tokens], 1.. ; 0 is padding
    positions: Tensor  # [batch, tokens] counted from the first token after the image
    kinds: list[list[str]]  # kind of every branch's first question


def chat_batch(prompts: Prompts, samples: list[Sample]) -> Batch:
    rows = [[prompts.branch([(q.text, q.answer) for q in chat]) for chat in s.chats] for s in samples]
    kinds = [[chat[0].kind for chat in s.chats] for s in samples]
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
    return Batch(collate([s.picture for s in samples]), ids, want, weight, branch, positions, kinds)


def image_rows(model: Llava, features: Tensor, rows: Tensor) -> Tensor:
    """What the language model gets for the pictures: [pictures, rows, width]."""
    patches = model.projector(features).flatten(0, 1).float()
    extra = torch.zeros(2, patches.shape[1])
    if model.image_newline is not None:
        extra = torch.stack([model.image_newline, extra[1]])
    return torch.cat([patches, extra])[rows]


@dataclass
class Seen:
    features: Tensor  # of the tower, [views, 64, width]
    image: Tensor  # states of the language model at the rows of the image
    logits: Tensor  # [answers, vocab]
    want: Tensor  # [answers]


def chat_forward(model: Llava, prompts: Prompts, batch: Batch, frozen_tower: bool = False) -> Seen:
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen_tower):
        features = model.tower(batch.pictures.views)
    image = image_rows(model, features, batch.pictures.rows)
    count, n_rows = image.shape[:2]
    padding = batch.pictures.rows == len(features) * features.shape[1] + 1
    lengths = n_rows - padding.sum(1, keepdim=True)
    system = torch.tensor([prompts.system])
    start = system.shape[1]
    _, past = model.model(model.model.embed_tokens(system), torch.arange(start)[None])
    x = torch.cat([image, model.model.embed_tokens(batch.ids)], 1)
    positions = torch.cat([torch.arange(n_rows).expand(count, -1), batch.positions + lengths], 1) + start
    group = torch.cat([torch.zeros(count, n_rows, dtype=torch.long), batch.branch], 1)
    order = torch.arange(x.shape[1])
    group_key = group.clone()
    group_key[:, n_rows:][batch.branch == 0] = -1  # nobody looks at padding
    group_key[:, :n_rows][padding] = -1
    seen = (group_key[:, None] == 0) | (group_key[:, None] == group[..., None])
    seen = seen & (order[None, :] <= order[:, None])
    mask = F.pad(torch.where(seen, 0.0, -1e4), (start, 0))[:, None]
    states, _ = model.model(x, positions, mask, past)
    answers = batch.want >= 0
    logits = model.lm_head(states[:, n_rows:][answers])
    return Seen(features, states[:, :n_rows], logits, batch.want[answers])


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
