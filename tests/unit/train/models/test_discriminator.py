"""The PatchGAN: what a logit sees, and that pictures don't see each other."""

import pytest
import torch
from torch import nn

from data_pipeline.common.errors import UserError
from train.models.discriminator import PatchDiscriminator


@pytest.fixture
def discriminator():
    return PatchDiscriminator(channels=8, norm_groups=4)


@pytest.mark.parametrize(("size", "patches"), [(24, 1), (32, 2), (64, 6), (256, 30)])
def test_patches(discriminator, size, patches):
    assert discriminator(torch.randn(1, 3, size, size)).shape == (1, 1, patches, patches)
    assert discriminator.smallest_picture == 24


def test_too_small_a_picture_leaves_no_patch(discriminator):
    with pytest.raises(RuntimeError, match=r"Kernel size can.t be greater"):
        discriminator(torch.randn(1, 3, 23, 23))


def test_a_logit_sees_70_pixels_norms_apart(discriminator):
    """Isola et al. 2017: the 70 x 70 discriminator has three layers."""
    for block in discriminator.blocks:
        block[1] = nn.Identity()
    image = torch.randn(1, 3, 256, 256, requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator(image)[0, 0, 15, 15], image)
    rows, columns = (gradient[0].abs().amax(0) > 0).nonzero().T
    assert int(rows.max() - rows.min()) + 1 == int(columns.max() - columns.min()) + 1 == 70


def test_full_size_is_theirs_but_for_the_norms():
    """3 pixels in, 64-128-256-512 channels, one out; a norm has two values a channel, as batch norm has."""
    with torch.device("meta"):
        count = sum(p.numel() for p in PatchDiscriminator().parameters())
    convolutions = (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) * 16
    assert count == convolutions + 64 + 2 * (128 + 256 + 512) + 1


def test_a_picture_is_judged_alone_and_without_state(discriminator):
    images = torch.randn(4, 3, 32, 32)
    state = {name: value.clone() for name, value in discriminator.state_dict().items()}
    logits = discriminator.train()(images)
    for i in range(4):
        torch.testing.assert_close(discriminator(images[i : i + 1])[0], logits[i], rtol=1e-4, atol=1e-5)
    assert not list(discriminator.buffers())
    assert all(torch.equal(value, state[name]) for name, value in discriminator.state_dict().items())


def test_channels_that_groups_cannot_share():
    with pytest.raises(UserError, match="channels=48 must be a multiple of norm_groups=32"):
        PatchDiscriminator(channels=48)
