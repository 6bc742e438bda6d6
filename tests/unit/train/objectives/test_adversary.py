"""The adversary's options by their formulas, and the whole loss by that of CompVis' configurations, in their units."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from data_pipeline.common.errors import UserError
from train.diffusion.randomness import StreamRandom
from train.models.autoencoder import AutoencoderKL, VQModel
from train.models.discriminator import PatchDiscriminator
from train.objectives.adversarial_losses import of_discriminator, of_first_stage, r1_penalty
from train.objectives.adversary import Adversary
from train.objectives.autoencoder import AutoencoderObjective
from train.objectives.compvis_units import in_compvis_units, optimizer_in_compvis_units, values_per_picture

PIXELS = 3 * 16 * 16


@pytest.fixture
def autoencoder():
    return AutoencoderKL(channels=(8, 16), layers_per_block=1, norm_groups=4)


@pytest.fixture
def judge():
    return PatchDiscriminator(8, layers=2, norm="batch")


def mirrored(batch, seed=0):
    random = StreamRandom(seed, batch.step, batch.streams, len(batch) // len(batch.streams), torch.device("cpu"))
    mirror, images = random.uniform("mirror") < 0.5, batch.tensors["image"]
    return torch.where(mirror.view(-1, 1, 1, 1), images.flip(-1), images), random


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)


@pytest.mark.parametrize("bound", [1e4, 20.0], ids=["free", "bounded"])
def test_the_loss_of_kl_models_is_compvis_over_the_number_of_values(autoencoder, judge, image_batch, bound):
    """Their sums over a picture and a latent, weights of 1e-6 and 0.5, a log-variance that is not zero."""
    adversary = Adversary(judge, weight=0.5, adaptive_delta=1e-4, adaptive_max=bound / PIXELS)
    kl_weight = 1e-6 * autoencoder.latent_channels / (3 * autoencoder.factor**2)
    objective = AutoencoderObjective(
        autoencoder, kl_weight=kl_weight, gradient_weight=0.0, adversary=adversary, log_variance="learned"
    )
    with torch.no_grad():
        objective.log_variance.fill_(0.3)
    batch = image_batch(step=4)
    terms = objective(batch)

    images, random = mirrored(batch)
    mean, logvar = autoencoder.encode_moments(images).chunk(2, 1)
    again = autoencoder.decode(mean + (logvar / 2).exp() * random.normal("posterior", mean.shape[1:]))
    nll = ((again - images).abs() / math.exp(0.3) + 0.3).sum() / len(images)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / len(images)
    gan, last = -judge(again).mean(), autoencoder.decoder.conv_out.weight
    norms = [float(torch.autograd.grad(loss, last, retain_graph=True)[0].norm()) for loss in (nll, gan)]
    weight = min(norms[0] / (norms[1] + 1e-4), bound)
    assert (weight == bound) == (bound == 20.0)
    theirs = nll + 1e-6 * kl + 0.5 * weight * gan
    own = (F.relu(1 - judge(images)).mean() + F.relu(1 + judge(again.detach())).mean()) / 2

    assert float(terms.parts["adaptive_weight"]) * PIXELS == pytest.approx(weight, rel=2e-6)
    torch.testing.assert_close(terms.total - own, theirs / PIXELS, rtol=1e-6, atol=1e-6)
    for mine, its in zip(gradients(terms.total, autoencoder), gradients(theirs, autoencoder), strict=True):
        torch.testing.assert_close(mine, its / PIXELS, rtol=2e-4, atol=1e-7)
    said = in_compvis_units(objective, (16, 16))
    assert said == {
        "kl_weight": 1e-6,
        "disc_weight": 0.5,
        "disc_start": 0,
        "d_weight_max": bound,
        "d_weight_delta": 1e-4,
    }
    assert optimizer_in_compvis_units(4.5e-6 * 24, 1e-8 / PIXELS, values_per_picture(objective, (16, 16)), 24) == {
        "base_learning_rate": 4.5e-6, "adam_eps": 1e-8
    }  # fmt: skip


@pytest.mark.parametrize(("name", "to_outputs", "to_codes"), [("standard", 0.25, 1.0), ("legacy", 1.0, 0.25)])
def test_both_losses_of_vq_models(image_batch, judge, name, to_outputs, to_codes):
    """The legacy loss has the weights of taming-transformers' quantizer by default, which LDM's models have."""
    model = VQModel(codebook_size=30, channels=(8, 16), layers_per_block=1, norm_groups=4)
    nn.init.normal_(model.codebook)
    adversary = Adversary(judge, weight=0.75, start=9)
    options = {"vq_loss": name, "revival_weight": 0.0, "gradient_weight": 0.0}
    objective = AutoencoderObjective(model, adversary=adversary, **options)
    batch = image_batch(step=4)
    terms, (images, _) = objective(batch), mirrored(batch)
    z = model.encode(images)
    codes = model.codebook[torch.cdist(z.permute(0, 2, 3, 1), model.codebook).argmin(-1)].permute(0, 3, 1, 2)
    again = model.decoded(z + (codes - z).detach())
    distance = to_outputs * F.mse_loss(z, codes.detach()) + to_codes * F.mse_loss(codes, z.detach())
    expected = (again - images).abs().mean() + distance
    torch.testing.assert_close(terms.total, expected, rtol=1e-6, atol=1e-6)
    for mine, its in zip(gradients(terms.total, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(mine, its, rtol=2e-4, atol=1e-7)
    assert "revival" not in terms.parts
    said = in_compvis_units(objective, (16, 16))
    assert said["beta"] == 0.25
    assert said["legacy"] == (name == "legacy")
    assert said["d_weight_max"] == 1e4  # that loss has means in their code, too


def test_losses_of_logits():
    real, fake = torch.randn(4, 1, 3, 3), torch.randn(4, 1, 3, 3)
    cross_entropy = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean()) / 2
    for kind in ("vanilla", "non_saturating"):
        torch.testing.assert_close(of_discriminator(kind, real, fake), cross_entropy)
    hinge = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    torch.testing.assert_close(of_discriminator("hinge", real, fake), hinge)
    torch.testing.assert_close(of_first_stage("non_saturating", fake), -fake.sigmoid().log().mean())
    for kind in ("hinge", "vanilla"):
        torch.testing.assert_close(of_first_stage(kind, fake), -fake.mean())


def test_r1_is_half_the_squared_gradient_and_can_be_descended():
    judge = nn.Conv2d(3, 1, 8)  # one logit per picture, linear: its gradient is the weight
    penalty = r1_penalty(judge, torch.randn(5, 3, 8, 8))
    torch.testing.assert_close(penalty, judge.weight.square().sum() / 2)
    torch.testing.assert_close(torch.autograd.grad(penalty, judge.weight)[0], judge.weight)


def test_ramp_and_turns():
    judge = PatchDiscriminator(8, layers=2, norm_groups=4)
    images, last = torch.rand(2, 3, 16, 16), nn.Parameter(torch.ones(1))
    adversary = Adversary(judge, weight=0.8, start=10, ramp=4, adaptive_delta=1e-4)

    def weighed(step):
        again = images * last
        terms = adversary(images, again, (again - 1).abs().mean(), last, step)
        parts = terms.parts
        return float((terms.total.detach() - parts["discriminator"]) / (parts["adaptive_weight"] * parts["gan"]))

    assert [weighed(step) for step in (10, 11, 12, 13, 14)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8], rel=1e-4)
    assert {adversary.turn(step) for step in range(20)} == {"both"}
    alternating = Adversary(judge, start=3, turns="alternate")
    assert [alternating.turn(step) for step in range(7)] == [
        *["first_stage"] * 4, "discriminator", "first_stage", "discriminator"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss": "wgan"}, "adversary.loss=wgan is not valid: use hinge, vanilla, non_saturating"),
        ({"turns": "never"}, "adversary.turns=never is not valid: use together, alternate"),
        ({"r1_weight": 1.0}, "r1_weight needs .* use objective.adversary.discriminator.norm=group"),
    ],
)
def test_options_that_do_not_exist_or_fit(judge, options, sentence):
    with pytest.raises(UserError, match=sentence):
        Adversary(judge, **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"reconstruction": "l3"}, "objective.reconstruction=l3 is not valid: use l1, l2"),
        ({"log_variance": "fixed"}, "objective.log_variance=fixed is not valid: use null, learned"),
        ({"vq_loss": "legacy"}, "vq_loss=legacy has no effect on a AutoencoderKL: set objective.vq_loss=null"),
    ],
)
def test_objectives_that_do_not_exist_or_fit(autoencoder, options, sentence):
    with pytest.raises(UserError, match=sentence):
        AutoencoderObjective(autoencoder, **options)
