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
from train.models.clip import architecture
from train.runs.curves import curve_line, plot_curves
from train.runs.metrics import read_metrics
from train.runs.run_folder import RunFolder
from train.weights.open_clip import save_open_clip
from train.weights.saved import save_model


def train(cfg: DictConfig, ranks: Ranks) -> None:
    """Compose, fit, measure, save."""
    config = configuration(cfg)
    given = Input.of(config["input"])
    images = given.split("train", "image-text")
    recipe = Recipe.of(cfg, instantiate, ranks, images)
    refuse_copies_as_negatives(recipe.training.batch_size, images.samples, images.root)
    torch.manual_seed(cfg.seed)
    clip = instantiate(config["clip"], _convert_="all")
    objective = instantiate(
        cfg.objective, clip=clip, rank=ranks.rank, world_size=ranks.world_size, seed=cfg.seed, _convert_="all"
    )
    splits = {
        split: given.split(split).first(instantiate(cfg.read, _partial_=True), cfg.validation_pairs)
        for split in ("train", "heldout")
    }
    zero_shot = instantiate(cfg.zero_shot, _convert_="all") if cfg.zero_shot.field else None
    if zero_shot:
        zero_shot.classes(splits["heldout"])  # refuses a field that is not there, before training
    measured = instantiate(config["clip"], _convert_="all").eval()

    def figures() -> dict[str, float]:
        found = retrieval_of(measured, splits)
        return found | (zero_shot.accuracy(measured, splits["heldout"]) if zero_shot else {})

    run = RunFolder(cfg.output, "train_clip", config, ranks)

    def actions(context: TrainingContext) -> list[Action]:
        return [validation(context, measured, cfg.validate_every, figures)]

    identity = {**images.identity("images"), "clip": config["clip"], "seed": cfg.seed}
    weights = fit(TrainedModel("clip", objective, "clip."), recipe, run, identity, actions)
    if ranks.is_main:
        measured.load_state_dict(weights)
        report(run.path, config, weights, figures(), images.fingerprint)
        save_open_clip(run.path / "open_clip", measured)


main = on_all_ranks(train)


def configuration(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, with the options of the architecture that clip.architecture names."""
    config = OmegaConf.to_container(cfg, resolve=True)
    name, dropout = (config["clip"].pop(option, None) for option in ("architecture", "patch_dropout"))
    if name is not None:
        config["clip"] |= architecture(name)
    if dropout:
        config["clip"]["vision"]["patch_dropout"] = dropout
    return config


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
        "clip: retrieval (text to image) " + ", ".join(in_words(figures)) + f", fingerprint {mark}; in {folder}",
        flush=True,
    )


def in_words(figures: dict[str, float]) -> list[str]:
    """The figures as text: each split's retrieval, with the number of pictures it was measured among."""
    found = []
    for name, value in figures.items():
        split, _, figure = name.partition("_")
        if figure == "candidates":
            found[-1] += f" of {value:g} pictures"
        elif figure == "zero_shot_classes":
            found[-1] += f" of {value:g} classes"
        else:
            found.append(f"{split} {figure.removeprefix('retrieval_').replace('_', ' ')} {value:.2f}")
    return found
