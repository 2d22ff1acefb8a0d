"""Pictures made of coloured rectangles: one image, or many small ones side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Ticks = tuple[Sequence[float] | np.ndarray, Sequence[str]]  # places, and what is written there
GAP = 0.06  # inches between two tiles


@dataclass(frozen=True)
class Image:
    """Values as the colours of rectangles, from the top down, between `low` and `high`; NaN is left blank.

    Attributes:
        x: (A + 1,) the rectangles' edges, in inches of the printed picture.
        y: (B + 1,) the same, downwards.
        z: (B, A) the values.
        low: The value of the scale's first colour.
        high: That of its last one.
        colours: Matplotlib's name of the scale.
        x_ticks: What is written below.
        y_ticks: What is written on the left.
        bar: What the colours mean, beside a colour bar; empty where there is to be none.
    """

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    low: float
    high: float
    colours: str
    x_ticks: Ticks = ((), ())
    y_ticks: Ticks = ((), ())
    bar: str = ""


def mosaic(tiles: np.ndarray, side: float, left: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges x from `left`, edges y, and values of tiles (rows, columns, height, width), `side` inches long."""
    rows, columns, height, width = tiles.shape
    pixel = side / max(height, width)
    z = np.full((rows, columns, height + 1, width + 1), np.nan)
    z[:, :, :height, :width] = tiles
    flat = z.transpose(0, 2, 1, 3).reshape(rows * (height + 1), columns * (width + 1))
    return left + _edges(columns, width, pixel), _edges(rows, height, pixel), flat[:-1, :-1]


def centres(edges: np.ndarray, count: int) -> np.ndarray:
    """The middles of `count` tiles between such edges."""
    step = (edges[-1] - edges[0] + GAP) / count
    return edges[0] + step * np.arange(count) + (step - GAP) / 2


def _edges(count: int, length: int, pixel: float) -> np.ndarray:
    starts = (length * pixel + GAP) * np.arange(count)
    return (starts[:, None] + pixel * np.arange(length + 1)).ravel()
