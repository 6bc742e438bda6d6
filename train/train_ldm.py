"""Train the cross-attention U-Net on latent or image-text shards through DeepSpeed: compose, build, fit."""

from __future__ import annotations

from data_pipeline.common.entry import start_entry

if __name__ == "__main__":
    start_entry("train.train_ldm")  # checks the options, runs main() and exits

import copy
import functools
from dataclasses import replace
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from data_pipeline.common import storage
from data_pipeline.encode.encoders import TEXT_ENCODERS
from data_pipeline.shards.data_sets import DataSets
from data_pipeline.shards.input_option import Input
from train.data.base_model import refuse_other_noise, unet_to_train
from train.data.build import build_network
from train.data.latent_facts import LatentFacts
from train.data.ldm_inputs import latents_of, refuse_other_encoders, with_base_model_scaling
from train.data.sizes import mean_in_words
from train.distributed.ranks import Ranks
from train.engine.config import DTYPES
from train.evaluation.heldout_loss import HeldoutLoss, HeldoutSet
from train.loop.context import TrainedModel, TrainingContext
from train.loop.fit import fit
from train.loop.recipe import Recipe
from train.loop.trainer import Action
from train.loop.training_entry import on_all_ranks, with_averaged_weights
from train.models.attention import attention_backend
from train.models.conditioning import ConditionedUNet
from train.models.unet import allow_graphs
from train.objectives.latent_diffusion import LatentDiffusion, refuse_unfit
from train.runs.curves import curve_line, plot_curves
from train.runs.metrics import read_metrics
from train.runs.run_folder import RunFolder
from train.sampling.decoders import with_decoder
from train.sampling.generator import Sampler, generator_of
from train.sampling.preview import Preview, preview_parts
from train.weights.published import load_weights


def train(cfg: DictConfig, ranks: Ranks) -> None:
    """Check the options, build, fit, and print where the results are."""
    config = configuration(cfg)
    make_objective, sampler = objective_and_sampler(cfg)
    guidance = instantiate(cfg.guidance, _convert_="all")
    given = Input.of(config["input"])
    data = given.split("train")
    recipe, read_samples = Recipe.of(cfg, instantiate, ranks, data), instantiate(cfg.read, _partial_=True)
    unseen = given.split("heldout")
    latents = latents_of(config, data, recipe.make_loader, read_samples, instantiate, ranks.device)
    recipe = replace(recipe, make_loader=latents.make_loader)
    read_samples, autoencoder = latents.read_samples, latents.autoencoder
    facts = with_base_model_scaling(config, latents.facts)
    refuse_other_encoders(facts, config, autoencoder, instantiate, data.sets[0].root)
    network = initial_network(config, facts)
    if cfg.engine.compile:
        allow_graphs(len(facts.buckets))
    objective = make_objective(network=network, latents=facts.latents, seed=cfg.seed)
    run, dtype = RunFolder(cfg.output, "train_ldm", config, ranks), DTYPES[recipe.engine.dtype]
    if ranks.is_main:
        describe(data, cfg.training.batch_size, facts, attention_used(network.unet, dtype, ranks))
    averaged = copy.deepcopy(network).to(ranks.device, dtype).eval().requires_grad_(False)
    heldout = HeldoutSet.of(unseen.read(read_samples, cfg.validation_samples), data.fractions())

    def actions(context: TrainingContext) -> list[Action]:
        if ranks.is_main:  # not earlier: only now the run is sure to continue in this folder
            facts.save(run.path)
        validation = HeldoutLoss(objective, averaged, heldout, ranks, context.reporter)
        found = [Action(cfg.validate_every, with_averaged_weights(context, averaged, validation.measure))]
        if cfg.preview_every:
            generator = generator_of(averaged, objective, facts, autoencoder, ranks.device)
            generator = with_decoder(generator, cfg.preview_decoder, autoencoder, facts)
            parts = preview_parts(generator, facts, data, read_samples, cfg.preview_samples)
            preview = Preview(parts, sampler, guidance, cfg.seed, run, context.reporter)
            found.append(Action(cfg.preview_every, with_averaged_weights(context, averaged, preview.draw)))
        return found

    fit(TrainedModel("train_ldm", objective, "network."), recipe, run, identity(config, data, facts), actions)
    if ranks.is_main:
        report(run)


