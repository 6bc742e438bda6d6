"""The EMA weights of a run's checkpoint, for sampling and export."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, UserError
from train.checkpointing.files import MANIFEST, CheckpointPaths, complete_checkpoints, local_copy, step_of


class EmaWeights(NamedTuple):
    """Tensors by name, and the path of their file."""

    path: str
    tensors: dict[str, Tensor]


def ema_weights(run: Path, step: str | int = "latest") -> EmaWeights:
    """The full EMA weights of a run at `step`, or from a file of rebuild_ema.py; errors list the steps there are."""
    if str(step).endswith(".safetensors"):
        if not Path(step).exists():
            raise UserError(f"step={step} does not exist: make this file with train/rebuild_ema.py.")
        return EmaWeights(str(step), load_file(step))
    folder = storage.join(CheckpointPaths.of_run(run).checkpoints, _chosen(run, step))
    path, manifest = storage.join(folder, "ema.safetensors"), storage.read_bytes(storage.join(folder, MANIFEST))
    unfit = (ValueError, KeyError, TypeError, SafetensorError)
    with contextlib.suppress(*unfit), local_copy(path, json.loads(manifest)["ema.safetensors"]) as file:
        if file is not None:
            return EmaWeights(path, load_file(file))
    raise DataError(f"{path} is damaged: use another step= of this run, or train it again.")


def _chosen(run: Path, step: str | int) -> str:
    there = complete_checkpoints(CheckpointPaths.of_run(run).checkpoints)
    if not there:
        raise UserError(f"{run} has no checkpoint: use the output= of a train_ldm.py run that has saved one.")
    if step == "latest":
        return there[-1]
    if f"step-{step:0>8}" not in there:
        steps = ", ".join(str(step_of(name)) for name in there)
        raise UserError(f"{run} has no checkpoint of step {step}: use one of {steps}.")
    return f"step-{step:0>8}"
