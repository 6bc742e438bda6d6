"""Sample grids drawn during training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from data_pipeline.images.grid import grid, save_png
from data_pipeline.shards.data_sets import DataSets
from data_pipeline.shards.samples import collated
from train.data.latent_facts import LatentFacts
from train.data.sizes import at_mean_size
from train.engine.train_state import TrainState
from train.runs.metrics import Reporter
from train.runs.run_folder import RunFolder
from train.sampling.generator import ConditionBatch, Generator, Guidance, NotFinite, Sampler, how_drawn

log = logging.getLogger(__name__)


class PreviewPart(NamedTuple):
    """Samples of one size, and a generator that draws that size."""

    generator: Generator
    samples: Sequence[dict[str, Any]]

    @property
    def conditions(self) -> ConditionBatch:
        return ConditionBatch(collated(self.samples), [sample["caption"] for sample in self.samples])


def preview_parts(
    generator: Generator,
    facts: LatentFacts,
    data: DataSets,
    read_samples: Callable[..., list[dict[str, Any]]],
    count: int,
) -> list[PreviewPart]:
    """Every eighth of the first training samples of each data set, `count` in all, shared equally; the remainder comes
    from the largest sets. Each bucket is a part; all other sets form one part. All are drawn at the mean sizes."""
    ordered = sorted(data, key=lambda each: -each.manifest.samples)
    found = {}
    for i, each in enumerate(ordered):
        own = count // len(ordered) + (i < count % len(ordered))
        found[each.name] = read_samples(root=each.root, limit=own * 8)[::8][:own] if own else []
    if not facts.buckets:
        samples = [sample for samples in found.values() for sample in samples]
        return [PreviewPart(generator, at_mean_size(samples, facts))]
    own = {name: facts.of_bucket(name) for name, samples in found.items() if samples}
    return [
        PreviewPart(replace(generator, latent_shape=of.unet_shape), at_mean_size(found[name], of))
        for name, of in own.items()
    ]


class Preview:
    """A grid of samples for the conditions of all parts, with a fixed seed, drawn by rank 0 with the EMA weights."""

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
        try:
            for part in self.parts:
                conditions = part.conditions
                drawn = part.generator.draw(conditions, self.sampler, self.guidance, self.seed)
                shown += list(part.generator.with_conditioning_images(conditions, drawn))
                captions += conditions.captions
        except NotFinite as error:  # training may still recover
            log.warning("no sample grid at step %d: %s", state.step, error)
            return
        path = self.run.samples / f"step-{state.step:08d}.png"
        title = how_drawn(state.step, self.sampler, self.guidance, self.seed)
        self.reporter.image(state.step, "samples", save_png(grid(shown, captions, title=title), path))
