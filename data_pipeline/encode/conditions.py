"""What a latent sample is conditioned on, stored beside its latents: text states, class, boxes, pictures.

Precompute makes these from image-text samples, and sampling makes them from the user's options: with the same code,
so sampling matches training. A sample is {"key", "caption", "meta", "image" (H, W, 3) uint8}.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.common.errors import UserError
from data_pipeline.common.saved_names import entry_of
from data_pipeline.encode.encoders import ImageEncoder, TextEncoder

Sample = Mapping[str, Any]


class Tools(Protocol):
    """The encoders available; text is clip=, text_encoder is text_encoder=, None where no condition uses them."""

    image: ImageEncoder
    text: TextEncoder | None
    text_encoder: TextEncoder | None


class Condition(Protocol):
    """options: those of sample_images.py that set it; optional: those that may be left out; encoder: the
    one that it uses beside the first stage, by its group in conf/; uses_first_stage: whether it needs that;
    uses_image_tower: whether it needs the CLIP's image tower.

    fields: what it stores; made_from: the parts of a sample (picture, caption, meta) that it depends on.
    """

    options: tuple[str, ...]
    optional: tuple[str, ...]
    encoder: str | None
    uses_first_stage: bool
    uses_image_tower: bool
    fields: tuple[str, ...]
    made_from: tuple[str, ...]

    def learn(self, samples: Iterable[Sample]) -> None:
        """Learn from the whole training split what is not configured (class names)."""

    def settle(self, tools: Tools) -> None:
        """Decide what depends on the encoders, which are loaded now."""

    def config(self) -> dict[str, Any]:
        """The arguments that build it again, with what it has learnt."""

    def reason_against(self, sample: Sample) -> str | None:
        """Why a sample can't be used; None if it can."""

    def encode(self, samples: Sequence[Sample], images: Tensor | None, tools: Tools) -> dict[str, Tensor]:
        """Fields by name, each (B, ...); images (B, 3, H, W) in [-1, 1]."""

    def null(self, tools: Tools) -> dict[str, Tensor]:
        """The fields' values without a condition, unbatched; only where an encoder defines them."""

    def as_sample(self, **given: Any) -> dict[str, Any]:
        """The user's options, `options` and any given `optional`, as parts of a sample."""


class PlainCondition:
    """A condition that learns nothing, accepts every sample and has no encoder-defined null."""

    options: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    encoder: str | None = None
    uses_first_stage = uses_image_tower = False
    fields: tuple[str, ...] = ()
    made_from: tuple[str, ...] = ("meta",)

    def learn(self, samples: Iterable[Sample]) -> None:
        pass

    def settle(self, tools: Tools) -> None:
        pass

    def config(self) -> dict[str, Any]:
        return entry_of(type(self))

    def reason_against(self, sample: Sample) -> str | None:
        return None

    def null(self, tools: Tools) -> dict[str, Tensor]:
        return {}


class Classes(PlainCondition):
    """A condition on named classes: those of the training split, in alphabetical order, unless given."""

    none_named = (
        "conditions=[label]: no sample names a class: check conditions.label.key, or set conditions.label.classes."
    )

    def __init__(self, classes: Sequence[str] | None = None) -> None:
        self.classes = None if classes is None else [str(name) for name in classes]

    def named_in(self, sample: Sample) -> list[str]:
        """The classes that a sample names."""
        raise NotImplementedError

    def learn(self, samples: Iterable[Sample]) -> None:
        if self.classes is None:
            self.classes = sorted({name for sample in samples for name in self.named_in(sample)})
            if not self.classes:
                raise UserError(self.none_named)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "classes": self.classes}

    def numbers(self, names: Iterable[str]) -> list[int]:
        """Class names to numbers; the error for an unknown name lists the known ones."""
        try:
            return [self.classes.index(name) for name in names]
        except ValueError:
            unknown = next(name for name in names if name not in self.classes)
            known = ", ".join(self.classes)
            if len(self.classes) > 12:
                near = difflib.get_close_matches(str(unknown), self.classes, 4, 0.3) or self.classes[:12]
                known = f"{', '.join(near)}, or another of {len(self.classes)}"
            raise UserError(f"class {unknown} is unknown: use one of {known}.") from None


