"""Builds the network of a configuration for given latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from data_pipeline.common.saved_objects import build
from data_pipeline.encode.encoders import TEXT_ENCODERS
from train.data.latent_facts import LatentFacts
from train.models.conditioning import ConditionedUNet, Conditioners

Instantiate = Callable[..., Any]  # hydra's, passed by the entry script: for the user's configuration, never for files


def build_network(config: Mapping[str, Any], facts: LatentFacts, instantiate: Instantiate) -> ConditionedUNet:
    """The U-Net and its conditioners as the user configures them."""
    parts = instantiate(config["conditioning"], _convert_="all")
    return network_of(config["unet"], lambda: instantiate(config["unet"], _convert_="all"), parts, facts)


def network_of(
    unet: Mapping[str, Any], make_unet: Callable[[], nn.Module], parts: Mapping[str, Callable], facts: LatentFacts
) -> ConditionedUNet:
    """The U-Net, with arguments `unet`, and its conditioners; misfits are refused before the U-Net is made."""
    conditioner = Conditioners(facts, parts)
    facts.refuse_other_shapes(unet, conditioner)
    return ConditionedUNet(make_unet(), conditioner)


def used_conditions(config: Mapping[str, Any], facts: LatentFacts, where: str) -> dict[str, Any]:
    """The conditions, of all in the data set, that the run is conditioned on. where: the file, for error messages."""
    used = {name: made for name, made in facts.conditions.items() if name in config["conditioning"]}
    return {name: build(made, "conditions", f"{where}: conditions.{name}") for name, made in used.items()}


def encoders_used(conditions: Mapping[str, Any]) -> list[str]:
    """The text encoders that sampling needs, by their groups in conf/."""
    return [group for group in TEXT_ENCODERS if any(made.encoder == group for made in conditions.values())]
