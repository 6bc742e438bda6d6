"""Steps of first stages against a discriminator, one configuration after another: torchrun ... first_stage_steps.py OUT
NAME ...

OUT/<configuration>.safetensors: the full weights of both networks after the steps; metadata: the parts of each step.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_pipeline.loading.batch import Batch, DataCursor
from train.checkpointing.safetensors_io import save_tensors
from train.distributed.collectives import mean_over_ranks
from train.distributed.ranks import Ranks, closing_distributed, find_ranks
from train.engine.config import EngineConfig
from train.engine.deepspeed_engine import Engine
from train.engine.optimizer import AdamW, Schedule
from train.models.autoencoder import Autoencoder, AutoencoderKL, VQModel
from train.models.discriminator import PatchDiscriminator
from train.objectives.adversary import Adversary
from train.objectives.autoencoder import AutoencoderObjective

SEED, STREAMS, PER_STREAM, STEPS, START, BROKEN = 3, 4, 2, 5, 1, 3
# eps is above rounding errors, because Adam divides by the gradient's magnitude even if that is only rounding error.
OPTIMIZER = AdamW(0.003, Schedule("constant"), (0.5, 0.9), eps=1e-3, weight_decay=0.0)


class Options(NamedTuple):
    """Of a first stage, of its discriminator, of their game."""

    model: str
    norm: str
    objective: dict[str, Any]
    adversary: dict[str, Any]


RECIPES = {
    "kl": Options("kl", "group", {"kl_weight": 0.01, "equivariance": 0.5}, {}),
    "batch_norm": Options(
        "kl", "batch", {"kl_weight": 1e-3, "log_variance": "learned", "reconstruction": "l2"},
        {"loss": "vanilla", "ramp": 3, "adaptive_delta": 1e-4, "adaptive_max": 0.02},
    ),
    "in_turn": Options(
        "vq", "group", {"vq_loss": "legacy", "revival_weight": 0.0, "equivariance": 0.25},
        {"loss": "non_saturating", "turns": "alternate", "r1_weight": 0.3, "r1_every": 2},
    ),
    "in_turn_batch_norm": Options("vq", "batch", {"revival_weight": 0.0}, {"turns": "alternate"}),
}  # fmt: skip


class Configuration(NamedTuple):
    recipe: str
    stage: int

    def __str__(self) -> str:
        return f"{self.recipe}-zero{self.stage}"


CONFIGURATIONS = list(itertools.starmap(Configuration, itertools.product(RECIPES, (0, 1, 2))))


def networks(recipe: Options) -> tuple[Autoencoder, PatchDiscriminator]:
    torch.manual_seed(0)
    options = {"channels": (8, 16), "layers_per_block": 1, "norm_groups": 4, "mid_attention": False}
    model = AutoencoderKL(**options) if recipe.model == "kl" else VQModel(codebook_size=30, **options)
    if recipe.model == "vq":
        torch.nn.init.normal_(model.codebook)
    judge = PatchDiscriminator(8, layers=2, norm_groups=4, norm=recipe.norm)
    with torch.no_grad():
        for parameter in judge.parameters():
            parameter.mul_(3)  # so that its gradients are above rounding errors
    return model, judge


def batch_at(step: int, streams: tuple[int, ...]) -> Batch:
    """Random pictures of 16 pixels; those of step BROKEN have a NaN, in the last stream."""
    parts = []
    for stream in streams:
        generator = torch.Generator().manual_seed(1000 * step + stream)
        parts.append(torch.rand(PER_STREAM, 3, 16, 16, generator=generator) * 2 - 1)
        if step == BROKEN and stream == STREAMS - 1:
            parts[-1][0, 0, 0, 0] = torch.nan
    keys = tuple(f"{stream}-{i}" for stream in streams for i in range(PER_STREAM))
    return Batch(keys, keys, {"image": torch.cat(parts)}, streams, step, DataCursor(step + 1), STREAMS)


def batches(ranks: Ranks) -> Iterator[Batch]:
    own = STREAMS // ranks.world_size
    streams = tuple(range(ranks.rank * own, (ranks.rank + 1) * own))
    return (batch_at(step, streams) for step in itertools.count())


def trained(how: Configuration, ranks: Ranks) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Both networks' weights after STEPS, and the parts of each step; {} for a skipped one."""
    recipe = RECIPES[how.recipe]
    model, judge = networks(recipe)
    adversary = Adversary(judge, weight=0.4, start=START, **recipe.adversary)
    objective = AutoencoderObjective(model, adversary=adversary, gradient_weight=0.7, seed=SEED, **recipe.objective)
    config = EngineConfig(how.stage, gradient_clipping=0.0)
    engine = Engine(objective, OPTIMIZER, config, ranks, STREAMS * PER_STREAM, 1)
    source, said = batches(ranks), []
    for step in range(STEPS):
        result = engine.train_step(source, step, STEPS)
        values = {name: float(mean_over_ranks(value)) for name, value in result.parts.items()}
        said.append(values if result.applied else {})
    return engine.full_state_dict(), said


def main(output: str, *names: str) -> None:
    ranks = find_ranks()
    with closing_distributed():
        for how in (how for how in CONFIGURATIONS if str(how) in names):
            weights, said = trained(how, ranks)
            if ranks.is_main:
                save_tensors(weights, Path(output) / f"{how}.safetensors", {"parts": json.dumps(said)})


if __name__ == "__main__":
    main(*sys.argv[1:])
