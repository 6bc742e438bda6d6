"""Export a trained model as a diffusers folder and, if requested, as a CompVis single file."""

from __future__ import annotations

from data_pipeline.common.entry import start_entry

if __name__ == "__main__":
    start_entry("train.export_diffusers")  # checks the options, runs main() and exits

import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from data_pipeline.common.errors import UserError
from data_pipeline.common.storage import HOST, write_atomically
from data_pipeline.common.temp_files import abandoned
from train.models.size_features import SizeFeatures
from train.sampling.trained_run import TrainedRun, encoder_paths, open_run
from train.weights.hf_text import HFTextEncoder
from train.weights.open_clip import HEAD_WIDTH
from train.weights.pipeline import Pipeline, reads_back, scheduler_config


def main(cfg: DictConfig) -> None:
    output, file = Path(cfg.output), None if cfg.single_file is None else Path(cfg.single_file)
    if file is not None and file.suffix != ".safetensors":
        raise UserError(f"single_file={file} must end with .safetensors, the only format that is written.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output={output} already exists: choose a new or empty folder.")
    run = open_run(cfg.input, cfg.step, encoder_paths(cfg))
    pipeline = pipeline_of(run)
    pipeline.refuse_unfit(single_file=file is not None)
    with written_aside(output) as folder:
        pipeline.save_folder(folder)
        about = {"mean": run.facts.mean, "std": run.facts.std, "fold": run.facts.fold}
        write_atomically(folder / "x0.json", json.dumps(about, indent=1).encode())
        reads_back(pipeline, folder, shape_of(run))
        if file is not None:
            aside = folder / file.relative_to(output) if file.is_relative_to(output) else file
            pipeline.save_single_file(aside)
            reads_back(pipeline, aside, shape_of(run))
    print(f"export_diffusers: {run.weights} -> {output}; each part was read back and gives the same output")
    print(usage_hint(pipeline, run, output))
    if file is not None:
        print(f"export_diffusers: {run.weights} -> {file}; each part was read back and gives the same output")
        if pipeline.text is not None and not pipeline.text_in_single_file:
            print(
                f"the text encoder is only in {output}: a single file can only store one with heads of width "
                f"{HEAD_WIDTH}"
            )


@contextmanager
def written_aside(output: Path) -> Iterator[Path]:
    """A temporary folder that becomes `output` at the end, so that a kill leaves nothing that stops the next start; it
    is removed after an error."""
    folder = output.with_name(f"{output.name}.tmp.{HOST}.{os.getpid()}")
    for left in output.parent.glob(f"{glob.escape(output.name)}.tmp.*"):
        if abandoned(left) or left == folder:  # in containers, numbers of processes repeat
            shutil.rmtree(left)
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.replace(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # not there any more unless something failed


def pipeline_of(run: TrainedRun) -> Pipeline:
    """The run's parts, on the CPU; UserError for parts that diffusers can't store."""
    refuse_trained_conditioners(run.generator.network.conditioner)
    refuse_other_text(run)
    autoencoder = None if run.facts.stored_as == "pixels" else run.image.cpu()
    text = run.conditions["text"].of(run) if "text" in run.config["conditioning"] else None
    objective = run.config["objective"]
    scheduler = scheduler_config(objective["process"], objective["parameterization"])
    unet, conditioner = run.generator.network.unet.cpu(), run.generator.network.conditioner
    return Pipeline.of(unet, autoencoder, text, run.facts.scaling, scheduler, is_sdxl_vector(conditioner))


def is_sdxl_vector(conditioner: nn.Module) -> bool:
    """Whether the vector condition is the pooled text state (if it is stored) followed by the sizes."""
    return [name for name, part in conditioner.parts.items() if part.vector_dim] in (["text", "size"], ["size"])


def refuse_trained_conditioners(conditioner: nn.Module) -> None:
    """UserError for a conditioner with trained weights: the export would lack them."""
    trained = [name for name, part in conditioner.parts.items() if any(True for _ in part.parameters())]
    if trained:
        raise UserError(
            f"conditioning={trained[0]} has weights trained with the U-Net, which diffusers' folders can't store: "
            "export a run conditioned on stored text or images, or on nothing."
        )


def refuse_other_text(run: TrainedRun) -> None:
    """UserError for text states that diffusers' StableDiffusionPipeline does not give to the U-Net."""
    parts = run.generator.network.conditioner.parts
    reason = {
        "two text encoders": "text_t5" in parts,
        "an encoder other than CLIP": "text" in parts and isinstance(run.conditions["text"].of(run), HFTextEncoder),
        "masks": any(getattr(part, "length", None) for part in parts.values()),
    }
    if found := [what for what, there in reason.items() if there]:
        raise UserError(
            f"this run is conditioned on text with {' and '.join(found)}, which diffusers' "
            "StableDiffusionPipeline can't draw with: export a run on the states of one CLIP without masks."
        )


def shape_of(run: TrainedRun) -> tuple[int, int, int]:
    """(C, h, w) of the U-Net's input."""
    return run.generator.network.unet.in_channels, *run.facts.unet_shape[1:]


def usage_hint(pipeline: Pipeline, run: TrainedRun, output: Path) -> str:
    """How to load the export, and how to scale its latents, as text."""
    if pipeline.drawn_by_theirs:
        return f'to draw: diffusers.StableDiffusionPipeline.from_pretrained("{output}")("a red heart").images[0]'
    name = "UNet2DModel" if pipeline.unet.context_dim is None else "UNet2DConditionModel"
    lines = [f'to load: diffusers.{name}.from_pretrained("{output}", subfolder="unet")']
    if pipeline.with_sizes:
        lines.append(
            "its added_cond_kwargs: text_embeds, the pooled text state that precompute stores, (B, "
            f"{pipeline.unet.vector_dim - 6 * SizeFeatures.WIDTH}), and time_ids (B, 6), original height and width, "
            "crop top and left, target height and width"
        )
    if pipeline.vae_facts:
        lines.append(
            "x0 = (z - latents_mean) / latents_std, with the values in vae/config.json: diffusers does not apply them"
        )
    if pipeline.autoencoder is None:
        mean, std = ([round(value, 4) for value in values] for values in (run.facts.mean, run.facts.std))
        folded = f", then pixel_unshuffle by {run.facts.fold}" if run.facts.fold > 1 else ""
        lines.append(f"x0 = (pixels - {mean}) / {std}{folded}: x0.json has all digits")
    elif run.facts.fold > 1:
        lines.append(f"x0 is folded: pixel_unshuffle of the scaled latents by {run.facts.fold}, as in x0.json")
    return "\n".join(lines)
