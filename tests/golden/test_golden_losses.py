"""The first 20 losses of the demo's U-Net, as a small text file. `GOLDEN=write` rewrites it, where that is meant."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from synthetic import DEMO_LATENTS, NO_ENCODERS, losses, run, write_splits

GOLDEN = Path(__file__).with_name("demo_ldm_losses.txt")


def test_the_demos_first_20_losses(tmp_path: Path) -> None:
    latents = write_splits(tmp_path / "latents", DEMO_LATENTS)
    run(
        "train/train_ldm.py", f"input={latents}", f"output={tmp_path / 'run'}", *NO_ENCODERS, "engine=zero2",
        "engine.dtype=fp32", "training.steps=20", "training.log_every=1", "training.save_every=null",
        "validate_every=null",
    )  # fmt: skip
    got = [float.fromhex(loss) for _, loss in sorted(losses(tmp_path / "run").items())]
    if os.environ.get("GOLDEN") == "write":
        GOLDEN.write_text("".join(f"{loss:.7f}\n" for loss in got))
    expected = np.loadtxt(GOLDEN)
    assert len(got) == len(expected) == 20
    # Other CPUs sum in another order: 1e-4 is well above that, and far below any change of the mathematics.
    np.testing.assert_allclose(got, expected, rtol=1e-4)
