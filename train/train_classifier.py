"""Train a classifier of noised latents for classifier guidance, and save it with facts on its latents and process."""

from __future__ import annotations

from data_pipeline.common.entry import start_entry

if __name__ == "__main__":
    start_entry("train.train_classifier")  # checks the options, runs main() and exits

from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from data_pipeline.common.errors import UserError
from data_pipeline.common.saved_names import named
from data_pipeline.loading.batch import Batch, DataCursor
from data_pipeline.shards.data_sets import BUCKETS, DataSets
from data_pipeline.shards.input_option import Input
from data_pipeline.shards.samples import collated
from train.data.joined_facts import facts_of
from train.data.latent_facts import LatentFacts
from train.distributed.ranks import Ranks
from train.loop.context import TrainedModel, TrainingContext
from train.loop.fit import fit
from train.loop.recipe import Recipe
from train.loop.trainer import Action
from train.loop.training_entry import on_all_ranks, validation
from train.models.classifier import NoisyClassifier
from train.models.latents import OneFactor
from train.runs.curves import curve_line, plot_curves
from train.runs.metrics import read_metrics
from train.runs.run_folder import RunFolder
from train.weights.saved import save_model

FRACTIONS = torch.tensor([0.05, 0.25, 0.5, 0.75])


def train(cfg: DictConfig, ranks: Ranks) -> None:
    """Compose, fit, measure, save."""
    config = OmegaConf.to_container(cfg, resolve=True)
    given = Input.of(config["input"])
    latents = given.split("train", "latents")
    if latents.layout == BUCKETS:
        raise UserError(
            f"{cfg.input} contains aspect-ratio buckets, but a classifier is trained on one: use its folder."
        )
    recipe = Recipe.of(cfg, instantiate, ranks, latents)
    facts = facts_of(latents, cfg.fold, OneFactor.of(cfg))
    if "label" not in facts.shapes:
        raise UserError(f"{latents.root} has no labels: run precompute_latents.py with conditions=[label].")
    sizes = {"in_channels": facts.unet_shape[0], "classes": len(facts.classes("label"))}
    torch.manual_seed(cfg.seed)
    classifier = instantiate(cfg.classifier, **sizes, _convert_="all")
    make_objective = instantiate(cfg.objective, _partial_=True, _convert_="all")
    objective = make_objective(classifier=classifier, latents=facts.latents, seed=cfg.seed)
    measured = instantiate(cfg.classifier, **sizes, _convert_="all").eval().to(ranks.device)
    heldout = heldout_batch(given.split("heldout"), cfg, ranks)
    run = RunFolder(cfg.output, "train_classifier", config, ranks)

    def actions(context: TrainingContext) -> list[Action]:
        accuracies = partial(objective.accuracies, measured, heldout, FRACTIONS)
        return [validation(context, measured, cfg.validate_every, accuracies)]

    same = {name: config[name] for name in ("seed", "fold", "scaling_factor", "classifier", "process", "time_sampling")}
    same |= {"shift_factor": config["shift_factor"]} if config["shift_factor"] is not None else {}
    model = TrainedModel("classifier", objective, "classifier.")
    identity = {**latents.identity("data"), **same}
    weights = fit(model, recipe, run, identity, actions)
    if ranks.is_main:
        measured.load_state_dict(weights)
        arguments = {**{k: v for k, v in config["classifier"].items() if k != "_target_"}, **sizes}
        report(run.path, arguments, measured.cpu(), belongs_to(facts, config), len(heldout))


main = on_all_ranks(train)


def heldout_batch(data: DataSets, cfg: DictConfig, ranks: Ranks) -> Batch:
    """The held-out samples as one batch, with one stream per sample, so that their noise is always the same."""
    samples = data.first(instantiate(cfg.read, _partial_=True), cfg.validation_samples)
    keys, captions = tuple(s["key"] for s in samples), tuple(s["caption"] for s in samples)
    return Batch(keys, captions, collated(samples), tuple(range(len(samples))), 0, DataCursor()).to(ranks.device)


def belongs_to(facts: LatentFacts, config: dict[str, Any]) -> dict[str, Any]:
    """What a run must share with the classifier that guides it, and the class names by number."""
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
    """Save the model, plot the curves, and print the figures."""
    rows = read_metrics(folder / "metrics.jsonl")
    plot_curves(rows, ["loss", "accuracy"], folder / "curves.png")
    figures: dict[str, Any] = {
        name: value for row in rows for name, value in row.items() if name.startswith("heldout_accuracy")
    }
    mark = save_model(folder, "NoisyClassifier", arguments, classifier.state_dict(), {**figures, **belongs})
    print(curve_line("classifier loss", rows, "loss"))
    said = ", ".join(f"{value:.2f} at t = {name[-4:]}" for name, value in figures.items())
    print(f"classifier: accuracy on {heldout} held-out latents: {said}; fingerprint {mark}; in {folder}", flush=True)