class Label(Classes):
    """label (B,): the number of the class that meta[key] names."""

    options, fields = ("labels",), ("label",)

    def __init__(self, key: str = "group", classes: Sequence[str] | None = None) -> None:
        super().__init__(classes)
        self.key = key

    def config(self) -> dict[str, Any]:
        return {**super().config(), "key": self.key}

    def named_in(self, sample: Sample) -> list[str]:
        value = sample["meta"].get(self.key)
        return [] if value in (None, "") else [str(value)]

    def reason_against(self, sample: Sample) -> str | None:
        named = self.named_in(sample)
        if not named:
            return f"no {self.key} in its json"
        return None if named[0] in self.classes else f"{self.key} is not one of the classes"

    def encode(self, samples: Sequence[Sample], images: Tensor | None, tools: Tools) -> dict[str, Tensor]:
        return {"label": torch.tensor([self.numbers(self.named_in(sample))[0] for sample in samples])}

    def as_sample(self, labels: str) -> dict[str, Any]:
        self.numbers([str(labels)])
        return {"meta": {self.key: labels}}


class Layout(Classes):
    """boxes (B, N, 4), x0 y0 x1 y1 as fractions of the picture, and box_label (B, N), -1 where there is no box.

    From meta["boxes"]: a list of [class, x0, y0, x1, y1].
    """

    none_named = (
        "conditions=[layout]: no sample has boxes in its json: add boxes: [[class, x0, y0, x1, y1], ...] to the "
        "samples, or use make_shards.py source=openmoji_pairs."
    )
    options, fields = ("layouts",), ("boxes", "box_label")

    def __init__(self, max_boxes: int = 8, classes: Sequence[str] | None = None) -> None:
        super().__init__(classes)
        self.max_boxes = max_boxes

    def config(self) -> dict[str, Any]:
        return {**super().config(), "max_boxes": self.max_boxes}

    def named_in(self, sample: Sample) -> list[str]:
        boxes = sample["meta"].get("boxes")
        return [str(box[0]) for box in boxes if well_formed(box)] if isinstance(boxes, list) else []

    def reason_against(self, sample: Sample) -> str | None:
        boxes = sample["meta"].get("boxes")
        if not boxes or not isinstance(boxes, list):
            return "no boxes in its json"
        if len(boxes) > self.max_boxes:
            return f"more than max_boxes={self.max_boxes} boxes"
        if not all(well_formed(box) for box in boxes):
            return "a box is not [class, x0, y0, x1, y1] with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1"
        return None if set(self.named_in(sample)) <= set(self.classes) else "a box's class is not one of the classes"

    def encode(self, samples: Sequence[Sample], images: Tensor | None, tools: Tools) -> dict[str, Tensor]:
        boxes = torch.zeros(len(samples), self.max_boxes, 4)
        labels = torch.full((len(samples), self.max_boxes), -1)
        for i, sample in enumerate(samples):
            listed = sample["meta"]["boxes"]
            boxes[i, : len(listed)] = torch.tensor([box[1:] for box in listed])
            labels[i, : len(listed)] = torch.tensor(self.numbers(self.named_in(sample)))
        return {"boxes": boxes, "box_label": labels}

    def as_sample(self, layouts: Sequence[Sequence[Any]]) -> dict[str, Any]:
        if not isinstance(layouts, list | tuple) or not all(isinstance(box, list | tuple) for box in layouts):
            raise UserError(f"layouts: {layouts} is not a list of boxes: use layouts='[[[class,x0,y0,x1,y1]]]'.")
        sample = {"meta": {"boxes": [list(box) for box in layouts]}}
        self.numbers(self.named_in(sample))
        if reason := self.reason_against(sample):
            raise UserError(f"layouts: {reason}.")
        return sample


def well_formed(box: Any) -> bool:
    """Whether a box is [class, x0, y0, x1, y1] in fractions, with a positive area."""
    if (
        not isinstance(box, list | tuple)
        or len(box) != 5
        or not all(isinstance(value, int | float) for value in box[1:])
    ):
        return False
    x0, y0, x1, y1 = box[1:]
    return 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


class OfPicture(PlainCondition):
    """A condition that is made from the picture itself."""

    options, made_from = ("images",), ("picture",)

    def as_sample(self, images: np.ndarray) -> dict[str, Any]:
        return {"image": images}


