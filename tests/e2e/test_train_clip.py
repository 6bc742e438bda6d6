"""CLIP on several ranks, as a user starts it: each picture is told from the captions of all ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic import metric_rows, run

pytestmark = pytest.mark.processes
SHORT = [
    "training.batch_size=16", "training.steps=3", "training.log_every=1", "validate_every=null", "clip.text.width=32",
    "clip.text.layers=1", "clip.vision.width=32", "clip.vision.layers=1", "optimizer.schedule.warmup=0",
]  # fmt: skip


SIGMOID = ["objective.loss=sigmoid", "+clip.logit_bias=-10", "+clip.logit_scale=2.303"]


@pytest.mark.parametrize("loss", [[], pytest.param(SIGMOID, marks=pytest.mark.exhaustive)], ids=["softmax", "sigmoid"])
def test_the_number_of_ranks_does_not_matter(tmp_path: Path, loss: list[str]) -> None:
    """The loss is that of the global batch, and so is its gradient: what comes later depends on it."""
    things = ["source=openmoji_demo", "source.limit=48"]
    run("data_pipeline/make_shards.py", *things, f"output={tmp_path}/shards", "shard_size=8")
    losses = {}
    for ranks in (1, 2):
        output = tmp_path / f"ranks{ranks}"
        run("train/train_clip.py", f"input={tmp_path}/shards", f"output={output}", *SHORT, *loss, ranks=ranks)
        losses[ranks] = [row["loss"] for row in metric_rows(output) if "loss" in row]
    assert len(losses[1]) == 3
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-3)
