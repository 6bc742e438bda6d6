"""Train a first stage, KL or VQ, on image-text shards; measure it on held-out pictures; save it with a fingerprint."""

from __future__ import annotations

from data_pipeline.common.entry import start_entry

if __name__ == "__main__":
    start_entry("train.train_autoencoder")  # checks the options, runs main() and exits

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from data_pipeline.common.errors import UserError
from data_pipeline.images.grid import grid, save_png
from data_pipeline.images.pixels import psnr
from data_pipeline.shards.data_sets import DataSets
from data_pipeline.shards.input_option import Input
from train.data.base_first_stage import FROM_START, BaseFirstStage, encoder_weights
from train.distributed.ranks import Ranks
from train.evaluation.reconstruction import latent_statistics, reconstructed, summary_line
from train.loop.context import TrainedModel, TrainingContext
from train.loop.fit import fit
from train.loop.recipe import Recipe, refuse_wrong_entry
from train.loop.trainer import Action
from train.loop.training_entry import on_all_ranks, validation
from train.models.autoencoder import Autoencoder
from train.models.unet import allow_graphs
from train.objectives.autoencoder import AutoencoderObjective
from train.objectives.compvis_units import in_compvis_units, optimizer_in_compvis_units, values_per_picture
from train.runs.curves import curve_line, plot_curves
from train.runs.metrics import read_metrics
from train.runs.run_folder import RunFolder
from train.weights.saved import save_model

TRAINABLE = ("train.models.autoencoder.AutoencoderKL", "train.models.autoencoder.VQModel", FROM_START)


def train(cfg: DictConfig, ranks: Ranks) -> None:
    """Compose, fit, measure, save."""
    set_rate(cfg)
    refuse_untrainable(OmegaConf.to_container(cfg, resolve=True))
    refuse_wrong_entry(cfg)
    base = started_from(cfg)
    config = OmegaConf.to_container(cfg, resolve=True)
    torch.manual_seed(cfg.seed)
    autoencoder = instantiate(cfg.autoencoder, _convert_="all")
    if base is not None:
        base.load_into(autoencoder)
    objective = instantiate(cfg.objective, autoencoder=autoencoder, seed=cfg.seed, _convert_="all")
    given = Input.of(config["input"])
    images = given.split("train", "image-text")
    recipe = Recipe.of(cfg, instantiate, ranks, images)
    heldout = pictures_of(given.split("heldout"), cfg, cfg.validation_pictures)
    refuse_sizes(heldout.shape[1:3], objective.crop if objective.crop_until else 0, autoencoder.factor)
    sizes = objective.decoded_sizes(heldout.shape[1:3])
    if cfg.engine.compile:
        allow_graphs(sizes)
    measured = instantiate(cfg.autoencoder, _convert_="all").eval().to(ranks.device)
    config["in_compvis_units"] = compvis_units(objective, heldout.shape[1:3], recipe)
    run = RunFolder(cfg.output, "train_autoencoder", config, ranks)
    if ranks.is_main:
        print(units_line(config["in_compvis_units"], heldout.shape[1:3]), flush=True)
    run.config["objective"]["perceptual_space"] = objective.perceptual_space

    def actions(context: TrainingContext) -> list[Action]:
        def decibels() -> dict[str, float]:
            return {"heldout_psnr_db": float(psnr(heldout, reconstructed(measured, heldout)).mean())}

        return [validation(context, measured, cfg.validate_every, decibels)]

    identity = {**images.identity("images"), "autoencoder": config["autoencoder"], "seed": cfg.seed}
    identity |= discriminator_of(config)
    identity |= {"perceptual": objective.perceptual.distance.fingerprint} if objective.perceptual else {}
    identity |= {"start_from": base.identity, "train": cfg.objective.train} if base else {}
    frozen = encoder_weights(autoencoder) if objective.decoder_only else {}  # before the engine changes their dtype
    weights = fit(TrainedModel("autoencoder", objective, "autoencoder.", frozen), recipe, run, identity, actions)
    if ranks.is_main:
        measured.load_state_dict(weights)
        facts = {"images": images.fingerprint, **(base.kept_by_decoder() if objective.decoder_only else {})}
        report(run.path, config, measured, weights, facts, heldout, pictures_of(images, cfg, 512))


main = on_all_ranks(train)


def started_from(cfg: DictConfig) -> BaseFirstStage | None:
    """The model at start_from=; sets the options of autoencoder=from_start to its own."""
    if cfg.start_from is None:
        needs = {
            "autoencoder=from_start uses its options": cfg.autoencoder._target_ == FROM_START,
            "objective.train=decoder keeps its encoder": cfg.objective.train == "decoder",
        }
        for why in (why for why, so in needs.items() if so):
            raise UserError(f"start_from must be given, as {why}: add start_from=....")
        return None
    base = BaseFirstStage.at(cfg.start_from)
    options = base.configuration(OmegaConf.to_container(cfg.autoencoder, resolve=True))
    OmegaConf.update(cfg, "autoencoder", options, merge=False, force_add=True)
    return base