class ImageEmbedding(OfPicture):
    """image_embedding (B, E): the CLIP's embedding of the picture, at unit variance."""

    encoder, uses_image_tower, fields = "clip", True, ("image_embedding",)

    def encode(self, samples: Sequence[Sample], images: Tensor | None, tools: Tools) -> dict[str, Tensor]:
        refuse_text_alone(tools.text)
        return {"image_embedding": tools.text.encode_image(images)}


def refuse_text_alone(text: TextEncoder) -> None:
    """Refuse a text-only encoder where a CLIP with both towers is needed."""
    if not hasattr(text, "encode_image"):
        raise UserError(
            "conditions=[image_embedding] needs a CLIP with an image tower: use clip=trained, from train_clip.py."
        )


class LowResolution(OfPicture):
    """low_resolution (B, 3, H/factor, W/factor) in [-1, 1], box-averaged: what super-resolution starts from."""

    fields = ("low_resolution",)

    def __init__(self, factor: int = 4) -> None:
        self.factor = factor

    def config(self) -> dict[str, Any]:
        return {**super().config(), "factor": self.factor}

    def encode(self, samples: Sequence[Sample], images: Tensor | None, tools: Tools) -> dict[str, Tensor]:
        return {"low_resolution": F.avg_pool2d(images, self.factor)}


class Hole(PlainCondition):
    """hole (B, 1, h, w), 1 where the picture is to be filled in, and masked_latents (B, C, h, w), the first stage's of
    the picture with that part grey: what inpainting starts from (Rombach et al. 2022, sec. 4.5).

    The hole is meta["hole"] = [x0, y0, x1, y1] in fractions where given, else a box drawn by the sample's key, each of
    its sides between `smallest` and `largest` of the picture's.
    """

    options, made_from = ("images", "holes"), ("picture", "meta")
    uses_first_stage, fields = True, ("hole", "masked_latents")

    def __init__(self, smallest: float = 0.25, largest: float = 0.75) -> None:
        if not 0 < smallest <= largest <= 1:
            raise UserError(
                f"conditions.hole: smallest={smallest} largest={largest} must satisfy 0 < smallest <= largest <= 1."
            )
        self.smallest, self.largest = smallest, largest

    def reason_against(self, sample: Sample) -> str | None:
        hole = sample["meta"].get("hole")
        if hole is None or (isinstance(hole, list) and well_formed(["hole", *hole])):
            return None
        return "its hole is not [x0, y0, x1, y1] in fractions"

    def config(self) -> dict[str, Any]:
        return {**super().config(), "smallest": self.smallest, "largest": self.largest}

    def encode(self, samples: Sequence[Sample], images: Tensor | None, tools: Tools) -> dict[str, Tensor]:
        factor = tools.image.factor
        height, width = images.shape[-2] // factor, images.shape[-1] // factor
        hole = torch.zeros(len(samples), 1, height, width, device=images.device)
        for i, sample in enumerate(samples):
            x0, y0, x1, y1 = sample["meta"].get("hole") or self.drawn(sample["key"])
            hole[i, 0, cells(y0, y1, height), cells(x0, x1, width)] = 1
        seen = images * (1 - hole.repeat_interleave(factor, 2).repeat_interleave(factor, 3))
        mean, _ = tools.image.posterior_of(tools.image.encode_stored(seen))
        return {"hole": hole, "masked_latents": mean}

    def drawn(self, key: str) -> tuple[float, float, float, float]:
        """A box that depends only on the key."""
        random = np.random.default_rng(list(hashlib.sha256(key.encode()).digest()))
        sides = random.uniform(self.smallest, self.largest, 2)
        x0, y0 = random.uniform(0, 1 - sides)
        return x0, y0, x0 + sides[0], y0 + sides[1]

    def as_sample(self, images: np.ndarray, holes: Sequence[float]) -> dict[str, Any]:
        if not isinstance(holes, list | tuple) or not well_formed(["hole", *holes]):
            raise UserError(f"holes: {holes} is not [x0, y0, x1, y1] in fractions of the picture.")
        return {"image": images, "meta": {"hole": list(holes)}}


def cells(start: float, end: float, count: int) -> slice:
    """The cells, out of `count`, that an interval in fractions covers: at least one."""
    first = min(round(start * count), count - 1)
    return slice(first, max(round(end * count), first + 1))
