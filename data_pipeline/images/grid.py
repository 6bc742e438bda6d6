"""A grid of pictures with their captions, for a person to look at."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# matplotlib need not be imported for this; it brings a font with more than ASCII.
FONT = str(Path(importlib.util.find_spec("matplotlib").origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf")
SIZES = (10, 9, 8, 7)  # font sizes of captions: the first in which the longest word fits is used
LINE, MOST_LINES, ELLIPSIS = 13, 4, "…"


class Label(NamedTuple):
    """A caption's lines, and the font in which they fit."""

    lines: list[str]
    font: ImageFont.FreeTypeFont


def grid(
    images: Sequence[np.ndarray],
    labels: Sequence[str] | None = None,
    columns: int = 8,
    scale: int = 1,
    gap: int = 8,
    narrowest: int = 0,
    title: str = "",
) -> Image.Image:
    """(H, W, 3) uint8 pictures in rows, each with its label below, and the title at the top. Cells are as large as the
    largest picture and at least `narrowest` pixels wide; smaller pictures are centred."""
    height = max(image.shape[0] for image in images) * scale
    width = max(narrowest, *(image.shape[1] * scale for image in images))
    shown = [fitted(label, width + gap - 2) for label in labels] if labels else [Label([], font_of(10))] * len(images)
    rows = -(-len(images) // columns)
    cell_w, cell_h = width + gap, height + LINE * max((len(label.lines) for label in shown), default=0) + gap
    heading = fitted(title, columns * cell_w - gap, most=8)
    top = gap + (LINE * len(heading.lines) + gap // 2 if title else 0)
    sheet = Image.new("RGB", (columns * cell_w + gap, rows * cell_h + top), "white")
    draw = ImageDraw.Draw(sheet)
    write(draw, heading, gap, gap, anchor="la")
    for i, (image, label) in enumerate(zip(images, shown, strict=True)):
        x, y = gap + (i % columns) * cell_w, top + (i // columns) * cell_h
        picture = Image.fromarray(image)
        if scale > 1:
            picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        sheet.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
        write(draw, label, x + width / 2, y + height + 1, anchor="ma")
    return sheet


def write(draw: ImageDraw.ImageDraw, label: Label, x: float, y: float, anchor: str) -> None:
    """Write a label's lines from y downwards. x: their left edge or centre, depending on the anchor."""
    for row, line in enumerate(label.lines):
        draw.text((x, y + LINE * row), line, fill="black", font=label.font, anchor=anchor)


@functools.cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT, size)


def fitted(text: str, width: float, most: int = MOST_LINES) -> Label:
    """The text in at most `most` lines of `width` pixels, in the largest font in which each word fits; the rest is
    replaced by an ellipsis after a whole word."""
    words = text.split()
    fonts = [font_of(size) for size in SIZES]
    font = next((font for font in fonts if all(font.getlength(word) <= width for word in words)), fonts[-1])
    lines = list(wrapped(words, width, font))
    if len(lines) <= most:
        return Label(lines, font)
    kept = lines[most - 1].split()
    while len(kept) > 1 and font.getlength(f"{' '.join(kept)} {ELLIPSIS}") > width:
        kept.pop()
    return Label([*lines[: most - 1], f"{' '.join(kept)} {ELLIPSIS}"], font)


def wrapped(words: Sequence[str], width: float, font: ImageFont.FreeTypeFont) -> Iterator[str]:
    """Lines of whole words; only a word wider than a line is split."""
    line = ""
    for word in words:
        if font.getlength(word) > width:
            while font.getlength(word + ELLIPSIS) > width and len(word) > 1:
                word = word[:-1]
            word += ELLIPSIS
        longer = f"{line} {word}".lstrip()
        if line and font.getlength(longer) > width:
            yield line
            longer = word
        line = longer
    if line:
        yield line


def save_png(image: Image.Image, path: Path) -> Path:
    """Save under a temporary name first, so that nobody sees an incomplete picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    image.save(temporary, format="PNG", optimize=True)
    temporary.replace(path)
    return path
