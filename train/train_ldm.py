"""Train the cross-attention U-Net on latent or image-text shards through DeepSpeed: compose, build, fit."""

from __future__ import annotations

from data_pipeline.common.entry import start_entry

if __name__ == "__main__":
    start_entry("train.train_ldm")  # imports the rest when the options are right, and ends

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from data_pipeline.common import storage
from data_pipeline.shards.manifest import Manifest
from train.data.build import build_network
from train.data.latent_facts import LatentFacts
from train.data.ldm_inputs import latents_of, refuse_other_encoders, scaled_as_known
from train.distributed.ranks import Ranks, closing_distributed, find_ranks
from train.engine.config import DTYPES
from train.engine.deepspeed_engine import Engine
from train.engine.ema import Ema
from train.engine.train_state import TrainState
from train.evaluation.heldout_loss import HeldoutLoss
from train.loop.fit import fit
from train.loop.recipe import Recipe
from train.loop.trainer import Action
from train.models.attention import attention_backend
from train.objectives.latent_diffusion import refuse_unfit
from train.runs.curves import curve_line, plot_curves
from train.runs.metrics import Reporter, read_metrics
from train.runs.run_folder import RunFolder
from train.sampling.generator import Generator, generator_of
from train.sampling.preview import Preview
from train.weights.published import load_weights


def main(cfg: DictConfig) -> None:
    ranks = find_ranks()
    with closing_distributed():
        train(cfg, ranks)


def train(cfg: DictConfig, ranks: Ranks) -> None:
    """Check what doesn't belong together, build, fit, and say where it lies."""
    config = OmegaConf.to_container(cfg, resolve=True)
    for encoder in ("autoencoder", "clip"):  # sampling finds them by the run's configuration, from any folder
        if config[encoder].get("path"):
            config[encoder]["path"] = storage.absolute(config[encoder]["path"])
    make_objective = instantiate(cfg.objective, _partial_=True, _convert_="all")
    process = make_objective.keywords["process"]
    refuse_unfit(process, make_objective.keywords["parameterization"])
    sampler = instantiate(cfg.sampler)
    sampler.times(process, sampler.steps)  # refuses steps that there can't be
    instantiate(cfg.guidance, _convert_="all")  # likewise
    data = Manifest.load(f"{cfg.input}/train")
    recipe, read = Recipe.of(cfg, instantiate, ranks), instantiate(cfg.read, _partial_=True)
    latents = latents_of(config, data, recipe.make_loader, read, instantiate, ranks.device)
    recipe, read, autoencoder = replace(recipe, make_loader=latents.make_loader), latents.read, latents.autoencoder
    facts = scaled_as_known(config, latents.facts)
    refuse_other_encoders(facts, config, autoencoder, instantiate)
    torch.manual_seed(cfg.seed)
    network = build_network(config, facts, instantiate)
    if cfg.start_from is not None:
        load_weights(network, cfg.start_from)
    objective = make_objective(network=network, latents=facts.latents, seed=cfg.seed)
    run, dtype = RunFolder(cfg.output, "train_ldm", config, ranks), DTYPES[recipe.engine.dtype]
    if ranks.is_main:
        print(f"attention: {attention_used(network.unet, dtype, ranks)}", flush=True)
    averaged = copy.deepcopy(network).to(ranks.device, dtype).eval().requires_grad_(False)
    heldout = read(root=f"{cfg.input}/heldout", limit=cfg.validation_samples)

    def actions(engine: Engine, ema: Ema, reporter: Reporter) -> list[Action]:
        if ranks.is_main:  # only now is it certain that this run may go on in this folder
            facts.save(run.path)

        def with_averaged_weights(do: Callable[[TrainState], None]) -> Callable[[TrainState], None]:
            def action(state: TrainState) -> None:
                averaged.load_state_dict(engine.full_state_dict(ema.shards, prefix="network."))
                do(state)

            return action

        validation = HeldoutLoss(objective, averaged, heldout, ranks, reporter)
        preview = None
        if cfg.preview_every:
            generator = generator_of(averaged, objective, facts, autoencoder, ranks.device)
            preview = preview_of(cfg, generator, read, run, reporter)
        return [
            Action(cfg.validate_every, with_averaged_weights(validation.measure)),
            Action(cfg.preview_every, with_averaged_weights(preview.draw) if preview else lambda state: None),
        ]

    fit(
        "train_ldm",
        objective,
        "network.",
        recipe,
        run,
        identity(config, data, facts),
        actions,
    )
    if ranks.is_main:
        report(run)


def preview_of(
    cfg: DictConfig,
    generator: Generator,
    read: Callable[..., list[dict[str, Any]]],
    run: RunFolder,
    reporter: Reporter,
) -> Preview:
    """Of every eighth of the first samples that are trained on."""
    samples = read(root=f"{cfg.input}/train", limit=cfg.preview_samples * 8)[::8][: cfg.preview_samples]
    guidance, sampler = instantiate(cfg.guidance, _convert_="all"), instantiate(cfg.sampler)
    return Preview(generator, sampler, guidance, samples, cfg.seed, run, reporter)


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
