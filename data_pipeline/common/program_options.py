"""Type and range of every option of every program, checked before a program's own code is imported.

COMMON has the options that mean the same in all programs; PROGRAMS those of one program, which take precedence. Options
of `training`, `engine` and `optimizer` are annotated where they are used (Training, EngineConfig, AdamW) and are also
checked before anything is written. tests/unit/data_pipeline/common/test_program_options.py compares this with conf/.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from data_pipeline.common.errors import UserError
from data_pipeline.common.option_checks import (
    Count,
    Finite,
    Folder,
    NotNegative,
    OneOf,
    Path,
    Positive,
    Share,
    Within,
    fits,
    refuse_wrong_values,
)

OWN_PACKAGES = ("train.", "data_pipeline.", "hydra.utils.")
# ${process} and others, which objective= repeats
REPEATED = tuple(f"objective.{name}." for name in ("process", "parameterization", "time_sampling", "loss", "weighting"))
Seed = Annotated[int, Within(-(2**63), 2**63 - 1)]
Number = Annotated[int, Within(0)]  # a count that may be 0
RandomSeed = Annotated[int, Within(0, 2**63 - 1)]  # numpy's seeds are not negative
DataSets = Folder | Sequence[Any]  # train/ checks the list itself
Texts = str | Sequence[str]
Pixels = tuple[NotNegative, NotNegative]  # [height,width] or [top,left]

SIZE_PARTS = ("original", "crop", "target")

# Checked elsewhere, by the classes with these names.
ELSEWHERE = ("training.", "engine.", "optimizer.")
COMMON: Mapping[str, Any] = {
    "input": Folder,
    "output": Folder | None,
    "seed": Seed,
    "step": Number | Path,
    "batch_size": Count,
    "max_aside_fraction": Share,
    "dtype": str,
    "flips": bool,
    "device": str,
    "autoencoder_path": Folder | None,
    "decoder": Folder | None,
    "preview_decoder": Path | None,
    "clip_path": Folder | None,
    "text_encoder_path": Folder | None,
    "shards": Folder | None,
    "fold": Count,
    "scaling_factor": Positive | None,
    "shift_factor": float | None,
    "start_from_ema": bool,
    "measured_on": Count,
    "validate_every": Count | None,
    "validation_samples": Count | None,
    "validation_pictures": Count | None,
    "validation_pairs": Count | None,
    "preview_every": Count | None,
    "preview_samples": Count,
    "store.endpoint": Path | None,
    "store.region": Path | None,
    "store.deadline_s": Positive | None,
    "store.attempts": Count | None,
    "store.cache": Folder | None,
    "store.cache_gb": Positive | None,
    "autoencoder.path": Folder | None,
    "autoencoder.latent_channels": Count,
    "autoencoder.codebook_size": Annotated[int, Within(2)],
    "autoencoder.channels": Sequence[Count],
    "autoencoder.layers_per_block": Count,
    "autoencoder.norm_groups": Count,
    "autoencoder.mid_attention": bool,
    "autoencoder.patch": Count,
    "autoencoder.attention_levels": Sequence[bool] | None,
    "autoencoder.channels_last": bool,
    "autoencoder.quant_conv": bool,
    "clip.path": Folder | None,
    "clip.context_length": Annotated[int, Within(3)],
    "text_encoder.path": Folder | None,
    "text_encoder.context_length": Annotated[int, Within(3)],
    "clip.architecture": str,
    "clip.patch_dropout": Annotated[float, Within(0, 1, below=True)],
    "clip.quick_gelu": bool,
    "clip.logit_scale": float | None,
    "clip.logit_bias": float | None,
    "clip.embed_dim": Count,
    "clip.vision.image_size": Count,
    "clip.vision.patch_size": Count,
    "clip.vision.width": Count,
    "clip.vision.layers": Count,
    "clip.vision.head_width": Count,
    "clip.text.context_length": Annotated[int, Within(3)],
    "clip.text.vocab_size": Count,
    "clip.text.width": Count,
    "clip.text.layers": Count,
    "clip.text.heads": Count,
    "unet.zero_init": bool,
    "unet.in_channels": Count,
    "unet.out_channels": Count,
    "unet.channels": Sequence[Count],
    "unet.layers_per_block": Count,
    "unet.context_dim": Count | None,
    "unet.vector_dim": Count | None,
    "unet.attention_levels": Sequence[bool],
    "unet.self_attention_levels": Sequence[bool] | None,
    "unet.heads": Count | Sequence[Count] | None,  # None: with unet=from_start
    "unet.transformer_depth": Number,
    "unet.linear_projection": bool,
    "unet.norm_groups": Count,
    "unet.channels_last": bool,
    "unet.from_start": bool,
    "classifier.channels": Sequence[Count],
    "classifier.layers_per_block": Count,
    "classifier.heads": Count,
    "classifier.norm_groups": Count,
    **{f"conditions.{name}.pooled": bool for name in ("text", "text_t5")},
    **{f"conditions.{name}.encoder": str | None for name in ("text", "text_t5")},
    **{f"conditions.{name}.mask": bool | None for name in ("text", "text_t5")},
    "conditions.hole.smallest": Share,
    "conditions.hole.largest": Share,
    "conditions.layout.max_boxes": Count,
    "conditions.low_resolution.factor": Count,
    "conditioning.hole.drop": bool,
    "conditioning.low_resolution.drop": bool,
    "conditioning.image_embedding.dim": Count | None,
    "conditioning.image_embedding.tokens": Count,
    "conditioning.joint_text.dim": Count | None,
    "conditioning.joint_text.layers": Count,
    "conditioning.joint_text.heads": Count,
    "conditioning.joint_text.context_length": Annotated[int, Within(3)],
    "conditioning.label.dim": Count | None,
    "conditioning.layout.dim": Count | None,
    "conditioning.layout.layers": Count,
    "conditioning.layout.heads": Count,
    "conditioning.size.drop": bool,
    **{f"conditioning.{name}.mask": bool | None for name in ("text", "text_t5")},
    "process.shift": Positive,
    "process.beta_min": NotNegative,
    "process.beta_max": Positive,
    "process.beta_start": Share,
    "process.beta_end": Share,
    "process.steps": Annotated[int, Within(2)],
    "process.zero_terminal_snr": bool,
    "loss.delta": Positive,
    "weighting.gamma": Positive,
    "weighting.limit": Positive,
    "time_sampling.mean": Finite,
    "time_sampling.std": Positive,
    "objective.prompt_dropout": Share,
    "objective.offset_noise": NotNegative,
    "objective.stratified_times": bool,
    "objective.train": Annotated[str, OneOf(("all", "decoder"))],
    "objective.equivariance": NotNegative,
    "objective.equivariance_scales": Sequence[Annotated[float, Within(0, 1, above=True, below=True)]],
    "objective.kl_weight": NotNegative | None,
    "objective.commitment_weight": NotNegative | None,
    "objective.revival_weight": NotNegative | None,
    "objective.vq_loss": Annotated[str, OneOf(("standard", "legacy"))] | None,
    "objective.reconstruction": Annotated[str, OneOf(("l1", "l2"))],
    "objective.log_variance": Annotated[str, OneOf(("learned",))] | None,
    "base_learning_rate": Positive | None,
    "objective.gradient_weight": NotNegative,
    "objective.crop": Number,
    "objective.crop_until": NotNegative,
    "objective.shift": Number,
    "objective.perceptual.weight": NotNegative,
    "objective.perceptual.weights": Texts,
    "objective.adversary.weight": NotNegative,
    "objective.adversary.start": NotNegative,
    "objective.adversary.ramp": NotNegative,
    "objective.adversary.loss": Annotated[str, OneOf(("hinge", "vanilla", "non_saturating"))],
    "objective.adversary.turns": Annotated[str, OneOf(("together", "alternate"))],
    "objective.adversary.adaptive_delta": Positive,
    "objective.adversary.adaptive_max": Positive,
    "objective.adversary.r1_weight": NotNegative,
    "objective.adversary.r1_every": Count,
    "objective.adversary.discriminator.norm": Annotated[str, OneOf(("group", "batch"))],
    "objective.adversary.discriminator.channels": Count,
    "objective.adversary.discriminator.layers": Count,
    "objective.adversary.discriminator.norm_groups": Count,
    "data.streams": Count,
    "data.num_workers": Number,
    "data.prefetch": Count,
    "data.window_shards": Count,
    "data.overlap": bool,
    "data.shuffle": bool,
    "data.cache_mb": NotNegative,
    "data.verify": bool,
    "sampler.steps": Count | None,
    "sampler.function.eta": NotNegative,
    "guidance.scale": Finite | None,
    "guidance.rescale": Share | None,
    "filters.shortest_side.at_least": Count,
    "filters.aspect.at_most": Annotated[float, Within(1)],
    "filters.caption_length.at_least": Number,
    "filters.caption_length.at_most": Count | None,
    "filters.columns.bounds": Mapping[str, Any] | None,
    "filters.duplicates.distance": Annotated[int, Within(0, 15)],
    "source.limit": Count | None,
    "source.count": Count,
    "source.seed": RandomSeed,
    "source.of.limit": Count | None,
    "source.complete": bool,
    "source.heldout_every": Annotated[int, Within(2)] | None,
    "source.caption": Texts | None,
    "source.file": Path,
    "source.table": Path | None,
    **{f"{where}.captions.first_tags": Count | None for where in ("data", "read")},
    **{f"{where}.captions.fixed_tags": Number for where in ("data", "read")},
    **{f"{where}.captions.shuffle_tags": bool for where in ("data", "read")},
    "tokenizer.context_length": Count,
    "source.encoding": Path | None,
    "source.key": str | None,
    "source.unended": bool | None,
}
PROGRAMS: Mapping[str, Mapping[str, Any]] = {
    "make_shards": {
        "input": Folder | None,
        "output": Folder,
        "size": Count,
        "shard_size": Count,
        "bucket_step": Count,
        "resize": str,
        "heldout_every": Annotated[int, Within(2)] | None,
    },
    "index_shards": {"size": Count, "shard_in_keys": bool, "key": str | None, "unended": bool | None},
    "precompute_latents": {
        "output": Folder,
        "base": Folder | None,
        "size": Count | None,
        "bucket_step": Count,
        "caption_cache_size": Number,
        "captions.first_tags": Count | None,
        "captions.fixed_tags": Number,
        "captions.tag_orders": Count,
        "captions.seed": Seed,
        "decoders": Count | None,
        "worker": Number | None,
        "workers": Count | None,
    },
    "verify_shards": {"output": Folder, "samples": Number, "every": Count},
    "plan_storage": {
        "input": Folder | None,
        "images": Annotated[float, Within(1)],
        "size": Count,
        "shard_mb": Positive,
        "caption_bytes": NotNegative,
        "json_bytes": NotNegative,
        "captions": Count,
        "unique_captions": Annotated[float, Within(0, 1, above=True)],
        "bytes_per_pixel.jpg": Positive,
        "bytes_per_pixel.webp": Positive,
        "bytes_per_pixel.png": Positive,
        "training.images_per_s": Positive,
        "training.gpus_per_node": Count,
        "training.nodes": Count,
        "encoding.images_per_s": Positive,
        "encoding.gpus": Count,
    },
    "train_ldm": {"input": DataSets, "output": Folder, "start_from": Path | None, "sampler.steps": Count,
                  "guidance.scale": Finite, "guidance.rescale": Share},
    "train_autoencoder": {"input": DataSets, "output": Folder, "start_from": Path | None},
    "train_clip": {"input": DataSets, "output": Folder},
    "train_classifier": {"input": DataSets, "output": Folder},
    "sample_images": {
        "samples_per_prompt": Count,
        "columns": Count,
        "scale": Count,
        "classifier.path": Folder | None,
        "classifier.scale": Finite,
        "prompts_file": Path | None,
        **{f"size.{part}": Sequence[Any] | None for part in SIZE_PARTS},  # one for all pictures, or one per picture
        **{f"negative_size.{part}": Pixels | None for part in SIZE_PARTS},
    },
    "evaluate_ldm": {
        "shards": Folder,
        "captions": Count,
        "heldout_captions": Number,
        "seed": RandomSeed,
        **{f"size.{part}": Pixels | None for part in SIZE_PARTS},
    },
    "export_diffusers": {"output": Folder, "single_file": Path | None},
    "rebuild_ema": {
        "output": Path | None,
        "sigma_rel": Annotated[float, Within(0, 12**-0.5, above=True, below=True)],
        "updates": NotNegative | None,
    },
    "replay_metrics": {"project": Path | None, "run_id": Path | None},
    "quickstart": {"output": Folder, "only": Path | None},
}  # fmt: skip


def refuse_wrong_options(options: Mapping[str, Any], program: str) -> None:
    """UserError for the first option of a program that has a wrong type or is out of range."""
    hints = {**COMMON, **PROGRAMS[program]}
    for name, value in leaves(options):
        hint = hints.get(name)
        if name in ("input", "output") and isinstance(value, list) and not fits(value, hint):
            raise UserError(f"{name}={value} is a list: use one folder, as {name}=FOLDER.")
        if hint is None or (name.startswith(ELSEWHERE) and program != "plan_storage"):
            continue
        refuse_wrong_values({name: value}, {name: hint})


def leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every option, except options of a user's own class and repetitions of another group."""
    target = options.get("_target_")
    if prefix.startswith(REPEATED) or (isinstance(target, str) and not target.startswith(OWN_PACKAGES)):
        return
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        elif not str(name).startswith("_"):
            yield f"{prefix}{name}", value
