"""Train a classifier of noised latents for classifier guidance, and save it with what it belongs to."""

from __future__ import annotations

from data_pipeline.common.entry import start_entry

if __name__ == "__main__":
    start_entry("train.train_classifier")  # imports the rest when the options are right, and ends

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from data_pipeline.common.errors import UserError
from data_pipeline.common.saved_names import named
from data_pipeline.loading.batch import Batch, DataCursor
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.samples import collated
from train.data.latent_facts import LatentFacts
from train.distributed.ranks import Ranks, closing_distributed, find_ranks
from train.engine.deepspeed_engine import Engine
from train.engine.ema import Ema
from train.engine.train_state import TrainState
from train.loop.fit import fit
from train.loop.recipe import Recipe
from train.loop.trainer import Action
from train.models.classifier import NoisyClassifier
from train.runs.curves import curve_line, plot_curves
from train.runs.metrics import Reporter, read_metrics
from train.runs.run_folder import RunFolder
from train.weights.saved import save_model

FRACTIONS = torch.tensor([0.05, 0.25, 0.5, 0.75])


def main(cfg: DictConfig) -> None:
    ranks = find_ranks()
    with closing_distributed():
        train(cfg, ranks)


def train(cfg: DictConfig, ranks: Ranks) -> None:
    """Compose, fit, measure, save."""
    config = OmegaConf.to_container(cfg, resolve=True)
    latents = Manifest.load(f"{cfg.input}/train", "latents")
    recipe = Recipe.of(cfg, instantiate, ranks)
    facts = LatentFacts.of(f"{cfg.input}/train", latents, cfg.fold, cfg.scaling_factor)
    if "label" not in facts.shapes:
        raise UserError(f"{cfg.input} holds no labels: run precompute_latents.py with conditions=[label].")
    sizes = {"in_channels": facts.unet_shape[0], "classes": len(facts.classes("label"))}
    torch.manual_seed(cfg.seed)
    classifier = instantiate(cfg.classifier, **sizes, _convert_="all")
    make_objective = instantiate(cfg.objective, _partial_=True, _convert_="all")
    objective = make_objective(classifier=classifier, latents=facts.latents, seed=cfg.seed)
    measured = instantiate(cfg.classifier, **sizes, _convert_="all").eval().to(ranks.device)
    heldout = heldout_batch(cfg, ranks)
    run = RunFolder(cfg.output, "train_classifier", config, ranks)

    def actions(engine: Engine, ema: Ema, reporter: Reporter) -> list[Action]:
        def validate(state: TrainState) -> None:
            measured.load_state_dict(engine.full_state_dict(ema.shards, prefix="classifier."))
            if ranks.is_main:
                reporter.log(state.step, objective.accuracies(measured, heldout, FRACTIONS))

        return [Action(cfg.validate_every, validate)]

    same = {name: config[name] for name in ("seed", "fold", "scaling_factor", "classifier", "process", "time_sampling")}
    weights = fit("classifier", objective, "classifier.", recipe, run, {"data": latents.fingerprint, **same}, actions)
    if ranks.is_main:
        measured.load_state_dict(weights)
        arguments = {**{k: v for k, v in config["classifier"].items() if k != "_target_"}, **sizes}
        report(run.path, arguments, measured.cpu(), belongs_to(facts, config), len(heldout))


def heldout_batch(cfg: DictConfig, ranks: Ranks) -> Batch:
    """The held-out samples as one batch, a stream each, so that their noise is always the same."""
    samples = instantiate(cfg.read, root=f"{cfg.input}/heldout", limit=cfg.validation_samples)
    keys, captions = tuple(s["key"] for s in samples), tuple(s["caption"] for s in samples)
    return Batch(keys, captions, collated(samples), tuple(range(len(samples))), 0, DataCursor()).to(ranks.device)


def belongs_to(facts: LatentFacts, config: dict[str, Any]) -> dict[str, Any]:
    """What a run must have in common with a classifier that guides it, and the classes by number."""
    belongs = {
        "autoencoder": facts.fingerprints["autoencoder"],
        "mean": facts.mean,
        "std": facts.std,
        "fold": facts.fold,
        "process": named(config["process"]),
    }
    return {"belongs_to": belongs, "class_names": list(facts.classes("label"))}


def report(
    folder: Path, arguments: dict[str, Any], classifier: NoisyClassifier, belongs: dict[str, Any], heldout: int
) -> None:
    """Save the model, draw the curves, and say it."""
    rows = read_metrics(folder / "metrics.jsonl")
    plot_curves(rows, ["loss", "accuracy"], folder / "curves.png")
    figures: dict[str, Any] = {
        name: value for row in rows for name, value in row.items() if name.startswith("heldout_accuracy")
    }
    mark = save_model(folder, "NoisyClassifier", arguments, classifier.state_dict(), {**figures, **belongs})
    print(curve_line("classifier loss", rows, "loss"))
    said = ", ".join(f"{value:.2f} at t = {name[-4:]}" for name, value in figures.items())
    print(f"classifier: right on {heldout} held-out latents: {said}; fingerprint {mark}; in {folder}", flush=True)