def set_rate(cfg: DictConfig) -> None:
    """Sets optimizer.lr, if it is null, to base_learning_rate times the global batch size, as CompVis' main.py does."""
    if cfg.optimizer.lr is None:
        if cfg.base_learning_rate is None:
            raise UserError("optimizer.lr=null needs base_learning_rate, the rate per sample: set one of them.")
        cfg.optimizer.lr = cfg.base_learning_rate * cfg.training.batch_size


def compvis_units(objective: AutoencoderObjective, size: Sequence[int], recipe: Recipe) -> dict[str, Any]:
    """Weights and rates by the names and in the units of CompVis' configurations, for pictures of (height, width)."""
    optimizer, times = recipe.optimizer, values_per_picture(objective, size)
    rates = optimizer_in_compvis_units(optimizer.lr, optimizer.eps, times, recipe.training.batch_size)
    return in_compvis_units(objective, size) | rates


def units_line(units: dict[str, Any], size: Sequence[int]) -> str:
    """`units` as one line."""
    named = ", ".join(f"{name}={value:g}" for name, value in units.items())
    return f"autoencoder: in CompVis' units, for pictures of {size[0]}x{size[1]}: {named}"


def discriminator_of(config: dict[str, Any]) -> dict[str, Any]:
    """The discriminator's architecture, as checkpoints record it: without options that old ones did not have yet."""
    adversary = config["objective"].get("adversary")
    if not adversary:
        return {}
    later = {"norm": "group"}
    return {"discriminator": {k: v for k, v in adversary["discriminator"].items() if later.get(k) != v}}


def refuse_untrainable(config: dict[str, Any]) -> None:
    """UserError for a first stage without trainable weights, and for an adversary with partitioned parameters."""
    target = config["autoencoder"]["_target_"]
    if target not in TRAINABLE:
        raise UserError(
            f"autoencoder: {target} has no weights to train: choose an architecture, such as autoencoder=kl_f8 or "
            "autoencoder=vq_f4."
        )
    if config["objective"].get("adversary") and config["engine"]["zero_stage"] == 3:
        raise UserError(
            "objective.adversary needs whole parameters, but ZeRO stage 3 partitions them: use engine=zero2."
        )


def refuse_sizes(size: Sequence[int], crop: int, factor: int) -> None:
    """UserError for pictures, or crops of them, that the first stage can't shrink by its factor."""
    if any(side % factor for side in size):
        raise UserError(
            f"pictures of {size[0]}x{size[1]} are not divisible by the autoencoder's factor {factor}: make shards of "
            "another size."
        )
    if crop % factor or crop > min(size):
        raise UserError(
            f"objective.crop={crop} must be a multiple of {factor} and at most {min(size)}, or 0 for no crop."
        )


def pictures_of(data: DataSets, cfg: DictConfig, limit: int | None) -> np.ndarray:
    """The first pictures of a split, (N, H, W, 3) uint8."""
    return np.stack([sample["image"] for sample in data.first(instantiate(cfg.read, _partial_=True), limit)])


def report(
    folder: Path,
    config: dict[str, Any],
    autoencoder: Autoencoder,
    weights: dict[str, torch.Tensor],
    facts: dict[str, Any],
    heldout: np.ndarray,
    train_pictures: np.ndarray,
) -> None:
    """Measure and save the model with the facts, plot the curves, and print the figures."""
    again = reconstructed(autoencoder, heldout)
    facts = {
        "heldout_psnr_db": float(psnr(heldout, again).mean()),
        "train_psnr_db": float(psnr(train_pictures, reconstructed(autoencoder, train_pictures)).mean()),
        "latents": latent_statistics(autoencoder, train_pictures),
        "factor": autoencoder.factor,
        **facts,
    }
    arguments = {k: v for k, v in config["autoencoder"].items() if k != "_target_"}
    mark = save_model(folder, type(autoencoder).__name__, arguments, weights, facts)
    rows = read_metrics(folder / "metrics.jsonl")
    curves = [key for key in ("loss", "kl", "code_perplexity", "discriminator") if key in rows[0]]
    plot_curves(rows, [*curves, "heldout_psnr_db"], folder / "curves.png")
    save_png(pairs_of(heldout[:32], again[:32], facts["heldout_psnr_db"]), folder / "reconstructions.png")
    print(curve_line("autoencoder loss", rows, "loss"))
    print(curve_line("held-out PSNR dB", rows, "heldout_psnr_db"))
    print(
        f"autoencoder: held-out PSNR {facts['heldout_psnr_db']:.2f} dB ({len(heldout)} pictures), "
        f"{summary_line(facts['latents'])}, fingerprint {mark}; in {folder}",
        flush=True,
    )


def pairs_of(originals: np.ndarray, again: np.ndarray, mean: float) -> Image.Image:
    """Each picture beside its reconstruction, with its PSNR; both (N, H, W, 3) uint8. mean: over all pictures, in
    dB."""
    pictures = [picture for pair in zip(originals, again, strict=True) for picture in pair]
    labels = [label for decibels in psnr(originals, again) for label in ("original", f"{decibels:.1f} dB")]
    title = f"Held-out pictures and their reconstructions, with PSNR; mean {mean:.2f} dB"
    return grid(pictures, labels, columns=max(2, min(16, 2 * round(len(originals) ** 0.5))), title=title)
