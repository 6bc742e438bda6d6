"""The size to encode a picture at: one square, or the bucket of nearest aspect ratio; and what is cut off for it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.common.errors import UserError
from data_pipeline.images.resize import Fitted, Sides

AS_STORED = "as stored"


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that pictures are brought to; if empty, they keep their stored size. `split`: one data set per size."""

    sides: tuple[Sides, ...] = ()
    split: bool = False

    def of(self, sides: Sides) -> Sides:
        """The size for a picture of `sides`: nearest in aspect ratio (log scale); of two equally near, the larger."""
        if not self.sides:
            return sides
        aspect = math.log(sides[1] / sides[0])
        return min(self.sides, key=lambda each: (abs(math.log(each[1] / each[0]) - aspect), -each[0] * each[1], each))

    def bucket(self, sides: Sides) -> str:
        """The name of the data set that a size belongs to; "" if there is only one."""
        return f"{sides[0]}x{sides[1]}" if self.split else ""

    @property
    def described(self) -> str:
        return ",".join(f"{height}x{width}" for height, width in self.sides) or AS_STORED


def sizes_of(size: int | None, buckets: str | Sequence[str] | None, step: int, factor: int) -> Sizes:
    """The sizes from the configuration. buckets: null, auto, or names like 512x384; all sides must be multiples of the
    first stage's `factor`."""
    if buckets == "auto":
        if size is None:
            raise UserError("buckets=auto needs size=: the side of the square whose area no bucket exceeds.")
        if step < 1:
            raise UserError(f"bucket_step={step} is not valid: use 1 or more: sides of buckets are multiples of it.")
        sides = automatic(size, math.lcm(step, factor))
        if len(sides) < 2:
            finer = max(factor, size // 4 // factor * factor)
            stage = f" (with the first stage's f={factor})" if factor > 1 else ""
            raise UserError(
                f"buckets=auto: size={size} and bucket_step={step}{stage} leave no bucket but the square: lower "
                f"bucket_step, as bucket_step={finer}, or raise size=."
            )
    elif buckets:
        sides = tuple(sorted({parsed(name) for name in ([buckets] if isinstance(buckets, str) else buckets)}))
    else:
        sides = ((size, size),) if size else ()
    for each in sides:
        if each[0] % factor or each[1] % factor or min(each) < 1:
            raise UserError(
                f"{each[0]}x{each[1]} is no multiple of {factor}, the first stage's f: choose sides that are."
            )
    return Sizes(sides, bool(buckets))


def parsed(name: str) -> Sides:
    """'512x384': height 512, width 384."""
    if not re.fullmatch(r"\d+x\d+", str(name)):
        raise UserError(f"buckets: {name} is no size: write height x width, as 512x384.")
    height, width = str(name).split("x")
    return int(height), int(width)


def automatic(size: int, step: int, widest: float = 2.0) -> tuple[Sides, ...]:
    """For each short side the longest possible other side, in multiples of `step`: with an area of at most size^2 and
    more than half of it, and at most `widest` times the short side."""
    found = {(size // step * step,) * 2} if size >= step else set()
    for short in range(step, size + 1, step):
        long = int(min(size * size / short, widest * short)) // step * step
        if long >= short and 2 * short * long > size * size:
            found |= {(short, long), (long, short)}
    return tuple(sorted(found))


def geometry(meta: Mapping[str, Any], before: Sides, fit: Fitted) -> dict[str, Any]:
    """A sample's json entries on its picture, (height, width) and (top, left) in pixels, as in SDXL's conditioning.

    original_size is that of the source, if whoever made the shards resized it and recorded it, as img2dataset does;
    crop_top_left includes an earlier crop, if make_shards.py recorded it.
    """
    source = meta.get("original_height"), meta.get("original_width")
    original = source if all(isinstance(side, int) and side > 0 for side in source) else before
    return {
        "original_size": list(original),
        "crop_top_left": [
            new + round(old * side / own)
            for new, old, side, own in zip(fit.offset, earlier_crop(meta), fit.resized, before, strict=True)
        ],
        "target_size": list(fit.pixels.shape[:2]),
        **{name: moved(meta[name], fit) for name in ("boxes", "hole") if name in meta and cut(fit)},
    }


def earlier_crop(meta: Mapping[str, Any]) -> tuple[float, float]:
    """The (top, left) that was cut off before, as the json records it; (0, 0) if it does not."""
    found = meta.get("crop_top_left")
    ok = isinstance(found, list) and len(found) == 2 and all(type(v) in (int, float) and v >= 0 for v in found)
    return (found[0], found[1]) if ok else (0, 0)


def cut(fit: Fitted) -> bool:
    return fit.resized != fit.pixels.shape[:2]


def moved(boxes: Any, fit: Fitted) -> Any:
    """Boxes (or one box) in fractions of the whole picture, as fractions of what is kept; boxes outside are left out.

    Anything that is not a box stays as it is, for its condition to refuse.
    """
    try:
        if not isinstance(boxes[0], list):
            return moved_box(boxes, fit)
        inside = [[name, *box] for name, *place in boxes if (box := moved_box(place, fit))]
    except (TypeError, ValueError, IndexError, KeyError):
        return boxes
    return inside


def moved_box(box: Sequence[float], fit: Fitted) -> list[float] | None:
    """x0 y0 x1 y1 after the cut; None where nothing is left of it."""
    (height, width), (top, left) = fit.pixels.shape[:2], fit.offset
    x0, x1 = (min(max((x * fit.resized[1] - left) / width, 0.0), 1.0) for x in (box[0], box[2]))
    y0, y1 = (min(max((y * fit.resized[0] - top) / height, 0.0), 1.0) for y in (box[1], box[3]))
    return [x0, y0, x1, y1] if x0 < x1 and y0 < y1 else None
