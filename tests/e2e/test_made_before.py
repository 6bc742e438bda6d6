"""What earlier commits wrote opens, draws, lends and is gone on with. tests/make_before.py tells what there is."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from make_before import ARCHIVE, COMMITS, RUN
from PIL import Image
from synthetic import losses, metric_rows, run

from data_pipeline.loading.loader import read_dataset

pytestmark = pytest.mark.processes


@pytest.fixture(params=COMMITS)
def before(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """All that a commit made, elsewhere than it lay then."""
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(tmp_path, [m for m in tar if m.name.startswith(request.param)], filter="data")
    return tmp_path / request.param


def test_its_run_draws_as_it_did(before: Path) -> None:
    opened = [f"input={before}/run", f"autoencoder_path={before}/autoencoder"]
    run("train/sample_images.py", *opened, "labels=across", f"images={before}/pictures/3.png")
    drawn, then = (np.array(Image.open(path), int) for path in (only(before / "run/drawn"), before / "drawn.png"))
    assert np.abs(drawn - then).max() <= 2  # another machine's last bits
    run("train/evaluate_ldm.py", *opened, f"shards={before}/shards")
    assert json.loads((before / "run/evaluation/evaluation.json").read_text())["candidates"] == 8


def only(drawn: Path) -> Path:
    (picture,) = drawn.glob("0*.png")
    return picture


def test_its_run_is_trained_on_as_it_would_have_been(before: Path) -> None:
    logged = metric_rows(before / "run")
    train = [f"input={before}/latents", f"output={before}/run", f"autoencoder.path={before}/autoencoder", *RUN]
    then = ["training.ema_decay=0.998", "optimizer.lr=2e-3"]  # the defaults of those commits
    said = run("train/train_ldm.py", *train, *then, "training.steps=6", "training.resume=must").stdout
    assert "resumed from step 4 of 6" in said
    assert metric_rows(before / "run")[: len(logged)] == logged
    ours, theirs = ({step: float.fromhex(loss) for step, loss in losses(before / at).items()} for at in ("run", "on"))
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert sorted(ours) == [1, 2, 3, 4, 5, 6]


def test_its_latents_lend_and_are_gone_on_with(before: Path) -> None:
    given = [f"input={before}/shards", f"autoencoder.path={before}/autoencoder", "conditions=[label,low_resolution]"]
    made = run("data_pipeline/precompute_latents.py", *given, f"output={before}/new", f"base={before}/latents").stdout
    assert "precompute train: 0 encoded, 8 copied from base=" in made
    theirs, ours = (read_dataset(f"{before}/{latents}/train") for latents in ("latents", "new"))
    for old, new in zip(theirs, ours, strict=True):
        assert all(np.array_equal(old[name], new[name]) for name in ("key", "moments", "label", "low_resolution"))
    for name in ("manifest.json", "shards/000001.tar", "shards/000001.tar.done.json"):
        (before / "latents/train" / name).unlink()
    made = run("data_pipeline/precompute_latents.py", *given, f"output={before}/latents").stdout
    assert "precompute train: 4 encoded, 4 there already" in made
