"""The sizes to draw at, as options of sampling: micro-conditioning as in SDXL (docs/conditioning.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.common.errors import UserError
from data_pipeline.encode.conditions import PlainCondition, Sample, Tools
from data_pipeline.shards.json_fields import GEOMETRY, is_pair, size_in

OPTIONS = dict(zip(("size.original", "size.crop", "size.target"), GEOMETRY, strict=True))  # option -> key of the json


class Size(PlainCondition):
    """size (B, 6): see data_pipeline/shards/json_fields.py. Not stored: training reads it from each sample's json. This
    class serves sampling: the sizes that the user asks for, and otherwise `mean`, that of the training data."""

    optional, fields = tuple(OPTIONS), ("size",)

    def __init__(self, mean: Sequence[float]) -> None:
        pairs = list(zip(mean[::2], mean[1::2], strict=False))
        if len(mean) != 6 or not all(map(is_pair, pairs)):
            raise UserError(f"mean={list(mean)} is not six numbers of pixels: copy the file again.")
        self.mean = dict(zip(GEOMETRY, pairs, strict=True))

    def config(self) -> dict[str, Any]:
        return {**super().config(), "mean": [value for pair in self.mean.values() for value in pair]}

    def encode(self, samples: Sequence[Sample], images: Tensor | None, tools: Tools) -> dict[str, Tensor]:
        return {"size": torch.from_numpy(np.stack([size_in({**self.mean, **sample["meta"]}) for sample in samples]))}

    def as_sample(self, **given: Any) -> dict[str, Any]:
        for option, value in given.items():
            if not is_pair(value):
                raise UserError(f"{option}={value} is not two numbers of pixels: write them as {option}=[512,512].")
        return {"meta": {OPTIONS[option]: list(value) for option, value in given.items()}}
