"""Averages of any length from snapshots of two: against the average itself, taken while the weights went by."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.common.errors import DataError, UserError
from train.checkpointing.posthoc_ema import Profile, coefficients, find_snapshots, inner_products, rebuilt
from train.engine.ema import Ema, gamma_of

STEPS, EVERY = 1024, 128


def weights_at(n):
    """A slow drift with a faster swing, as (3,)."""
    return torch.tensor([math.log(n + 10.0), math.sin(n / 150), n / STEPS])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that kept snapshots of two widths, and the averages of two others as they came out."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "ema_snapshots").mkdir()
    kept = Ema([weights_at(0)], 0.9, [0.05, 0.1])
    wanted = Ema([weights_at(0)], 0.9, [0.07, 0.15])
    for n in range(1, STEPS + 1):
        kept.update([weights_at(n)])
        wanted.update([weights_at(n)])
        if n % EVERY == 0:
            tensors = {f"{kind}/w": shards[0].clone() for kind, shards in kept.powers.items()}
            facts = {"kinds": ",".join(kept.powers), "updates": str(n)}
            save_file(tensors, folder / "ema_snapshots" / f"step-{n:08d}.safetensors", facts)
    return folder, wanted


@pytest.mark.parametrize("sigma_rel", [0.07, 0.15])
def test_an_average_that_was_not_kept_is_rebuilt(run, sigma_rel):
    folder, wanted = run
    got = rebuilt(find_snapshots(folder), Profile(STEPS, gamma_of(sigma_rel)))["w"]
    expected = wanted.powers[f"ema_{sigma_rel:g}"][0]
    assert float((got - expected).norm() / expected.norm()) < 1e-2
    last = find_snapshots(folder)[-1:]
    nearest = rebuilt(last, last[0].profile)["w"]
    assert float((got - expected).norm()) < 0.2 * float((nearest - expected).norm())


def test_one_that_was_kept_comes_out_as_it_is(run):
    folder, _ = run
    snapshots = find_snapshots(folder)
    shares = coefficients([s.profile for s in snapshots], snapshots[5].profile)
    np.testing.assert_allclose(shares, np.eye(len(snapshots))[5], atol=1e-4)


def test_inner_products_are_the_integrals():
    profiles = [Profile(1.0, 3.0), Profile(0.6, 7.5), Profile(0.8, 16.0)]
    t = (np.arange(200_000) + 0.5) / 200_000
    curves = [np.where(t <= p.updates, (p.gamma + 1) * t**p.gamma / p.updates ** (p.gamma + 1), 0) for p in profiles]
    expected = [[float((a * b).mean()) for b in curves] for a in curves]
    np.testing.assert_allclose(inner_products(profiles, profiles), expected, rtol=1e-3)


@pytest.mark.parametrize("wanted", [Profile(STEPS, gamma_of(0.01)), Profile(30 * STEPS, gamma_of(0.1))])
def test_what_the_snapshots_can_not_make_is_refused(run, wanted):
    with pytest.raises(UserError, match=r"can't be built from the snapshots \(the nearest is \d+ % away\)"):
        rebuilt(find_snapshots(run[0]), wanted)


def test_a_run_without_snapshots_is_told_how_to_keep_them(tmp_path):
    with pytest.raises(UserError, match=r"training\.power_ema=\[0\.05,0\.1\]"):
        find_snapshots(tmp_path)


@pytest.mark.parametrize(
    "about", [{}, {"updates": "8"}, {"updates": "x", "kinds": "ema_0.1"}, {"updates": "8", "kinds": "weight"}]
)
def test_a_file_that_is_no_snapshot_is_named(tmp_path, about):
    (tmp_path / "ema_snapshots").mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "ema_snapshots/other.safetensors", about)
    with pytest.raises(DataError, match=r"other\.safetensors is not a snapshot"):
        find_snapshots(tmp_path)
