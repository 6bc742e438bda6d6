"""Distances between pictures, and recall of training captions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RECALL_PIXELS = 16


def thumbnails(images: np.ndarray, size: int = RECALL_PIXELS) -> np.ndarray:
    """Box-averages pictures: (N, H, W, 3) uint8 -> (N, size*size*3) float."""
    n, h, w, c = images.shape
    boxes = images.reshape(n, size, h // size, size, w // size, c).astype(np.float32)
    return boxes.mean((2, 4)).reshape(n, -1)


class Recall(NamedTuple):
    """Fractions of drawn pictures whose right real picture is the nearest, or among the five nearest."""

    top1: float
    top5: float


def training_recall(drawn: np.ndarray, real: np.ndarray, right: np.ndarray) -> Recall:
    """How often the nearest training picture is that of the caption: recall of training captions, not generalisation.

    drawn (N, H, W, 3) and real (M, H, W, 3) uint8; right (N,) indices into real. Distance: mean squared error between
    pictures box-averaged to 16x16 pixels. Ties with the right picture count as correct.
    """
    distances = thumbnail_mse(drawn, real)
    own = distances[np.arange(len(drawn)), right]
    nearer = (distances < own[:, None]).sum(1)
    return Recall(float((nearer < 1).mean()), float((nearer < 5).mean()))


def nearest(drawn: np.ndarray, real: np.ndarray) -> np.ndarray:
    """The nearest real picture of each drawn one, by the distance of `training_recall`: (N,) indices."""
    return thumbnail_mse(drawn, real).argmin(1)


def thumbnail_mse(drawn: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Mean squared error between pictures box-averaged to 16x16 pixels: (N, M)."""
    return squared_distances(thumbnails(drawn), thumbnails(real))


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared difference between each row of a (N, D) and each row of b (M, D): (N, M), summed in float64."""
    return np.stack([np.square(row - b).mean(1, dtype=np.float64) for row in a])
