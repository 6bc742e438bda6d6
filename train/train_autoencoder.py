"""Train a first stage, KL or VQ, on image-text shards; measure it on held-out pictures; save it, fingerprinted."""

from __future__ import annotations

from data_pipeline.entry import start_entry

if __name__ == "__main__":
    start_entry("train.train_autoencoder")  # imports the rest when the options are right, and ends

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from data_pipeline.errors import UserError
from data_pipeline.manifest import Manifest
from data_pipeline.picture_grid import grid, save_png
from train.evaluation.distances import psnr
from train.evaluation.report import curve_line, plot_curves, to_uint8
from train.fitting import Recipe, fit, refuse_wrong_entry
from train.models.autoencoder import Autoencoder, DiagonalGaussian
from train.models.quantizer import usage
from train.ranks import Ranks
from train.reporters import read_metrics
from train.run_folder import RunFolder
from train.trainer import Action
from train.training_context import TrainedModel, TrainingContext
from train.training_entry import on_all_ranks, validation
from train.weights.saved import save_model

TRAINABLE = ("train.models.autoencoder.AutoencoderKL", "train.models.autoencoder.VQModel")


def train(cfg: DictConfig, ranks: Ranks) -> None:
    """Compose, fit, measure, save."""
    config = OmegaConf.to_container(cfg, resolve=True)
    refuse_what_cannot_train(config)
    refuse_wrong_entry(cfg)
    torch.manual_seed(cfg.seed)
    autoencoder = instantiate(cfg.autoencoder, _convert_="all")
    objective = instantiate(cfg.objective, autoencoder=autoencoder, seed=cfg.seed, _convert_="all")
    images = Manifest.load(f"{cfg.input}/train", "image-text")
    recipe = Recipe.of(cfg, instantiate, ranks)
    heldout = pictures_of(cfg, "heldout", cfg.validation_pictures)
    refuse_sizes(heldout.shape[1:3], objective.crop if objective.crop_until else 0, autoencoder.factor)
    measured = instantiate(cfg.autoencoder, _convert_="all").eval().to(ranks.device)
    run = RunFolder(cfg.output, "train_autoencoder", config, ranks)

    def actions(context: TrainingContext) -> list[Action]:
        def decibels() -> dict[str, float]:
            return {"heldout_psnr_db": float(psnr(heldout, reconstructed(measured, heldout)).mean())}

        return [validation(context, measured, cfg.validate_every, decibels)]

    adversary = config["objective"].get("adversary") or {}
    identity = {"images": images.fingerprint, "autoencoder": config["autoencoder"], "seed": cfg.seed}
    identity |= {"discriminator": adversary["discriminator"]} if adversary else {}
    weights = fit(TrainedModel("autoencoder", objective, "autoencoder."), recipe, run, identity, actions)
    if ranks.is_main:
        measured.load_state_dict(weights)
        report(run.path, config, measured, weights, heldout, pictures_of(cfg, "train", 512), images.fingerprint)


main = on_all_ranks(train)


def refuse_what_cannot_train(config: dict[str, Any]) -> None:
    """A first stage that has no weights, or has them already; an adversary where parameters are partitioned."""
    target = config["autoencoder"]["_target_"]
    if target not in TRAINABLE:
        raise UserError(
            f"autoencoder: {target} has nothing to train: choose a shape, as autoencoder=kl_f8 or autoencoder=vq_f4."
        )
    if config["objective"].get("adversary") and config["engine"]["zero_stage"] == 3:
        raise UserError(
            "objective.adversary needs whole parameters, and ZeRO stage 3 partitions them: take engine=zero2."
        )


def refuse_sizes(size: Sequence[int], crop: int, factor: int) -> None:
    """Pictures, or crops of them, that the first stage can't shrink by its factor."""
    if any(side % factor for side in size):
        raise UserError(f"pictures of {size[0]}x{size[1]} can't be shrunk {factor} times: make shards of another size.")
    if crop % factor or crop > min(size):
        raise UserError(
            f"objective.crop={crop} is no multiple of {factor} up to {min(size)}: change it, or set 0 for none."
        )


