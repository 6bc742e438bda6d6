"""What training and sampling must know of a latent data set: scale, shape, null, and which encoders made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import nn

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.manifest import Manifest
from data_pipeline.samples import TextStates
from train.models.latents import LatentScaling


@dataclass(frozen=True, slots=True)
class LatentFacts:
    """Kept in the run folder too, so that what is sampled with is what was trained with."""

    moments_shape: tuple[int, int, int]  # (2C, h, w) as stored
    context_dim: int
    pooled_dim: int
    mean: list[float]  # per channel, of posterior draws over the training split
    std: list[float]
    fold: int
    fingerprints: Mapping[str, str]
    null: TextStates

    @classmethod
    def of(cls, root: str, manifest: Manifest, fold: int) -> LatentFacts:
        """From a latent data set; statistics are those that precompute measured on all of it."""
        null = load(storage.read_bytes(storage.join(root, "null.safetensors")))
        shape = tuple(manifest.fields["moments.npy"]["shape"])
        if shape[1] % fold or shape[2] % fold:
            raise UserError(f"fold={fold} does not divide latents of {shape[1]}x{shape[2]}: choose one that does.")
        latents = manifest.info["latents"]
        return cls(
            shape,
            manifest.fields["text.npy"]["shape"][-1],
            manifest.fields["pooled.npy"]["shape"][-1],
            latents["mean"],
            latents["std"],
            fold,
            dict(manifest.fingerprints),
            TextStates(null["tokens"], null["pooled"]),
        )

    @property
    def scaling(self) -> LatentScaling:
        return LatentScaling(self.mean, self.std, self.fold)

    @property
    def unet_shape(self) -> tuple[int, int, int]:
        """(C, h, w) that the U-Net sees."""
        channels, h, w = self.moments_shape
        return channels // 2 * self.fold**2, h // self.fold, w // self.fold

    def refuse_other_encoders(self, autoencoder: str | None, clip: str | None) -> None:
        """Latents or text states that the encoders of these fingerprints did not make; None: unknown, not checked."""
        for option, field, mark in (("autoencoder", "autoencoder", autoencoder), ("clip", "text_encoder", clip)):
            if mark is not None and mark != self.fingerprints[field]:
                raise UserError(
                    f"the latents were made by {field} {self.fingerprints[field]}, but {option}.path holds "
                    f"{mark}: give the one that made them, or run precompute_latents.py with this one."
                )

    def refuse_other_shapes(self, unet: nn.Module) -> None:
        """A U-Net that these latents and text states don't fit into."""
        for what, has, needs in (
            ("unet.in_channels", unet.in_channels, self.unet_shape[0]),
            ("unet.context_dim", unet.context_dim, self.context_dim),
            ("unet.vector_dim", unet.vector_dim, self.pooled_dim),
        ):
            if has is not None and has != needs:
                raise UserError(f"{what}={has} does not fit this data set (fold={self.fold}): set {what}={needs}.")

    def save(self, run: Path) -> None:
        """<run>/latents.json and <run>/null.safetensors."""
        about: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__ if name != "null"}
        storage.write_atomically(run / "latents.json", json.dumps(about, indent=1).encode())
        null = {"tokens": self.null.tokens, "pooled": self.null.pooled}
        storage.write_atomically(run / "null.safetensors", save(null))

    @classmethod
    def of_run(cls, run: Path) -> LatentFacts:
        """What `save` wrote."""
        about = json.loads((run / "latents.json").read_text())
        null = load((run / "null.safetensors").read_bytes())
        about["moments_shape"] = tuple(about["moments_shape"])
        return cls(**about, null=TextStates(null["tokens"], null["pooled"]))
