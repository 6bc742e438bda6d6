"""Training from the first step, or the last checkpoint, to the end: called by all entry scripts that train."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from data_pipeline.common.errors import UserError
from train.checkpointing.checkpoints import Checkpoints
from train.distributed.collectives import broadcast_object
from train.distributed.ranks import Ranks
from train.engine.deepspeed_engine import Engine
from train.engine.ema import Ema
from train.engine.train_state import TrainState
from train.loop.context import TrainedModel, TrainingContext
from train.loop.heartbeat import HangWatchdog, NoWatchdog
from train.loop.recipe import Recipe, Training
from train.loop.run_shares import warn_of_steps_beyond_the_end
from train.loop.stability_monitor import StabilityMonitor, TrainingDiverged
from train.loop.trainer import Action, Cadence, Trainer
from train.runs.run_folder import RunFolder

log = logging.getLogger(__name__)
MakeActions = Callable[[TrainingContext], list[Action]]


def fit(
    model: TrainedModel, recipe: Recipe, run: RunFolder, identity: dict[str, Any], make_actions: MakeActions
) -> dict[str, Tensor]:
    """Train to the end, from a checkpoint if there is one. Returns the full EMA weights on every rank.

    identity: what a resumed run must share with its checkpoint, in addition to the recipe's identity.
    """
    ranks, training = run.ranks, recipe.training
    with HangWatchdog(run.path / "heartbeats", ranks, training.hang_timeout_s) as watchdog:
        context = resumed(model, recipe, run, {**recipe.identity, **identity}, watchdog)
        actions = make_actions(context)
        if ranks.is_main:
            warn_of_steps_beyond_the_end(run.config)
        context.say(f"{size_of(context.engine)}, {how_it_runs(recipe, ranks)}")
        state = context.state
        monitor = StabilityMonitor(training.stability, ranks, run.path / "skipped.jsonl", good_step=state.step)
        cadence = Cadence(training.log_every, training.save_every)
        while not state.finished:
            batches = recipe.loader(ranks, state.cursor)
            try:
                Trainer(context, batches, monitor, cadence, actions).fit()
            except TrainingDiverged as bad:
                roll_back(context, monitor, bad)
        watchdog.beat("finish", state.step)
        context.reporter.close()
        report_skipped_steps(context, monitor)
        weights = context.averaged_weights()
        context.preemption.over()
        return weights


def resumed(
    model: TrainedModel, recipe: Recipe, run: RunFolder, identity: dict[str, Any], watchdog: NoWatchdog
) -> TrainingContext:
    """The parts of a run, restored from its checkpoint if there is one."""
    ranks, training = run.ranks, recipe.training
    engine = Engine(model.objective, recipe.optimizer, recipe.engine, ranks, training.batch_size, training.accumulation)
    ema = Ema(engine.master_shards(), training.ema_decay, training.power_ema)
    state = TrainState(training.steps, run_id=run.run_id)
    checkpoints = Checkpoints(run.checkpoints, ranks, identity, model.prefix, training.saving, run.paths)
    before_anew = partial(refuse_silent_restart, run, training)
    found = checkpoints.resume(training.resume, engine, ema, state, before_anew)
    run.config["engine"] |= {"dtype": recipe.engine.dtype, "dtype_because": recipe.dtype_because}
    reporter = run.reporters(state.step, training.wandb_project)
    context = TrainingContext(model, engine, ema, state, checkpoints, reporter, watchdog)
    if found:
        beyond = ": nothing is left to do" * state.finished
        context.say(f"resumed from step {state.step} of {state.total_steps}{beyond}")
    return context


def refuse_silent_restart(run: RunFolder, training: Training) -> None:
    """For a run that logged steps but has no checkpoint: killed before the first, or its checkpoints are lost."""
    last = broadcast_object(run.last_step_logged() if run.ranks.is_main else None)
    if training.resume == "auto" and training.save_every and last > 2 * training.save_every:
        raise UserError(
            f"output={run.path} has logged {last} steps but has no checkpoint: restore its checkpoints, use another "
            "output=, or start it from the beginning with training.resume=never."
        )
    if last and run.ranks.is_main:
        log.warning("there is no checkpoint: the run starts from the beginning (it had logged %d steps)", last)


def size_of(engine: Engine) -> str:
    """The number of parameters, over all ranks, as text."""
    size = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in engine.module.parameters())
    return f"{size / 1e6:.2f} M parameters"


def how_it_runs(recipe: Recipe, ranks: Ranks) -> str:
    """Device, precision, and how the batch is split: size of a micro-batch x accumulation x ranks."""
    training, world_size = recipe.training, ranks.world_size
    micro_batch = training.batch_size // (world_size * training.accumulation)
    return (
        f"ZeRO stage {recipe.engine.zero_stage}, {recipe.engine.dtype}, {world_size} rank(s) on {ranks.device.type}, "
        f"batch {training.batch_size} = {micro_batch} x {training.accumulation} x {world_size}, {training.steps} steps"
    )


def roll_back(context: TrainingContext, monitor: StabilityMonitor, bad: TrainingDiverged) -> None:
    """Go back to the last checkpoint before the fault, skipping the data in between; UserError if that can't help."""
    state = context.state
    gone_bad, rollbacks = state.step, state.rollbacks
    remedy = "lower optimizer.lr, or look for broken values in the data (skipped.jsonl names the samples)."
    if rollbacks >= monitor.limits.max_rollbacks:
        raise UserError(f"{bad.why}, after {rollbacks} rollbacks: {remedy}")
    if not context.roll_back(bad.good_step):
        raise UserError(f"{bad.why}, and there is no earlier checkpoint: {remedy}")
    monitor.after_rollback(gone_bad, state.step, bad.why)
    context.reporter.rewind(state.step)
    context.say(f"{bad.why}: rolled back to step {state.step}; the data in between are skipped")


def report_skipped_steps(context: TrainingContext, monitor: StabilityMonitor) -> None:
    """Report the number of skipped steps; UserError if they are more than half, as the result is then useless."""
    state = context.state
    skipped = state.step - state.applied_steps
    if 2 * skipped > state.step:
        raise UserError(
            f"{skipped} of {state.step} steps could not be applied: lower optimizer.lr, or look for broken values in "
            f"the data ({monitor.skipped_log} names the samples)."
        )
    if skipped:
        context.say(f"{skipped} of {state.step} steps were skipped, see {monitor.skipped_log}")
