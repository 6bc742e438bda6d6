"""Zero-shot classification by a CLIP: the class name whose text is nearest to a picture (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from data_pipeline.common.errors import UserError
from train.evaluation.retrieval import image_features
from train.models.clip import CLIP


@dataclass(frozen=True, slots=True)
class ZeroShot:
    """field: of the samples' json, whose values are the class names; templates: sentences with {} for the name."""

    field: str
    templates: Sequence[str] = ("{}",)

    def __post_init__(self) -> None:
        if wrong := [template for template in self.templates if "{}" not in template]:
            raise UserError(f"zero_shot.templates has {wrong[0]!r} without {{}}, where the class name goes: add it.")

    def classes(self, samples: Sequence[dict[str, Any]]) -> list[str]:
        """The class names of these samples, sorted; UserError if one has none."""
        lacking = [sample["key"] for sample in samples if self.field not in sample["meta"]]
        if lacking:
            fields = ", ".join(sorted(samples[0]["meta"])) or "none"
            raise UserError(
                f"zero_shot.field={self.field} is not in the json of {lacking[0]}: use a field that every sample has "
                f"({fields})."
            )
        return sorted({str(sample["meta"][self.field]) for sample in samples})

    @torch.no_grad()
    def accuracy(self, clip: CLIP, samples: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Share of the samples whose own class is the nearest, and the number of classes."""
        names = self.classes(samples)
        weights = torch.stack([self._class_vector(clip, name) for name in names])
        nearest = (image_features(clip, samples) @ weights.T).argmax(1).tolist()
        right = [names[i] == str(sample["meta"][self.field]) for i, sample in zip(nearest, samples, strict=True)]
        return {"heldout_zero_shot_top1": sum(right) / len(right), "heldout_zero_shot_classes": float(len(names))}

    def _class_vector(self, clip: CLIP, name: str) -> Tensor:
        """The mean of the normalised features of all templates, normalised."""
        states = clip.encode_text([template.replace("{}", name) for template in self.templates]).pooled
        return functional.normalize(functional.normalize(states, dim=-1).mean(0), dim=-1)
