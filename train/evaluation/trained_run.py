"""A finished (or running) train_ldm run, ready to draw from: its EMA weights, decoder, encoders and nulls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from data_pipeline.errors import UserError
from data_pipeline.samples import collated
from train.checkpoint_files import ema_weights
from train.evaluation.generate import Asked, Generator
from train.latent_data import LatentFacts
from train.models.conditioning import ConditionedUNet

Build = Callable[..., Any]  # hydra's instantiate, handed in by the entry script


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """generator draws; conditions turn samples into what the network is conditioned on, with `image` and `text` as
    their encoders; config is the run's own."""

    generator: Generator
    image: nn.Module
    text: nn.Module | None
    conditions: Mapping[str, Any]
    facts: LatentFacts
    config: dict[str, Any]
    weights: str  # the file that they are from

    @property
    def picture_size(self) -> tuple[int, int]:
        """(H, W) of what it draws."""
        _, h, w = self.facts.latent_shape
        return h * self.image.factor, w * self.image.factor

    @torch.no_grad()
    def asked(self, samples: Sequence[Mapping[str, Any]], batch_size: int = 64) -> Asked:
        """Samples ({"key", "caption", "meta", "image"}) as their conditions, made as precompute makes them."""
        parts = [self._fields(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]
        fields = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
        return Asked(fields, [sample["caption"] for sample in samples])

    def _fields(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        images = collated(samples).get("image")
        images = None if images is None else images.to(self.generator.device)
        fields: dict[str, torch.Tensor] = {}
        for condition in self.conditions.values():
            fields |= condition.encode(samples, images, self)
        return fields


def open_run(
    run: str, step: str | int, build: Build, autoencoder_path: str | None = None, clip_path: str | None = None
) -> TrainedRun:
    """Load a run's EMA weights in fp32. The encoders' paths are those it was trained with unless given."""
    folder = Path(run)
    if not (folder / "config.yaml").exists():
        raise UserError(f"input={run} is not a run (no config.yaml there): give the output= of train_ldm.py.")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    weights = ema_weights(folder, step)
    facts = LatentFacts.of_run(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder = build(with_path(config["autoencoder"], autoencoder_path)).to(device)
    conditions = used_conditions(config, facts, build)
    clip = build(with_path(config["clip"], clip_path)).to(device) if uses_clip(conditions) else None
    facts.refuse_other_encoders(autoencoder.fingerprint, clip.fingerprint if clip else None)
    network = build_network(config, facts, build)
    network.load_state_dict(weights.tensors)
    network.to(device).eval().requires_grad_(False)
    make_objective = build(config["objective"], _partial_=True, _convert_="all")
    objective = make_objective(network=network, latents=facts.latents)
    generator = Generator(
        network,
        objective.process,
        objective.parameterization,
        facts.scaling,
        autoencoder.decode,
        facts.unet_shape,
        device,
    )
    return TrainedRun(generator, autoencoder, clip, conditions, facts, config, weights.path)


def build_network(config: Mapping[str, Any], facts: LatentFacts, build: Build) -> ConditionedUNet:
    """The U-Net and its conditioners; what doesn't fit together is refused before the U-Net is made."""
    make_conditioner = build(
        {"_target_": "train.models.conditioning.Conditioners", "parts": config["conditioning"]},
        _partial_=True,
        _convert_="all",
    )
    conditioner = make_conditioner(facts)
    facts.refuse_other_shapes(config["unet"], conditioner)
    return ConditionedUNet(build(config["unet"], _convert_="all"), conditioner)


def used_conditions(config: Mapping[str, Any], facts: LatentFacts, build: Build) -> dict[str, Any]:
    """What makes the stored fields that the run is conditioned on, of all that its data set holds."""
    used = {name: made for name, made in facts.conditions.items() if name in config["conditioning"]}
    return build(used, _convert_="all")


def uses_clip(conditions: Mapping[str, Any]) -> bool:
    """Whether sampling needs the CLIP."""
    return any(condition.uses_clip for condition in conditions.values())


def as_the_run_draws(config: Mapping[str, Any], group: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """`sampler` or `guidance` of the run's own sample grids, but for what is given."""
    return {**config[group], **{name: value for name, value in given.items() if value is not None}}


def with_path(config: Mapping[str, Any], path: str | None) -> dict[str, Any]:
    """An encoder's configuration, at another place where one is given."""
    return {**config, **({"path": path} if path else {})}
