"""Train a small CLIP (open_clip's classes) on image-text shards; report retrieval; save it with its fingerprint."""

from __future__ import annotations

from data_pipeline.entry import start_entry

if __name__ == "__main__":
    start_entry("train.train_clip")  # imports the rest when the options are right, and ends

from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from data_pipeline.manifest import Manifest
from train.evaluation.report import curve_line, plot_curves
from train.fitting import Recipe, fit
from train.models.clip import CLIP
from train.ranks import Ranks
from train.reporters import read_metrics
from train.run_folder import RunFolder
from train.trainer import Action
from train.training_context import TrainedModel, TrainingContext
from train.training_entry import on_all_ranks, validation
from train.weights.saved import save_model


def train(cfg: DictConfig, ranks: Ranks) -> None:
    """Compose, fit, measure, save."""
    config = OmegaConf.to_container(cfg, resolve=True)
    images = Manifest.load(f"{cfg.input}/train", "image-text")
    recipe = Recipe.of(cfg, instantiate, ranks)
    torch.manual_seed(cfg.seed)
    clip = instantiate(cfg.clip, _convert_="all")
    objective = instantiate(
        cfg.objective, clip=clip, rank=ranks.rank, world_size=ranks.world_size, seed=cfg.seed, _convert_="all"
    )
    splits = {
        split: instantiate(cfg.read, root=f"{cfg.input}/{split}", limit=cfg.validation_pairs)
        for split in ("train", "heldout")
    }
    measured = instantiate(cfg.clip, _convert_="all").eval()

    run = RunFolder(cfg.output, "train_clip", config, ranks)

    def actions(context: TrainingContext) -> list[Action]:
        return [validation(context, measured, cfg.validate_every, lambda: retrieval_of(measured, splits))]

    identity = {"images": images.fingerprint, "clip": config["clip"], "seed": cfg.seed}
    weights = fit(TrainedModel("clip", objective, "clip."), recipe, run, identity, actions)
    if ranks.is_main:
        measured.load_state_dict(weights)
        report(run.path, config, weights, retrieval_of(measured, splits), images.fingerprint)


main = on_all_ranks(train)


def retrieval_of(clip: CLIP, splits: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Text to image: of all pictures of a split, how often the caption's own is nearest, or among the five nearest."""
    figures = {}
    for split, samples in splits.items():
        ranks = caption_ranks(clip, samples)
        figures[f"{split}_retrieval_top1"] = float((ranks < 1).mean())
        figures[f"{split}_retrieval_top5"] = float((ranks < 5).mean())
    return figures


@torch.no_grad()
def caption_ranks(clip: CLIP, samples: list[dict[str, Any]]) -> np.ndarray:
    """For each caption, how many pictures lie nearer than its own: (N,)."""
    images, texts = [], []
    for first in range(0, len(samples), 128):
        part = samples[first : first + 128]
        pixels = torch.from_numpy(np.stack([s["image"] for s in part])).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        image, text, _ = clip(pixels, [s["caption"] for s in part])
        images.append(image)
        texts.append(text)
    similarity = torch.cat(texts) @ torch.cat(images).T
    return (similarity > similarity.diagonal()[:, None]).sum(1).numpy()


def report(
    folder: Path,
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    figures: dict[str, float],
    images_fingerprint: str,
) -> None:
    """Save the model, draw the curves, and say the figures."""
    arguments = {k: v for k, v in config["clip"].items() if k != "_target_"}
    mark = save_model(folder, "CLIP", arguments, weights, {**figures, "images": images_fingerprint})
    rows = read_metrics(folder / "metrics.jsonl")
    plot_curves(rows, ["loss", "train_retrieval_top1", "heldout_retrieval_top5"], folder / "curves.png")
    print(curve_line("CLIP loss", rows, "loss"))
    print(
        "clip: retrieval (text to image) "
        + ", ".join(f"{name.replace('_retrieval_', ' ')} {value:.2f}" for name, value in figures.items())
        + f", fingerprint {mark}; in {folder}",
        flush=True,
    )
