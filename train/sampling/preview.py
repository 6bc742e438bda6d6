"""Pictures drawn during a training, to look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from data_pipeline.images.grid import grid, save_png
from data_pipeline.shards.samples import collated
from train.data.latent_facts import LatentFacts
from train.engine.train_state import TrainState
from train.models.conditioning import ConditionedUNet
from train.objectives.latent_diffusion import LatentDiffusion
from train.runs.metrics import Reporter
from train.runs.run_folder import RunFolder
from train.sampling.generator import Asked, Generator


class Preview:
    """A grid of fixed conditions with fixed seeds, drawn by rank 0 with the averaged weights."""

    def __init__(
        self,
        cfg: DictConfig,
        objective: LatentDiffusion,
        network: ConditionedUNet,
        autoencoder: nn.Module,
        facts: LatentFacts,
        run: RunFolder,
        reporter: Reporter,
        read: Callable[..., list[dict[str, Any]]],
    ) -> None:
        self.run, self.reporter, self.seed = run, reporter, cfg.seed
        self.guidance, self.sampler = instantiate(cfg.guidance, _convert_="all"), instantiate(cfg.sampler)
        device = run.ranks.device
        self.generator = Generator(
            network,
            objective.process,
            objective.parameterization,
            facts.scaling,
            autoencoder.to(device).decode,
            facts.unet_shape,
            device,
        )
        count = cfg.preview_samples
        samples = read(root=f"{cfg.input}/train", limit=count * 8)[::8][:count]
        self.asked = Asked(collated(samples), [sample["caption"] for sample in samples])

    def draw(self, state: TrainState) -> None:
        if self.run.ranks.is_main:
            drawn = self.generator.draw(self.asked, self.sampler, self.guidance, self.seed)
            path = self.run.samples / f"step-{state.step:08d}.png"
            shown = list(self.generator.beside_what_was_given(self.asked, drawn))
            self.reporter.image(state.step, "samples", save_png(grid(shown, self.asked.captions), path))
