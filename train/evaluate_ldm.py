"""Evaluate a trained run: recall of training captions, and grids of generated beside real pictures (also held-out)."""

from __future__ import annotations

from data_pipeline.common.entry import start_entry

if __name__ == "__main__":
    start_entry("train.evaluate_ldm")  # checks the options, runs main() and exits

from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from data_pipeline.common.errors import UserError
from data_pipeline.common.finite_json import json_of
from data_pipeline.common.progress import Progress
from data_pipeline.common.storage import exists, write_atomically
from data_pipeline.images.aspect_buckets import Sizes, parsed
from data_pipeline.images.grid import grid, save_png
from data_pipeline.images.pixels import psnr
from data_pipeline.images.resize import fitted
from data_pipeline.shards.json_fields import GEOMETRY
from data_pipeline.shards.manifest import Manifest
from train.evaluation.distances import RECALL_PIXELS, nearest, training_recall
from train.sampling.generator import how_drawn
from train.sampling.requests import size_options
from train.sampling.trained_run import TrainedRun, encoder_paths, merged_with_run_config, open_run

DISTANCE = f"mean squared error of pictures box-averaged to {RECALL_PIXELS}x{RECALL_PIXELS}"


def main(cfg: DictConfig) -> None:
    run = open_run(cfg.input, cfg.step, encoder_paths(cfg), cfg.bucket, cfg.decoder)
    if not cfg.other_shards:
        refuse_other_shards(run, cfg.shards)
    given = OmegaConf.to_container(cfg, resolve=True)
    size = {option: value for option, value in size_options(given["size"]).items() if value is not None}
    if size and "size" not in run.conditions:
        raise UserError("this run is not conditioned on sizes: leave size out.")
    train, heldout = pictures_of(cfg, run)
    output = Path(cfg.output or f"{cfg.input}/evaluation")
    right = np.linspace(0, len(train), min(cfg.captions, len(train)), endpoint=False).astype(int)
    chosen, heldout = (at_size(run, samples, size) for samples in ([train[i] for i in right], heldout))
    sampler, guidance = (merged_with_run_config(run.config, group, given[group]) for group in ("sampler", "guidance"))
    with Progress("evaluate_ldm", len(chosen) + len(heldout), "pictures") as bar:
        how = {"seed": cfg.seed, "batch_size": cfg.batch_size, "on_batch": bar.advance}
        drawn, unseen = (
            run.generator.draw(run.encode_conditions(s), sampler, guidance, **how) if s else np.array([])
            for s in (chosen, heldout)
        )
    figures = recall_figures(drawn, np.stack([sample["image"] for sample in train]), right, cfg.seed)
    figures |= similarity_metrics(run, train, chosen, drawn, heldout, unseen)
    figures |= {"guidance": guidance.scale, "steps": sampler.steps, "weights": run.weights}
    write_atomically(output / "evaluation.json", json_of(figures))
    save_grids(output, how_drawn(run.step, sampler, guidance, cfg.seed), (chosen, drawn), (heldout, unseen))
    say(figures, output)


def pictures_of(cfg: DictConfig, run: TrainedRun) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out samples on which the run can be evaluated: of its bucket, with its conditions. UserError if
    there are no training samples."""
    train, heldout = instantiate(cfg.read, root=f"{cfg.shards}/train"), []
    if cfg.heldout_captions and exists(f"{cfg.shards}/heldout/manifest.json"):
        limit = None if run.facts.buckets else cfg.heldout_captions
        heldout = instantiate(cfg.read, root=f"{cfg.shards}/heldout", limit=limit)
    if run.facts.buckets:
        train, heldout = of_bucket(run, train), of_bucket(run, heldout)
        refuse_no_pictures(run, train, cfg.shards)
    heldout = heldout[: cfg.heldout_captions]
    refuse_sizes(train, cfg.shards)
    listed = len(train) + len(heldout)
    train, heldout = (usable(run, as_trained_on(run, samples)) for samples in (train, heldout))
    if not train:
        raise UserError(
            f"shards={cfg.shards}: no picture has the conditions of this run; use the shards that its latents were "
            "made from."
        )
    if left_out := listed - len(train) - len(heldout):
        print(f"evaluate_ldm: {left_out} of {listed} pictures lack a condition of this run, and are left out")
    return train, heldout


def as_trained_on(run: TrainedRun, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples with their captions edited as for the run's training."""
    edits = run.caption_edits
    return [{**s, "caption": edits.edited(s["caption"]) if s["caption"] else ""} for s in samples]


def refuse_other_shards(run: TrainedRun, shards: str) -> None:
    """UserError for shards from which the run's latents were not made: recall on unseen pictures is at chance level."""
    made_of, given = run.facts.fingerprints.get("images"), Manifest.load(f"{shards}/train").fingerprint
    if made_of is not None and made_of != given:
        raise UserError(
            f"shards={shards} are not the shards that this run's latents were made from (fingerprint {given}, not "
            f"{made_of}): use those, or other_shards=true to measure recall of pictures that it was not trained on."
        )


