"""LPIPS on VGG16, against the package lpips; its weights' layouts, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import train.models.torchvision_patch  # noqa: F401  (before lpips imports torchvision)
from data_pipeline.common.errors import UserError
from train.models.perceptual import LPIPS
from train.weights.foreign import read_tensors
from train.weights.perceptual import load_lpips, published_names

HEADS = Path(importlib.util.find_spec("lpips").origin).parent / "weights/v0.1/vgg.pth"  # the published ones


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """VGG16 in torchvision's layout, with random weights that keep the activations' size."""
    model, generator = LPIPS(), torch.Generator().manual_seed(0)
    names, state = published_names(model, in_slices=False), {"classifier.6.bias": torch.zeros(1000)}
    for name, value in model.state_dict().items():
        if name.startswith("trunk."):
            spread = (2 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1
            state[names[name]] = torch.randn(value.shape, generator=generator) * spread
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def theirs(trunk):
    """The package's LPIPS with the same weights."""
    import lpips

    with torch.device("meta"):
        network = lpips.LPIPS(pretrained=False, net="vgg", pnet_rand=True, verbose=False)
    features = {name: value for name, value in read_tensors(trunk).items() if name.startswith("features.")}
    heads, state = read_tensors(HEADS), {}
    for name in network.state_dict():
        kind, _, rest = name.partition(".")
        if kind == "net":
            state[name] = features[f"features.{rest.partition('.')[2]}"]
        elif kind.startswith("lin"):
            state[name] = heads[name if kind != "lins" else f"lin{rest[0]}{rest[1:]}"]
    state |= lpips.ScalingLayer().state_dict(prefix="scaling_layer.")
    network.load_state_dict(state, assign=True)
    return network.eval()


@pytest.fixture(scope="module")
def ours(trunk):
    return load_lpips([str(trunk), str(HEADS)], "weights")


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(3, 3, 32, 48, generator=generator) * 2 - 1
    y = (x + torch.tensor([0.02, 0.3, 1.0]).view(3, 1, 1, 1) * torch.randn(x.shape, generator=generator)).clamp(-1, 1)
    return x, y


def test_lpips_is_that_of_the_package(ours, theirs, pairs):
    x, y = pairs
    y = y.requires_grad_()
    expected = theirs(x, y).flatten()
    assert expected[0] > 1e-4
    assert expected[2] > 0.05
    got = ours(x, y)
    assert got.shape == (3,)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    gradient = torch.autograd.grad(got.sum(), y)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), y)[0], rtol=1e-3, atol=1e-8)


def test_every_published_layout_gives_the_same(trunk, theirs, ours, pairs, tmp_path):
    torch.save({**read_tensors(trunk), **read_tensors(HEADS)}, tmp_path / "both.pth")
    torch.save(theirs.state_dict(), tmp_path / "whole.pth")
    for weights in ([HEADS, trunk], tmp_path / "both.pth", tmp_path / "whole.pth"):
        again = load_lpips([str(one) for one in weights] if isinstance(weights, list) else str(weights), "weights")
        assert (again.space, again.fingerprint) == (ours.space, ours.fingerprint)
        assert torch.equal(again(*pairs), ours(*pairs))


def test_finite_gradients_at_equal_and_at_black_pictures(ours):
    """Where no channel is active, too: sqrt has no derivative at 0."""
    silent = LPIPS()
    for name, parameter in silent.named_parameters():
        parameter.zero_() if name.startswith("trunk.") else None
    for distance in (ours, silent):
        x = torch.zeros(2, 3, 16, 16, requires_grad=True)
        value = distance(x.detach(), x)
        assert torch.equal(value, torch.zeros(2))
        assert torch.autograd.grad(value.sum(), x)[0].isfinite().all()


def test_in_fp32_whatever_the_autocast(ours, pairs):
    expected = ours(*pairs)
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(*pairs)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_weights_of_the_package(pairs):
    """ST-LPIPS: shift-tolerant, so a shift of one pixel changes less than noise of the same error does."""
    distance = load_lpips("package", "weights")
    assert distance.space == "ST-LPIPS VGG16"
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    x, y = pairs
    near, middle, far = distance(x, y)
    assert 0 < near < middle < far
    assert distance(x, x).abs().max() == 0
    assert distance(x[..., :18, :18], y[..., :18, :18]).isfinite().all()  # smallest_picture
    wave = torch.linspace(0, 12, 49).sin().expand(1, 3, 48, 49)
    shifted, still = wave[..., 1:], wave[..., :-1]
    noise = torch.randn(still.shape, generator=torch.Generator().manual_seed(2)) * (shifted - still).std()
    assert distance(still, shifted) < 0.5 * distance(still, still + noise)


def wrong(tmp_path, trunk, kind):
    state = read_tensors(trunk)
    if kind == "deeper":
        state["features.30.weight"] = torch.zeros(512, 512, 3, 3)
    if kind == "other":
        state["features.0.weight"] = torch.zeros(64, 3, 11, 11)
    torch.save(state | read_tensors(HEADS), tmp_path / f"{kind}.pth")
    return str(tmp_path / f"{kind}.pth")


def test_other_weights_are_refused_in_a_sentence(tmp_path, trunk):
    for weights, sentence in (
        (str(trunk), r"vgg16.pth has VGG16, but not LPIPS' linear heads \(lin0.model.1.weight ...\): add them"),
        (str(HEADS), r"weights=.*vgg.pth contains no VGG16 .*: add torchvision's vgg16"),
        (wrong(tmp_path, trunk, "deeper"), r"is not LPIPS' VGG16 \(features.30.weight is unknown\): use"),
        (wrong(tmp_path, trunk, "other"), r"features.0.weight is \(64, 3, 11, 11\), not \(64, 3, 3, 3\)"),
        ("nowhere.pth", "nowhere.pth is not a file"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_lpips(weights, "weights")


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps stlpips-pytorch==0\.0\.2"):
        load_lpips("package", "weights")
