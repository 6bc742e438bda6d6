"""The latents that a diffusion model is trained on: stored, or encoded as they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from data_pipeline.common import storage
from data_pipeline.common.errors import UserError
from data_pipeline.common.saved_objects import read_config
from data_pipeline.shards.manifest import Manifest
from train.data.build import used_conditions, uses_clip
from train.data.latent_facts import LatentFacts
from train.data.online_encoding import OnlineLatents, first_batches
from train.distributed.ranks import Ranks
from train.loop.recipe import Recipe
from train.weights.saved import saved_fingerprint


class Latents(NamedTuple):
    """What is trained on, by the recipe's loader; `read` gives whole sets of them, autoencoder is for previews."""

    recipe: Recipe
    read: Callable[..., list[dict[str, Any]]]
    autoencoder: nn.Module | None
    facts: LatentFacts


def latents_of(cfg: DictConfig, config: dict[str, Any], data: Manifest, ranks: Ranks) -> Latents:
    """As they are stored; or, of image-text shards, encoded while training."""
    recipe, read = Recipe.of(cfg, instantiate, ranks), instantiate(cfg.read, _partial_=True)
    if data.kind == "latents":
        autoencoder = instantiate(cfg.autoencoder) if cfg.preview_every else None
        facts = LatentFacts.of(f"{cfg.input}/train", data, cfg.fold, cfg.scaling_factor)
        return Latents(recipe, read, autoencoder, facts)
    online = OnlineLatents.of(config, instantiate, ranks.device)
    pictures = first_batches(recipe.make_loader, cfg.training.batch_size, cfg.measured_on, data.samples)
    facts = online.facts(pictures, cfg.fold, cfg.scaling_factor)
    recipe = dataclasses.replace(recipe, make_loader=online.loader(recipe.make_loader))
    return Latents(recipe, online.read(read), online.image, facts)


def refuse_other_encoders(facts: LatentFacts, config: dict[str, Any], autoencoder: nn.Module | None) -> None:
    """Encoders that did not make these latents, as far as their folders or the loaded first stage tell."""
    where = f"{config['input']}/train/manifest.json"
    needed, path = uses_clip(used_conditions(config, facts, where)), config["clip"].get("path")
    if needed and path is None:
        encoder = facts.fingerprints["text_encoder"]
        raise UserError(f"clip.path must be given: {encoder} made what is conditioned on; add clip.path=....")
    mark = autoencoder.fingerprint if autoencoder else saved_fingerprint(config["autoencoder"].get("path"))
    facts.refuse_other_encoders(mark, text_fingerprint(config["clip"]) if needed else None)


def text_fingerprint(clip: dict[str, Any]) -> str | None:
    """Of the text encoder at clip.path, which is loaded where its folder does not tell; None for clip.path=none."""
    path = clip["path"]
    if Path(path).name == "none":
        return None
    if not Path(path).exists():
        raise UserError(f"clip.path={path} is not there: give the text encoder, or clip.path=none to train without it.")
    return saved_fingerprint(path) or instantiate(clip).fingerprint


def scaled_as_known(cfg: DictConfig, facts: LatentFacts) -> LatentFacts:
    """A U-Net to start from knows latents at one scale: its own run's, or the one factor of a published model."""
    if cfg.start_from is None:
        return facts
    if not Path(cfg.start_from).exists():
        raise UserError(f"start_from={cfg.start_from} is not there: give a run, a diffusers folder, or a single file.")
    if not storage.exists(storage.join(cfg.start_from, "latents.json")):
        if cfg.scaling_factor is None:
            raise UserError(
                f"start_from={cfg.start_from} is a published model, which knows latents scaled by one factor: add "
                "scaling_factor=0.18215 (Stable Diffusion 1.x and 2.x)."
            )
        return facts
    known = LatentFacts.of_run(Path(cfg.start_from))
    for name, was, now in (
        ("autoencoder", known.fingerprints["autoencoder"], facts.fingerprints["autoencoder"]),
        ("fold", known.fold, facts.fold),
    ):
        if was != now:
            raise UserError(f"start_from={cfg.start_from} was trained with {name} {was}, these latents with {now}.")
    if cfg.scaling_factor is not None and (facts.mean, facts.std) != (known.mean, known.std):
        raise UserError(
            f"start_from={cfg.start_from} knows latents scaled otherwise than by scaling_factor={cfg.scaling_factor}: "
            "set scaling_factor=null."
        )
    refuse_other_classes(cfg, known, facts)
    return dataclasses.replace(facts, mean=known.mean, std=known.std)


def refuse_other_classes(cfg: DictConfig, known: LatentFacts, facts: LatentFacts) -> None:
    """A run to start from has a vector for each of its classes, by number: others would be taken for them."""
    theirs = read_config(Path(cfg.start_from) / "config.yaml").get("conditioning") or {}
    for name in sorted(set(theirs) & set(cfg.conditioning)):
        was, now = (of.conditions.get(name, {}).get("classes") for of in (known, facts))
        if was != now:
            raise UserError(
                f"start_from={cfg.start_from} knows other classes of {name} than these latents: run "
                f"precompute_latents.py with conditions.{name}.classes= as in its latents.json."
            )
