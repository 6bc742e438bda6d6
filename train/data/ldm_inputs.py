"""The latents that a diffusion model is trained on: stored, or encoded during training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from data_pipeline.common import storage
from data_pipeline.common.errors import UserError
from data_pipeline.common.saved_names import named
from data_pipeline.common.saved_objects import read_config
from data_pipeline.encode.encoders import TEXT_ENCODERS
from data_pipeline.shards.data_sets import DataSets
from train.data.base_model import refuse_absent
from train.data.build import Instantiate, encoders_used, used_conditions
from train.data.joined_facts import facts_of
from train.data.latent_facts import LatentFacts
from train.data.online_encoding import OnlineLatents, first_batches
from train.data.sizes import fields_in_json, with_mean_size
from train.models.latents import OneFactor
from train.weights import hf_text
from train.weights.saved import saved_fingerprint


class Latents(NamedTuple):
    """Latents to train on. make_loader: batches; read: lists of samples; autoencoder: for previews."""

    make_loader: Callable[..., Any]
    read_samples: Callable[..., list[dict[str, Any]]]
    autoencoder: nn.Module | None
    facts: LatentFacts


def latents_of(
    config: Mapping[str, Any],
    data: DataSets,
    make_loader: Callable[..., Any],
    read_samples: Callable[..., list[dict[str, Any]]],
    instantiate: Instantiate,
    device: torch.device,
) -> Latents:
    """Latents as stored, or encoded from image-text shards during training. make_loader, read: for the stored data."""
    if data.kind == "latents":
        autoencoder = instantiate(config["autoencoder"]) if config["preview_every"] else None
        facts = facts_of(data, config["fold"], OneFactor.of(config))
        if fields := fields_in_json(config, facts):
            facts = with_mean_size(facts, data)
            make_loader, read_samples = (partial(read, json_fields=fields) for read in (make_loader, read_samples))
        return Latents(make_loader, read_samples, autoencoder, facts)
    online = OnlineLatents.of(config, instantiate, device)
    pictures = first_batches(make_loader, config["training"]["batch_size"], config["measured_on"], data.samples)
    facts = online.facts(pictures, config["fold"], OneFactor.of(config))
    return Latents(online.loader(make_loader), online.read(read_samples), online.image, facts)


def refuse_other_encoders(
    facts: LatentFacts,
    config: Mapping[str, Any],
    autoencoder: nn.Module | None,
    instantiate: Instantiate,
    root: str,
) -> None:
    """UserError if other encoders made these latents, judged by their folders and by the loaded first stage. root: the
    data set, for the message."""
    where = storage.join(root, "manifest.json")
    marks = {
        "autoencoder": autoencoder.fingerprint if autoencoder else saved_fingerprint(config["autoencoder"].get("path"))
    }
    for group in encoders_used(used_conditions(config, facts, where)):
        if config[group].get("path") is None:
            encoder = facts.fingerprints[TEXT_ENCODERS[group]]
            choice = "text_encoder=hf " if group == "text_encoder" else ""
            raise UserError(
                f"{group}.path must be given, as text encoder {encoder} encoded the conditions: add "
                f"{choice}{group}.path=...."
            )
        marks[group] = text_fingerprint(config[group], group, instantiate)
    facts.refuse_other_encoders(marks)


def text_fingerprint(encoder: Mapping[str, Any], group: str, instantiate: Instantiate) -> str | None:
    """Fingerprint of the text encoder at clip.path or text_encoder.path, loaded if its folder has none; None for a path
    of none."""
    path = encoder["path"]
    if Path(path).name == "none":
        return None
    if not Path(path).exists():
        raise UserError(
            f"{group}.path={path} does not exist: use the path of the text encoder, or {group}.path=none to train "
            "without it."
        )
    if named(encoder).get("name") == "hf":
        return hf_text.fingerprint_of(path, encoder["context_length"])
    return saved_fingerprint(path) or instantiate(encoder).fingerprint


def with_base_model_scaling(config: Mapping[str, Any], facts: LatentFacts) -> LatentFacts:
    """Facts with the scaling that the U-Net to start from was trained with: of its run, or one factor if published."""
    start_from, scaling = config["start_from"], OneFactor.of(config)
    if start_from is None:
        return facts
    refuse_absent(start_from)
    if not storage.exists(storage.join(start_from, "latents.json")):
        return with_published_scaling(start_from, scaling, facts)
    known = LatentFacts.of_run(Path(start_from))
    for name, was, now in (
        ("autoencoder", known.fingerprints["autoencoder"], facts.fingerprints["autoencoder"]),
        ("fold", known.fold, facts.fold),
    ):
        if was != now:
            raise UserError(
                f"start_from={start_from} was trained with {name} {was}, but these latents use {now}: use the same "
                "for both."
            )
    if scaling is not None and (facts.mean, facts.std) != (known.mean, known.std):
        raise UserError(
            f"start_from={start_from} was trained with another scaling of the latents than "
            f"scaling_factor={scaling.factor:g}: set scaling_factor=null."
        )
    refuse_other_classes(config, known, facts)
    return dataclasses.replace(facts, mean=known.mean, std=known.std)


def with_published_scaling(start_from: str, scaling: OneFactor | None, facts: LatentFacts) -> LatentFacts:
    """Facts with the scaling that the first stage's files state, or with `scaling`; UserError if neither is known, or
    if they differ: the published U-Net was trained on the stated one."""
    if scaling is None and not facts.stated:
        raise UserError(
            f"start_from={start_from} is a published model, which expects latents scaled by one factor: add "
            "scaling_factor=0.18215 (Stable Diffusion 1.x and 2.x)."
        )
    stated = dict(facts.stated)
    if scaling is not None and stated:
        given = scaling.per_channel(len(facts.mean))
        apart = max(abs(a - b) for name in given for a, b in zip(given[name], stated[name], strict=True))
        if apart > 1e-4 * max(given["std"]):
            raise UserError(
                f"scaling_factor={scaling.factor:g} shift_factor={scaling.shift:g} is not what the first stage of "
                f"these latents states (mean {stated['mean'][0]:.4g}, std {stated['std'][0]:.5g} in channel 0): set "
                "scaling_factor=null shift_factor=null to use that."
            )
    return dataclasses.replace(facts, **stated) if scaling is None else facts


def refuse_other_classes(config: Mapping[str, Any], known: LatentFacts, facts: LatentFacts) -> None:
    """The run to start from has a vector per class number: other classes would get the vectors of its own."""
    start_from = config["start_from"]
    theirs = read_config(Path(start_from) / "config.yaml").get("conditioning") or {}
    for name in sorted(set(theirs) & set(config["conditioning"])):
        was, now = (of.conditions.get(name, {}).get("classes") for of in (known, facts))
        if was != now:
            raise UserError(
                f"start_from={start_from} was trained with other classes of {name} than these latents have: run "
                f"precompute_latents.py with conditions.{name}.classes= from its latents.json."
            )
