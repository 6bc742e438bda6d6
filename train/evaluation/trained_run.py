"""A finished (or running) train_ldm run, ready to draw from: its EMA weights, decoder, text encoder and null."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from data_pipeline.errors import UserError
from data_pipeline.samples import TextStates
from train.checkpoint import ema_weights_path
from train.evaluation.generate import Generator
from train.latent_data import LatentFacts


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """generator draws; clip turns prompts into text states; config is the run's own."""

    generator: Generator
    clip: nn.Module
    config: dict[str, Any]
    weights: Path

    def text(self, prompts: Sequence[str]) -> TextStates:
        """Text states of prompts, by the encoder that made the training captions'."""
        return self.clip.encode_text(list(prompts))


def open_run(
    run: str,
    step: str | int,
    build: Callable[..., Any],  # hydra's instantiate, handed in by the entry script
    autoencoder_path: str | None = None,
    clip_path: str | None = None,
) -> TrainedRun:
    """Load a run's EMA weights in fp32. The encoders' paths are those it was trained with unless given."""
    folder = Path(run)
    if not (folder / "config.yaml").exists():
        raise UserError(f"input={run} is not a run (no config.yaml there): give the output= of train_ldm.py.")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    weights = ema_weights_path(folder, step)
    facts = LatentFacts.of_run(folder)
    autoencoder = build({**config["autoencoder"], "path": autoencoder_path or config["autoencoder"]["path"]})
    clip = build({**config["clip"], "path": clip_path or config["clip"]["path"]})
    facts.refuse_other_encoders(autoencoder.fingerprint, clip.fingerprint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet = build(config["unet"], _convert_="all")
    unet.load_state_dict(load_file(weights))
    unet.to(device).eval().requires_grad_(False)
    make_objective = build(config["objective"], _partial_=True, _convert_="all")
    objective = make_objective(unet=unet, scaling=facts.scaling, null=facts.null)
    generator = Generator(
        unet,
        objective.process,
        objective.parameterization,
        facts.scaling,
        autoencoder.to(device).decode,
        facts.null,
        facts.unet_shape,
        device,
    )
    return TrainedRun(generator, clip, config, weights)
