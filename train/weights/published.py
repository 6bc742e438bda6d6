"""Loads published models that a configuration names by a path: diffusers folders or CompVis single files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from data_pipeline.common.saved_objects import checked, read_config, refuse_wrong_kinds
from train.checkpointing.ema_weights import ema_weights
from train.models.conditioning import ConditionedUNet
from train.models.size_features import SizeFeatures
from train.models.unet import UNet
from train.weights import diffusers, open_clip, stable_diffusion
from train.weights.foreign import load_exactly
from train.weights.shapes import unet_options

log = logging.getLogger(__name__)

_UNSEEN = ("heads", "norm_groups")  # options that change a U-Net's function but not the shapes of its weights


def unet_options_of(path: str | Path, heads: Any = None) -> dict[str, Any]:
    """The U-Net's keyword arguments for a diffusers folder, a CompVis single file or a run of train_ldm.py, without
    reading its weights. heads: those of a single file of an unpublished model, as shapes don't show them."""
    path = Path(path)
    if path.is_file():
        options = {"vector_dim": None, "self_attention_levels": None, "norm_groups": stable_diffusion.NORM_GROUPS}
        return options | stable_diffusion.unet_arguments(stable_diffusion.unet_shapes(path), path, heads)
    if (path / "config.yaml").exists():
        where, config = path / "config.yaml", read_config(path / "config.yaml")
        if "unet" not in config:
            raise UserError(f"start_from={path} is a run without a U-Net: use the output= of a train_ldm.py run.")
        return dict(checked(config["unet"], "unet", f"{where}: unet").arguments)
    folder, config = diffusers.component(path, ("unet",), diffusers.UNET_CLASSES)
    return diffusers.unet_arguments(config, folder / "config.json")


def load_weights(network: ConditionedUNet, path: str, averaged: bool = False) -> None:
    """Starts a U-Net from a diffusers folder, a CompVis single file, or the EMA weights of a run of train_ldm.py; from
    a run, also its trained conditioners, if any. One UserError names all that does not fit. averaged: of a CompVis
    training checkpoint, its EMA weights."""
    if averaged and not Path(path).is_file():
        raise UserError(
            f"start_from_ema=true is for CompVis files, but start_from={path} is a folder: set start_from_ema=false (a "
            "run's EMA weights are always used)."
        )
    learns_sizes = network.conditioner.needs_vector
    if (Path(path) / "config.yaml").exists():
        weights = _of_run(network.unet, Path(path))
        if any(name.startswith("conditioner.") for name in weights):
            if learns_sizes:
                grown = _with_sizes(network.unet, _below("unet.", weights))
                weights = {**weights, **{f"unet.{name}": value for name, value in grown.items()}}
            load_exactly(network, weights, path)
            return
    load_unet_weights(network.unet, path, learns_sizes, averaged)


def load_unet_weights(unet: UNet, path: str, learns_sizes: bool = False, averaged: bool = False) -> None:
    """Loads the U-Net only. learns_sizes: whether it is conditioned on sizes; the one at `path` need not be. averaged:
    as in `load_weights`."""
    if Path(path).is_file():
        with torch.device("meta"):  # single files have no vector condition
            known = UNet(**{**unet_options(unet), "vector_dim": None}) if learns_sizes else unet
        state = stable_diffusion.unet_state(known, stable_diffusion.read_unet(path, averaged), path)
        _say_which(path, averaged)
    elif (Path(path) / "config.yaml").exists():
        weights = _of_run(unet, Path(path))
        state = _below("unet.", weights) or weights  # older runs stored only the U-Net
    else:
        folder, config = diffusers.component(path, ("unet",), diffusers.UNET_CLASSES)
        _refuse_other_function(unet, diffusers.unet_arguments(config, folder), path)
        state = diffusers.read_unet_state(path)
    load_exactly(unet, _with_sizes(unet, state) if learns_sizes else state, path)


def _say_which(path: str, averaged: bool) -> None:
    """Log whether raw or averaged weights of a file are used, if it holds both."""
    if averaged:
        log.info("start_from=%s: its averaged weights (model_ema.*)", path)
    elif stable_diffusion.has_averaged(path):
        log.info("start_from=%s: its raw weights; start_from_ema=true uses its averaged ones", path)


def _with_sizes(unet: UNet, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a U-Net without sizes, extended by zeros for one with sizes, so that both give the same at first."""
    into, ours = "vector_embedding.linear_1.weight", unet.state_dict()
    if into not in state:
        new = {name: value for name, value in ours.items() if name.startswith("vector_embedding.")}
        last = {name: torch.zeros_like(value) for name, value in new.items() if ".linear_2." in name}
        return {**state, **new, **last}
    lacking = ours[into].shape[1] - state[into].shape[1]
    if lacking != 6 * SizeFeatures.WIDTH:
        return dict(state)
    zeros = state[into].new_zeros(len(state[into]), lacking)
    return {**state, into: torch.cat([state[into], zeros], 1)}  # the sizes come after the pooled text


def _of_run(unet: UNet, run: Path) -> dict[str, Tensor]:
    config = run / "config.yaml"
    options = {"unet": {}, **read_config(config)}["unet"]
    refuse_wrong_kinds({"unet": options}, {"unet": Mapping[str, Any]}, str(config))
    kinds = {"channels": Sequence[int], "heads": int | Sequence[int]}
    options = {"channels": [], **options}
    refuse_wrong_kinds({"heads": 1, **options}, kinds, f"{config}: unet")
    if isinstance(options.get("heads"), int):
        options["heads"] = [options["heads"]] * len(options["channels"])
    _refuse_other_function(unet, options, run)
    return ema_weights(run).tensors


def _below(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _refuse_other_function(unet: UNet, options: Mapping[str, Any], where: str | Path) -> None:
    own = unet_options(unet)
    attending = [*own["attention_levels"][:-1], True]  # the middle block always does, with the last level's heads
    for name in _UNSEEN:
        theirs, ours = options.get(name, own[name]), own[name]
        if name == "heads" and len(theirs) == len(ours):  # heads of levels without attention are not used
            theirs, ours = ([n for n, used in zip(h, attending, strict=True) if used] for h in (theirs, ours))
        if theirs != ours:
            raise UserError(f"start_from={where} was made with unet.{name}={theirs}, not {ours}: set the same here.")


def load_autoencoder(path: str) -> nn.Module:
    """The first stage of a diffusers folder or a CompVis single file, in eval mode, frozen, with its `fingerprint`."""
    return (stable_diffusion if Path(path).is_file() else diffusers).load_autoencoder(path)


def load_text_encoder(path: str) -> nn.Module:
    """The text encoder of a diffusers (or transformers) folder or a CompVis single file, with its `fingerprint`."""
    return open_clip.load_text_encoder(path)
