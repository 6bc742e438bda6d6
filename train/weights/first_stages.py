"""A trained first stage from wherever there is one: a run's folder, a diffusers folder, or a CompVis file."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from train.weights import published, saved
from train.weights.foreign import read_json


def load_first_stage(path: str) -> nn.Module:
    """AutoencoderKL or VQModel in eval mode, frozen, with its `fingerprint`."""
    for folder in (Path(path) / "vae", Path(path)):
        if "fingerprint" in about_model(folder):
            return saved.load_autoencoder(str(folder))
    return published.load_autoencoder(path)


def about_model(folder: Path) -> dict:
    """The folder's config.json; empty if it has none."""
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
