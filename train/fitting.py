"""What the training entries share: engine, EMA, loader, checkpoints and trainer put together, and run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.samples import Batch, DataCursor
from train.bad_numbers import BadNumbers, NumbersWentBad, Watch
from train.checkpoint import RESUME, CheckpointConfig, Checkpoints
from train.checkpoint_files import Places
from train.dtype import settled
from train.ema import Ema, gamma_of
from train.engine import Engine, EngineConfig
from train.heartbeat import Heart, Heartbeat
from train.optim import AdamW
from train.option_checks import Count, NotNegative, OneOf, Positive, Share, Within, refuse_wrong, refuse_wrong_values
from train.ranks import Ranks, broadcast_object
from train.run_folder import RunFolder
from train.train_state import TrainState
from train.trainer import Action, Cadence, Trainer
from train.training_context import TrainedModel, TrainingContext

log = logging.getLogger(__name__)
# Of an entry's own options, those that some of them have; checked before anything is built of them.
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
    "objective.prompt_dropout": Share,
    "objective.offset_noise": NotNegative,
    "objective.stratified_times": bool,
}


@dataclass(frozen=True, slots=True)
class Training:
    """How long, in what batches, and how it is followed. batch_size is global: over all ranks and accumulation.

    micro_batch: what a rank takes at once; accumulation then follows from the number of ranks.
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
    scratch: str | None = None  # of each node, for what goes to and comes from a bucket
    resume: Annotated[str, OneOf(RESUME)] = "auto"
    may_change: Sequence[str] = ()
    bad_numbers: BadNumbers = field(default_factory=BadNumbers)
    wandb_project: str | None = None
    hang_timeout_s: Annotated[float, Within(1)] = 300.0  # for a step; six times that for a save or what else is slow

    def __post_init__(self) -> None:
        refuse_wrong(self, "training")
        for width in self.power_ema:
            gamma_of(width)  # refuses what is none
        if self.micro_batch is not None and self.accumulation != 1:
            raise UserError(
                f"training.accumulation={self.accumulation} and training.micro_batch={self.micro_batch} both say how a "
                "batch is cut: give one of them."
            )
        kept = (self.keep_checkpoints - 1) * (self.save_every or self.steps)
        if self.bad_numbers.spike_factor is not None and kept < self.log_every:
            raise UserError(
                f"training.bad_numbers.spike_factor: a spike is seen every log_every={self.log_every} steps, and the "
                f"checkpoints kept go back {kept} for sure: raise training.keep_checkpoints or training.save_every."
            )

    @property
    def saving(self) -> CheckpointConfig:
        """How its checkpoints are written and kept."""
        return CheckpointConfig(
            self.keep_checkpoints, self.keep_every, self.asynchronous_save, tuple(self.may_change), self.scratch
        )

    def over(self, world_size: int) -> Training:
        """With accumulation as the micro-batch asks for; a global batch that the ranks can't share is refused."""
        if self.micro_batch is None:
            self.check(world_size)
            return self
        at_once = world_size * self.micro_batch
        if self.batch_size % at_once:
            raise UserError(
                f"batch_size={self.batch_size} is no multiple of {world_size} ranks x training.micro_batch="
                f"{self.micro_batch}: change one of them."
            )
        return replace(self, accumulation=self.batch_size // at_once, micro_batch=None)

    def check(self, world_size: int) -> None:
        """A global batch that the ranks can't share is refused before anything is loaded."""
        parts = world_size * self.accumulation
        if self.batch_size % parts:
            raise UserError(
                f"batch_size={self.batch_size} can't be shared by {world_size} ranks x accumulation "
                f"{self.accumulation}: "
                f"make it a multiple of {parts}."
            )


def refuse_wrong_entry(cfg: Any) -> None:
    """An entry's own options that can't be."""
    groups = {"": cfg, "objective.": cfg.get("objective") or {}}
    found = {prefix + name: value for prefix, group in groups.items() for name, value in group.items()}
    refuse_wrong_values({name: value for name, value in found.items() if name in OPTIONS}, OPTIONS)


MakeActions = Callable[[TrainingContext], list[Action]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that the training entries have in common; make_loader lacks only the ranks and where to start."""

    training: Training
    optimizer: AdamW
    engine: EngineConfig
    make_loader: Callable[..., Iterable[Batch]]
    data_order: dict[str, Any]  # what the order of the samples depends on, beside the seed and the data set
    dtype_because: str = "given by name"  # why the engine has its dtype

    @classmethod
    def of(cls, cfg: Any, build: Callable[..., Any], ranks: Ranks) -> Recipe:
        """From an entry's configuration by hydra's instantiate; what doesn't fit together is refused."""
        refuse_wrong_entry(cfg)
        data = build(cfg.data, root=f"{cfg.input}/train", seed=cfg.seed)
        order = {
            name: cfg.data[name] for name in ("streams", "window_shards", "shuffle", "overlap") if name in cfg.data
        }
        training, optimizer = build(cfg.training).over(ranks.world_size), build(cfg.optimizer)
        chosen = settled(cfg.engine, Places.of(Path(cfg.output), training.checkpoints), ranks)
        engine = build(cfg.engine, dtype=chosen.dtype)
        recipe = cls(training, optimizer, engine, data, order, chosen.because)
        recipe.check(ranks)
        return recipe

    def loader(self, ranks: Ranks, start: DataCursor) -> Iterable[Batch]:
        """This rank's batches from `start` on."""
        return self.make_loader(
            global_batch_size=self.training.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            accumulation=self.training.accumulation,
            start=start,
        )

    def check(self, ranks: Ranks) -> None:
        """Refuse damaged shards, and streams that can't be shared, before the run's folder is made."""
        self.loader(ranks, DataCursor())

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with its checkpoint. The learning rate and its schedule may change."""
        training, optimizer = self.training, self.optimizer
        moments = {"betas": list(optimizer.betas), "eps": optimizer.eps, "weight_decay": optimizer.weight_decay}
        batch = {"batch_size": training.batch_size}
        averages = {"ema_decay": training.ema_decay, "power_ema": list(training.power_ema)}
        return {**batch, **self.data_order, **averages, "optimizer": moments, "dtype": self.engine.dtype}


def fit(
    model: TrainedModel, recipe: Recipe, run: RunFolder, identity: dict[str, Any], make_actions: MakeActions
) -> dict[str, Tensor]:
    """Train to the end, from a checkpoint where there is one. Returns the EMA weights, whole, on every rank.

    identity: what a resumed run must have in common with its checkpoint, beside what the recipe tells.
    """
    ranks, training = run.ranks, recipe.training
    with Heartbeat(run.path / "heartbeats", ranks, training.hang_timeout_s) as watchdog:
        context = resumed(model, recipe, run, {**recipe.identity, **identity}, watchdog)
        actions = make_actions(context)
        context.say(f"{size_of(context.engine)}, {how_it_runs(recipe, ranks)}")
        state = context.state
        watch = Watch(training.bad_numbers, ranks, run.path / "skipped.jsonl", good_step=state.step)
        cadence = Cadence(training.log_every, training.save_every)
        while not state.finished:
            batches = recipe.loader(ranks, state.cursor)
            try:
                Trainer(context, batches, watch, cadence, actions).fit()
            except NumbersWentBad as bad:
                roll_back(context, watch, bad)
        watchdog.beat("finish", state.step)
        context.reporter.close()
        say_what_was_skipped(context, watch)
        return context.averaged_weights()


def resumed(
    model: TrainedModel, recipe: Recipe, run: RunFolder, identity: dict[str, Any], watchdog: Heart
) -> TrainingContext:
    """The parts of a run, in the state of its checkpoint where there is one."""
    ranks, training = run.ranks, recipe.training
    engine = Engine(model.objective, recipe.optimizer, recipe.engine, ranks, training.batch_size, training.accumulation)
    ema = Ema(engine.master_shards(), training.ema_decay, training.power_ema)
    state = TrainState(training.steps, run_id=run.run_id)
    checkpoints = Checkpoints(run.checkpoints, ranks, identity, model.prefix, training.saving, run.places)
    before_anew = partial(refuse_to_begin_anew_in_silence, run, training)
    found = checkpoints.resume(training.resume, engine, ema, state, before_anew)
    run.config["engine"] |= {"dtype": recipe.engine.dtype, "dtype_because": recipe.dtype_because}
    reporter = run.reporters(state.step, training.wandb_project)
    context = TrainingContext(model, engine, ema, state, checkpoints, reporter, watchdog)
    if found:
        beyond = ": nothing is left to do" * state.finished
        context.say(f"resumed from step {state.step} of {state.total_steps}{beyond}")
    return context


def refuse_to_begin_anew_in_silence(run: RunFolder, training: Training) -> None:
    """There is no checkpoint, though there was a run: killed before its first one, or its checkpoints are lost."""
    last = broadcast_object(run.last_step_logged() if run.ranks.is_main else None)
    if training.resume == "auto" and training.save_every and last > 2 * training.save_every:
        raise UserError(
            f"output={run.path} has logged {last} steps, and has no checkpoint: bring its checkpoints back, or take "
            "another output=; training.resume=never begins anew in this one."
        )
    if last and run.ranks.is_main:
        log.warning("no checkpoint is there: the run begins anew (it had logged %d steps)", last)


def size_of(engine: Engine) -> str:
    """How many parameters, whole."""
    size = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in engine.module.parameters())
    return f"{size / 1e6:.2f} M parameters"


def how_it_runs(recipe: Recipe, ranks: Ranks) -> str:
    """Where, in what precision, and how the batch is cut: size of a micro-batch x accumulation x ranks."""
    training, world_size = recipe.training, ranks.world_size
    micro_batch = training.batch_size // (world_size * training.accumulation)
    return (
        f"ZeRO stage {recipe.engine.zero_stage}, {recipe.engine.dtype}, {world_size} rank(s) on {ranks.device.type}, "
        f"batch {training.batch_size} = {micro_batch} x {training.accumulation} x {world_size}, {training.steps} steps"
    )


def roll_back(context: TrainingContext, watch: Watch, bad: NumbersWentBad) -> None:
    """To the last checkpoint before it, past the data in between; what can't be mended so is a UserError."""
    state = context.state
    gone_bad, rollbacks = state.step, state.rollbacks
    remedy = "lower optimizer.lr, or look for broken values in the data (skipped.jsonl names the samples)."
    if rollbacks >= watch.limits.max_rollbacks:
        raise UserError(f"{bad.why}, after {rollbacks} rollbacks: {remedy}")
    if not context.roll_back(bad.good_step):
        raise UserError(f"{bad.why}, and no checkpoint lies before it: {remedy}")
    watch.after_rollback(gone_bad, state.step, bad.why)
    context.reporter.rewind(state.step)
    context.say(f"{bad.why}: back to step {state.step}, past the data up to there")


def say_what_was_skipped(context: TrainingContext, watch: Watch) -> None:
    """Of all steps; where it was most of them, the run is not a result: a UserError."""
    state = context.state
    skipped = state.step - state.applied_steps
    if 2 * skipped > state.step:
        raise UserError(
            f"{skipped} of {state.step} steps could not be applied: lower optimizer.lr, or look for broken values in "
            f"the data ({watch.notes} names the samples)."
        )
    if skipped:
        context.say(f"{skipped} of {state.step} steps were skipped, see {watch.notes}")
