"""Sample grids drawn during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from data_pipeline.images.grid import grid, save_png
from data_pipeline.shards.samples import collated
from train.engine.train_state import TrainState
from train.runs.metrics import Reporter
from train.runs.run_folder import RunFolder
from train.sampling.generator import ConditionBatch, Generator, Guidance, Sampler


class PreviewPart(NamedTuple):
    """Samples of one size, and a generator that draws that size."""

    generator: Generator
    samples: Sequence[dict[str, Any]]

    @property
    def conditions(self) -> ConditionBatch:
        return ConditionBatch(collated(self.samples), [sample["caption"] for sample in self.samples])


class Preview:
    """A grid for the conditions of all parts' samples with a fixed seed, drawn by rank 0 with the EMA weights."""

    def __init__(
        self,
        parts: Sequence[PreviewPart],
        sampler: Sampler,
        guidance: Guidance,
        seed: int,
        run: RunFolder,
        reporter: Reporter,
    ) -> None:
        self.parts, self.sampler, self.guidance, self.seed = parts, sampler, guidance, seed
        self.run, self.reporter = run, reporter

    def draw(self, state: TrainState) -> None:
        if not self.run.ranks.is_main:
            return
        shown, captions = [], []
        for part in self.parts:
            conditions = part.conditions
            drawn = part.generator.draw(conditions, self.sampler, self.guidance, self.seed)
            shown += list(part.generator.with_conditioning_images(conditions, drawn))
            captions += conditions.captions
        path = self.run.samples / f"step-{state.step:08d}.png"
        self.reporter.image(state.step, "samples", save_png(grid(shown, captions), path))
