"""Rebuild an average of the weights of any length after training, from the snapshots of a run."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from safetensors.torch import save

from data_pipeline.entry import entry
from data_pipeline.errors import UserError
from data_pipeline.storage import write_atomically
from train.ema import gamma_of
from train.posthoc_ema import Profile, find_snapshots, rebuilt


@entry("rebuild_ema")
def main(cfg: DictConfig) -> None:
    gamma = gamma_of(cfg.sigma_rel)
    snapshots = find_snapshots(Path(cfg.input))
    updates = max(snapshot.profile.updates for snapshot in snapshots) if cfg.updates is None else cfg.updates
    used = [snapshot for snapshot in snapshots if snapshot.profile.updates <= updates]
    if not used:
        least = min(snapshot.profile.updates for snapshot in snapshots)
        raise UserError(f"updates={updates} lies before the first snapshot: take {least:.0f} or more.")
    output = cfg.output or f"{cfg.input}/ema_{cfg.sigma_rel:g}.safetensors"
    write_atomically(output, save(rebuilt(used, Profile(updates, gamma))))
    print(f"rebuild_ema: sigma_rel {cfg.sigma_rel:g} at {updates:.0f} updates, of {len(used)} snapshots; in {output}")
    print(f"  python train/sample_images.py input={cfg.input} step={output} prompts=...")


if __name__ == "__main__":
    main()
