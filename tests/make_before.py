"""Makes data/before.tar.xz: data sets, a run and its checkpoint as earlier commits of this repository wrote them.

python tests/make_before.py        in a clone that has the commits, in an environment where they run
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
ARCHIVE = HERE / "data/before.tar.xz"
# The first commit records conditions and configurations by Python paths; the second by short names.
COMMITS = ("e6e97b4", "bc7cbfb")
PICTURES, SIDE = 10, 16
AUTOENCODER = [
    "autoencoder.channels=[4]", "autoencoder.norm_groups=2", "objective.crop=16", "objective.crop_until=0",
    "training.steps=4", "training.batch_size=8", "training.save_every=null", "validation_pictures=null",
]  # fmt: skip
# The test continues training with the same options, so these must not change.
RUN = [
    "experiment=super_resolution", "conditioning=[label,low_resolution]", "fold=1", "unet.channels=[4]",
    "unet.attention_levels=[true]", "unet.layers_per_block=1", "unet.heads=1", "unet.norm_groups=2",
    "unet.in_channels=7", "unet.out_channels=4", "unet.context_dim=4", "optimizer.schedule.kind=constant",
    "engine=zero1", "engine.dtype=fp32", "training.batch_size=8", "training.log_every=1", "training.save_every=4",
    "training.wandb_project=null", "validate_every=null", "preview_every=null", "sampler.steps=3",
]  # fmt: skip


def write_pictures(folder: Path) -> None:
    """Pictures of stripes, in two groups."""
    folder.mkdir()
    for i in range(PICTURES):
        stripes = np.zeros((SIDE, SIDE, 3), np.uint8)
        stripes[(slice(None, None, 1 + i // 2), slice(None))[:: 1 if i % 2 else -1]] = (25 * i, 255 - 25 * i, 128)
        Image.fromarray(stripes).save(folder / f"{i}.png")
        about = {"caption": f"thing {i}", "group": ("across", "down")[i % 2]}
        (folder / f"{i}.json").write_text(json.dumps(about))


def make(checkout: Path, to: Path) -> None:
    """Makes shards/ latents/ autoencoder/ run/ of 4 steps, on/ with the losses of 2 more, drawn.png after the 4."""

    def run(script: str, *options: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "LDT_CPU_BF16": "0"}
        subprocess.run([sys.executable, script, *options], cwd=checkout, env=environment, check=True)

    write_pictures(to / "pictures")
    shards = ["source=folder", f"input={to}/pictures", f"size={SIDE}", "shard_size=4", "heldout_every=5"]
    run("data_pipeline/make_shards.py", *shards, f"output={to}/shards")
    run("train/train_autoencoder.py", f"input={to}/shards", f"output={to}/first", *AUTOENCODER)
    (to / "autoencoder").mkdir()
    for name in ("config.json", "weights.safetensors"):
        shutil.copy2(to / "first" / name, to / "autoencoder")
    encoder = f"autoencoder.path={to}/autoencoder"
    latents = [f"input={to}/shards", f"output={to}/latents", encoder, "conditions=[label,low_resolution]"]
    run("data_pipeline/precompute_latents.py", *latents)
    train = ["train/train_ldm.py", f"input={to}/latents", encoder, *RUN]
    run(*train, f"output={to}/run", "training.steps=4")
    drawn = ["labels=across", f"images={to}/pictures/3.png", f"output={to}/drawn"]
    run("train/sample_images.py", f"input={to}/run", *drawn)
    shutil.copy2(next((to / "drawn").glob("0*.png")), to / "drawn.png")
    shutil.copytree(to / "run", to / "longer")
    run(*train, f"output={to}/longer", "training.steps=6")
    (to / "on").mkdir()
    shutil.copy2(to / "longer/metrics.jsonl", to / "on")
    for folder in ("first", "drawn", "longer"):
        shutil.rmtree(to / folder)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="before-") as home, tarfile.open(ARCHIVE, "w:xz") as tar:
        for commit in COMMITS:
            checkout, to = Path(home, f"checkout-{commit}"), Path(home, commit)
            subprocess.run(["git", "worktree", "add", "--detach", checkout, commit], cwd=HERE, check=True)
            try:
                to.mkdir()
                make(checkout, to)
                tar.add(to, commit, filter=without_owner)
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", checkout], cwd=HERE, check=True)


def without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """The file without owner and time; None for the plot, which is large, and for files that name a machine."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return None if Path(member.name).name in ("lock", "heartbeats", "curves.png") else member


if __name__ == "__main__":
    main()
