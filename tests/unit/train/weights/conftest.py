"""Small models of each published shape, away from where their initialisation left them."""

import hashlib

import pytest
import torch

from train.models.autoencoder import AutoencoderKL, VQModel
from train.models.unet import UNet

# As CompVis' and diffusers' are, but narrow: 32 norm groups, two levels or three.
UNETS = {
    "sd1": {"channels": (32, 64, 64), "context_dim": 768, "attention_levels": (True, True, False), "heads": 8},
    "sd2": {
        "channels": (64, 128), "context_dim": 1024, "attention_levels": (True, True), "heads": (1, 2),
        "linear_projection": True,
    },
    "ldm_imagenet": {
        "in_channels": 3, "out_channels": 3, "channels": (32, 64, 96), "context_dim": 512,
        "attention_levels": (False, True, True), "heads": 1,
    },
    "ldm_unconditional": {
        "in_channels": 3, "out_channels": 3, "channels": (32, 64, 96), "context_dim": None,
        "attention_levels": (False, True, True), "heads": (1, 2, 3), "transformer_depth": 0,
    },
    "deep": {
        "channels": (32, 64), "context_dim": 768, "attention_levels": (True, False), "heads": 8, "layers_per_block": 1,
        "transformer_depth": 3,
    },
}  # fmt: skip


def shaken(model):
    """The same model, every parameter of it moved."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=UNETS)
def unet(request):
    torch.manual_seed(1)
    return shaken(UNet(**UNETS[request.param]))


@pytest.fixture
def sd1_unet():
    return shaken(UNet(**UNETS["sd1"]))


FIRST_STAGES = {
    "kl": (AutoencoderKL, {}),
    "kl_attending": (AutoencoderKL, {"attention_levels": (False, True), "latent_channels": 8}),
    "vq": (VQModel, {"codebook_size": 40}),
    "vq_attending": (VQModel, {"codebook_size": 40, "attention_levels": (False, True)}),
}


@pytest.fixture(params=["kl"])
def first_stage(request):
    torch.manual_seed(2)
    kind, options = FIRST_STAGES[request.param]
    return shaken(kind(channels=(32, 64), layers_per_block=1, **options))


@pytest.fixture
def same_weights():
    """same_weights(a, b): every name, every bit."""

    def compare(a, b):
        ours, theirs = a.state_dict(), b.state_dict()
        return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    return compare


@pytest.fixture
def sha256():
    """sha256(folder or file): by relative path."""

    def digests(path):
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        base = path.parent if path.is_file() else path
        return {str(p.relative_to(base)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    return digests
