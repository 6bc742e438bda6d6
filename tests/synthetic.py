"""Small data sets with known content, and functions that run the entry points as a user does."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from forked import Forked, forked, run_forked
from safetensors.torch import save_file

from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import ShardWriter

ROOT = Path(__file__).resolve().parents[1]
TINY_LATENTS = {"moments.npy": (8, 8, 8), "text.npy": (4, 6), "pooled.npy": (5,)}
DEMO_LATENTS = {"moments.npy": (8, 16, 16), "text.npy": (16, 192), "pooled.npy": (128,)}
TINY_UNET = [
    "unet.channels=[8,16]", "unet.norm_groups=4", "unet.heads=2", "unet.context_dim=6", "unet.vector_dim=5",
]  # fmt: skip
NO_ENCODERS = ["autoencoder.path=none", "clip.path=none", "preview_every=null", "training.wandb_project=null"]


def tar_of(members: Iterable[tuple[str, bytes] | tarfile.TarInfo]) -> bytes:
    """A tar of (name, bytes) pairs and given TarInfos."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def write_latents(
    root: Path,
    samples: int,
    shapes: dict[str, tuple[int, ...]],
    shard_size: int = 16,
    spoilt: Mapping[int, float] = MappingProxyType({}),
) -> None:
    """Writes <root>, a latent data set of standard normal numbers that depend only on `samples` and `shapes`.

    spoilt: index of a sample -> value that replaces the means of its moments.
    """
    random, shards = np.random.default_rng(samples), []
    for first in range(0, samples, shard_size):
        writer = ShardWriter()
        for i in range(first, min(first + shard_size, samples)):
            arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
            if i in spoilt:
                arrays["moments.npy"][: shapes["moments.npy"][0] // 2] = spoilt[i]
            writer.add(f"{i:06d}", {**arrays, "json": {"caption": f"thing {i}"}})
        shards.append(writer.publish(root, f"shards/{len(shards):06d}.tar"))
    null = {"text": torch.zeros(shapes["text.npy"]), "pooled": torch.zeros(shapes["pooled.npy"])}
    save_file(null, root / "null.safetensors")
    fields = {name: {"dtype": "float32", "shape": list(shape)} for name, shape in shapes.items()}
    channels = shapes["moments.npy"][0] // 2
    conditions = {"text": {"name": "text"}}
    info = {"latents": {"mean": [0.0] * channels, "std": [1.0] * channels}, "conditions": conditions}
    made_of = {"autoencoder": "none", "text_encoder": "none"}
    Manifest("latents", tuple(shards), {**fields, "json": {}}, info, made_of).save(root)


def write_splits(root: Path, shapes: dict[str, tuple[int, ...]], samples: int = 64) -> Path:
    """Writes <root>/train and <root>/heldout."""
    write_latents(root / "train", samples, shapes)
    write_latents(root / "heldout", 8, shapes)
    return root


def environment() -> dict[str, str]:
    """One thread per process: on two cores, two ranks with two threads each mostly wait for each other."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(script: str, *arguments: str, ranks: int = 1) -> list[str]:
    """`python train/x.py ...`, or the same under torchrun."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0"]
        launcher += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    return [*launcher, script, *arguments]


def run(
    script: str,
    *arguments: str,
    ranks: int = 1,
    check: bool = True,
    fresh: bool = False,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess[str]:
    """Runs an entry point in the repository's root until it ends; shows its output if it fails.

    fresh: in a new Python, with torchrun for several ranks, instead of a fork of one with all imports done.
    """
    variables = {**environment(), **variables}
    if fresh:
        done = subprocess.run(
            command(script, *arguments, ranks=ranks),
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
    else:
        done = run_forked([script, *arguments], ranks, variables, timeout=300)
    if check and done.returncode:
        raise AssertionError(f"{script} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def started(log: Path, script: str, *arguments: str, ranks: int = 1, **more: str) -> Forked:
    """A running entry point, to be watched, stopped or killed; stdout and stderr go to `log`."""
    with log.open("wb") as file:
        return forked([script, *arguments], ranks, {**environment(), **more}, file)


def metric_rows(folder: Path) -> list[dict[str, Any]]:
    """Complete lines of a run's metrics.jsonl; none before it exists."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def losses(folder: Path) -> dict[int, str]:
    """Step -> loss, with all its bits."""
    return {row["step"]: float(row["loss"]).hex() for row in metric_rows(folder) if "loss" in row}
