"""The options of training, and what each of the four training scripts gives the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from data_pipeline.common import storage
from data_pipeline.common.errors import UserError
from data_pipeline.common.option_checks import (
    Count,
    NotNegative,
    OneOf,
    Positive,
    Share,
    Within,
    refuse_wrong,
    refuse_wrong_values,
)
from data_pipeline.loading.batch import Batch, DataCursor
from data_pipeline.shards.data_sets import DataSets
from train.checkpointing.checkpoints import RESUME, CheckpointConfig
from train.checkpointing.files import CheckpointPaths
from train.distributed.ranks import Ranks
from train.engine.config import EngineConfig
from train.engine.ema import gamma_of
from train.engine.optimizer import AdamW
from train.loop.dtype import resolve_dtype
from train.loop.stability_monitor import StabilityConfig

# Options that only some entry scripts have; checked before anything is built from them.
OPTIONS = {
    "seed": int,
    "fold": Count,
    "scaling_factor": Positive | None,
    "measured_on": Count,
    "validate_every": Count | None,
    "validation_samples": Count | None,
    "validation_pictures": Count | None,
    "validation_pairs": Count | None,
    "preview_every": Count | None,
    "preview_samples": Count,
    "fine_tune": bool,
    "new_objective": bool,
    "objective.prompt_dropout": Share,
    "objective.offset_noise": NotNegative,
    "objective.stratified_times": bool,
}


@dataclass(frozen=True, slots=True)
class Training:
    """Steps, batches, checkpoints and logging. batch_size is global: over all ranks and accumulation.

    micro_batch: samples per rank and forward pass; accumulation then follows from the number of ranks.
    """

    steps: Count
    batch_size: Count
    accumulation: Count = 1
    micro_batch: Count | None = None
    ema_decay: Share = 0.999
    power_ema: Sequence[float] = ()  # sigma_rel of each power-function average
    log_every: Count = 50
    save_every: Count | None = 1000
    keep_checkpoints: Count = 2
    keep_every: Count | None = None
    asynchronous_save: bool = True
    checkpoints: str | None = None  # another folder or s3://bucket/prefix; None: in the run's folder
    scratch: str | None = None  # folder on each node, for uploads and downloads
    resume: Annotated[str, OneOf(RESUME)] = "auto"
    allow_mismatch: Sequence[str] = ()
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    wandb_project: str | None = None
    hang_timeout_s: Annotated[float, Within(1)] = 300.0  # for a step; 6 times it for slow phases, such as a save

    def __post_init__(self) -> None:
        refuse_wrong(self, "training")
        if self.scratch is not None:
            storage.on_this_node(self.scratch, "training.scratch")
        for width in self.power_ema:
            gamma_of(width)  # refuses invalid widths
        if self.micro_batch is not None and self.accumulation != 1:
            raise UserError(
                f"training.accumulation={self.accumulation} and training.micro_batch={self.micro_batch} both set how "
                "a batch is split: set only one of them."
            )
        kept = (self.keep_checkpoints - 1) * (self.save_every or self.steps)
        if self.stability.spike_factor is not None and kept < self.log_every:
            raise UserError(
                f"training.stability.spike_factor is checked every log_every={self.log_every} steps, but the kept "
                f"checkpoints only go back {kept} steps for certain: raise training.keep_checkpoints or "
                "training.save_every."
            )

    @property
    def saving(self) -> CheckpointConfig:
        """How this run's checkpoints are written and kept."""
        return CheckpointConfig(
            self.keep_checkpoints, self.keep_every, self.asynchronous_save, tuple(self.allow_mismatch), self.scratch
        )

    def over(self, world_size: int) -> Training:
        """With accumulation computed from micro_batch; UserError if the ranks can't share the global batch."""
        if self.micro_batch is None:
            self.check(world_size)
            return self
        at_once = world_size * self.micro_batch
        if self.batch_size % at_once:
            raise UserError(
                f"batch_size={self.batch_size} is not a multiple of {world_size} ranks x "
                f"training.micro_batch={self.micro_batch}: change one of them."
            )
        return replace(self, accumulation=self.batch_size // at_once, micro_batch=None)

    def check(self, world_size: int) -> None:
        """UserError, before anything is loaded, if the ranks can't share the global batch."""
        parts = world_size * self.accumulation
        if self.batch_size % parts:
            raise UserError(
                f"batch_size={self.batch_size} can't be shared by {world_size} ranks x accumulation "
                f"{self.accumulation}: "
                f"make it a multiple of {parts}."
            )


def captions_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Options that decide which captions a step takes and how they are edited: only those that differ from the
    defaults."""
    options = {name: value for name, value in (data.get("captions") or {}).items() if name != "_target_"}
    given = {name: value for name, value in options.items() if value not in (None, "", 0, False)}
    if "weights" in given:
        given["weights"] = {str(name): float(weight) for name, weight in given["weights"].items()}
    return {"captions": given} if given else {}


def refuse_wrong_entry(cfg: Any) -> None:
    """UserError for invalid values of an entry script's own options."""
    groups = {"": cfg, "objective.": cfg.get("objective") or {}}
    found = {prefix + name: value for prefix, group in groups.items() for name, value in group.items()}
    refuse_wrong_values({name: value for name, value in found.items() if name in OPTIONS}, OPTIONS)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What all training scripts have in common; make_loader only needs the ranks and where to start."""

    training: Training
    optimizer: AdamW
    engine: EngineConfig
    make_loader: Callable[..., Iterable[Batch]]
    data_order: dict[str, Any]  # what sample order depends on, besides seed and data
    dtype_because: str = "set by engine.dtype"  # why the engine has its dtype

    @classmethod
    def of(cls, cfg: Any, build: Callable[..., Any], ranks: Ranks, data: DataSets) -> Recipe:
        """Build from an entry script's configuration by hydra's instantiate; UserError for options that do not fit."""
        refuse_wrong_entry(cfg)
        make_loader = partial(build(cfg.data).loader, data.for_loader(), seed=cfg.seed)
        order = {
            name: cfg.data[name] for name in ("streams", "window_shards", "shuffle", "overlap") if name in cfg.data
        }
        order |= captions_of(cfg.data)
        training, optimizer = build(cfg.training).over(ranks.world_size), build(cfg.optimizer)
        chosen = resolve_dtype(cfg.engine, CheckpointPaths.of(Path(cfg.output), training.checkpoints), ranks)
        engine = build(cfg.engine, dtype=chosen.dtype)
        recipe = cls(training, optimizer, engine, make_loader, order, chosen.because)
        recipe.check(ranks)
        return recipe

    def loader(self, ranks: Ranks, start: DataCursor) -> Iterable[Batch]:
        """This rank's batches from `start` on."""
        return self.make_loader(
            batch_size=self.training.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            accumulation=self.training.accumulation,
            start=start,
        )

    def check(self, ranks: Ranks) -> None:
        """Refuse damaged shards, and streams that the ranks can't share, before the run's folder is made."""
        self.loader(ranks, DataCursor())

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with its checkpoint. The learning rate and its schedule may change."""
        training, optimizer = self.training, self.optimizer
        moments = {"betas": list(optimizer.betas), "eps": optimizer.eps, "weight_decay": optimizer.weight_decay}
        batch = {"batch_size": training.batch_size}
        averages = {"ema_decay": training.ema_decay, "power_ema": list(training.power_ema)}
        return {**batch, **self.data_order, **averages, "optimizer": moments, "dtype": self.engine.dtype}
