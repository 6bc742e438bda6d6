"""Train the cross-attention U-Net on latent or image-text shards through DeepSpeed: compose, build, fit."""

from __future__ import annotations

from data_pipeline.entry import start_entry

if __name__ == "__main__":
    start_entry("train.train_ldm")  # imports the rest when the options are right, and ends

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.manifest import Manifest
from data_pipeline.samples import collated
from train.dtype import DTYPES
from train.evaluation.generate import Asked, Generator
from train.evaluation.preview import Preview
from train.evaluation.report import curve_line, plot_curves
from train.evaluation.trained_run import build_network, used_conditions, uses_clip
from train.evaluation.validation import HeldoutLoss
from train.fitting import Recipe, fit
from train.latent_data import LatentFacts
from train.models.attention import attention_backend
from train.models.conditioning import ConditionedUNet
from train.objectives.latent_diffusion import refuse_unfit
from train.online_latents import OnlineLatents, first_batches
from train.ranks import Ranks
from train.reporters import Reporter, read_metrics
from train.run_folder import RunFolder
from train.saved_objects import read_config
from train.train_state import TrainState
from train.trainer import Action
from train.training_context import TrainedModel, TrainingContext
from train.training_entry import on_all_ranks, with_averaged_weights
from train.weights.published import load_weights
from train.weights.saved import saved_fingerprint


def train(cfg: DictConfig, ranks: Ranks) -> None:
    """Check what doesn't belong together, build, fit, and say where it lies."""
    config = configuration(cfg)
    make_objective = instantiate(cfg.objective, _partial_=True, _convert_="all")
    refuse_unfit(make_objective.keywords["process"], make_objective.keywords["parameterization"])
    sampler, guidance = instantiate(cfg.sampler), instantiate(cfg.guidance, _convert_="all")
    sampler.times(make_objective.keywords["process"], sampler.steps)  # refuses a number of steps that it can't take
    data = Manifest.load(f"{cfg.input}/train")
    recipe, read, autoencoder, facts = latents_of(cfg, config, data, ranks)
    facts = scaled_as_known(cfg, facts)
    refuse_other_encoders(facts, config, autoencoder)
    network = initial_network(cfg, config, facts)
    objective = make_objective(network=network, latents=facts.latents, seed=cfg.seed)
    run, dtype = RunFolder(cfg.output, "train_ldm", config, ranks), DTYPES[recipe.engine.dtype]
    if ranks.is_main:
        print(f"attention: {attention_used(network.unet, dtype, ranks)}", flush=True)
    averaged = copy.deepcopy(network).to(ranks.device, dtype).eval().requires_grad_(False)
    heldout = read(root=f"{cfg.input}/heldout", limit=cfg.validation_samples)

    def actions(context: TrainingContext) -> list[Action]:
        if ranks.is_main:  # only now is it certain that this run may go on in this folder
            facts.save(run.path)
        validation = HeldoutLoss(objective, averaged, heldout, ranks, context.reporter)
        found = [Action(cfg.validate_every, with_averaged_weights(context, averaged, validation.measure))]
        if cfg.preview_every:
            generator = Generator.of(averaged, objective, facts, autoencoder.to(ranks.device), ranks.device)
            preview = Preview(generator, sampler, guidance, asked_of_previews(cfg, read), cfg.seed)
            draw = partial(drawn_by_main, preview, run, context.reporter)
            found.append(Action(cfg.preview_every, with_averaged_weights(context, averaged, draw)))
        return found

    fit(TrainedModel("train_ldm", objective, "network."), recipe, run, identity(config, data, facts), actions)
    if ranks.is_main:
        report(run)


main = on_all_ranks(train)


def configuration(cfg: DictConfig) -> dict[str, Any]:
    """As plain values. Sampling finds the encoders by it, from any folder: their paths are absolute."""
    config = OmegaConf.to_container(cfg, resolve=True)
    for encoder in ("autoencoder", "clip"):
        if config[encoder].get("path"):
            config[encoder]["path"] = storage.absolute(config[encoder]["path"])
    return config


def initial_network(cfg: DictConfig, config: dict[str, Any], facts: LatentFacts) -> ConditionedUNet:
    """Of weights by the seed, the same on all ranks, or those to start from."""
    torch.manual_seed(cfg.seed)
    network = build_network(config, facts, instantiate)
    if cfg.start_from is not None:
        load_weights(network, cfg.start_from)
    return network


def asked_of_previews(cfg: DictConfig, read: Callable[..., list[dict[str, Any]]]) -> Asked:
    """Every eighth sample of the training set's first."""
    count = cfg.preview_samples
    samples = read(root=f"{cfg.input}/train", limit=count * 8)[::8][:count]
    return Asked(collated(samples), [sample["caption"] for sample in samples])


def drawn_by_main(preview: Preview, run: RunFolder, reporter: Reporter, state: TrainState) -> None:
    if run.ranks.is_main:
        reporter.image(state.step, "samples", preview.draw(run.samples / f"step-{state.step:08d}.png"))


class Latents(NamedTuple):
    """What is trained on, by the recipe's loader; `read` gives whole sets of them, autoencoder is for previews."""

    recipe: Recipe
    read: Callable[..., list[dict[str, Any]]]
    autoencoder: nn.Module | None
    facts: LatentFacts


