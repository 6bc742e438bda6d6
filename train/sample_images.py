"""Draw pictures from a trained run: one PNG a prompt, and a grid with the prompts written under them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig
from PIL import Image

from data_pipeline.entry import entry
from data_pipeline.errors import UserError
from data_pipeline.progress import Progress
from train.evaluation.report import grid, save_png
from train.evaluation.trained_run import open_run


@entry("sample_images")
def main(cfg: DictConfig) -> None:
    prompts = prompts_of(cfg.prompts, cfg.samples_per_prompt)
    guidance, steps = number("guidance", cfg.guidance), number("sampler.steps", cfg.sampler.steps)
    if steps < 1 or steps != int(steps):
        raise UserError(f"sampler.steps={cfg.sampler.steps}: give a whole number from 1, as sampler.steps=30.")
    run = open_run(cfg.input, cfg.step, instantiate, cfg.autoencoder_path, cfg.clip_path)
    output = Path(cfg.output or f"{cfg.input}/drawn")
    with Progress("sample_images", len(prompts), "pictures") as bar:
        drawn = run.generator.draw(
            run.text(prompts), instantiate(cfg.sampler), guidance, cfg.seed, cfg.batch_size, on_batch=bar.advance
        )
    for i, (prompt, picture) in enumerate(zip(prompts, drawn, strict=True)):
        save_png(Image.fromarray(picture), output / f"{i:04d}-{file_stem(prompt)}.png")
    sheet = save_png(
        grid(list(drawn), prompts, columns=min(cfg.columns, len(prompts)), scale=cfg.scale), output / "grid.png"
    )
    print(f"sample_images: {len(prompts)} pictures from {run.weights}, guidance {guidance:g}; grid in {sheet}")


def prompts_of(value: Any, repeats: int) -> list[str]:
    """A prompt, or a list of them, each `repeats` times."""
    prompts = [str(prompt) for prompt in value] if isinstance(value, ListConfig) else [str(value)]
    if not prompts:
        raise UserError("prompts is empty: give some, as prompts='[red heart,grinning face]'.")
    return [prompt for prompt in prompts for _ in range(repeats)]


def number(name: str, value: Any) -> float:
    """`value` as a float, or a sentence."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{name}={value} is not a number: give one, as {name}=3.") from None


def file_stem(prompt: str) -> str:
    """What of a prompt can stand in a file's name."""
    return "".join(c if c.isalnum() else "-" for c in prompt.lower())[:40].strip("-") or "empty"


if __name__ == "__main__":
    main()
