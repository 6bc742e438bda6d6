"""The demo's training on noise in place of its data, for the benchmarks of saving and reporting."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from data_pipeline.loading.batch import Batch, DataCursor
from train.data.latent_facts import LatentFacts
from train.diffusion.parameterization import Flow
from train.diffusion.process import RectifiedFlow
from train.diffusion.time_sampling import uniform
from train.distributed.ranks import Ranks
from train.engine.config import EngineConfig
from train.engine.deepspeed_engine import Engine
from train.engine.optimizer import AdamW, Schedule
from train.models.conditioning import ConditionedUNet, Conditioners, StoredText
from train.models.unet import UNet
from train.objectives.latent_diffusion import LatentDiffusion

SHAPES = {"moments": (8, 16, 16), "text": (16, 192), "pooled": (128,)}


def engine(channels: list[int], batch: int, ranks: Ranks, zero_stage: int = 2) -> Engine:
    """conf/unet/demo.yaml with `channels` (its own: [128, 256]), as train_ldm.py builds it without an experiment."""
    null = {name: torch.zeros(SHAPES[name]) for name in ("text", "pooled")}
    facts = LatentFacts(SHAPES, [0.0] * 4, [1.0] * 4, 2, {}, {}, null)
    torch.manual_seed(0)
    unet = UNet(16, 16, channels, 1, 192, 128, [False, True], heads=4, norm_groups=16, channels_last=True)
    network = ConditionedUNet(unet, Conditioners(facts, {"text": StoredText}))
    objective = LatentDiffusion(network, RectifiedFlow(), Flow(), uniform, facts.latents)
    return Engine(objective, AdamW(1e-4, Schedule()), EngineConfig(zero_stage), ranks, batch, accumulation=1)


def batches(batch: int, ranks: Ranks) -> Iterator[Batch]:
    """This rank's part of global batches of size `batch`, with the same numbers each time."""
    count, streams = batch // ranks.world_size, 8 // ranks.world_size
    tensors = {name: torch.randn(count, *shape) for name, shape in SHAPES.items()}
    own = tuple(range(ranks.rank * streams, (ranks.rank + 1) * streams))
    for step in itertools.count():
        yield Batch(("key",) * count, ("",) * count, tensors, own, step, DataCursor(step + 1), 8)
