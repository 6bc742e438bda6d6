"""How make_shards brings a picture to its size: a square, or the bucket of nearest aspect ratio."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from data_pipeline.common.errors import UserError
from data_pipeline.images.aspect_buckets import Sizes
from data_pipeline.images.decode import Picture, colour_of
from data_pipeline.images.resize import Sides, fitted

CROP, PAD, STRETCH = RESIZES = ("crop", "pad", "stretch")


@dataclass(frozen=True, slots=True)
class Framing:
    """crop: resize until the picture covers its size, and keep the middle; pad: until it fits, with `background` beside
    it; stretch: to its size, whatever its aspect ratio. Drawings, which have no size, are squares of `size`."""

    size: int
    buckets: Sizes = field(default_factory=Sizes)  # empty: squares
    resize: str = CROP
    background: str = "white"

    def __post_init__(self) -> None:
        if self.resize not in RESIZES:
            raise UserError(f"resize={self.resize} is not valid: use {CROP}, {PAD} or {STRETCH}.")

    @property
    def by_default(self) -> bool:
        """Whether pictures become squares by cropping, as they do where nothing else is asked for."""
        return self.resize == CROP and not self.buckets.sides

    def of(self, sides: Sides) -> Sides:
        """The (height, width) of a picture of `sides`."""
        return self.buckets.of(sides) if self.buckets.sides else (self.size, self.size)

    def applied(self, picture: Picture) -> Picture:
        """The picture at its size, (h, w, 3) uint8."""
        before = picture.pixels.shape[:2]
        after = self.of(before)
        if self.resize == CROP or before == after:
            pixels = fitted(picture.pixels, after).pixels
        elif self.resize == STRETCH:
            pixels = resized(picture.pixels, after)
        else:
            pixels = padded(picture.pixels, after, self.background)
        return picture._replace(pixels=pixels)

    def facts(self, sides: Sides) -> dict[str, int]:
        """What the json says of a picture whose aspect ratio or size was changed: as img2dataset, its own sides, which
        micro-conditioning reads. Nothing by default: shards of earlier versions have the same bytes."""
        return {} if self.by_default else {"original_height": sides[0], "original_width": sides[1]}


def resized(pixels: np.ndarray, sides: Sides) -> np.ndarray:
    """By Lanczos to (height, width), whatever the aspect ratio."""
    return np.array(Image.fromarray(pixels).resize(sides[::-1], Image.Resampling.LANCZOS))


def padded(pixels: np.ndarray, sides: Sides, background: str) -> np.ndarray:
    """The whole picture in the middle of (height, width), with `background` beside it."""
    scale = min(side / before for side, before in zip(sides, pixels.shape, strict=False))
    inner = tuple(min(max(1, round(before * scale)), side) for before, side in zip(pixels.shape, sides, strict=False))
    found = np.empty((*sides, 3), np.uint8)
    found[:] = colour_of(background)
    top, left = ((side - own) // 2 for side, own in zip(sides, inner, strict=True))
    found[top : top + inner[0], left : left + inner[1]] = resized(pixels, inner)
    return found
