"""Curves in the terminal and as plots; grids are in data_pipeline/images/grid.py."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.common.storage import write_atomically

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A line of at most `width` bars, each a mean, from the lowest (▁) to the highest (█)."""
    if not values:
        return ""
    means = [float(np.mean(part)) for part in np.array_split(np.asarray(values, float), min(width, len(values)))]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in means)


def curve_line(name: str, rows: Sequence[Mapping[str, float]], key: str) -> str:
    """`name ▁▂▃ first -> last`, from metrics rows."""
    values = [row[key] for row in rows if row.get(key) is not None]  # None: not finite
    return f"{name} {sparkline(values)} {values[0]:.4g} -> {values[-1]:.4g}" if values else f"{name}: no figures"


def plot_curves(rows: Sequence[Mapping[str, float]], keys: Sequence[str], path: Path) -> Path:
    """Save a PNG with one panel per key, over steps."""
    from matplotlib.figure import Figure  # pyplot takes as long again to import, and looks for a display

    figure = Figure(figsize=(4.5 * len(keys), 3), layout="constrained")
    axes = figure.subplots(1, len(keys), squeeze=False)
    for axis, key in zip(axes[0], keys, strict=True):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        axis.plot(*zip(*points, strict=True) if points else ([], []), marker="o" if len(points) == 1 else None)
        axis.set(xlabel="step", title=key)
        axis.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90)
    write_atomically(path, drawn.getvalue())
    return path
