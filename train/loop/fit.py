"""What the training entries share: engine, EMA, loader, checkpoints and trainer put together, and run."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from train.checkpointing.checkpoints import Checkpoints
from train.distributed.collectives import broadcast_object
from train.distributed.preemption import Preemption
from train.distributed.ranks import Ranks
from train.engine.deepspeed_engine import Engine
from train.engine.ema import Ema
from train.engine.train_state import TrainState
from train.loop.heartbeat import Heart, Heartbeat
from train.loop.recipe import MakeActions, Recipe, Training
from train.loop.stability_monitor import NumbersWentBad, Watch
from train.loop.trainer import Cadence, Trainer
from train.runs.run_folder import RunFolder

log = logging.getLogger(__name__)


def fit(
    what: str,
    objective: nn.Module,
    weights_prefix: str,  # of the trained network within the objective: its EMA is what is kept
    recipe: Recipe,
    run: RunFolder,
    identity: dict[str, Any],
    make_actions: MakeActions,
) -> dict[str, Tensor]:
    """Train to the end, from a checkpoint where there is one. Returns the EMA weights, whole, on every rank."""
    with Heartbeat(run.path / "heartbeats", run.ranks, recipe.training.hang_timeout_s) as heart:
        return _fit(what, objective, weights_prefix, recipe, run, identity, make_actions, heart)


def _fit(
    what: str,
    objective: nn.Module,
    weights_prefix: str,
    recipe: Recipe,
    run: RunFolder,
    identity: dict[str, Any],
    make_actions: MakeActions,
    heart: Heart,
) -> dict[str, Tensor]:
    ranks, training = run.ranks, recipe.training
    engine = Engine(objective, recipe.optimizer, recipe.engine, ranks, training.batch_size, training.accumulation)
    ema = Ema(engine.master_shards(), training.ema_decay, training.power_ema)
    state = TrainState(training.steps, run_id=run.run_id)
    identity = {**recipe.identity, **identity}
    checkpoints = Checkpoints(
        run.checkpoints, ranks, identity, weights_prefix, training.keep_checkpoints, training.keep_every,
        training.asynchronous_save, tuple(training.may_change), run.places, training.scratch,
    )  # fmt: skip
    before_anew = partial(_refuse_to_begin_anew_in_silence, run, training)
    if checkpoints.resume(training.resume, engine, ema, state, before_anew):
        _say_where(what, state, ranks)
    run.config["engine"] |= {"dtype": recipe.engine.dtype, "dtype_because": recipe.dtype_because}
    reporter = run.reporters(state.step, training.wandb_project)
    actions = make_actions(engine, ema, reporter)
    cadence = Cadence(training.log_every, training.save_every)
    _say_what_runs(what, engine, training, ranks)
    watch = Watch(training.bad_numbers, ranks, run.path / "skipped.jsonl", good_step=state.step)
    preemption = Preemption()  # one: a signal from before a rollback still counts
    while not state.finished:
        batches = recipe.loader(ranks, state.cursor)
        trainer = Trainer(
            engine, ema, batches, state, checkpoints, watch, reporter, cadence, actions, training.batch_size, what,
            heart, preemption,
        )  # fmt: skip
        try:
            trainer.fit()
        except NumbersWentBad as bad:
            heart.beat("start", state.step)  # reading a checkpoint may take long
            go_back(what, bad, watch, checkpoints, engine, ema, state)
            reporter.rewind(state.step)
    heart.beat("finish", state.step)
    reporter.close()
    _say_what_was_skipped(what, state, watch)
    return engine.full_state_dict(ema.shards, prefix=weights_prefix)


def _say_where(what: str, state: TrainState, ranks: Ranks) -> None:
    if ranks.is_main:
        beyond = ": nothing is left to do" * (state.step >= state.total_steps)
        print(f"{what}: resumed from step {state.step} of {state.total_steps}{beyond}", flush=True)


def _refuse_to_begin_anew_in_silence(run: RunFolder, training: Training) -> None:
    """There is no checkpoint, though there was a run: killed before its first one, or its checkpoints are lost."""
    last = broadcast_object(run.last_step_logged() if run.ranks.is_main else None)
    if training.resume == "auto" and training.save_every and last > 2 * training.save_every:
        raise UserError(
            f"output={run.path} has logged {last} steps, and has no checkpoint: bring its checkpoints back, or take "
            "another output=; training.resume=never begins anew in this one."
        )
    if last and run.ranks.is_main:
        log.warning("no checkpoint is there: the run begins anew (it had logged %d steps)", last)


def _say_what_was_skipped(what: str, state: TrainState, watch: Watch) -> None:
    skipped = state.step - state.applied_steps
    if 2 * skipped > state.step:
        raise UserError(
            f"{skipped} of {state.step} steps could not be applied: lower optimizer.lr, or look for broken values in "
            f"the data ({watch.notes} names the samples)."
        )
    if skipped and watch.ranks.is_main:
        print(f"{what}: {skipped} of {state.step} steps were skipped, see {watch.notes}", flush=True)


def go_back(
    what: str, bad: NumbersWentBad, watch: Watch, checkpoints: Checkpoints, engine: Engine, ema: Ema, state: TrainState
) -> None:
    """To the last checkpoint before it, past the data in between; what can't be mended so is a UserError."""
    gone_bad, rollbacks = state.step, state.rollbacks
    remedy = "lower optimizer.lr, or look for broken values in the data (skipped.jsonl names the samples)."
    if rollbacks >= watch.limits.max_rollbacks:
        raise UserError(f"{bad.why}, after {rollbacks} rollbacks: {remedy}")
    if not checkpoints.roll_back(engine, ema, state, bad.good_step):
        raise UserError(f"{bad.why}, and no checkpoint lies before it: {remedy}")
    watch.skipped, watch.good_step = 0, state.step
    watch.note({"step": gone_bad, "rolled_back_to": state.step, "why": bad.why})
    if watch.ranks.is_main:
        print(f"{what}: {bad.why}: back to step {state.step}, past the data up to there", flush=True)


def _say_what_runs(what: str, engine: Engine, training: Training, ranks: Ranks) -> None:
    if ranks.is_main:
        size = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in engine.module.parameters())
        print(
            f"{what}: {size / 1e6:.2f} M parameters, ZeRO stage {engine.config.zero_stage}, {engine.config.dtype}, "
            f"{ranks.world_size} rank(s) on {ranks.device.type}, batch {training.batch_size} = "
            f"{training.batch_size // (ranks.world_size * training.accumulation)} x {training.accumulation} x "
            f"{ranks.world_size}, {training.steps} steps",
            flush=True,
        )
