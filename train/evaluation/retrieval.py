"""Retrieval of a CLIP, text to image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data_pipeline.images.pixels import from_uint8
from train.models.clip import CLIP

NEAREST = (1, 5, 10)
AT_ONCE = 128  # pictures


def retrieval_of(clip: CLIP, splits: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Text to image: how often the caption's own picture is among the 1, 5 and 10 nearest of its split, and the number
    of pictures that it is found among."""
    figures = {}
    for split, samples in splits.items():
        ranks = caption_ranks(clip, samples)
        figures |= {f"{split}_retrieval_top{n}": float((ranks < n).mean()) for n in NEAREST}
        figures[f"{split}_candidates"] = float(len(samples))
    return figures


@torch.no_grad()
def caption_ranks(clip: CLIP, samples: Sequence[dict[str, Any]]) -> np.ndarray:
    """For each caption, how many pictures are nearer than its own: (N,)."""
    parts = [samples[first : first + AT_ONCE] for first in range(0, len(samples), AT_ONCE)]
    texts = torch.cat([clip.encode_text([s["caption"] for s in part]).pooled for part in parts])
    similarity = texts @ image_features(clip, samples).T
    return (similarity > similarity.diagonal()[:, None]).sum(1).numpy()


@torch.no_grad()
def image_features(clip: CLIP, samples: Sequence[dict[str, Any]]) -> Tensor:
    """Unit vectors of the samples' pictures, (N, E)."""
    found = []
    for first in range(0, len(samples), AT_ONCE):
        part = samples[first : first + AT_ONCE]
        pixels = torch.from_numpy(from_uint8(np.stack([s["image"] for s in part]))).permute(0, 3, 1, 2)
        found.append(functional.normalize(clip.encode_image(pixels), dim=-1))
    return torch.cat(found)