main = on_all_ranks(train)


def objective_and_sampler(cfg: DictConfig) -> tuple[functools.partial[LatentDiffusion], Sampler]:
    """The objective and sampler of a configuration, built without a network. UserError for parts that are incompatible,
    or that differ from those of the model to start from."""
    make_objective = instantiate(cfg.objective, _partial_=True, _convert_="all")
    process, parameterization = (make_objective.keywords[name] for name in ("process", "parameterization"))
    refuse_unfit(process, parameterization)
    if not cfg.new_objective:
        refuse_other_noise(cfg.start_from, process, parameterization)
    sampler = instantiate(cfg.sampler)
    sampler.times(process, sampler.steps)  # refuses an invalid number of steps
    return make_objective, sampler


def configuration(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, with the U-Net of start_from= for unet=from_start, and absolute paths to the
    encoders, so that sampling can run in any folder."""
    given = OmegaConf.to_container(cfg.unet, resolve=True)
    unet = unet_to_train(given, cfg.start_from, cfg.fine_tune, "size" in cfg.conditioning)
    OmegaConf.update(cfg, "unet", unet, merge=False, force_add=True)  # before ${unet.context_dim} is resolved
    config = OmegaConf.to_container(cfg, resolve=True)
    for encoder in ("autoencoder", *TEXT_ENCODERS):
        if config[encoder].get("path"):
            config[encoder]["path"] = storage.absolute(config[encoder]["path"])
    return config


def initial_network(config: dict[str, Any], facts: LatentFacts) -> ConditionedUNet:
    """The network with random weights by the seed, the same on all ranks, or with the weights to start from."""
    torch.manual_seed(config["seed"])
    network = build_network(config, facts, instantiate)
    if config["start_from"] is not None:
        load_weights(network, config["start_from"], config["start_from_ema"])
    return network


def identity(config: dict[str, Any], data: DataSets, facts: LatentFacts) -> dict[str, Any]:
    """What a resumed run must share with its checkpoint; the fingerprint of stored latents includes their encoders."""
    same = {
        name: config[name]
        for name in ("seed", "fold", "scaling_factor", "unet", "conditioning", "objective", "start_from")
    }
    same |= {name: config[name] for name in ("shift_factor", "start_from_ema") if config[name]}  # later options
    same["unet"] = {name: value for name, value in same["unet"].items() if name != "zero_init"}  # a later option
    # "captions" is part of the recipe's identity, but was not in earlier versions; no more was a mask that isn't given.
    same["conditioning"] = {
        name: {k: v for k, v in part.items() if k != "captions" and (k != "mask" or v is not None)}
        for name, part in config["conditioning"].items()
    }
    encoders = {} if data.kind == "latents" else {"encoders": dict(facts.fingerprints)}
    return {**data.identity("data"), **encoders, "streams": config["data"]["streams"], **same}


def describe(data: DataSets, batch_size: int, facts: LatentFacts, attention: str) -> None:
    """Print what a run is trained with, before it begins."""
    for line in (f"attention: {attention}", mean_in_words(facts), data.describe(batch_size) if len(data) > 1 else ""):
        if line:
            print(line, flush=True)


def attention_used(unet: nn.Module, dtype: torch.dtype, ranks: Ranks) -> str:
    """The attention backend that the U-Net will use for each head width, as text."""
    widths = {module.to_q.out_features // module.heads for module in unet.modules() if hasattr(module, "to_q")}
    return ", ".join(f"{attention_backend(ranks.device.type, dtype, w)} (head width {w})" for w in sorted(widths))


def report(run: RunFolder) -> None:
    """Plot and print the curves, and print where the results are."""
    rows = read_metrics(run.path / "metrics.jsonl")
    plot_curves(rows, ["loss", "heldout_loss", "lr"], run.path / "curves.png")
    print(curve_line("train loss", rows, "loss"))
    print(curve_line("held-out loss", rows, "heldout_loss"))
    print(f"train_ldm: finished; config, metrics, samples and checkpoints in {run.path}", flush=True)
