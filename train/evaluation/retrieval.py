"""Text-to-image retrieval of a CLIP."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from data_pipeline.images.pixels import from_uint8
from train.models.clip import CLIP


def retrieval_of(clip: CLIP, splits: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Text to image: how often the caption's own picture is the nearest of its split, or among the five nearest."""
    figures = {}
    for split, samples in splits.items():
        ranks = caption_ranks(clip, samples)
        figures[f"{split}_retrieval_top1"] = float((ranks < 1).mean())
        figures[f"{split}_retrieval_top5"] = float((ranks < 5).mean())
    return figures


@torch.no_grad()
def caption_ranks(clip: CLIP, samples: list[dict[str, Any]]) -> np.ndarray:
    """For each caption, how many pictures are nearer than its own: (N,)."""
    images, texts = [], []
    for first in range(0, len(samples), 128):
        part = samples[first : first + 128]
        pixels = torch.from_numpy(from_uint8(np.stack([s["image"] for s in part]))).permute(0, 3, 1, 2)
        image, text, _ = clip(pixels, [s["caption"] for s in part])
        images.append(image)
        texts.append(text)
    similarity = torch.cat(texts) @ torch.cat(images).T
    return (similarity > similarity.diagonal()[:, None]).sum(1).numpy()
