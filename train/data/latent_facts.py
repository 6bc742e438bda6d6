"""Facts on a latent data set that training and sampling need: scale, shapes, nulls, and the encoders that made it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, UserError
from data_pipeline.common.saved_names import named
from data_pipeline.common.saved_objects import read_json, refuse_wrong_kinds
from data_pipeline.encode.encoders import TEXT_ENCODERS
from data_pipeline.shards.manifest import Manifest
from train.models.conditioning import Conditioners
from train.models.latents import STORED_AS, LatentScaling, OneFactor, StoredLatents


@dataclass(frozen=True, slots=True)
class LatentFacts:
    """Facts on a latent data set. Also saved in the run folder, so that sampling uses the same as training."""

    shapes: Mapping[str, Sequence[int]]  # of the stored fields, unbatched
    mean: list[float]  # per channel, of posterior draws over the training split
    std: list[float]
    fold: int
    fingerprints: Mapping[str, str]
    conditions: Mapping[str, Mapping[str, Any]]  # how to build each condition again
    null: Mapping[str, Tensor]  # null conditions from the encoders, by field
    codebook: Tensor | None = None
    # By bucket, if there are several: shapes, and the mean sizes if the run is conditioned on sizes.
    buckets: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)
    bucket_sizes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    stated: Mapping[str, Sequence[float]] = field(
        default_factory=dict
    )  # mean and std that the first stage's files state

    @classmethod
    def of(cls, root: str, manifest: Manifest, fold: int, scaling: OneFactor | None = None) -> LatentFacts:
        """Read from a latent data set, with the statistics that precompute measured on all of it.

        scaling: as of a published model instead, the same for all channels.
        """
        shapes = {
            name.removesuffix(".npy"): field["shape"] for name, field in manifest.fields.items() if "shape" in field
        }
        where, latents = storage.join(root, "manifest.json"), manifest.info.get("latents")
        facts = dict(latents) if isinstance(latents, Mapping) else {}
        facts |= {"shapes": shapes, "fold": fold, "fingerprints": dict(manifest.fingerprints)}
        facts |= {"conditions": named(manifest.info.get("conditions", {}))}
        refuse_wrong_kinds(facts, KINDS, f"{where}: info")
        refuse_no_latents(shapes, where)
        refuse_wrong_kinds({"stated": {}, **facts}, STATED, f"{where}: info")
        null, codebook = tensors_in(storage.join(root, "null.safetensors")), codebook_of(root)
        own = {name: facts[name] for name in KINDS} | {"stated": facts.get("stated", {})}
        return cls(**own, null=null, codebook=codebook).checked(scaling)

    def checked(self, scaling: OneFactor | None) -> LatentFacts:
        """With `scaling`, if given, in place of measured statistics; UserError for a fold that does not fit."""
        _, h, w = self.latent_shape
        if h % self.fold or w % self.fold:
            raise UserError(f"fold={self.fold} does not divide latents of {h}x{w}: choose one that does.")
        return self if scaling is None else replace(self, **scaling.per_channel(len(self.mean)))

    def of_bucket(self, name: str | None) -> LatentFacts:
        """The facts with the shapes and mean sizes of an aspect-ratio bucket; None: unchanged. UserError if there is no
        such bucket."""
        if name is None:
            return self
        if name not in self.buckets:
            known = f"take one of {', '.join(self.buckets)}" if self.buckets else "it has one size: leave bucket= out"
            raise UserError(f"bucket={name} is none that this run was trained on: {known}.")
        changed = replace(self, shapes=self.buckets[name])
        return changed.with_mean_size(self.bucket_sizes[name]) if name in self.bucket_sizes else changed

    def with_mean_size(self, mean: Sequence[float]) -> LatentFacts:
        """The facts with the sizes at which sampling draws by default."""
        return replace(self, conditions={**self.conditions, "size": {"name": "size", "mean": list(mean)}})

    @property
    def stored_as(self) -> str:
        return next(name for name in STORED_AS if name in self.shapes)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of unscaled latents."""
        h, w = self.shapes[self.stored_as][-2:]
        return len(self.mean), h, w

    @property
    def unet_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the U-Net's input."""
        channels, h, w = self.latent_shape
        return channels * self.fold**2, h // self.fold, w // self.fold

    @property
    def scaling(self) -> LatentScaling:
        return LatentScaling(self.mean, self.std, self.fold)

    @property
    def latents(self) -> StoredLatents:
        return StoredLatents(self.stored_as, self.scaling, self.codebook)

    def classes(self, condition: str) -> Sequence[str]:
        """The class names of a condition; conditioners look them up by number."""
        names = self.conditions.get(condition, {}).get("classes")
        refuse_wrong_kinds({"classes": names}, {"classes": Sequence[str]}, f"condition {condition} of the latents")
        return names

    def refuse_other_encoders(self, marks: Mapping[str, str | None]) -> None:
        """UserError if encoders with these fingerprints, by their groups in conf/, did not make the latents or text
        states; None: not checked."""
        for option, mark in marks.items():
            name = TEXT_ENCODERS.get(option, option)
            if mark is not None and mark != self.fingerprints.get(name, mark):
                raise UserError(
                    f"the latents were made with {name} {self.fingerprints[name]}, but {option}.path contains "
                    f"{mark}: use the one that made them, or run precompute_latents.py with this one."
                )

    def refuse_other_shapes(self, unet: Mapping[str, Any], conditioner: Conditioners) -> None:
        """UserError if the U-Net of this configuration does not fit the latents and conditioners."""
        channels, planes = self.unet_shape[0], conditioner.concat_channels
        uses_vector = unet["vector_dim"] or conditioner.needs_vector
        needed = [
            ("unet.in_channels", unet["in_channels"], channels + planes),
            ("unet.out_channels", unet["out_channels"], channels),
            *(("unet.context_dim", unet["context_dim"], width) for width in conditioner.context_dims.values()),
            ("unet.context_dim", unet["context_dim"], conditioner.context_dim),
            *([("unet.vector_dim", unet["vector_dim"], conditioner.vector_dim)] if uses_vector else []),
        ]
        misfits = {name: (has, needs) for name, has, needs in needed if has != needs}
        if misfits:
            has = ", ".join(f"{name}={value}" for name, (value, _) in misfits.items())
            set_these = " ".join(f"{name}={'null' if value is None else value}" for name, (_, value) in misfits.items())
            raise UserError(
                f"{has} does not fit these latents ({self.latent_shape[0]} channels, fold={self.fold}) and their "
                f"conditioning: set {set_these}, or use latents, a fold and encoders that fit the U-Net."
            )
        self._refuse_uneven_buckets(conditioner)
        halvings = len(unet["channels"]) - 1
        for h, w in {self.of_bucket(name).unet_shape[1:]: None for name in self.buckets or (None,)}:
            if h % 2**halvings or w % 2**halvings:
                raise UserError(
                    f"latents of {h}x{w} (fold={self.fold}) can't be halved {halvings} times: use fewer levels in "
                    "unet.channels, or another fold or picture size."
                )

    def _refuse_uneven_buckets(self, conditioner: Conditioners) -> None:
        for bucket in self.buckets:
            if misfits := conditioner.misfits(self.of_bucket(bucket)):
                raise UserError(
                    f"conditioning=[{misfits[0]}]: in bucket {bucket} it has other proportions to the latents than in "
                    "the others: make the latents with buckets whose sides are multiples of "
                    f"conditions.{misfits[0]}.factor, use one bucket, or leave {misfits[0]} out."
                )

    def save(self, run: Path) -> None:
        """Write <run>/latents.json, null.safetensors and, for codes, codebook.safetensors."""
        about = {name: getattr(self, name) for name in KINDS}
        about |= {name: value for name in OF_BUCKETS if (value := getattr(self, name))}
        storage.write_atomically(run / "latents.json", json.dumps(about, indent=1).encode())
        storage.write_atomically(run / "null.safetensors", save(dict(self.null)))
        if self.codebook is not None:
            storage.write_atomically(run / "codebook.safetensors", save({"codebook": self.codebook}))

    @classmethod
    def of_run(cls, run: Path) -> LatentFacts:
        """Read what `save` wrote."""
        saved = read_json(run / "latents.json")
        saved = {name: {} for name in OF_BUCKETS} | saved
        refuse_wrong_kinds(saved, {**KINDS, **OF_BUCKETS}, str(run / "latents.json"))
        refuse_no_latents(saved["shapes"], str(run / "latents.json"))
        about = {name: saved[name] for name in (*KINDS, *OF_BUCKETS)} | {"conditions": named(saved["conditions"])}
        return cls(**about, null=tensors_in(str(run / "null.safetensors")), codebook=codebook_of(run))


# Types of the fields in latents.json; those of buckets only if there are any.
HINTS = get_type_hints(LatentFacts)
OF_BUCKETS = {name: hint for name, hint in HINTS.items() if name.startswith("bucket")}
STATED = {"stated": HINTS["stated"]}
KINDS = {name: hint for name, hint in HINTS.items() if name not in ("null", "codebook", *STATED, *OF_BUCKETS)}


def refuse_no_latents(shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """DataError if no field holds latents of (C, h, w) or codes of (h, w)."""
    if not any(len(shapes.get(name, ())) in (2, 3) for name in STORED_AS):
        raise DataError(f"{where} has no field with latents ({', '.join(STORED_AS)}): make or copy the data set again.")


def codebook_of(root: str | Path) -> Tensor | None:
    """The codebook (N, C) of a data set or run; None if its latents are not codes."""
    path = storage.join(root, "codebook.safetensors")
    return tensors_in(path)["codebook"] if storage.exists(path) else None


def tensors_in(path: str) -> dict[str, Tensor]:
    """The tensors of a small safetensors file."""
    try:
        return load(storage.read_bytes(path))
    except SafetensorError as error:
        raise DataError(f"{path} is damaged ({error}): make or copy it again.") from error
