"""How make_shards resizes a picture: to a square, or to the bucket of nearest aspect ratio."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.common.errors import UserError
from data_pipeline.images.aspect_buckets import Sizes
from data_pipeline.images.decode import Picture, colour_of
from data_pipeline.images.resize import Sides, fitted

CROP, PAD, STRETCH = RESIZES = ("crop", "pad", "stretch")


@dataclass(frozen=True, slots=True)
class Framing:
    """crop: resize until the picture covers its target size, keep the middle; pad: resize until it fits, with
    `background` beside it; stretch: resize whatever its aspect ratio. Drawings, which have no size, become squares of
    `size`."""

    size: int
    buckets: Sizes = field(default_factory=Sizes)  # empty: squares
    resize: str = CROP
    background: str = "white"

    def __post_init__(self) -> None:
        if self.resize not in RESIZES:
            raise UserError(f"resize={self.resize} is not valid: use {CROP}, {PAD} or {STRETCH}.")

    @property
    def by_default(self) -> bool:
        """Whether pictures are cropped to squares, as they are unless something else is asked for."""
        return self.resize == CROP and not self.buckets.sides

    def of(self, sides: Sides) -> Sides:
        """The target (height, width) of a picture with these `sides`."""
        return self.buckets.of(sides) if self.buckets.sides else (self.size, self.size)

    def applied(self, picture: Picture) -> Picture:
        """The resized picture, (h, w, 3) uint8."""
        before, offset = picture.pixels.shape[:2], (0, 0)
        after = self.of(before)
        if self.resize == CROP or before == after:
            pixels, _, offset = fitted(picture.pixels, after)
        elif self.resize == STRETCH:
            pixels = resized(picture.pixels, after)
        else:
            pixels = padded(picture.pixels, after, self.background)
        return picture._replace(pixels=pixels, original=before, offset=offset)

    def facts(self, picture: Picture) -> dict[str, Any]:
        """What the json records of a resized picture, for micro-conditioning: its original sides, as img2dataset, and
        where it was cropped, if it was. Nothing for drawings; nothing by default, so that shards have the same bytes as
        in earlier versions."""
        if self.by_default or picture.original is None:
            return {}
        cropped = {"crop_top_left": list(picture.offset)} if any(picture.offset) else {}
        return {"original_height": picture.original[0], "original_width": picture.original[1], **cropped}


def resized(pixels: np.ndarray, sides: Sides) -> np.ndarray:
    """Resized by Lanczos to (height, width), whatever the aspect ratio."""
    return np.array(Image.fromarray(pixels).resize(sides[::-1], Image.Resampling.LANCZOS))


def padded(pixels: np.ndarray, sides: Sides, background: str) -> np.ndarray:
    """The whole picture in the middle of (height, width), with `background` around it."""
    scale = min(side / before for side, before in zip(sides, pixels.shape, strict=False))
    inner = tuple(min(max(1, round(before * scale)), side) for before, side in zip(pixels.shape, sides, strict=False))
    found = np.empty((*sides, 3), np.uint8)
    found[:] = colour_of(background)
    top, left = ((side - own) // 2 for side, own in zip(sides, inner, strict=True))
    found[top : top + inner[0], left : left + inner[1]] = resized(pixels, inner)
    return found
