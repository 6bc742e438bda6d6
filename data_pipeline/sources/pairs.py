"""Two pictures of another source side by side on white, with known boxes: data for layout-to-image."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from data_pipeline.common.errors import UserError
from data_pipeline.images.decode import Picture
from data_pipeline.images.framing import Framing
from data_pipeline.sources.source import Source, SourceItem


class Pairs:
    """`count` pairs drawn from another source's items by `seed`; each picture in its own box, left and right.

    json: "boxes": [[name, x0, y0, x1, y1], ...] in fractions; name is the item's caption; caption: "a and b".
    """

    def __init__(self, of: Source, count: int = 2000, seed: int = 0, limit: int | None = None) -> None:
        self.of, self.count, self.seed = of, count if limit is None else min(count, limit), seed

    def items(self) -> list[SourceItem]:
        items = [item for item in self.of.items() if item.caption]
        if len(items) < 2:
            raise UserError(f"source=openmoji_pairs needs two things to draw, not {len(items)}: raise source.of.limit.")
        return [self._pair(items, number) for number in range(self.count)]

    def _pair(self, items: Sequence[SourceItem], number: int) -> SourceItem:
        random = np.random.default_rng([self.seed, number])
        two = [items[i] for i in random.choice(len(items), 2, replace=False)]
        # Eighths of the picture, so that boxes end on whole latents of f = 8 at 64 pixels: sides of 3 or 4 eighths.
        boxes = []
        for item, half in zip(two, (0, 4), strict=True):
            side = int(random.integers(3, 5))
            x, y = half + int(random.integers(0, 5 - side)), int(random.integers(0, 9 - side))
            boxes.append([item.caption, x / 8, y / 8, (x + side) / 8, (y + side) / 8])
        meta = {"boxes": boxes, "parts": [item.key for item in two]}
        return SourceItem(f"{number:06d}", functools.partial(load, two, boxes), " and ".join(b[0] for b in boxes), meta)


def load(items: Sequence[SourceItem], boxes: Sequence[Sequence], framing: Framing) -> Picture:
    """Each item drawn at the size of its box, on white."""
    size = framing.size
    picture = np.full((size, size, 3), 255, np.uint8)
    for item, (_, x0, y0, x1, _) in zip(items, boxes, strict=True):
        side, left, top = round((x1 - x0) * size), round(x0 * size), round(y0 * size)
        picture[top : top + side, left : left + side] = item.load(Framing(side)).pixels
    return Picture(picture)
