"""The sample grid of a training: always the same conditions and seed, so that grids can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.picture_grid import grid, save_png
from train.evaluation.generate import Asked, Generator, Guidance, Sampler


@dataclass(frozen=True, slots=True)
class Preview:
    """Draws with whatever weights the generator's network holds at the time."""

    generator: Generator
    sampler: Sampler
    guidance: Guidance
    asked: Asked
    seed: int

    def draw(self, path: Path) -> Path:
        """The grid as a PNG at `path`."""
        drawn = self.generator.draw(self.asked, self.sampler, self.guidance, self.seed)
        shown = list(self.generator.beside_what_was_given(self.asked, drawn))
        return save_png(grid(shown, self.asked.captions), path)
