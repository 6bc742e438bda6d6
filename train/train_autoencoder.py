"""Train a KL autoencoder on image-text shards; measure it on held-out pictures; save it with its fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from data_pipeline.entry import entry
from data_pipeline.manifest import Manifest
from train.ema import Ema
from train.engine import Engine
from train.evaluation.distances import psnr
from train.evaluation.report import curve_line, grid, plot_curves, save_png, to_uint8
from train.fitting import Recipe, fit
from train.models.autoencoder import AutoencoderKL
from train.ranks import Ranks, closing_distributed, find_ranks
from train.reporters import Reporter, read_metrics
from train.run_folder import RunFolder
from train.train_state import TrainState
from train.trainer import Action
from train.weights.saved import save_model


@entry("train_autoencoder")
def main(cfg: DictConfig) -> None:
    ranks = find_ranks()
    with closing_distributed():
        train(cfg, ranks)


def train(cfg: DictConfig, ranks: Ranks) -> None:
    """Compose, fit, measure, save."""
    config = OmegaConf.to_container(cfg, resolve=True)
    images = Manifest.load(f"{cfg.input}/train", "image-text")
    recipe = Recipe(
        instantiate(cfg.training),
        instantiate(cfg.optimizer),
        instantiate(cfg.engine),
        instantiate(cfg.data, root=f"{cfg.input}/train", seed=cfg.seed),
    )
    recipe.check(ranks)
    torch.manual_seed(cfg.seed)
    autoencoder = instantiate(cfg.autoencoder, _convert_="all")
    objective = instantiate(cfg.objective, autoencoder=autoencoder, seed=cfg.seed, _convert_="all")
    heldout = pictures_of(cfg, "heldout", cfg.validation_pictures)
    measured = instantiate(cfg.autoencoder, _convert_="all").eval()

    run = RunFolder(cfg.output, "train_autoencoder", config, ranks)

    def actions(engine: Engine, ema: Ema, reporter: Reporter) -> list[Action]:
        def validate(state: TrainState) -> None:
            measured.load_state_dict(engine.full_state_dict(ema.shards, prefix="autoencoder."))
            if ranks.is_main:
                reporter.log(
                    state.step, {"heldout_psnr_db": float(psnr(heldout, reconstructed(measured, heldout)).mean())}
                )

        return [Action(cfg.validate_every, validate)]

    weights = fit(
        "autoencoder",
        objective,
        "autoencoder.",
        recipe,
        run,
        {"images": images.fingerprint, "autoencoder": config["autoencoder"], "seed": cfg.seed},
        actions,
    )
    if ranks.is_main:
        measured.load_state_dict(weights)
        report(run.path, config, measured, weights, heldout, pictures_of(cfg, "train", 512), images.fingerprint)


def pictures_of(cfg: DictConfig, split: str, limit: int | None) -> np.ndarray:
    """The first pictures of a split, (N, H, W, 3) uint8."""
    return np.stack([sample["image"] for sample in instantiate(cfg.read, root=f"{cfg.input}/{split}", limit=limit)])


def to_model(pictures: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0


@torch.no_grad()
def reconstructed(autoencoder: AutoencoderKL, pictures: np.ndarray) -> np.ndarray:
    """What decoding the posterior's mean gives back, as uint8."""
    parts = to_model(pictures).split(64)
    return np.concatenate([to_uint8(autoencoder.reconstruct(part).numpy()) for part in parts])


@torch.no_grad()
def latent_statistics(autoencoder: AutoencoderKL, pictures: np.ndarray) -> dict[str, Any]:
    """Of posterior draws over pictures: mean and std of each channel, and the mean posterior std and KL in nats."""
    posteriors = [autoencoder.encode(part) for part in to_model(pictures).split(64)]
    mean = torch.cat([p.mean for p in posteriors])
    variance = torch.cat([p.logvar.exp() for p in posteriors])
    return {
        "channel_mean": mean.mean((0, 2, 3)).tolist(),
        "channel_std": (mean.var((0, 2, 3)) + variance.mean((0, 2, 3))).sqrt().tolist(),
        "posterior_std": float(variance.sqrt().mean()),
        "kl_nats": float(torch.cat([p.kl() for p in posteriors]).mean()),
    }


def report(
    folder: Path,
    config: dict[str, Any],
    autoencoder: AutoencoderKL,
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
    mark = save_model(folder, "AutoencoderKL", arguments, weights, facts)
    rows = read_metrics(folder / "metrics.jsonl")
    plot_curves(rows, ["loss", "kl", "heldout_psnr_db"], folder / "curves.png")
    pairs = [picture for pair in zip(heldout[:32], again[:32], strict=True) for picture in pair]
    save_png(grid(pairs, columns=16), folder / "reconstructions.png")
    print(curve_line("autoencoder loss", rows, "loss"))
    print(curve_line("held-out PSNR dB", rows, "heldout_psnr_db"))
    latents = facts["latents"]
    print(
        f"autoencoder: held-out PSNR {facts['heldout_psnr_db']:.2f} dB ({len(heldout)} pictures), latents' std "
        f"{np.mean(latents['channel_std']):.3f}, KL {latents['kl_nats']:.0f} nats a picture, fingerprint {mark}; "
        f"in {folder}",
        flush=True,
    )


if __name__ == "__main__":
    main()
