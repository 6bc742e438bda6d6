"""Training directly on pictures and captions: frozen encoders make from each batch what precompute would store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from data_pipeline.common.saved_objects import build
from data_pipeline.encode.encoders import TEXT_ENCODERS
from data_pipeline.loading.batch import Batch
from data_pipeline.shards.samples import collated
from train.data.build import Instantiate, encoders_used
from train.data.latent_facts import LatentFacts
from train.models.latents import OneFactor

# Conditions to encode, by conditioning; all others need facts that precompute learns from a whole data set.
CONDITIONS: Mapping[str, dict[str, Any]] = {
    "text": {"text": {"name": "text"}},
    "text_t5": {"text_t5": {"name": "text_t5", "pooled": False}},
    "joint_text": {},
}
ENCODED_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class OnlineLatents:
    """The encoders, outside the engine: not trained, not sharded, and in fp32. Conditions are encoded with `image`,
    `text` (clip=) and `text_encoder`."""

    image: nn.Module
    text: nn.Module | None
    text_encoder: nn.Module | None
    conditions: Mapping[str, Any]
    device: torch.device

    @classmethod
    def of(cls, config: Mapping[str, Any], instantiate: Instantiate, device: torch.device) -> OnlineLatents:
        """Build from a training configuration; UserError for conditionings that can't be encoded online."""
        unknown = [name for name in config["conditioning"] if name not in CONDITIONS]
        if unknown:
            raise UserError(
                f"conditioning=[{','.join(unknown)}] can't be computed from image-text shards during training: make "
                "latents with precompute_latents.py, and use them as input=."
            )
        wanted = {k: v for name in config["conditioning"] for k, v in CONDITIONS[name].items()}
        if "text" in wanted and "text_t5" not in wanted and config.get("text_encoder", {}).get("path"):
            wanted["text"] = {**wanted["text"], "encoder": "text_encoder"}
        conditions = {name: build(made, "conditions", name) for name, made in wanted.items()}
        needed = ["autoencoder", *encoders_used(conditions)]
        for name in needed:
            if "path" in config[name] and Path(config[name]["path"] or "none").name == "none":
                raise UserError(f"input= contains pictures, which must be encoded: add {name}.path=....")
        image, text, second = (
            frozen(instantiate(config[name]), device) if name in needed else None
            for name in ("autoencoder", *TEXT_ENCODERS)
        )
        made = cls(image, text, second, conditions, device)
        for condition in conditions.values():
            condition.settle(made)
        return made

    @torch.no_grad()
    def encoded(self, images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Fields by name, as in a latent data set. images: (B, 3, H, W) in [-1, 1]."""
        images = images.to(self.device, non_blocking=True)
        fields = {self.image.stored_as: self.image.encode_stored(images)}
        for condition in self.conditions.values():
            fields |= condition.encode([{"caption": caption} for caption in captions], images, self)
        return fields

    def loader(self, make_loader: Callable[..., Iterable[Batch]]) -> Callable[..., Iterable[Batch]]:
        """Turns a function that makes loaders of pictures into one that makes loaders of latents, in the same order."""
        return lambda **how: EncodedBatches(make_loader(**how), self)

    def read(self, read: Callable[..., list[dict[str, Any]]]) -> Callable[..., list[dict[str, Any]]]:
        """Turns a function that reads samples with pictures into one that returns them with latents."""
        return lambda **how: list(self._encoded_samples(read(**how)))

    def _encoded_samples(self, samples: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for first in range(0, len(samples), ENCODED_AT_ONCE):
            part = samples[first : first + ENCODED_AT_ONCE]
            fields = self.encoded(collated(part)["image"], [sample["caption"] for sample in part])
            arrays = {name: value.cpu().numpy() for name, value in fields.items()}
            for i, sample in enumerate(part):
                plain = {name: sample[name] for name in ("key", "caption", "meta")}
                yield plain | {name: np.asarray(value[i]) for name, value in arrays.items()}  # a length is no array

    def facts(self, batches: Iterable[Batch], fold: int, scaling: OneFactor | None = None) -> LatentFacts:
        """Facts on the latents; shapes, mean and standard deviation come from these batches of pictures."""
        codebook = self.image.codebook.detach().float().cpu() if self.image.stored_as == "indices" else None
        found, conditions = self._measured(batches), {name: made.config() for name, made in self.conditions.items()}
        facts = LatentFacts(*found, fold, self.fingerprints, conditions, self._null(), codebook)
        return replace(facts, stated=self.image.stated_scaling or {}).checked(scaling)

    def _measured(self, batches: Iterable[Batch]) -> tuple[dict[str, list[int]], list[float], list[float]]:
        """Shapes of the fields; mean and standard deviation of the latents per channel."""
        sums, count, fields = torch.zeros(2, 1, dtype=torch.float64), 0, {}
        for batch in batches:
            fields = self.encoded(batch.tensors["image"], batch.captions)
            mean, variance = (part.double().cpu() for part in self.image.posterior_of(fields[self.image.stored_as]))
            sums = sums + torch.stack([mean.sum((0, 2, 3)), (mean.square() + variance).sum((0, 2, 3))])
            count += mean.numel() // mean.shape[1]
        mean, square = sums / count
        shapes = {name: list(value.shape[1:]) for name, value in fields.items()}
        return shapes, mean.tolist(), (square - mean.square()).sqrt().tolist()

    @property
    def fingerprints(self) -> dict[str, str]:
        made_of = {"autoencoder": self.image.fingerprint}
        texts = zip(TEXT_ENCODERS.values(), (self.text, self.text_encoder), strict=True)
        return made_of | {name: text.fingerprint for name, text in texts if text is not None}

    @torch.no_grad()
    def _null(self) -> dict[str, Tensor]:
        null: dict[str, Tensor] = {}
        for condition in self.conditions.values():
            null |= {name: value.float().cpu().contiguous() for name, value in condition.null(self).items()}
        return null


def frozen(encoder: nn.Module, device: torch.device) -> nn.Module:
    return encoder.to(device).eval().requires_grad_(False)


def first_batches(
    make_loader: Callable[..., Iterable[Batch]], batch_size: int, samples: int, data_samples: int
) -> Iterator[Batch]:
    """The first batches, undivided and so the same on every rank: `samples`, or one epoch of a smaller data set."""
    loader = make_loader(batch_size=batch_size)
    return islice(iter(loader), max(min(samples, data_samples) // batch_size, 1))


class EncodedBatches:
    """A loader whose batches have latents instead of pictures."""

    def __init__(self, loader: Iterable[Batch], encoders: OnlineLatents) -> None:
        self.loader, self.encoders = loader, encoders

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield replace(batch, tensors=self.encoders.encoded(batch.tensors["image"], batch.captions))

    def shards_of(self, step: int) -> list[str]:
        """The loader's shards of a step, to report what a waiting rank waits for."""
        return self.loader.shards_of(step)

    def epochs(self, step: int) -> dict[str, float]:
        """As the loader's epochs, for each data set."""
        return self.loader.epochs(step)
