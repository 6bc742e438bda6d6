"""The first stage to start from (start_from= of train_autoencoder.py): its options, its weights, and what a tuned
decoder keeps of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from train.models.autoencoder import ENCODER, Autoencoder
from train.weights.first_stages import load_first_stage
from train.weights.saved import fingerprint
from train.weights.shapes import autoencoder_options

TARGET = f"{Autoencoder.__module__}."  # followed by the class
FROM_START = f"{__name__}.from_start"  # as conf/autoencoder/from_start.yaml has it


def from_start(**options: Any) -> NoReturn:
    """What autoencoder=from_start builds where there is no start_from=: a UserError."""
    raise UserError(
        "autoencoder=from_start is only for train_autoencoder.py, with start_from=: use autoencoder=trained or "
        "autoencoder=stable_diffusion, with autoencoder.path=."
    )


@dataclass(frozen=True, slots=True)
class BaseFirstStage:
    """A trained first stage. made_latents_of: the fingerprint that data sets of its latents record."""

    path: str
    kind: str  # the class
    options: dict[str, Any]
    weights: Mapping[str, Tensor]
    made_latents_of: str
    stated_scaling: Mapping[str, Sequence[float]] | None

    @classmethod
    def at(cls, path: str) -> BaseFirstStage:
        """Reads a run's folder, a diffusers folder or a CompVis file. UserError if there is no first stage."""
        if not Path(path).exists():
            raise UserError(
                f"start_from={path} does not exist: use the output= of a train_autoencoder.py run, a diffusers folder, "
                "or a single file."
            )
        if (Path(path) / "run_id").exists() and not (Path(path) / "config.json").exists():
            raise UserError(f"start_from={path} contains no first stage: use a finished train_autoencoder.py run.")
        model = load_first_stage(path)
        options = autoencoder_options(model)
        return cls(path, type(model).__name__, options, model.state_dict(), model.fingerprint, model.stated_scaling)

    @property
    def identity(self) -> str:
        """What resumed runs must share: 16 hex digits of all weights."""
        return fingerprint({}, dict(self.weights))

    def configuration(self, autoencoder: Mapping[str, Any]) -> dict[str, Any]:
        """The options of autoencoder=; for autoencoder=from_start, this model's own."""
        if autoencoder["_target_"] != FROM_START:
            return dict(autoencoder)
        return {**self.options, "_target_": TARGET + self.kind, "channels_last": autoencoder["channels_last"]}

    def load_into(self, autoencoder: nn.Module) -> None:
        """Sets all weights. UserError for another architecture: one sentence, not one per tensor."""
        ours, theirs = (
            {"class": kind, "attention_levels": None, "quant_conv": True, **options}
            for kind, options in (
                (type(autoencoder).__name__, autoencoder_options(autoencoder)),
                (self.kind, self.options),
            )
        )
        if names := [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]:
            has, asked = (", ".join(f"{name}={of.get(name)}" for name in names) for of in (theirs, ours))
            raise UserError(
                f"start_from={self.path} has a first stage with {has}, but autoencoder= has {asked}: use "
                "autoencoder=from_start, which sets autoencoder= to that of start_from=."
            )
        autoencoder.load_state_dict(self.weights)

    def kept_by_decoder(self) -> dict[str, Any]:
        """What config.json says of a model of which only the decoder was trained further: whose latents it decodes."""
        scaling = {"stated_scaling": dict(self.stated_scaling)} if self.stated_scaling else {}
        return {"encoder_of": self.made_latents_of, **scaling}


def encoder_weights(autoencoder: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights that determine the latents, by name, on the CPU."""
    found = {name: value for name, value in autoencoder.state_dict().items() if name.startswith(ENCODER)}
    return {name: value.detach().to("cpu", copy=True) for name, value in found.items()}