def pictures_of(cfg: DictConfig, split: str, limit: int | None) -> np.ndarray:
    """The first pictures of a split, (N, H, W, 3) uint8."""
    return np.stack([sample["image"] for sample in instantiate(cfg.read, root=f"{cfg.input}/{split}", limit=limit)])


def to_model(pictures: np.ndarray, autoencoder: Autoencoder) -> Sequence[torch.Tensor]:
    """(N, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1] beside the model, 64 at a time."""
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return images.to(autoencoder.last_layer.device).split(64)


@torch.no_grad()
def reconstructed(autoencoder: Autoencoder, pictures: np.ndarray) -> np.ndarray:
    """What decoding the posterior's mean, or the nearest codes, gives back, as uint8."""
    parts = to_model(pictures, autoencoder)
    return np.concatenate([to_uint8(autoencoder.reconstruct(part).cpu().numpy()) for part in parts])


@torch.no_grad()
def latent_statistics(autoencoder: Autoencoder, pictures: np.ndarray) -> dict[str, Any]:
    """Of latents as they are stored: mean and std of each channel of posterior draws; a KL model's mean posterior std
    and KL in nats, or how many codes a VQ model uses, and their perplexity."""
    stored = torch.cat([autoencoder.encode_stored(part) for part in to_model(pictures, autoencoder)])
    mean, variance = autoencoder.posterior_of(stored)
    figures = {
        "channel_mean": mean.mean((0, 2, 3)).tolist(),
        "channel_std": (mean.var((0, 2, 3)) + variance.mean((0, 2, 3))).sqrt().tolist(),
    }
    if autoencoder.stored_as == "indices":
        used, perplexity = usage(stored, len(autoencoder.codebook))
        return {**figures, "codes_used": int(used), "code_perplexity": float(perplexity)}
    kl = DiagonalGaussian.from_moments(stored).kl()
    return {**figures, "posterior_std": float(variance.sqrt().mean()), "kl_nats": float(kl.mean())}


def report(
    folder: Path,
    config: dict[str, Any],
    autoencoder: Autoencoder,
    weights: dict[str, torch.Tensor],
    heldout: np.ndarray,
    train_pictures: np.ndarray,
    images_fingerprint: str,
) -> None:
    """Measure, save the model, draw the curves, and say it."""
    again = reconstructed(autoencoder, heldout)
    facts = {
        "heldout_psnr_db": float(psnr(heldout, again).mean()),
        "train_psnr_db": float(psnr(train_pictures, reconstructed(autoencoder, train_pictures)).mean()),
        "latents": latent_statistics(autoencoder, train_pictures),
        "factor": autoencoder.factor,
        "images": images_fingerprint,
    }
    arguments = {k: v for k, v in config["autoencoder"].items() if k != "_target_"}
    mark = save_model(folder, type(autoencoder).__name__, arguments, weights, facts)
    rows = read_metrics(folder / "metrics.jsonl")
    curves = [key for key in ("loss", "kl", "code_perplexity", "discriminator") if key in rows[0]]
    plot_curves(rows, [*curves, "heldout_psnr_db"], folder / "curves.png")
    pairs = [picture for pair in zip(heldout[:32], again[:32], strict=True) for picture in pair]
    save_png(grid(pairs, columns=16), folder / "reconstructions.png")
    print(curve_line("autoencoder loss", rows, "loss"))
    print(curve_line("held-out PSNR dB", rows, "heldout_psnr_db"))
    print(
        f"autoencoder: held-out PSNR {facts['heldout_psnr_db']:.2f} dB ({len(heldout)} pictures), "
        f"{said_of(facts['latents'])}, fingerprint {mark}; in {folder}",
        flush=True,
    )


def said_of(latents: dict[str, Any]) -> str:
    """The latents' statistics in a line."""
    std = f"latents' std {np.mean(latents['channel_std']):.3f}"
    if "kl_nats" in latents:
        return f"{std}, KL {latents['kl_nats']:.0f} nats a picture"
    return f"{std}, {latents['codes_used']} codes used, perplexity {latents['code_perplexity']:.0f}"
