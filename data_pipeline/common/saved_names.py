"""The list of what a file of a data set, a run or a model may name: short name -> its path in this checkout.

Readers of such files build what is listed here and nothing else (saved_objects.py; docs/security.md says why).
An entry of a file is {"name": "discrete_vp", "steps": 1000, ...}; Hydra's notation in files of earlier versions
({"_target_": "train.diffusion.process.DiscreteVP", ...}) is read as the name that it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MODELS, _CONDITIONERS = "train.models", "train.models.conditioning"
_PLANES, _TOKENS = f"{_MODELS}.plane_conditioners", f"{_MODELS}.token_conditioners"
_TEXTS = "data_pipeline.encode.text_conditions"
_PROCESSES, _PREDICTIONS = "train.diffusion.process", "train.diffusion.parameterization"
_LOSSES, _SAMPLERS = "train.diffusion.losses", "train.diffusion.samplers"
_TEXT_ENCODERS = {
    "trained": "train.weights.saved.load_clip",
    "stable_diffusion": "train.weights.published.load_text_encoder",
    "hf": "train.weights.hf_text.load_text_encoder",
}

LIST: Mapping[str, Mapping[str, str]] = {
    "conditions": {
        "text": f"{_TEXTS}.Text",
        "text_t5": f"{_TEXTS}.SecondText",
        "label": "data_pipeline.encode.conditions.Label",
        "layout": "data_pipeline.encode.conditions.Layout",
        "image_embedding": "data_pipeline.encode.conditions.ImageEmbedding",
        "low_resolution": "data_pipeline.encode.conditions.LowResolution",
        "hole": "data_pipeline.encode.conditions.Hole",
        "size": "data_pipeline.encode.size_condition.Size",
    },
    "conditioning": {
        "text": f"{_CONDITIONERS}.StoredText",
        "text_t5": f"{_CONDITIONERS}.SecondStoredText",
        "joint_text": "train.models.text_transformer.JointText",
        "label": f"{_TOKENS}.ClassLabel",
        "layout": f"{_TOKENS}.LayoutTokens",
        "image_embedding": f"{_TOKENS}.ImageTokens",
        "low_resolution": f"{_PLANES}.LowResolutionImage",
        "hole": f"{_PLANES}.HoleAndRest",
        "size": f"{_MODELS}.size_features.SizeFeatures",
    },
    "unet": {"unet": f"{_MODELS}.unet.UNet"},
    "autoencoder": {
        "trained": "train.weights.saved.load_autoencoder",
        "stable_diffusion": "train.weights.published.load_autoencoder",
        "identity": f"{_MODELS}.autoencoder.Identity",
    },
    "clip": _TEXT_ENCODERS,
    "text_encoder": _TEXT_ENCODERS,
    "objective": {"latent_diffusion": "train.objectives.latent_diffusion.LatentDiffusion"},
    "process": {
        "rectified_flow": f"{_PROCESSES}.RectifiedFlow",
        "discrete_vp": f"{_PROCESSES}.DiscreteVP",
        "continuous_vp": f"{_PROCESSES}.ContinuousVP",
        "cosine_vp": f"{_PROCESSES}.CosineVP",
    },
    "parameterization": {
        "flow": f"{_PREDICTIONS}.Flow",
        "velocity": f"{_PREDICTIONS}.Velocity",
        "epsilon": f"{_PREDICTIONS}.Epsilon",
        "sample": f"{_PREDICTIONS}.Sample",
    },
    "time_sampling": {
        "uniform": "train.diffusion.time_sampling.uniform",
        "logit_normal": "train.diffusion.time_sampling.LogitNormal",
    },
    "loss": {"l2": f"{_LOSSES}.L2", "l1": f"{_LOSSES}.L1", "huber": f"{_LOSSES}.Huber"},
    "weighting": {
        "uniform": f"{_LOSSES}.Uniform",
        "min_snr": f"{_LOSSES}.MinSnr",
        "truncated_snr": f"{_LOSSES}.TruncatedSnr",
    },
    "sampler": {"sampler": "train.sampling.generator.Sampler"},
    "sampling": {name: f"{_SAMPLERS}.sample_{name}" for name in ("ddim", "ddpm", "euler", "heun", "dpmpp_2m", "unipc")},
    "spacing": {name: f"{_SAMPLERS}.{name}_times" for name in ("uniform", "trailing", "karras")},
    "guidance": {"classifier_free": "train.sampling.generator.Guidance"},
    # Models as train/weights/saved.py keeps them, by their class.
    "first_stage": {
        "AutoencoderKL": f"{_MODELS}.autoencoder.AutoencoderKL",
        "VQModel": f"{_MODELS}.autoencoder.VQModel",
    },
    "text_model": {"CLIP": f"{_MODELS}.clip.CLIP"},
    "classifier": {"NoisyClassifier": f"{_MODELS}.classifier.NoisyClassifier"},
}
# What has moved: a module, or a name in it, as written in files of earlier versions -> as LIST has it.
MOVED: Mapping[str, str] = {
    "train.models.conditioning.ClassLabel": f"{_TOKENS}.ClassLabel",
    "train.models.conditioning.LayoutTokens": f"{_TOKENS}.LayoutTokens",
    "train.models.conditioning.ImageTokens": f"{_TOKENS}.ImageTokens",
    "train.models.conditioning.LowResolutionImage": f"{_PLANES}.LowResolutionImage",
    "train.models.conditioning.HoleAndRest": f"{_PLANES}.HoleAndRest",
    "data_pipeline.conditions.Text": f"{_TEXTS}.Text",
    "data_pipeline.encode.conditions.Text": f"{_TEXTS}.Text",
    "data_pipeline.conditions": "data_pipeline.encode.conditions",
    "data_pipeline.filters": "data_pipeline.sources.filters",
    "data_pipeline.loader": "data_pipeline.loading.loader",
    "train.bad_numbers.BadNumbers": "train.loop.stability_monitor.StabilityConfig",
    "train.loop.stability_monitor.BadNumbers": "train.loop.stability_monitor.StabilityConfig",
    "train.engine.EngineConfig": "train.engine.config.EngineConfig",
    "train.evaluation.generate": "train.sampling.generator",
    "train.fitting.Training": "train.loop.recipe.Training",
    "train.optim": "train.engine.optimizer",
}
# Hydra's ways to name a function without calling it: conf/ has them for spacings and time samplings.
GETTERS = ("hydra.utils.get_method", "hydra.utils.get_object", "hydra.utils.get_class")
_PARTIAL = ("conditioning", "sampling")  # groups for which conf/ sets _partial_: true
_GROUP_AND_NAME = {path: (group, name) for group, names in LIST.items() for name, path in names.items()}


def current_path(path: str) -> str:
    """The present path of something that a file of an earlier version names."""
    module, _, name = path.rpartition(".")
    return MOVED.get(path) or f"{MOVED.get(module, module)}.{name}"


def target_of(entry: Mapping[str, Any]) -> tuple[str, bool] | None:
    """The path that an entry in Hydra's notation names, and whether it is to be called; None if it names none."""
    if not isinstance(target := entry.get("_target_"), str):
        return None
    if target in GETTERS:
        return (current_path(entry["path"]), False) if isinstance(entry.get("path"), str) else None
    return current_path(target), True


def named(tree: Any) -> Any:
    """A configuration with short names in place of Hydra's notation for what is on the list; the rest is unchanged.

    So saved files don't say where code lies, and compare equal to those that another version saved.
    """
    if isinstance(tree, list | tuple):
        return [named(item) for item in tree]
    if not isinstance(tree, Mapping):
        return tree
    path, called = target_of(tree) or ("", True)
    if path not in _GROUP_AND_NAME:
        moved = {"_target_": path} if path and called else {}
        return {key: moved.get(key, named(value)) for key, value in tree.items()}
    group, name = _GROUP_AND_NAME[path]
    dropped = {"_target_"} | (set() if called else {"path"})
    dropped |= {"_partial_"} if group in _PARTIAL and tree.get("_partial_") is True else set()
    return {"name": name, **{key: named(value) for key, value in tree.items() if key not in dropped}}


def entry_of(made: type) -> dict[str, Any]:
    """How a file names a class: by its short name; a user's own class by its path, which conf/ must also name to build
    it again."""
    return named({"_target_": f"{made.__module__}.{made.__qualname__}"})
