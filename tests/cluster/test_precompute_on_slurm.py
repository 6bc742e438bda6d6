"""slurm/precompute_latents.sbatch with the real precompute_latents.py: an array over two nodes."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from slurm_cluster import Cluster, Job
from synthetic import run

from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import ShardWriter

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("machine")]

ROOT = Path(__file__).parents[2]
GIVEN = ("autoencoder=identity", "conditions=[low_resolution]", "batch_size=2")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve shards of eight pictures."""
    root, shards, generator = tmp_path_factory.mktemp("images"), [], np.random.default_rng(0)
    for number in range(12):
        writer = ShardWriter()
        for i in range(8):
            picture = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            writer.add(f"{number:02d}{i:04d}", {"png": picture, "txt": "noise", "json": {}})
        shards.append(writer.publish(root, f"shards/{number:06d}.tar"))
    Manifest("image-text", tuple(shards), {}, {"size": 64}).save(root)
    return root


def contents(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_an_array_makes_what_one_process_makes(cluster: Cluster, images: Path, tmp_path: Path) -> None:
    line = (f"input={images}", f"output={tmp_path}/array", *GIVEN)
    array = "--array=0-1", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1"
    first = cluster.submit(
        ROOT, *array, "slurm/precompute_latents.sbatch", *line, PYTHON=sys.executable, SITE=cluster.site
    )
    run("data_pipeline/precompute_latents.py", f"input={images}", f"output={tmp_path}/one", *GIVEN)
    told = cluster.client("squeue", "--noheader", "--format=%A", "--array", f"--jobs={first.number}").split()
    for number in {first.number, *map(int, told)}:
        Job(cluster, number, first.log).wait()
    assert contents(tmp_path / "array") == contents(tmp_path / "one"), first.output()
    assert first.output().count("restart 0:") == 2, first.output()
