"""One rank and two, ZeRO 0 to 3: the same training. Real processes, real DeepSpeed, gloo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from synthetic import NO_ENCODERS, TINY_LATENTS, TINY_UNET, losses, run, write_splits

STEPS = 8
SETTINGS = [
    *TINY_UNET, *NO_ENCODERS, f"training.steps={STEPS}", "training.batch_size=16", "training.log_every=1",
    "optimizer.schedule.warmup=2", "validate_every=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("latents"), TINY_LATENTS)


@pytest.fixture(scope="module")
def reference(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, no ZeRO."""
    output = tmp_path_factory.mktemp("reference") / "run"
    run("train/train_ldm.py", f"input={latents}", f"output={output}", "engine=zero0", *SETTINGS)
    return output


def as_numbers(folder: Path) -> np.ndarray:
    return np.array([float.fromhex(loss) for _, loss in sorted(losses(folder).items())])


def ema(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / f"checkpoints/step-{STEPS:08d}/ema.safetensors")


@pytest.mark.parametrize(
    ("stage", "ranks", "accumulation"), [(1, 1, 1), (1, 2, 1), (2, 2, 1), (3, 2, 1), (3, 1, 1), (2, 2, 4)]
)
def test_losses_and_weights_do_not_depend_on_ranks_or_stage(
    latents: Path, reference: Path, tmp_path: Path, stage: int, ranks: int, accumulation: int
) -> None:
    output = tmp_path / "run"
    options = [f"engine=zero{stage}", f"training.accumulation={accumulation}", *SETTINGS]
    run("train/train_ldm.py", f"input={latents}", f"output={output}", *options, ranks=ranks)
    assert len(as_numbers(output)) == STEPS
    np.testing.assert_allclose(as_numbers(output), as_numbers(reference), rtol=1e-5)
    expected, got = ema(reference), ema(output)
    assert expected.keys() == got.keys()
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], atol=1e-4, err_msg=name)
