"""torchrun --nnodes, as docs/slurm.md has it: two agents of one rank each, on this machine."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import NO_ENCODERS, ROOT, TINY_LATENTS, TINY_UNET, environment, losses, run, write_splits

pytestmark = pytest.mark.processes

SETTINGS = [
    *TINY_UNET, *NO_ENCODERS, "training.steps=6", "training.batch_size=8", "training.log_every=1", "engine=zero2",
    "validate_every=null", "validation_samples=2",
]  # fmt: skip


@pytest.mark.exhaustive  # four Pythons that start from nothing; several ranks under torchrun are in the other files
def test_two_nodes_train_as_two_ranks_of_one(tmp_path: Path) -> None:
    latents = write_splits(tmp_path / "latents", TINY_LATENTS)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_id=birds"]
    torchrun += ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "train/train_ldm.py"]
    line = [*torchrun, f"input={latents}", f"output={tmp_path / 'nodes'}", *SETTINGS]
    logs = [(tmp_path / f"log{i}").open("w+") for i in range(2)]
    nodes = [subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT) for log in logs]
    codes = [node.wait(300) for node in nodes]
    said = "".join((tmp_path / f"log{i}").read_text() for i in range(2))
    assert codes == [0, 0], said
    assert "2 rank(s) on cpu, batch 8 = 4 x 1 x 2" in said
    run("train/train_ldm.py", f"input={latents}", f"output={tmp_path / 'one'}", *SETTINGS, ranks=2)
    assert losses(tmp_path / "nodes") == losses(tmp_path / "one")