def usable(run: TrainedRun, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples that have a picture, a caption and all that this run is conditioned on."""
    whole = [sample for sample in samples if "image" in sample and sample["caption"]]
    return [s for s in whole if not any(condition.reason_against(s) for condition in run.conditions.values())]


def at_size(run: TrainedRun, samples: list[dict[str, Any]], size: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples with the sizes to draw at: those given, else the run's means, independent of their jsons."""
    if "size" not in run.conditions:
        return samples
    asked = run.conditions["size"].as_sample(**size)["meta"]
    return [{**s, "meta": {k: v for k, v in s["meta"].items() if k not in GEOMETRY} | asked} for s in samples]


def refuse_sizes(train: list[dict[str, Any]], shards: str) -> None:
    """UserError for pictures whose sides can't be average-pooled to RECALL_PIXELS."""
    sides = [side for sample in train[:1] if "image" in sample for side in sample["image"].shape[:2]]
    if not train or any(side % RECALL_PIXELS for side in sides):
        raise UserError(f"shards={shards} must contain pictures whose sides are multiples of {RECALL_PIXELS} pixels.")


def refuse_no_pictures(run: TrainedRun, train: list[dict[str, Any]], shards: str) -> None:
    """UserError for shards without a picture of the run's bucket."""
    if not train:
        height, width = run.picture_size
        raise UserError(f"shards={shards} has no picture of the bucket {height}x{width}: use another bucket=.")


def of_bucket(run: TrainedRun, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples whose pictures belong to the run's bucket, cropped to its size as in precompute."""
    sizes = Sizes(tuple(parsed(name) for name in run.facts.buckets))
    chosen = [s for s in samples if "image" in s and sizes.of(s["image"].shape[:2]) == run.picture_size]
    return [sample | {"image": fitted(sample["image"], run.picture_size).pixels} for sample in chosen]


def recall_figures(drawn: np.ndarray, real: np.ndarray, right: np.ndarray, seed: int) -> dict[str, Any]:
    """Recall of training captions, and with the captions shuffled as the baseline of chance."""
    recall = training_recall(drawn, real, right)
    shuffled = training_recall(drawn, real, np.random.default_rng(seed).permutation(right))
    return {
        "training_recall_top1": recall.top1,
        "training_recall_top5": recall.top5,
        "shuffled_captions_top1": shuffled.top1,
        "shuffled_captions_top5": shuffled.top5,
        "captions": len(right),
        "candidates": len(real),
        "distance": DISTANCE,
    }


def similarity_metrics(
    run: TrainedRun,
    train: list[dict[str, Any]],
    chosen: list[dict[str, Any]],
    drawn: np.ndarray,
    heldout: list[dict[str, Any]],
    unseen: np.ndarray,
) -> dict[str, float]:
    """PSNR to the picture that each condition came from, which matters if the condition is a picture; for class
    conditions, also how often the training picture nearest to a generated one has its class."""
    figures = {"psnr_db": float(psnr(drawn, np.stack([sample["image"] for sample in chosen])).mean())}
    if heldout:
        figures["heldout_psnr_db"] = float(psnr(unseen, np.stack([sample["image"] for sample in heldout])).mean())
    if "label" in run.config["conditioning"]:
        named = run.conditions["label"].named_in
        near = nearest(drawn, np.stack([sample["image"] for sample in train]))
        same = [named(train[i]) == named(sample) for i, sample in zip(near, chosen, strict=True)]
        figures["nearest_is_of_class"] = float(np.mean(same))
    return figures


Drawn = tuple[list[dict[str, Any]], np.ndarray]  # samples, and the pictures drawn for them


def save_grids(output: Path, how: str, trained: Drawn, heldout: Drawn) -> None:
    """Save drawn.png; blind.png, the same without captions, to show to someone who has not seen them; and two grids of
    pairs, beside_real.png and heldout.png. how: the title of each grid."""
    chosen, drawn = trained
    shown = np.linspace(0, len(chosen), min(64, len(chosen)), endpoint=False).astype(int)
    captions = [chosen[i]["caption"] for i in shown]
    save_png(grid([drawn[i] for i in shown], captions, title=f"Training captions: {how}"), output / "drawn.png")
    blind = "drawn.png without its captions: what is each, to someone who has not seen them?"
    save_png(grid([drawn[i] for i in shown], title=blind), output / "blind.png")
    for name, samples, pictures, what in (
        ("beside_real.png", [chosen[i] for i in shown], drawn[shown], "Training captions"),
        ("heldout.png", *heldout, "Held-out captions"),
    ):
        pairs = [p for s, d in zip(samples, pictures, strict=True) for p in (d, s["image"])]
        labels = [label for s in samples for label in (s["caption"], "(real)")]
        if pairs:
            save_png(grid(pairs, labels, columns=12, title=f"{what}, drawn and real: {how}"), output / name)


def say(figures: dict[str, Any], output: Path) -> None:
    print(
        f"recall of training captions ({figures['captions']} captions, nearest of {figures['candidates']} pictures by "
        f"{figures['distance']}): top-1 {figures['training_recall_top1']:.2f}, top-5 "
        f"{figures['training_recall_top5']:.2f}; shuffled captions: top-1 {figures['shuffled_captions_top1']:.2f}, "
        f"top-5 {figures['shuffled_captions_top5']:.2f}"
    )
    likeness = {
        "PSNR to the real pictures": figures["psnr_db"],
        "PSNR to the held-out pictures": figures.get("heldout_psnr_db"),
        "nearest picture in the right class": figures.get("nearest_is_of_class"),
    }
    print(", ".join(f"{what} {value:.2f}" for what, value in likeness.items() if value is not None))
    print(f"evaluate_ldm: grids and evaluation.json in {output}", flush=True)
