"""Generate pictures from a trained run: one PNG each, and a grid with the requests written under them."""

from __future__ import annotations

from data_pipeline.common.entry import start_entry

if __name__ == "__main__":
    start_entry("train.sample_images")  # imports the rest when the options are right, and ends

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from data_pipeline.common.errors import UserError
from data_pipeline.common.progress import Progress
from data_pipeline.common.saved_names import named
from data_pipeline.images.grid import grid, save_png
from train.sampling.generator import ClassifierGuide
from train.sampling.requests import (
    REQUEST_OPTIONS,
    as_sample,
    file_stem,
    negative_rows,
    number,
    refuse_non_numbers,
    refuse_unused_options,
    request_rows,
    title,
)
from train.sampling.trained_run import TrainedRun, merged_with_run_config, open_run


def main(cfg: DictConfig) -> None:
    given = OmegaConf.to_container(cfg, resolve=True)
    rows = request_rows({name: given[name] for name in REQUEST_OPTIONS}, cfg.samples_per_prompt)
    refuse_non_numbers(cfg.guidance.scale, cfg.sampler.steps)
    run = open_run(cfg.input, cfg.step, cfg.autoencoder_path, cfg.clip_path, cfg.bucket)
    sampler, guidance = (merged_with_run_config(run.config, group, given[group]) for group in ("sampler", "guidance"))
    classifier_guide = guided_by(cfg, run, rows)
    refuse_unused_options(run, rows[0], also=("labels",) if classifier_guide else ())
    away = negative_rows(given["negative_prompt"], rows)
    negative = run.encode_conditions([as_sample(run, row) for row in away]) if away else None
    conditions = replace(run.encode_conditions([as_sample(run, row) for row in rows]), negative=negative)
    output = Path(cfg.output or f"{cfg.input}/drawn")
    with Progress("sample_images", len(rows), "pictures") as bar:
        drawn = run.generator.draw(
            conditions, sampler, guidance, cfg.seed, cfg.batch_size, bar.advance, classifier_guide
        )
    titles = [title(row) for row in rows]
    for i, (name, picture) in enumerate(zip(titles, drawn, strict=True)):
        save_png(Image.fromarray(picture), output / f"{i:04d}-{file_stem(name)}.png")
    shown = list(run.generator.with_conditioning_images(conditions, drawn, cfg.batch_size))
    sheet = save_png(grid(shown, titles, columns=min(cfg.columns, len(rows)), scale=cfg.scale), output / "grid.png")
    how = f"{sampler.steps} steps, guidance {guidance.scale:g}"
    print(f"sample_images: {len(rows)} pictures from {run.weights}, {how}; grid in {sheet}")


def guided_by(cfg: DictConfig, run: TrainedRun, rows: list[dict[str, Any]]) -> ClassifierGuide | None:
    """The classifier that guides towards `labels`, if one is given; UserError if it was trained on other latents."""
    if cfg.classifier.path is None:
        return None
    if "labels" not in rows[0]:
        raise UserError("classifier.path guides towards labels: add labels=....")
    classifier, about = instantiate(cfg.classifier.load, path=cfg.classifier.path)
    for name, theirs in about["belongs_to"].items():
        ours = run.facts.fingerprints["autoencoder"] if name == "autoencoder" else getattr(run.facts, name, None)
        ours, theirs = (run.config["objective"]["process"], named(theirs)) if name == "process" else (ours, theirs)
        if ours != theirs:
            raise UserError(
                f"classifier.path={cfg.classifier.path} was trained with {name} {theirs}, this run with {ours}: train "
                "one on this run's latents and process."
            )
    classes = about["class_names"]
    unknown = [row["labels"] for row in rows if str(row["labels"]) not in classes]
    if unknown:
        raise UserError(f"class {unknown[0]} is unknown to the classifier: take one of {', '.join(classes[:12])}.")
    labels = torch.tensor([classes.index(str(row["labels"])) for row in rows])
    return ClassifierGuide(
        classifier.to(run.generator.device), labels, number("classifier.scale", cfg.classifier.scale)
    )
