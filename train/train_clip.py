"""Train a small CLIP (open_clip's classes) on image-text shards; report retrieval; save it with its fingerprint."""

from __future__ import annotations

from data_pipeline.common.entry import start_entry

if __name__ == "__main__":
    start_entry("train.train_clip")  # imports the rest when the options are right, and ends

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from data_pipeline.shards.manifest import Manifest
from train.distributed.ranks import Ranks, closing_distributed, find_ranks
from train.engine.deepspeed_engine import Engine
from train.engine.ema import Ema
from train.engine.train_state import TrainState
from train.evaluation.retrieval import retrieval_of
from train.loop.fit import fit
from train.loop.recipe import Recipe
from train.loop.trainer import Action
from train.runs.curves import curve_line, plot_curves
from train.runs.metrics import Reporter, read_metrics
from train.runs.run_folder import RunFolder
from train.weights.saved import save_model


def main(cfg: DictConfig) -> None:
    ranks = find_ranks()
    with closing_distributed():
        train(cfg, ranks)


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

    def actions(engine: Engine, ema: Ema, reporter: Reporter) -> list[Action]:
        def validate(state: TrainState) -> None:
            measured.load_state_dict(engine.full_state_dict(ema.shards, prefix="clip."))
            if ranks.is_main:
                reporter.log(state.step, retrieval_of(measured, splits))

        return [Action(cfg.validate_every, validate)]

    weights = fit(
        "clip",
        objective,
        "clip.",
        recipe,
        run,
        {"images": images.fingerprint, "clip": config["clip"], "seed": cfg.seed},
        actions,
    )
    if ranks.is_main:
        measured.load_state_dict(weights)
        report(run.path, config, weights, retrieval_of(measured, splits), images.fingerprint)


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
