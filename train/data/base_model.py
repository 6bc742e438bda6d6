"""The model to start from (start_from=): its U-Net's shape, and the refusal of runs that don't match it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data_pipeline.common.errors import UserError
from data_pipeline.common.saved_names import entry_of
from data_pipeline.common.saved_objects import build
from train.diffusion.process import DiffusionProcess
from train.models.unet import UNet
from train.weights.published import unet_options_of
from train.weights.scheduler import trained_on

TARGET = f"{UNet.__module__}.{UNet.__qualname__}"
ALIKE = 0.02  # tolerance of alpha and sigma; a last step with signal differs from one without by 0.07
NOT_FUNCTION = ("channels_last", "zero_init", "_target_")  # options that the trained U-Net does not depend on
PRESETS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}  # beta_start, beta_end of conf/process


def unet_to_train(
    unet: dict[str, Any], start_from: str | None, fine_tune: bool, learns_sizes: bool = False
) -> dict[str, Any]:
    """The options of unet=, or start_from='s own for unet=from_start; UserError if the two differ.

    learns_sizes: whether the run is conditioned on sizes; the vector condition of start_from= may then lack them.
    """
    if fine_tune and start_from is None:
        raise UserError(
            "start_from must be given, as this recipe fine-tunes a trained model: add start_from=... (a diffusers "
            "folder, a CompVis file or a run), or use fine_tune=false to train from random weights."
        )
    if not unet.get("from_start"):
        if start_from is not None:
            refuse_other_unet(unet, start_from, learns_sizes)
        return unet
    if start_from is None:
        raise UserError(
            "start_from must be given, as unet=from_start uses its U-Net: add start_from=..., or use another unet=."
        )
    refuse_absent(start_from)
    options = unet_options_of(start_from, unet["heads"])
    if unet["heads"] is not None and levelled({**options, "heads": unet["heads"]}) != levelled(options):
        raise UserError(
            f"start_from={start_from} has unet.heads={list(options['heads'])}, not {unet['heads']}: leave unet.heads= "
            "out."
        )
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    if unet.get("vector_dim") is not None:
        options["vector_dim"] = unet["vector_dim"]  # including the sizes, which the model to start from may lack
    return {**options, "_target_": unet["_target_"], "channels_last": unet["channels_last"]}


def refuse_absent(start_from: str) -> None:
    """UserError if start_from= does not exist."""
    if not Path(start_from).exists():
        raise UserError(
            f"start_from={start_from} does not exist: use the path of a run, a diffusers folder, or a single file."
        )


def refuse_other_unet(unet: Mapping[str, Any], start_from: str, learns_sizes: bool = False) -> None:
    """UserError if unet= has other widths than start_from=: one message instead of hundreds, one for each tensor.

    learns_sizes: vector_dim may differ; loading the weights adds the sizes, or refuses other widths.
    """
    if unet.get("_target_") != TARGET:
        return  # a user's own class: only its weights can be compared
    refuse_absent(start_from)
    theirs, ours = (levelled(options) for options in (unet_options_of(start_from, unet["heads"]), unet))
    names = [name for name in theirs if name in ours and theirs[name] != ours[name]]
    names = [name for name in names if not (learns_sizes and name == "vector_dim")]
    if names:
        has, asked = (", ".join(f"{name}={options[name]}" for name in names) for options in (theirs, ours))
        raise UserError(
            f"start_from={start_from} has a U-Net with {has}, but unet= has {asked}: use unet=from_start, which sets "
            "unet= to the U-Net of start_from=."
        )


def levelled(options: Mapping[str, Any]) -> dict[str, Any]:
    """A U-Net's arguments with one value per level where None or one number applies to all; without NOT_FUNCTION.
    Heads of levels without attention are left out."""
    count = len(options["channels"])
    heads, both = options["heads"], options["self_attention_levels"]
    # The middle block always has attention, with the last level's heads.
    attending = [*options["attention_levels"][:-1], True]
    heads = [heads] * count if isinstance(heads, int) else heads
    shown = {
        "channels": list(options["channels"]),
        "attention_levels": list(options["attention_levels"]),
        "self_attention_levels": [True] * count if both is None else list(both),
        "heads": [n for n, used in zip(heads, attending, strict=False) if used],
    }
    function = {name: value for name, value in options.items() if name not in NOT_FUNCTION}
    return {**function, **shown}


def refuse_other_noise(start_from: str | None, process: DiffusionProcess, parameterization: Any) -> None:
    """UserError if start_from= was trained on another prediction or noise schedule than this run's: the loss would fall
    all the same, but the pictures would be ruined."""
    if start_from is None or (known := trained_on(Path(start_from))) is None:
        return
    said, options = [], []
    if known.parameterization and known.parameterization != entry_of(type(parameterization)):
        theirs = known.parameterization["name"]
        said.append(f"predicts {theirs}")
        options.append(f"parameterization={theirs}")
    named = known.process and "name" in known.process  # otherwise a user's own class
    if named and not alike(build(known.process, "process", f"{known.where}: process"), process):
        options.insert(0, process_options(known.process))
        said.append(f"was trained with {options[0]}")
    if said:
        raise UserError(
            f"start_from={start_from} {' and '.join(said)} ({known.where}), unlike this run: add {' '.join(options)}; "
            "or add new_objective=true, to train it on this run's objective."
        )


def alike(a: DiffusionProcess, b: DiffusionProcess) -> bool:
    """Whether two processes have the same alpha and sigma for the same inputs of the network's time embedding."""
    tables = []
    for process in (a, b):
        t = torch.linspace(1.0, 999.0, 500) / process.network_time(torch.tensor(1.0))
        tables.append(torch.stack([process.alpha(t), process.sigma(t)]))
    return bool((tables[0] - tables[1]).abs().max() < ALIKE)


def process_options(process: Mapping[str, Any]) -> str:
    """The options that select this process, as text."""
    name = process["name"]
    if name != "discrete_vp":
        return f"process={'continuous_cosine' if name == 'cosine_vp' else name}"
    schedule, zero = process.get("schedule", "scaled_linear"), process.get("zero_terminal_snr", False)
    preset = "zero_terminal_snr" if zero and schedule == "scaled_linear" else schedule
    found = [f"process={preset}"] + ["process.zero_terminal_snr=true"] * (zero and preset == schedule)
    usual = dict(zip(("beta_start", "beta_end"), PRESETS.get(schedule, ()), strict=False)) | {"steps": 1000}
    return " ".join(found + [f"process.{k}={process[k]}" for k, v in usual.items() if process.get(k, v) != v])
