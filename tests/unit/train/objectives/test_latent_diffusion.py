"""The loss of latent diffusion, written out from the same draws."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from train.diffusion.parameterization import Epsilon, Flow, Velocity
from train.diffusion.process import DiscreteVP, RectifiedFlow
from train.diffusion.randomness import StreamRandom
from train.models.unet import UNet

MEAN, STD = torch.tensor([0.1, -0.2, 0.3, 0.0]).view(1, 4, 1, 1), torch.tensor([1.5, 0.5, 1.0, 2.0]).view(1, 4, 1, 1)


@pytest.fixture
def unet():
    def make(channels=4, vector_dim=12):
        torch.manual_seed(0)
        return UNet(
            channels, channels, (16, 16), 1, context_dim=24, vector_dim=vector_dim, attention_levels=(False, True),
            heads=2, norm_groups=8,
        )  # fmt: skip

    return make


def flow(t):
    return 1 - t, t


def scaled_linear(t):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = (1 - betas).cumprod(0).float()[t.long()]
    return signal.sqrt(), (1 - signal).sqrt()


@pytest.mark.parametrize(
    ("process", "parameterization", "coefficients", "target"),
    [
        (RectifiedFlow(), Flow(), flow, lambda x0, noise, a, s: noise - x0),
        (DiscreteVP(), Epsilon(), scaled_linear, lambda x0, noise, a, s: noise),
        (DiscreteVP(), Velocity(), scaled_linear, lambda x0, noise, a, s: a * noise - s * x0),
    ],
    ids=["flow", "epsilon", "velocity"],
)
@pytest.mark.parametrize(("fold", "vector_dim"), [(1, None), (2, 12)])
def test_the_loss_is_its_formula(
    process, parameterization, coefficients, target, fold, vector_dim, unet, latent_objective, latent_batch, null
):
    network = unet(4 * fold**2, vector_dim)
    objective = latent_objective(network, process, parameterization, fold, prompt_dropout=0.4, seed=5)
    batch = latent_batch(step=3)
    terms = objective(batch)

    random = StreamRandom(5, 3, batch.streams, 2, torch.device("cpu"))
    moments = batch.tensors["moments"]
    z = moments[:, :4] + (moments[:, 4:] / 2).exp() * random.normal("posterior", (4, 8, 8))
    x0 = F.pixel_unshuffle((z - MEAN) / STD, fold)
    dropped = random.uniform("prompt") < 0.4
    assert 0 < dropped.sum() < len(batch)
    context, vector = batch.tensors["text"].clone(), batch.tensors["pooled"].clone()
    context[dropped], vector[dropped] = null["text"], null["pooled"]
    u, noise = random.uniform("time"), random.normal("noise", x0.shape[1:])
    flowing = isinstance(process, RectifiedFlow)
    t = u if flowing else (1000 * u).floor()
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in coefficients(t))
    prediction = network(alpha * x0 + sigma * noise, 1000 * t if flowing else t, context, vector)
    expected = (prediction - target(x0, noise, alpha, sigma)).square().mean((1, 2, 3))
    torch.testing.assert_close(terms.per_sample, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.total, expected.mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.t, t)
    assert terms.total.requires_grad
    assert not terms.per_sample.requires_grad
    assert torch.equal(terms.parts["loss"], terms.total.detach())


def with_other_text(batch):
    tensors = {**batch.tensors, "text": batch.tensors["text"] + 1, "pooled": batch.tensors["pooled"] - 1}
    return dataclasses.replace(batch, tensors=tensors)


@torch.no_grad()
def test_a_dropped_prompt_is_not_seen_and_a_kept_one_is(unet, latent_objective, latent_batch):
    batch, network = latent_batch(), unet()
    always, never = latent_objective(network, prompt_dropout=1.0), latent_objective(network, prompt_dropout=0.0)
    assert torch.equal(always(batch).per_sample, always(with_other_text(batch)).per_sample)
    assert (never(batch).per_sample != never(with_other_text(batch)).per_sample).all()
    some = latent_objective(network, prompt_dropout=0.4, seed=5)
    random = StreamRandom(5, 0, batch.streams, 2, torch.device("cpu"))
    seen = some(batch).per_sample != some(with_other_text(batch)).per_sample
    assert torch.equal(seen, random.uniform("prompt") >= 0.4)


@torch.no_grad()
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_prompts_are_dropped_as_often_as_asked(share, unet, latent_objective, latent_batch, null):
    """By what reaches the network: the null states, both of them."""
    network, nulls = unet(), []

    def count(_, arguments):
        _, _, context, vector, *_ = arguments
        nulls.append((context == null["text"]).all((1, 2)))
        assert torch.equal(nulls[-1], (vector == null["pooled"]).all(1))

    network.register_forward_pre_hook(count)
    objective = latent_objective(network, prompt_dropout=share)
    for step in range(20):
        objective(latent_batch(step=step, per_stream=25))
    dropped = torch.cat(nulls)
    assert len(dropped) == 2000
    assert float(dropped.float().mean()) == pytest.approx(share, abs=0.03)


@torch.no_grad()
def test_a_streams_samples_are_the_same_whichever_rank_holds_them(unet, latent_objective, latent_batch):
    objective = latent_objective(unet(), prompt_dropout=0.3)
    whole = objective(latent_batch(streams=(0, 1, 2, 3)))
    parts = [objective(latent_batch(streams=(stream,))) for stream in range(4)]
    assert torch.equal(whole.t, torch.cat([part.t for part in parts]))
    torch.testing.assert_close(whole.per_sample, torch.cat([part.per_sample for part in parts]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.total, torch.stack([part.total for part in parts]).mean())


@torch.no_grad()
def test_each_step_and_seed_draws_anew(unet, latent_objective, latent_batch):
    network = unet()
    batch = latent_batch()
    one = latent_objective(network, seed=1)
    assert torch.equal(one(batch).t, latent_objective(network, seed=1)(batch).t)
    assert not torch.equal(one(batch).t, latent_objective(network, seed=2)(batch).t)
    assert not torch.equal(one(batch).t, one(dataclasses.replace(batch, step=1)).t)


@torch.no_grad()
def test_validation_is_at_the_given_times_without_dropping(unet, latent_objective, latent_batch):
    network, batch, fractions = unet(), latent_batch(), torch.linspace(0.1, 0.9, 8)
    objectives = [latent_objective(network, prompt_dropout=p) for p in (0.0, 1.0)]
    losses = [objective.validation_loss(objective.network, batch, fractions) for objective in objectives]
    assert torch.equal(losses[0].per_sample, losses[1].per_sample)
    torch.testing.assert_close(losses[0].t, (1000 * fractions).floor())


def test_training_lowers_the_loss(unet, latent_objective, latent_batch, train_a_little):
    objective = latent_objective(unet(), RectifiedFlow(), Flow())

    def loss():
        with torch.no_grad():
            return float(torch.stack([objective(latent_batch(step=100 + i)).total for i in range(4)]).mean())

    before = loss()
    train_a_little(objective, latent_batch, steps=12)
    assert loss() < 0.9 * before


@pytest.mark.parametrize("fold", [1, 2, 4])
def test_offset_noise_shifts_a_whole_channel(latent_objective, fold):
    """Its standard deviation over channels is the offset's, and within an unfolded channel there is none of it."""
    unet = UNet(4 * fold**2, 4 * fold**2, [8], 1, 24, None, [True], heads=2, norm_groups=4)
    plain, shifted = (latent_objective(unet, fold=fold, offset_noise=strength, seed=3) for strength in (0.0, 2.0))
    x0 = torch.zeros(800, 4 * fold**2, 8 // fold, 8 // fold)
    random = [StreamRandom(3, 0, tuple(range(8)), 100, "cpu") for _ in range(2)]
    shift = F.pixel_shuffle(shifted.noise(random[0], x0) - plain.noise(random[1], x0), fold)  # (800, 4, 8, 8)
    assert float(shift.std((2, 3)).max()) < 1e-5
    assert float(shift.mean((2, 3)).std()) == pytest.approx(2.0, rel=0.05)