def latents_of(cfg: DictConfig, config: dict[str, Any], data: Manifest, ranks: Ranks) -> Latents:
    """As they are stored; or, of image-text shards, encoded while training."""
    recipe, read = Recipe.of(cfg, instantiate, ranks), instantiate(cfg.read, _partial_=True)
    if data.kind == "latents":
        autoencoder = instantiate(cfg.autoencoder) if cfg.preview_every else None
        facts = LatentFacts.of(f"{cfg.input}/train", data, cfg.fold, cfg.scaling_factor)
        return Latents(recipe, read, autoencoder, facts)
    online = OnlineLatents.of(config, instantiate, ranks.device)
    pictures = first_batches(recipe.make_loader, cfg.training.batch_size, cfg.measured_on, data.samples)
    facts = online.facts(pictures, cfg.fold, cfg.scaling_factor)
    recipe = dataclasses.replace(recipe, make_loader=online.loader(recipe.make_loader))
    return Latents(recipe, online.read(read), online.image, facts)


def refuse_other_encoders(facts: LatentFacts, config: dict[str, Any], autoencoder: nn.Module | None) -> None:
    """Encoders that did not make these latents, as far as their folders or the loaded first stage tell."""
    where = f"{config['input']}/train/manifest.json"
    needed, path = uses_clip(used_conditions(config, facts, where)), config["clip"].get("path")
    if needed and path is None:
        encoder = facts.fingerprints["text_encoder"]
        raise UserError(f"clip.path must be given: {encoder} made what is conditioned on; add clip.path=....")
    mark = autoencoder.fingerprint if autoencoder else saved_fingerprint(config["autoencoder"].get("path"))
    facts.refuse_other_encoders(mark, text_fingerprint(config["clip"]) if needed else None)


def text_fingerprint(clip: dict[str, Any]) -> str | None:
    """Of the text encoder at clip.path, which is loaded where its folder does not tell; None for clip.path=none."""
    path = clip["path"]
    if Path(path).name == "none":
        return None
    if not Path(path).exists():
        raise UserError(f"clip.path={path} is not there: give the text encoder, or clip.path=none to train without it.")
    return saved_fingerprint(path) or instantiate(clip).fingerprint


def scaled_as_known(cfg: DictConfig, facts: LatentFacts) -> LatentFacts:
    """A U-Net to start from knows latents at one scale: its own run's, or the one factor of a published model."""
    if cfg.start_from is None:
        return facts
    if not Path(cfg.start_from).exists():
        raise UserError(f"start_from={cfg.start_from} is not there: give a run, a diffusers folder, or a single file.")
    if not storage.exists(storage.join(cfg.start_from, "latents.json")):
        if cfg.scaling_factor is None:
            raise UserError(
                f"start_from={cfg.start_from} is a published model, which knows latents scaled by one factor: add "
                "scaling_factor=0.18215 (Stable Diffusion 1.x and 2.x)."
            )
        return facts
    known = LatentFacts.of_run(Path(cfg.start_from))
    for name, was, now in (
        ("autoencoder", known.fingerprints["autoencoder"], facts.fingerprints["autoencoder"]),
        ("fold", known.fold, facts.fold),
    ):
        if was != now:
            raise UserError(f"start_from={cfg.start_from} was trained with {name} {was}, these latents with {now}.")
    if cfg.scaling_factor is not None and (facts.mean, facts.std) != (known.mean, known.std):
        raise UserError(
            f"start_from={cfg.start_from} knows latents scaled otherwise than by scaling_factor={cfg.scaling_factor}: "
            "set scaling_factor=null."
        )
    refuse_other_classes(cfg, known, facts)
    return dataclasses.replace(facts, mean=known.mean, std=known.std)


def refuse_other_classes(cfg: DictConfig, known: LatentFacts, facts: LatentFacts) -> None:
    """A run to start from has a vector for each of its classes, by number: others would be taken for them."""
    theirs = read_config(Path(cfg.start_from) / "config.yaml").get("conditioning") or {}
    for name in sorted(set(theirs) & set(cfg.conditioning)):
        was, now = (of.conditions.get(name, {}).get("classes") for of in (known, facts))
        if was != now:
            raise UserError(
                f"start_from={cfg.start_from} knows other classes of {name} than these latents: run "
                f"precompute_latents.py with conditions.{name}.classes= as in its latents.json."
            )


def identity(config: dict[str, Any], data: Manifest, facts: LatentFacts) -> dict[str, Any]:
    """What a resumed run must have in common with its checkpoint; latents' encoders are part of their fingerprint."""
    same = {
        name: config[name]
        for name in ("seed", "fold", "scaling_factor", "unet", "conditioning", "objective", "start_from")
    }
    encoders = {} if data.kind == "latents" else {"encoders": dict(facts.fingerprints)}
    return {"data": data.fingerprint, **encoders, "streams": config["data"]["streams"], **same}


def attention_used(unet: nn.Module, dtype: torch.dtype, ranks: Ranks) -> str:
    """The backend of each head width of the U-Net, as it will run."""
    widths = {module.to_q.out_features // module.heads for module in unet.modules() if hasattr(module, "to_q")}
    return ", ".join(f"{attention_backend(ranks.device.type, dtype, w)} (head width {w})" for w in sorted(widths))


def report(run: RunFolder) -> None:
    """The curves as a plot and in the terminal, and where the weights are."""
    rows = read_metrics(run.path / "metrics.jsonl")
    plot_curves(rows, ["loss", "heldout_loss", "lr"], run.path / "curves.png")
    print(curve_line("train loss", rows, "loss"))
    print(curve_line("held-out loss", rows, "heldout_loss"))
    print(f"train_ldm: finished; config, metrics, samples and checkpoints in {run.path}", flush=True)
