"""Another decoder for a run's latents: one tuned after the latents were made, or a tiny one for quick previews."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from train.data.latent_facts import LatentFacts
from train.models.autoencoder import ENCODER
from train.models.tiny_autoencoder import TinyAutoencoder
from train.sampling.generator import Generator
from train.weights import tiny_autoencoder
from train.weights.first_stages import about_model, load_first_stage


def with_decoder(generator: Generator, path: str | None, autoencoder: nn.Module, facts: LatentFacts) -> Generator:
    """The generator with the decoder at `path`, or unchanged for None. autoencoder: the one that made the latents.
    UserError if the decoder is of other latents."""
    if path is None:
        return generator
    if facts.stored_as == "pixels":
        raise UserError(f"decoder={path} is not used, as this run draws pixels: leave it out.")
    other = load_decoder(path).to(generator.device)
    if (other.latent_channels, other.factor) != (autoencoder.latent_channels, autoencoder.factor):
        raise UserError(
            f"decoder={path} decodes {other.latent_channels} channels at f={other.factor}, but this run's latents have "
            f"{autoencoder.latent_channels} at f={autoencoder.factor}: use a decoder of the same autoencoder."
        )
    if isinstance(other, TinyAutoencoder):
        return replace(generator, decode=tiny_decode(other, autoencoder, facts, path))
    if not same_encoder(other, autoencoder):
        raise UserError(
            f"decoder={path} has another encoder than the autoencoder of this run's latents: use one of which only the "
            "decoder was trained further."
        )
    return replace(generator, decode=other.decode)


def load_decoder(path: str) -> nn.Module:
    """An autoencoder of this project, of a diffusers folder or of a CompVis file; or an AutoencoderTiny folder."""
    if not Path(path).exists():
        raise UserError(f"decoder={path} does not exist: use the path of an autoencoder.")
    for folder in (Path(path) / "vae", Path(path)):
        about = about_model(folder)
        if about.get("_class_name") == tiny_autoencoder.CLASS:
            return tiny_autoencoder.load_tiny(folder, about)
    return load_first_stage(path)


def same_encoder(a: nn.Module, b: nn.Module) -> bool:
    """Whether two autoencoders have the same encoder, bit for bit, and so make the same latents."""
    ours, theirs = (
        {name: value.cpu() for name, value in model.state_dict().items() if name.startswith(ENCODER)}
        for model in (a, b)
    )
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def tiny_decode(
    tiny: TinyAutoencoder, autoencoder: nn.Module, facts: LatentFacts, path: str
) -> Callable[[Tensor], Tensor]:
    """Unscaled latents -> pictures. A tiny autoencoder takes latents scaled as the published model of its family
    states: the scaling that the autoencoder's own files state, else this run's if it is one factor."""
    stated = getattr(autoencoder, "stated_scaling", None) or {"mean": facts.mean, "std": facts.std}
    if len({*stated["std"]}) > 1 or len({*stated["mean"]}) > 1:
        raise UserError(
            f"decoder={path} is a tiny autoencoder, whose latents are scaled by one factor, but neither this run nor "
            "the files of its autoencoder state one: use a whole decoder."
        )
    shift, factor = stated["mean"][0], 1.0 / stated["std"][0]
    return lambda z: tiny.decode((z - shift) * factor)
