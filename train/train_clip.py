"""Train a small CLIP (open_clip's classes) on image-text shards; report retrieval; save it with its fingerprint."""

from __future__ import annotations

from data_pipeline.common.entry import start_entry

if __name__ == "__main__":
    start_entry("train.train_clip")  # checks the options, runs main() and exits

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from data_pipeline.common.errors import UserError
from data_pipeline.shards.input_option import Input
from train.distributed.ranks import Ranks
from train.evaluation.retrieval import retrieval_of
from train.loop.context import TrainedModel, TrainingContext
from train.loop.fit import fit
from train.loop.recipe import Recipe
from train.loop.trainer import Action
from train.loop.training_entry import on_all_ranks, validation
from train.runs.curves import curve_line, plot_curves
from train.runs.metrics import read_metrics
from train.runs.run_folder import RunFolder
from train.weights.saved import save_model


def train(cfg: DictConfig, ranks: Ranks) -> None:
    """Compose, fit, measure, save."""
    config = OmegaConf.to_container(cfg, resolve=True)
    given = Input.of(config["input"])
    images = given.split("train", "image-text")
    recipe = Recipe.of(cfg, instantiate, ranks, images)
    refuse_copies_as_negatives(recipe.training.batch_size, images.samples, images.root)
    torch.manual_seed(cfg.seed)
    clip = instantiate(cfg.clip, _convert_="all")
    objective = instantiate(
        cfg.objective, clip=clip, rank=ranks.rank, world_size=ranks.world_size, seed=cfg.seed, _convert_="all"
    )
    splits = {
        split: given.split(split).first(instantiate(cfg.read, _partial_=True), cfg.validation_pairs)
        for split in ("train", "heldout")
    }
    measured = instantiate(cfg.clip, _convert_="all").eval()

    run = RunFolder(cfg.output, "train_clip", config, ranks)

    def actions(context: TrainingContext) -> list[Action]:
        return [validation(context, measured, cfg.validate_every, lambda: retrieval_of(measured, splits))]

    identity = {**images.identity("images"), "clip": config["clip"], "seed": cfg.seed}
    weights = fit(TrainedModel("clip", objective, "clip."), recipe, run, identity, actions)
    if ranks.is_main:
        measured.load_state_dict(weights)
        report(run.path, config, weights, retrieval_of(measured, splits), images.fingerprint)


main = on_all_ranks(train)


def refuse_copies_as_negatives(batch_size: int, samples: int, where: str) -> None:
    """UserError if the batch has more pairs than the data set: it would contain copies, which can't be negatives."""
    if batch_size > samples:
        raise UserError(
            f"training.batch_size={batch_size} is more than the {samples} pairs of {where}, and copies of a pair "
            f"can't be its negatives: use {samples} or less, or more pictures."
        )


def report(
    folder: Path,
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    figures: dict[str, float],
    images_fingerprint: str,
) -> None:
    """Save the model, plot the curves, and print the figures."""
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
