"""What a person looks at: grids with captions, curves in the terminal and as plots."""

from __future__ import annotations

import importlib.resources
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BARS = "▁▂▃▄▅▆▇█"
# matplotlib brings a font that knows more than ASCII.
FONT = str(importlib.resources.files("matplotlib") / "mpl-data/fonts/ttf/DejaVuSans.ttf")


def to_uint8(images: np.ndarray) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] -> (N, H, W, 3) of 0..255, rounded."""
    return np.clip(np.round((images.transpose(0, 2, 3, 1) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def grid(
    images: Sequence[np.ndarray], labels: Sequence[str] | None = None, columns: int = 8, scale: int = 1, gap: int = 8
) -> Image.Image:
    """(H, W, 3) uint8 pictures in rows, each with its label under it in as many lines as it takes."""
    height, width = (side * scale for side in images[0].shape[:2])
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
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST) if scale > 1 else picture, (x, y))
        for row, line in enumerate(text):
            draw.text((x + width / 2, y + height + 1 + 13 * row), line, fill="black", font=font, anchor="ma")
    return sheet


def save_png(image: Image.Image, path: Path) -> Path:
    """Under a temporary name first, so that no half picture is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    image.save(temporary, format="PNG", optimize=True)
    temporary.replace(path)
    return path


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A line of bars from the lowest (▁) to the highest (█) value, at most `width` of them, each a mean."""
    if not values:
        return ""
    means = [float(np.mean(part)) for part in np.array_split(np.asarray(values, float), min(width, len(values)))]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in means)


def curve_line(name: str, rows: Sequence[Mapping[str, float]], key: str) -> str:
    """`name ▁▂▃ first -> last`, from metrics rows."""
    values = [row[key] for row in rows if row.get(key) is not None]  # None: was not finite
    return f"{name} {sparkline(values)} {values[0]:.4g} -> {values[-1]:.4g}" if values else f"{name}: no figures"


def plot_curves(rows: Sequence[Mapping[str, float]], keys: Sequence[str], path: Path) -> Path:
    """A panel a key over steps, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(keys), figsize=(4.5 * len(keys), 3), squeeze=False, layout="constrained")
    for axis, key in zip(axes[0], keys, strict=True):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        axis.plot(*zip(*points, strict=True) if points else ([], []))
        axis.set(xlabel="step", title=key)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return path
