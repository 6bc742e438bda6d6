"""Steps at which something begins or ends, given as numbers or as shares of the run; a warning if beyond its end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import UserError
from train.checkpointing.files import CheckpointPaths, newest_whole
from train.distributed.collectives import broadcast_object
from train.distributed.ranks import Ranks

log = logging.getLogger(__name__)
# Option -> what happens if the run ends before that step.
STEPS = {
    "optimizer.schedule.warmup": "the learning rate never reaches optimizer.lr",
    "optimizer.schedule.start": "the learning rate never falls",
    "objective.crop_until": "it never trains on whole pictures",
    "objective.adversary.start": "it never trains against the discriminator",
    "objective.adversary.ramp": "the discriminator never has its full weight",
}


def with_shares_as_steps(cfg: Any, ranks: Ranks) -> Any:
    """The configuration with shares replaced by numbers of steps, relative to the run's first training.steps.
    Collective.

    So a later change of training.steps does not end or restart anything that has begun.
    """
    given = {name: value for name in STEPS if (value := _option(cfg, name)) is not None}
    shares = {name: value for name, value in given.items() if isinstance(value, float) and 0 < value < 1}
    if not isinstance(cfg.training.steps, int):
        return cfg  # refused later, together with other mistakes in training's options
    if shares:
        _set_shares(cfg, shares, steps_at_first(cfg, ranks), ranks)
    for name in given.keys() - shares.keys():
        _check_number(name, given[name])
    return cfg


def _set_shares(cfg: Any, shares: dict[str, float], total: int, ranks: Ranks) -> None:
    for name, share in shares.items():
        parent, _, last = name.rpartition(".")
        _option(cfg, parent)[last] = max(1, round(share * total))
        if ranks.is_main:
            print(f"{name}: {_option(cfg, name)}, {share:g} of {total} steps", flush=True)


def _check_number(name: str, value: Any) -> None:
    """UserError if the value is not a number of steps."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"{name}={value} is not valid: use a whole number of steps, or a share of the run such as 0.1.")


def warn_of_steps_beyond_the_end(config: Mapping[str, Any]) -> None:
    """A warning for each step that the run ends before. Called once everything else is known to be in order, so that no
    error follows it."""
    total = config["training"]["steps"]
    what = "%s=%d outlasts the run of %d steps: %s; use a share of the run, such as 0.1, to fit any length"
    for name, lost in STEPS.items():
        value = _option(config, name)
        if isinstance(value, int) and 0 < total <= value and _is_used(config, name):
            log.warning(what, name, value, total, lost)


def steps_at_first(cfg: Any, ranks: Ranks) -> int:
    """training.steps at the run's first start, from its newest checkpoint; without one, training.steps."""
    found = None
    if ranks.is_main and cfg.training.resume != "never":
        found = newest_whole(CheckpointPaths.of(Path(cfg.output), cfg.training.checkpoints).checkpoints)
    saved = found.saved["state"] if found else {}
    return broadcast_object(saved.get("first_total") or saved.get("total_steps") or cfg.training.steps)


def _is_used(cfg: Any, name: str) -> bool:
    """Whether the other options make use of this one."""
    if name.endswith("schedule.start"):
        return _option(cfg, "optimizer.schedule.kind") == "inverse_sqrt"
    return bool(_option(cfg, "objective.crop")) if name.endswith("crop_until") else True


def _option(cfg: Any, name: str) -> Any:
    for part in name.split("."):
        cfg = cfg.get(part) if cfg is not None and hasattr(cfg, "get") else None
    return cfg
