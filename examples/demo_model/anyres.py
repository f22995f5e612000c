"""LLaVA-1.6's tiles: where the picture lies on them, and in what order the language model sees their patches.

pyllava.images cuts them. This is the merge in NumPy, for training, and as the second opinion on the one in C.
"""

from __future__ import annotations

import math

import numpy as np

SIDE, GRID = 112, 8  # pixels and patches of a view's side
PINPOINTS = ((112, 224), (224, 112), (224, 224), (336, 112), (112, 336))
Size = tuple[int, int]  # width and height


def fit(size: Size, box: Size) -> Size:
    """The size of the picture inside `box`."""
    (width, height), (w, h) = size, box
    scale_w, scale_h = w / width, h / height
    if scale_w < scale_h:
        return w, min(math.ceil(height * scale_w), h)
    return min(math.ceil(width * scale_h), w), h


def to_grid(values: np.ndarray, grid: Size) -> np.ndarray:
    """[tiles * GRID * GRID] in the order of the tiles -> [rows, columns] of the whole picture."""
    columns, rows = grid
    parts = values.reshape(rows, columns, GRID, GRID).transpose(0, 2, 1, 3)
    return parts.reshape(rows * GRID, columns * GRID)


def to_tiles(values: np.ndarray, grid: Size) -> np.ndarray:
    """The inverse of to_grid."""
    columns, rows = grid
    return values.reshape(rows, GRID, columns, GRID).transpose(0, 2, 1, 3).reshape(-1)


def merge(size: Size, grid: Size) -> np.ndarray:
    """For every row that the language model sees the index of its patch in the views; -1: the newline."""
    n_patch = GRID * GRID
    order = to_grid(np.arange(n_patch, n_patch * (1 + grid[0] * grid[1])), grid)
    (width, height), (rows, columns) = size, order.shape
    if width / height > columns / rows:
        kept = int(round(height * (columns / width), 7))
        cut = (rows - kept) // 2
        order = order[cut : rows - cut]
    else:
        kept = int(round(width * (rows / height), 7))
        cut = (columns - kept) // 2
        order = order[:, cut : columns - cut]
    lines = np.pad(order, ((0, 0), (0, 1)), constant_values=-1)
    return np.concatenate([np.arange(n_patch), lines.reshape(-1)])
