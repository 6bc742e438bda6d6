"""Reads from the files beside a published model's weights which prediction and noise schedule it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.common.saved_names import named
from data_pipeline.common.saved_objects import read_config
from train.weights.foreign import read_json, tensor_shapes

PREDICTION_TYPES = {"epsilon": "epsilon", "velocity": "v_prediction", "sample": "sample"}
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
OURS = {theirs: ours for table in (PREDICTION_TYPES, BETA_SCHEDULES) for ours, theirs in table.items()}


class Trained(NamedTuple):
    """`process` and `parameterization` as in a run's config.yaml; None: unknown. where: the file that says so."""

    where: Path
    process: Mapping[str, Any] | None
    parameterization: Mapping[str, Any] | None


def trained_on(path: Path) -> Trained | None:
    """What a run, a diffusers folder or a CompVis file was trained on; None if no file beside it says so."""
    if (path / "config.yaml").exists():
        objective = named(read_config(path / "config.yaml").get("objective") or {})
        return Trained(path / "config.yaml", objective.get("process"), objective.get("parameterization"))
    if path.is_file():
        return _beside_single_file(path)
    for folder in (path, path.parent):  # `path` is the folder of the whole model, or of its U-Net
        scheduler = folder / "scheduler" / "scheduler_config.json"
        if scheduler.is_file():
            return _of_diffusers(read_json(scheduler), scheduler)
    return None


def _of_diffusers(config: Mapping[str, Any], where: Path) -> Trained:
    """From a scheduler's config.json; missing entries have diffusers' defaults."""
    if "FlowMatch" in str(config.get("_class_name")):
        return Trained(where, {"name": "rectified_flow"}, {"name": "flow"})
    predicts = config.get("prediction_type", "epsilon")
    schedule = config.get("beta_schedule", "linear")
    process = {
        "name": "discrete_vp",
        "beta_start": config.get("beta_start", 1e-4),
        "beta_end": config.get("beta_end", 0.02),
        "steps": config.get("num_train_timesteps", 1000),
        "schedule": OURS.get(schedule, schedule),
        "zero_terminal_snr": bool(config.get("rescale_betas_zero_snr", False)),
    }
    known = config.get("trained_betas") is None and schedule in OURS
    return Trained(where, process if known else None, {"name": OURS.get(predicts, predicts)})


def _beside_single_file(path: Path) -> Trained | None:
    """From markers in the file itself, or from the CompVis configuration of the same name."""
    names, about = tensor_shapes(path)
    said = about.get("modelspec.predict_key")
    if said or "v_pred" in names:  # keys with which Stability AI and others mark their files
        return Trained(path, None, {"name": "velocity" if said != "epsilon" else "epsilon"})
    config = path.with_suffix(".yaml")
    if not config.is_file():
        return None
    params = (read_config(config).get("model") or {}).get("params") or {}
    process = {
        "name": "discrete_vp",
        "beta_start": params.get("linear_start", 1e-4),
        "beta_end": params.get("linear_end", 0.02),
        "steps": params.get("timesteps", 1000),
        "schedule": "scaled_linear" if params.get("beta_schedule", "linear") == "linear" else "",
    }  # CompVis' "linear" is linear in the square roots of the betas
    kind = {"eps": "epsilon", "v": "velocity", "x0": "sample"}.get(params.get("parameterization", "eps"))
    return Trained(config, process if process["schedule"] else None, kind and {"name": kind})
