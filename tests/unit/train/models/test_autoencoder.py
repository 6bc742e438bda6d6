"""The autoencoder is diffusers' AutoencoderKL; its posterior is torch's Gaussian."""

import pytest
import torch

from train.models.autoencoder import AutoencoderKL, DiagonalGaussian
from train.objectives.autoencoder import AutoencoderObjective

SMALL = {"channels": (16, 32, 32), "layers_per_block": 1, "norm_groups": 8}


def test_trained_weights_work_in_diffusers(image_batch, train_a_little, relative_error):
    from diffusers import AutoencoderKL as Theirs

    torch.manual_seed(0)
    ours = AutoencoderKL(**SMALL)
    train_a_little(AutoencoderObjective(ours), image_batch)
    theirs = Theirs(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8,
    )  # fmt: skip
    assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    eps = [{name: m.eps for name, m in network.named_modules() if hasattr(m, "eps")} for network in (ours, theirs)]
    assert eps[0] == eps[1]  # too small a difference to be seen in outputs of unit size
    images, z = torch.rand(2, 3, 24, 16) * 2 - 1, torch.randn(2, 4, 6, 4)
    moments, posterior = ours.encode_moments(images), theirs.encode(images).latent_dist
    assert moments.shape == (2, 8, 6, 4)
    assert relative_error(moments, posterior.parameters) < 1e-5
    assert relative_error(ours.encode(images).mean, posterior.mean) < 1e-5
    assert relative_error(ours.encode(images).logvar, posterior.logvar) < 1e-5
    assert relative_error(ours.decode(z), theirs.decode(z).sample) < 1e-5
    assert relative_error(ours.reconstruct(images), theirs.decode(posterior.mode()).sample) < 1e-5


def test_stable_diffusions_first_stage_on_the_meta_device():
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoencoderKL().parameters()) == 83_653_863


@pytest.mark.parametrize("options", [{"patch": 2}, {"patch": 2, "mid_attention": False, "latent_channels": 6}])
def test_demo_options(options, relative_error):
    torch.manual_seed(0)
    plain = AutoencoderKL(**SMALL, **options)
    last = AutoencoderKL(**SMALL, **options, channels_last=True).to(memory_format=torch.channels_last)
    last.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    moments = plain.encode_moments(images)
    assert plain.factor == 8
    assert moments.shape == (2, 2 * options.get("latent_channels", 4), 4, 6)
    assert plain.reconstruct(images).shape == images.shape
    assert relative_error(last.encode_moments(images), moments) < 1e-5
    assert relative_error(last.reconstruct(images), plain.reconstruct(images)) < 1e-5


def test_posterior():
    moments = torch.randn(3, 8, 5, 5)
    posterior, noise = DiagonalGaussian.from_moments(moments), torch.randn(3, 4, 5, 5)
    normal = torch.distributions.Normal(moments[:, :4], (0.5 * moments[:, 4:]).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(posterior.kl(), expected)
    torch.testing.assert_close(posterior.sample(noise), normal.mean + normal.stddev * noise)
    wild = DiagonalGaussian.from_moments(torch.full((1, 2, 1, 1), 1e4))
    assert torch.isfinite(wild.sample(torch.ones(1, 1, 1, 1))).all()
    assert torch.isfinite(wild.kl()).all()
