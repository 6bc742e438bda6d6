"""The network of a configuration, for the latents that there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from data_pipeline.common.saved_objects import build
from train.data.latent_facts import LatentFacts
from train.models.conditioning import ConditionedUNet, Conditioners

Instantiate = Callable[..., Any]  # hydra's, handed in by the entry script: for what its user says, never for files


def build_network(config: Mapping[str, Any], facts: LatentFacts, instantiate: Instantiate) -> ConditionedUNet:
    """The U-Net and its conditioners as the user configures them."""
    parts = instantiate(config["conditioning"], _convert_="all")
    return network_of(config["unet"], lambda: instantiate(config["unet"], _convert_="all"), parts, facts)


def network_of(
    unet: Mapping[str, Any], make_unet: Callable[[], nn.Module], parts: Mapping[str, Callable], facts: LatentFacts
) -> ConditionedUNet:
    """What doesn't fit together is refused before the U-Net, of the arguments `unet`, is made."""
    conditioner = Conditioners(facts, parts)
    facts.refuse_other_shapes(unet, conditioner)
    return ConditionedUNet(make_unet(), conditioner)


def used_conditions(config: Mapping[str, Any], facts: LatentFacts, where: str) -> dict[str, Any]:
    """What makes the stored fields that the run is conditioned on, of all that its data set holds. where: that file."""
    used = {name: made for name, made in facts.conditions.items() if name in config["conditioning"]}
    return {name: build(made, "conditions", f"{where}: conditions.{name}") for name, made in used.items()}


def uses_clip(conditions: Mapping[str, Any]) -> bool:
    """Whether sampling needs the CLIP."""
    return any(condition.uses_clip for condition in conditions.values())
