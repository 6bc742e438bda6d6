"""Resizes pictures until they cover a size, and keeps the middle."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipeline.images.exif import orientation

Sides = tuple[int, int]  # height, width
TURNED = range(5, 9)  # EXIF: the picture is stored turned on its side


class Fitted(NamedTuple):
    """A picture brought to its size: pixels (h, w, 3), the (H, W) it was resized to, and the (top, left) cut off."""

    pixels: np.ndarray
    resized: Sides
    offset: Sides


def fitted(pixels: np.ndarray, sides: Sides) -> Fitted:
    """Resize (Lanczos) until it covers `sides`, and keep the middle. Only the middle is resized: a whole narrow picture
    could take all memory. A picture that already has that size stays as it is."""
    if pixels.shape[:2] == sides:
        return Fitted(pixels, sides, (0, 0))
    scale = max(side / before for side, before in zip(sides, pixels.shape, strict=False))
    resized = tuple(max(side, round(before * scale)) for side, before in zip(sides, pixels.shape, strict=False))
    offset = tuple((whole - side) // 2 for whole, side in zip(resized, sides, strict=True))
    (top, bottom), (left, right) = (
        (first * before / whole, (first + side) * before / whole)
        for first, side, whole, before in zip(offset, sides, resized, pixels.shape, strict=False)
    )
    picture = Image.fromarray(pixels).resize(sides[::-1], Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    return Fitted(np.array(picture), resized, offset)


def upright_sides(image: Image.Image) -> tuple[int, int]:
    """Width and height after the rotation that to_picture makes; only the header is read."""
    width, height = image.size
    return (height, width) if orientation(image) in TURNED else (width, height)
