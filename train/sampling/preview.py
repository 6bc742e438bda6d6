"""Sample grids drawn during training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from data_pipeline.images.grid import grid, save_png
from data_pipeline.shards.samples import collated
from train.engine.train_state import TrainState
from train.runs.metrics import Reporter
from train.runs.run_folder import RunFolder
from train.sampling.generator import ConditionBatch, Generator, Guidance, NotFinite, Sampler, how_drawn

log = logging.getLogger(__name__)


class Preview:
    """A grid for the conditions of `samples` with a fixed seed, drawn by rank 0 with the EMA weights."""

    def __init__(
        self,
        generator: Generator,
        sampler: Sampler,
        guidance: Guidance,
        samples: Sequence[dict[str, Any]],
        seed: int,
        run: RunFolder,
        reporter: Reporter,
    ) -> None:
        self.generator, self.sampler, self.guidance, self.seed = generator, sampler, guidance, seed
        self.run, self.reporter = run, reporter
        self.conditions = ConditionBatch(collated(samples), [sample["caption"] for sample in samples])

    def draw(self, state: TrainState) -> None:
        if self.run.ranks.is_main:
            try:
                drawn = self.generator.draw(self.conditions, self.sampler, self.guidance, self.seed)
            except NotFinite as error:  # training may yet recover
                log.warning("no sample grid at step %d: %s", state.step, error)
                return
            path = self.run.samples / f"step-{state.step:08d}.png"
            shown = list(self.generator.with_conditioning_images(self.conditions, drawn))
            title = how_drawn(state.step, self.sampler, self.guidance, self.seed)
            sheet = grid(shown, self.conditions.captions, title=title)
            self.reporter.image(state.step, "samples", save_png(sheet, path))
