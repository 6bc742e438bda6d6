"""Generate pictures from a trained run: one PNG each, and a grid with the requests written under them."""

from __future__ import annotations

from data_pipeline.common.entry import start_entry

if __name__ == "__main__":
    start_entry("train.sample_images")  # checks the options, runs main() and exits

import contextlib
import itertools
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
from train.sampling.generator import ClassifierGuide, how_drawn
from train.sampling.requests import (
    REQUEST_OPTIONS,
    as_sample,
    file_stem,
    negative_rows,
    prompts_in,
    refuse_unused_options,
    request_rows,
    size_options,
    title,
    with_negative_size,
)
from train.sampling.trained_run import TrainedRun, encoder_paths, merged_with_run_config, open_run


def main(cfg: DictConfig) -> None:
    given = OmegaConf.to_container(cfg, resolve=True)
    if cfg.prompts_file is not None:
        if cfg.prompts is not None:
            raise UserError("prompts and prompts_file are both given: leave one of them out.")
        given["prompts"] = prompts_in(cfg.prompts_file)
    options = {name: given[name] for name in REQUEST_OPTIONS} | size_options(given["size"])
    rows, negative_size = (
        request_rows(options, cfg.samples_per_prompt),
        size_options(given["negative_size"], "negative_size"),
    )
    run = open_run(cfg.input, cfg.step, encoder_paths(cfg), cfg.bucket, cfg.decoder)
    sampler, guidance = (merged_with_run_config(run.config, group, given[group]) for group in ("sampler", "guidance"))
    classifier_guide = guided_by(cfg, run, rows)
    refuse_unused_options(run, rows[0], also=("labels",) if classifier_guide else ())
    away = with_negative_size(negative_size, run, negative_rows(given["negative_prompt"], rows), rows)
    negative = run.encode_conditions([as_sample(run, row) for row in away]) if away else None
    conditions = replace(run.encode_conditions([as_sample(run, row) for row in rows]), negative=negative)
    with Progress("sample_images", len(rows), "pictures") as bar:
        drawn = run.generator.draw(
            conditions, sampler, guidance, cfg.seed, cfg.batch_size, bar.advance, classifier_guide
        )
    output = Path(cfg.output) if cfg.output else new_folder(Path(cfg.input) / "drawn")
    titles = [title(row) for row in rows]
    for i, (name, picture) in enumerate(zip(titles, drawn, strict=True)):
        save_png(Image.fromarray(picture), output / f"{i:04d}-{file_stem(name)}.png")
    shown = list(run.generator.with_conditioning_images(conditions, drawn, cfg.batch_size))
    layout = {"columns": min(cfg.columns, len(rows)), "scale": cfg.scale}
    sheet = grid(shown, titles, **layout, title=how_drawn(run.step, sampler, guidance, cfg.seed))
    sheet = save_png(sheet, output / "grid.png")
    how = f"{sampler.steps} steps, guidance {guidance.scale:g}"
    print(f"sample_images: {len(rows)} pictures from {run.weights}, {how}; grid in {sheet}")


def new_folder(path: Path) -> Path:
    """The path itself or with -2, -3, ... appended: the first that no earlier call has written to."""
    for number_of_call in itertools.count(1):
        folder = path if number_of_call == 1 else path.with_name(f"{path.name}-{number_of_call}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("there is always a free number")


def guided_by(cfg: DictConfig, run: TrainedRun, rows: list[dict[str, Any]]) -> ClassifierGuide | None:
    """The classifier that guides towards `labels`, if one is given; UserError if it was trained on other latents."""
    if cfg.classifier.path is None:
        return None
    if "labels" not in rows[0]:
        raise UserError("classifier.path needs labels to guide towards: add labels=....")
    classifier, about = instantiate(cfg.classifier.load, path=cfg.classifier.path)
    for name, theirs in about["belongs_to"].items():
        ours = run.facts.fingerprints["autoencoder"] if name == "autoencoder" else getattr(run.facts, name, None)
        ours, theirs = (run.config["objective"]["process"], named(theirs)) if name == "process" else (ours, theirs)
        if ours != theirs:
            raise UserError(
                f"classifier.path={cfg.classifier.path} was trained with {name} {theirs}, this run with {ours}: train "
                "a classifier on this run's latents and process."
            )
    classes = about["class_names"]
    unknown = [row["labels"] for row in rows if str(row["labels"]) not in classes]
    if unknown:
        raise UserError(f"class {unknown[0]} is unknown to the classifier: use one of {', '.join(classes[:12])}.")
    labels = torch.tensor([classes.index(str(row["labels"])) for row in rows])
    return ClassifierGuide(classifier.to(run.generator.device), labels, float(cfg.classifier.scale))
