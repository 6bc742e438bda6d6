"""Runs engine steps in several configurations, one after another: torchrun ... engine_steps.py IN OUT NAME ...

OUT/<configuration>.safetensors: the full weights after the steps; its metadata: losses and gradient norms.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from loaders import loader_of
from synthetic import TINY_LATENTS

from data_pipeline.shards.manifest import Manifest
from train.checkpointing.safetensors_io import save_tensors
from train.data.latent_facts import LatentFacts
from train.diffusion.parameterization import Flow
from train.diffusion.process import RectifiedFlow
from train.diffusion.time_sampling import uniform
from train.distributed.collectives import mean_over_ranks
from train.distributed.ranks import Ranks, closing_distributed, find_ranks
from train.engine.config import EngineConfig
from train.engine.deepspeed_engine import Engine
from train.engine.optimizer import AdamW, Schedule
from train.models.conditioning import ConditionedUNet, Conditioners, StoredText
from train.models.unet import UNet
from train.objectives.latent_diffusion import LatentDiffusion

SEED, BATCH, STREAMS, STEPS, DROPOUT = 3, 32, 16, 2, 0.3
# eps is above rounding errors, because Adam divides by the gradient's magnitude even if that is only rounding error.
OPTIMIZER = AdamW(0.01, Schedule("constant", warmup=2), (0.9, 0.99), eps=1e-3, weight_decay=0.1)


class Configuration(NamedTuple):
    """clipping: far below the gradient norms that occur, or 0 for none."""

    stage: int
    accumulation: int
    clipping: float

    def __str__(self) -> str:
        return f"zero{self.stage}-accumulation{self.accumulation}-clipping{self.clipping:g}"


CONFIGURATIONS = list(itertools.starmap(Configuration, itertools.product((0, 1, 2, 3), (1, 4), (0.0, 0.05))))


def network(root: str) -> ConditionedUNet:
    """A network of few tensors, some too large for a rank to keep whole at stage 3; no weight is zero."""
    facts, shapes = facts_of(root), TINY_LATENTS
    torch.manual_seed(0)
    unet = UNet(16, 16, [48], 1, shapes["text.npy"][-1], shapes["pooled.npy"][-1], [True], heads=2, norm_groups=4)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return ConditionedUNet(unet, Conditioners(facts, {"text": StoredText}))


def facts_of(root: str) -> LatentFacts:
    return LatentFacts.of(root, Manifest.load(root), fold=2)


def trained(root: str, how: Configuration, ranks: Ranks) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
    """The network's weights after STEPS, and the loss and gradient norm of each step."""
    objective = LatentDiffusion(
        network(root), RectifiedFlow(), Flow(), uniform, facts_of(root).latents, prompt_dropout=DROPOUT, seed=SEED
    )
    config = EngineConfig(how.stage, gradient_clipping=how.clipping)
    engine = Engine(objective, OPTIMIZER, config, ranks, BATCH, how.accumulation)
    batches = iter(
        loader_of(
            root, BATCH, STREAMS, seed=SEED, rank=ranks.rank, world_size=ranks.world_size, accumulation=how.accumulation
        )
    )
    said: dict[str, list[float]] = {"losses": [], "norms": []}
    for step in range(STEPS):
        result = engine.train_step(batches, step, STEPS)
        said["losses"].append(float(mean_over_ranks(result.parts["loss"])))
        said["norms"].append(engine.gradient_norm())
    return engine.full_state_dict(prefix="network."), said


def main(root: str, output: str, *names: str) -> None:
    ranks = find_ranks()
    gc.freeze()  # stage 3 runs the garbage collector at each start: half a second over all that was imported
    with closing_distributed():
        for how in (how for how in CONFIGURATIONS if str(how) in names):
            weights, said = trained(root, how, ranks)
            if ranks.is_main:
                facts = {name: json.dumps(values) for name, values in said.items()}
                save_tensors(weights, Path(output) / f"{how}.safetensors", facts)


if __name__ == "__main__":
    main(*sys.argv[1:])
