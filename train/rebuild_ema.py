"""Rebuild a weight average of any length after training, from the snapshots of a run."""

from __future__ import annotations

from data_pipeline.common.entry import start_entry

if __name__ == "__main__":
    start_entry("train.rebuild_ema")  # checks the options, runs main() and exits

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig
from safetensors.torch import save

from data_pipeline.common.errors import UserError
from data_pipeline.common.option_checks import Within, fits
from data_pipeline.common.storage import write_atomically
from train.checkpointing.posthoc_ema import Profile, Snapshot, find_snapshots, rebuilt
from train.engine.ema import gamma_of


def main(cfg: DictConfig) -> None:
    gamma = gamma_of(cfg.sigma_rel)
    snapshots = find_snapshots(Path(cfg.input))
    updates = requested_updates(cfg.updates, snapshots)
    used = [snapshot for snapshot in snapshots if snapshot.profile.updates <= updates]
    output = cfg.output or f"{cfg.input}/ema_{cfg.sigma_rel:g}.safetensors"
    write_atomically(output, save(rebuilt(used, Profile(updates, gamma))))
    print(
        f"rebuild_ema: sigma_rel {cfg.sigma_rel:g} at {updates:.0f} updates, from {len(used)} snapshots; saved to "
        f"{output}"
    )
    print(f"  python train/sample_images.py input={cfg.input} step={output} prompts=...")


def requested_updates(updates: Any, snapshots: Sequence[Snapshot]) -> float:
    """The update at which the average ends; None: the newest snapshot's. UserError outside the snapshots' range."""
    there = [snapshot.profile.updates for snapshot in snapshots]
    if updates is None:
        return max(there)
    if not fits(updates, Annotated[float, Within(min(there), max(there))]):
        raise UserError(
            f"updates={updates} is not valid: use a number from {min(there):.0f} (first snapshot) to {max(there):.0f} "
            "(newest snapshot)."
        )
    return updates
