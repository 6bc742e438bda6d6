"""Our own trained models on disk: config.json, weights.safetensors, and a fingerprint of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipeline.common.errors import DataError, UserError
from data_pipeline.common.finite_json import json_of
from data_pipeline.common.saved_names import LIST
from data_pipeline.common.saved_objects import checked, read_json, refuse_wrong_kinds
from data_pipeline.common.storage import write_atomically
from train.checkpointing.safetensors_io import save_tensors


def fingerprint(config: dict[str, Any], state: dict[str, Tensor]) -> str:
    """16 hex digits of a hash of what determines a model's output: its configuration and its weights."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_model(folder: Path, kind: str, config: dict[str, Any], state: dict[str, Tensor], facts: dict[str, Any]) -> str:
    """Writes <folder>/weights.safetensors, then config.json, which marks it complete; returns the fingerprint.

    config: the class' keyword arguments; facts: measurements to store with it.
    """
    mark = fingerprint(config, state)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(state, folder / "weights.safetensors")
    about = {"class": kind, "config": config, "fingerprint": mark, **facts}
    write_atomically(folder / "config.json", json_of(about))
    return mark


def load_autoencoder(path: str) -> nn.Module:
    """A trained first stage, AutoencoderKL or VQModel, in eval mode. Its `fingerprint` is that of the latents: if only
    the decoder was trained further, of the model that it started from."""
    model, config = _load(path, "first_stage", "autoencoder.path", "train_autoencoder.py"), Path(path) / "config.json"
    about = {"encoder_of": model.fingerprint, "stated_scaling": {}, **read_json(config)}
    refuse_wrong_kinds(about, {"encoder_of": str, "stated_scaling": Mapping[str, Any]}, str(config))
    model.fingerprint, model.stated_scaling = about["encoder_of"], about["stated_scaling"] or None
    return model


def load_clip(path: str) -> nn.Module:
    """A trained CLIP in eval mode; checks its `fingerprint`."""
    return _load(path, "text_model", "clip.path", "train_clip.py")


def load_classifier(path: str) -> tuple[nn.Module, dict[str, Any]]:
    """A trained classifier of noised latents in eval mode, and the facts saved with it."""
    model, config = _load(path, "classifier", "classifier.path", "train_classifier.py"), Path(path) / "config.json"
    about = read_json(config)
    refuse_wrong_kinds(about, {"belongs_to": Mapping[str, Any], "class_names": Sequence[str]}, str(config))
    return model, about


def saved_fingerprint(path: str | None) -> str | None:
    """The fingerprint that the loaded model would have, read from config.json; None if the folder holds no model."""
    if path is None or not (about := Path(path) / "config.json").exists():
        return None
    known = read_json(about)
    return known.get("encoder_of", known.get("fingerprint"))


def _load(path: str, group: str, option: str, made_by: str) -> nn.Module:
    """group: name of the list in saved_names.py of classes that the folder may hold."""
    folder, kinds = Path(path), " or ".join(LIST[group])
    if not (folder / "config.json").exists():
        raise UserError(f"{option}={path} contains no {kinds}: use the output= of a finished {made_by} run.")
    about = read_json(folder / "config.json")
    kind = str(about.get("class"))
    if kind not in LIST[group]:
        raise UserError(f"{option}={path} contains a {kind}, not a {kinds}: use the output= of a {made_by} run.")
    refuse_wrong_kinds(about, {"config": Mapping[str, Any], "fingerprint": str}, str(folder / "config.json"))
    entry = checked({**about["config"], "name": kind}, group, f"{folder / 'config.json'}: {kind}")
    if not (folder / "weights.safetensors").exists():
        raise DataError(f"{folder / 'weights.safetensors'} is missing: bring it back, or train the model again.")
    try:
        state = load_file(folder / "weights.safetensors")
    except (SafetensorError, OSError):
        state = {}
    if fingerprint(about["config"], state) != about["fingerprint"]:
        raise DataError(f"{folder / 'weights.safetensors'} differs from what was saved: copy it again, or train again.")
    model = entry.build()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise DataError(
            f"{folder / 'weights.safetensors'} does not fit config.json ({reason}): copy it again, or train again."
        ) from error
    model.fingerprint = about["fingerprint"]
    return model.eval().requires_grad_(False)
