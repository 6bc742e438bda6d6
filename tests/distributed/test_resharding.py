"""A run that changes its ranks, its ZeRO stage and its accumulation on the way, against one that does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from recording_objective import read_records
from safetensors.torch import load_file
from synthetic import NO_ENCODERS, ROOT, TINY_UNET, losses, metric_rows, run
from torch import Tensor

from train.checkpointing.part_files import gathered

pytestmark = pytest.mark.processes

STEPS, STREAMS = 16, 8
SETTINGS = [
    *TINY_UNET, *NO_ENCODERS, f"training.steps={STEPS}", "training.batch_size=16", "training.log_every=1",
    "training.save_every=4", "training.keep_checkpoints=9", "validate_every=4",
    "objective._target_=recording_objective.RecordingObjective",
    # Adam divides a gradient by its own size, also where it is zero but for rounding: an eps above that.
    "optimizer.eps=1e-5", "optimizer.schedule.kind=constant", "optimizer.schedule.warmup=6",
]  # fmt: skip


def start(latents: Path, output: Path, *options: str, ranks: int) -> str:
    given = [f"input={latents}", f"output={output}", f"+objective.records={output}-records", *SETTINGS, *options]
    done = run("train/train_ldm.py", *given, ranks=ranks)
    return done.stdout + done.stderr


@pytest.fixture(scope="module", autouse=True)
def recording() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        yield


@pytest.fixture(scope="module")
def undisturbed(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, no ZeRO."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    start(latents, output, "engine=zero0", ranks=1)
    return output


def tensors(run_folder: Path, kind: str) -> dict[str, Tensor]:
    """Of the last checkpoint, put together from whatever parts it has."""
    folder = run_folder / f"checkpoints/step-{STEPS:08d}"
    about = json.loads((folder / "state.json").read_text())
    return gathered(kind, about["shapes"], sorted(folder.glob("part-*.safetensors")))


def as_numbers(folder: Path) -> list[float]:
    return [float.fromhex(loss) for _, loss in sorted(losses(folder).items())]


def heldout_losses(folder: Path) -> list[float]:
    return [row["heldout_loss"] for row in metric_rows(folder) if "heldout_loss" in row]


CHAINS = [
    [(1, 1), (2, 2), (2, 3), (1, 2)],  # ranks, stage
    pytest.param([(1, 1), (2, 2), (4, 3), (2, 2)], marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize("chain", CHAINS)
def test_ranks_and_stages_may_change_on_the_way(
    latents: Path, undisturbed: Path, tmp_path: Path, chain: list[tuple[int, int]]
) -> None:
    """The same samples, noise and times in each stream of each step; losses, weights, moments and EMA to rounding."""
    accumulations = [4, 1, 1, 4]
    output = tmp_path / "run"
    ends = [STEPS * (i + 1) // len(chain) for i in range(len(chain))]
    for i, ((ranks, stage), end) in enumerate(zip(chain, ends, strict=True)):
        more = [f"training.steps={end}", f"training.accumulation={accumulations[i]}"]
        said = start(latents, output, f"engine=zero{stage}", *more, ranks=ranks)
        if i:
            before = chain[i - 1]
            assert f"resumed from step {ends[i - 1]} of {end}" in said
            assert (
                f"was saved with {before[0]} rank(s) and ZeRO stage {before[1]}: it is resharded for this run" in said
            )
    records, expected = (read_records(Path(f"{folder}-records")) for folder in (output, undisturbed))
    assert len(expected) == STEPS * STREAMS
    assert records == expected
    assert sorted(losses(output)) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(as_numbers(output), as_numbers(undisturbed), rtol=1e-5)
    heldout = [heldout_losses(folder) for folder in (output, undisturbed)]
    assert len(heldout[1]) == STEPS // 4
    np.testing.assert_allclose(*heldout, rtol=1e-5)
    for kind, most in (("weight", 1e-5), ("ema", 1e-5), ("exp_avg", 1e-6), ("exp_avg_sq", 1e-7)):
        got = tensors(output, kind)
        for name, value in tensors(undisturbed, kind).items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=most, msg=f"{kind} {name}")
    written = [load_file(folder / f"checkpoints/step-{STEPS:08d}/ema.safetensors") for folder in (output, undisturbed)]
    assert written[0].keys() == written[1].keys()
    for name, value in written[1].items():
        torch.testing.assert_close(written[0][name], value, rtol=0, atol=1e-5, msg=name)


def test_the_heldout_loss_is_the_averages(latents: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Without averaging the training is the same, and the held-out loss another."""
    start(latents, tmp_path / "run", "engine=zero0", "training.steps=4", "training.ema_decay=0", ranks=1)
    assert as_numbers(tmp_path / "run") == as_numbers(undisturbed)[:4]
    assert abs(heldout_losses(tmp_path / "run")[0] - heldout_losses(undisturbed)[0]) > 1e-3


def test_the_published_weights_are_the_averages(undisturbed: Path) -> None:
    published = load_file(undisturbed / f"checkpoints/step-{STEPS:08d}/ema.safetensors")
    averages, raw = (tensors(undisturbed, kind) for kind in ("ema", "weight"))
    assert {f"network.{name}" for name in published} == averages.keys()
    assert all(torch.equal(published[name.removeprefix("network.")], average) for name, average in averages.items())
    assert any(not torch.equal(raw[name], average) for name, average in averages.items())
