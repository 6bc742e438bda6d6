"""Scaling of latents, and what is put in the place of a prompt."""

import pytest
import torch
from torch.nn import functional as F

from train.models.conditioning import Conditioning, Parts
from train.models.latents import LatentScaling

MEAN, STD = [0.5, -1.0, 0.0], [2.0, 0.25, 1.0]


@pytest.mark.parametrize("fold", [1, 2, 4])
def test_scaling_there_and_back(fold):
    scaling, z = LatentScaling(MEAN, STD, fold), torch.randn(2, 3, 8, 12)
    x = scaling.to_model(z)
    assert x.shape == (2, 3 * fold**2, 8 // fold, 12 // fold)
    torch.testing.assert_close(scaling.from_model(x), z, rtol=0, atol=1e-6)
    # Channel c * fold^2 + dy * fold + dx of the folded holds every fold-th pixel from (dy, dx) on.
    for c in range(3):
        for dy in range(fold):
            for dx in range(fold):
                expected = (z[:, c, dy::fold, dx::fold] - MEAN[c]) / STD[c]
                torch.testing.assert_close(x[:, c * fold**2 + dy * fold + dx], expected)


def test_scaling_makes_unit_variance():
    z = torch.randn(64, 3, 16, 16) * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)
    x = LatentScaling(MEAN, STD, 2).to_model(z)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(12), rtol=0, atol=0.06)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(12), rtol=0, atol=0.06)


def test_stable_diffusions_scaling_factor():
    z = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(LatentScaling([0.0] * 4, [1 / 0.18215] * 4).to_model(z), 0.18215 * z)


@pytest.fixture
def conditioning():
    given = Parts(torch.randn(4, 5, 6), torch.randn(4, 3), torch.randn(4, 2, 8, 8), torch.rand(4, 5) < 0.5)
    return Conditioning(
        given, Parts(torch.randn(1, 5, 6), torch.randn(1, 3), torch.randn(4, 2, 8, 8), torch.rand(1, 5) < 0.5)
    )


def test_dropped_rows_are_the_null_and_the_others_untouched(conditioning):
    drop = torch.tensor([True, False, False, True])
    dropped = conditioning.dropped(drop)
    for given, null, now in zip(conditioning.given, conditioning.null, dropped.given, strict=True):
        for i, gone in enumerate(drop):
            assert torch.equal(now[i], null.expand_as(given)[i] if gone else given[i])
    assert all(map(torch.equal, dropped.null, conditioning.null))


def test_for_guidance_is_the_condition_then_its_null(conditioning):
    both = conditioning.for_guidance()
    nothing = conditioning.dropped(torch.ones(4, dtype=torch.bool))  # what guidance steers from was trained on
    for given, away, doubled in zip(conditioning.given, nothing.given, both.given, strict=True):
        assert torch.equal(doubled, torch.cat([given, away]))


def test_parts_that_are_not_there(conditioning):
    text_only = Conditioning(Parts(conditioning.given.context), Parts(conditioning.null.context))
    assert text_only.dropped(torch.ones(4, dtype=torch.bool)).given[1:] == (None, None, None)
    assert text_only.for_guidance().given.vector is None
    assert text_only.for_guidance().given.context.shape == (8, 5, 6)
    nothing = Conditioning(Parts(), Parts())
    assert nothing.for_guidance().given == Parts()
    assert nothing.dropped(torch.ones(4, dtype=torch.bool)).given == Parts()


def test_pixel_shuffle_undoes_the_fold():
    z = torch.randn(1, 3, 4, 4)
    assert torch.equal(F.pixel_shuffle(LatentScaling([0.0] * 3, [1.0] * 3, 2).to_model(z), 2), z)
