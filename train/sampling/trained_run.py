"""A finished (or running) train_ldm run, ready for sampling: its EMA weights, decoder, encoders and nulls."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from data_pipeline.common.errors import DataError, UserError
from data_pipeline.common.saved_names import named
from data_pipeline.common.saved_objects import build, checked, read_config, targets_in
from data_pipeline.encode.encoders import TEXT_ENCODERS
from data_pipeline.shards.caption_edits import CaptionEdits
from data_pipeline.shards.samples import collated
from train.checkpointing.ema_weights import EmaWeights, ema_weights
from train.data.build import encoders_used, network_of, used_conditions
from train.data.latent_facts import LatentFacts
from train.sampling.decoders import with_decoder
from train.sampling.generator import ConditionBatch, Generator, generator_of

SECTIONS = ("autoencoder", "clip", "conditioning", "unet", "objective", "sampler", "guidance")


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """generator draws pictures; conditions turn samples into the network's conditions, with `image`, `text` (clip=) and
    `text_encoder` as their encoders; config is the run's configuration."""

    generator: Generator
    image: nn.Module
    text: nn.Module | None
    conditions: Mapping[str, Any]
    facts: LatentFacts
    config: dict[str, Any]
    weights: str  # path of the weights file
    text_encoder: nn.Module | None = None

    @property
    def step(self) -> int | str:
        """The step of the checkpoint, or the name of a file from rebuild_ema.py."""
        path = Path(self.weights)
        return int(path.parent.name.removeprefix("step-")) if path.parent.name.startswith("step-") else path.stem

    @property
    def caption_edits(self) -> CaptionEdits:
        """How the captions of the pictures were edited before the run was trained on them: by precompute_latents.py, or
        during training. Tags stay in their own order."""
        stored = json.loads(self.facts.fingerprints.get("caption_edits", "{}"))
        online = self.config.get("data", {}).get("captions") or {}
        names = {field.name for field in fields(CaptionEdits)}
        return CaptionEdits(**{name: value for name, value in {**online, **stored}.items() if name in names})

    @property
    def picture_size(self) -> tuple[int, int]:
        """(H, W) of the pictures that it draws."""
        _, h, w = self.facts.latent_shape
        return h * self.image.factor, w * self.image.factor

    @torch.no_grad()
    def encode_conditions(self, samples: Sequence[Mapping[str, Any]], batch_size: int = 64) -> ConditionBatch:
        """Conditions of samples ({"key", "caption", "meta", "image"}), computed as in precompute."""
        parts = [self._fields(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]
        fields = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
        return ConditionBatch(fields, [sample["caption"] for sample in samples])

    def _fields(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        images = collated(samples).get("image")
        images = None if images is None else images.to(self.generator.device)
        fields: dict[str, torch.Tensor] = {}
        for condition in self.conditions.values():
            fields |= condition.encode(samples, images, self)
        return fields


def open_run(
    run: str,
    step: str | int,
    paths: Mapping[str, str | None] = MappingProxyType({}),
    bucket: str | None = None,
    decoder: str | None = None,
) -> TrainedRun:
    """Loads a run with its EMA weights in fp32. paths: of encoders, by their groups in conf/, if they have moved since
    training. bucket: the size to draw in a run on aspect-ratio buckets; None: that of most of its samples. decoder:
    path of one to draw with instead.

    The folder may be untrusted: only data_pipeline/common/saved_objects.py builds the objects that its files name.
    """
    folder = Path(run)
    kind = made_by(folder)
    if kind not in (None, "train_ldm"):
        raise UserError(f"input={run} is a run of {kind}.py: use the output= of train_ldm.py.")
    if not (folder / "config.yaml").exists():
        raise UserError(f"input={run} is not a run (no config.yaml there): use the output= of train_ldm.py.")
    config, where = sections_of(folder / "config.yaml"), f"{folder / 'config.yaml'}: "
    unet = checked(config["unet"], "unet", f"{where}unet")  # before loading weights, which is slow
    make_objective = build(config["objective"], "objective", f"{where}objective")
    for group in ("sampler", "guidance"):
        build(config[group], group, where + group)
    facts = LatentFacts.of_run(folder).of_bucket(bucket)
    weights = ema_weights(folder, step)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    conditions = used_conditions(config, facts, f"{folder / 'latents.json'}")
    given = config["conditioning"].items()
    parts = {name: build(entry, "conditioning", f"{where}conditioning.{name}") for name, entry in given}
    network = network_of(unet.arguments, unet.build, parts, facts)
    encoders = {
        name: encoder_of(config, name, paths.get(name), where).to(device)
        for name in ("autoencoder", *encoders_used(conditions))
    }
    facts.refuse_other_encoders({name: encoder.fingerprint for name, encoder in encoders.items()})
    load(network, weights, where)
    network.to(device).eval().requires_grad_(False)
    objective = make_objective(network=network, latents=facts.latents)
    generator = generator_of(network, objective, facts, encoders["autoencoder"], device)
    generator = with_decoder(generator, decoder, encoders["autoencoder"], facts)
    image, text, second = (encoders.get(name) for name in ("autoencoder", *TEXT_ENCODERS))
    return TrainedRun(generator, image, text, conditions, facts, config, weights.path, second)


def made_by(folder: Path) -> str | None:
    """The program that made a run's folder; None if it is not recorded."""
    marker = folder / "run_id"
    words = marker.read_text(errors="replace").split() if marker.exists() else []
    return words[0] if words else None


def sections_of(path: Path) -> dict[str, Any]:
    """A run's configuration; DataError if it lacks a section that is needed to open the run."""
    config = read_config(path)
    if lacking := [name for name in SECTIONS if not isinstance(config.get(name), Mapping)]:
        raise DataError(f"{path} has no {' and no '.join(lacking)}: use the output= of train_ldm.py.")
    return config


def load(network: nn.Module, weights: EmaWeights, where: str) -> None:
    """Loads the EMA weights; DataError if they belong to another network than the configuration's."""
    try:
        network.load_state_dict(weights.tensors)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise DataError(
            f"{weights.path} does not fit {where}unet and conditioning ({reason}): copy the run again."
        ) from error


def merged_with_run_config(config: Mapping[str, Any], group: str, given: Mapping[str, Any]) -> Any:
    """`sampler` or `guidance` of the run's sample grids, with the options of the command line replaced."""
    saved, chosen = config[group], {name: value for name, value in given.items() if value is not None}
    own: Collection[tuple[str, bool]] = targets_in(chosen)  # any class is allowed, since the user named it
    chosen = named(chosen)
    if {"name", "_target_"} & set(chosen):
        saved = {name: value for name, value in saved.items() if name not in ("name", "_target_")}
    try:
        return build({**saved, **chosen}, group, group, own)
    except DataError as error:  # the file has been checked, so this is the user's mistake
        raise UserError(str(error)) from error


def encoder_of(config: Mapping[str, Any], name: str, path: str | None, where: str) -> nn.Module:
    """An encoder of a run's configuration, from another path if one is given."""
    entry = {**config.get(name, {}), **({"path": path} if path else {})}
    return build(entry, name, name if path else where + name)


def encoder_paths(options: Mapping[str, Any]) -> dict[str, str | None]:
    """The options that say where a run's encoders are now, by their groups in conf/."""
    return {name: options[f"{name}_path"] for name in ("autoencoder", *TEXT_ENCODERS)}
