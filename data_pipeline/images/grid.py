"""A grid of pictures with their captions, for a person to look at."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# matplotlib need not be imported for this; it brings a font with more than ASCII.
FONT = str(Path(importlib.util.find_spec("matplotlib").origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf")


def grid(
    images: Sequence[np.ndarray],
    labels: Sequence[str] | None = None,
    columns: int = 8,
    scale: int = 1,
    gap: int = 8,
    narrowest: int = 0,
) -> Image.Image:
    """(H, W, 3) uint8 pictures in rows, each with its label under it in as many lines as needed; cells are as large as
    the largest picture and at least `narrowest` pixels wide, with smaller pictures centred."""
    height = max(image.shape[0] for image in images) * scale
    width = max(narrowest, *(image.shape[1] * scale for image in images))
    font = ImageFont.truetype(FONT, 10)
    lines = [textwrap.wrap(label, max(width // 6, 8))[:4] for label in labels] if labels else [[]] * len(images)
    text_height = 13 * max(map(len, lines), default=0)
    rows = -(-len(images) // columns)
    cell_w, cell_h = width + gap, height + text_height + gap
    sheet = Image.new("RGB", (columns * cell_w + gap, rows * cell_h + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, lines, strict=True)):
        x, y = gap + (i % columns) * cell_w, gap + (i // columns) * cell_h
        picture = Image.fromarray(image)
        if scale > 1:
            picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        sheet.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
        for row, line in enumerate(text):
            draw.text((x + width / 2, y + height + 1 + 13 * row), line, fill="black", font=font, anchor="ma")
    return sheet


def save_png(image: Image.Image, path: Path) -> Path:
    """Save under a temporary name first, so that nobody sees an incomplete picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    image.save(temporary, format="PNG", optimize=True)
    temporary.replace(path)
    return path
