"""Drawing: picture i is a function of its prompt, the seed and i."""

import numpy as np
import pytest
import torch

from data_pipeline.common.errors import UserError
from train.diffusion.parameterization import Flow
from train.diffusion.process import RectifiedFlow
from train.diffusion.samplers import sample_ddim, sample_euler
from train.models.autoencoder import AutoencoderKL
from train.models.conditioning import ConditionedUNet, Conditioners, StoredText
from train.models.unet import UNet
from train.sampling.generator import ConditionBatch, Generator, Guidance, NotFinite, Sampler


@pytest.fixture
def generator(make_facts):
    torch.manual_seed(0)
    unet = UNet(
        16, 16, (16, 16), 1, context_dim=24, vector_dim=12, attention_levels=(False, True), heads=2, norm_groups=8
    )
    autoencoder = AutoencoderKL(channels=(8, 8), layers_per_block=1, norm_groups=4)
    facts = make_facts(mean=[0.1] * 4, std=[2.0] * 4, fold=2)
    network = ConditionedUNet(unet, Conditioners(facts, {"text": StoredText})).eval()
    decode, cpu = autoencoder.eval().decode, torch.device("cpu")
    return Generator(network, RectifiedFlow(), Flow(), facts.scaling, decode, facts.unet_shape, cpu)


@pytest.fixture
def text():
    return asked(torch.randn(4, 5, 24), torch.randn(4, 12))


def asked(text, pooled):
    return ConditionBatch({"text": text, "pooled": pooled}, ["a caption"] * len(text))


@pytest.mark.parametrize("function", [sample_euler, lambda *a: sample_ddim(*a, eta=1.0)], ids=["euler", "ancestral"])
def test_pictures_do_not_depend_on_the_batch_size(generator, text, function):
    counted = []
    sampler = Sampler(function, steps=3)
    together = generator.draw(text, sampler, guidance=Guidance(3.0), seed=1, batch_size=4)
    one_by_one = generator.draw(text, sampler, guidance=Guidance(3.0), seed=1, batch_size=1, on_batch=counted.append)
    assert together.shape == (4, 16, 16, 3)
    assert together.dtype == np.uint8
    assert counted == [1, 1, 1, 1]
    assert np.abs(together.astype(int) - one_by_one).max() <= 1  # a sum in another order may round the other way
    assert (together == one_by_one).mean() > 0.99


def test_pictures_depend_on_seed_place_prompt_and_guidance(generator, text):
    def draw(text, guidance=2.0, seed=1):
        return generator.draw(text, Sampler(sample_euler, 3), Guidance(guidance), seed)

    pictures = draw(text)
    np.testing.assert_array_equal(pictures, draw(text))
    tokens, pooled = text.fields["text"], text.fields["pooled"]
    same = asked(tokens[:1].repeat(2, 1, 1), pooled[:1].repeat(2, 1))
    first, second = draw(same)
    assert (first != second).mean() > 0.1  # the same prompt twice: two pictures
    assert (draw(text, seed=2) != pictures).mean() > 0.1
    assert (draw(asked(tokens + 1, pooled))[0] != pictures[0]).mean() > 0.01
    assert (draw(text, guidance=6.0) != pictures).mean() > 0.01


def test_a_drawn_picture_is_the_sampler_written_out(generator, text, null):
    """Guided Euler on rectified flow, step by step, from the same noise."""
    from train.diffusion.randomness import generator_at

    got = generator.draw(text, Sampler(sample_euler, 4), guidance=Guidance(2.5), seed=9)
    x = torch.stack([torch.randn(16, 4, 4, generator=generator_at("cpu", 9, i, "start")) for i in range(4)])
    unet = generator.network.unet
    with torch.no_grad():
        for step in range(4):
            t = torch.full((4,), 1000 * (1 - step / 4))
            c = unet(x, t, text.fields["text"], text.fields["pooled"])
            u = unet(x, t, null["text"].expand(4, -1, -1), null["pooled"].expand(4, -1))
            x = x - (u + 2.5 * (c - u)) / 4
        images = generator.decode(torch.pixel_shuffle(x, 2) * 2.0 + 0.1)
    expected = ((images + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(got - expected).max() <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        *({"interval": interval} for interval in ([0.8, 0.2], [0.5], [100, 800], 0.5, "ab", ["a", "b"])),
        *({"rescale": rescale} for rescale in (7, "half")),
    ],
)
def test_what_guidance_can_not_be(wrong):
    with pytest.raises(UserError, match="guidance"):
        Guidance(3.0, **wrong)


def test_a_picture_that_is_not_finite_is_none(generator, text):
    with torch.no_grad():
        generator.network.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NotFinite, match=r"picture 0 is not finite after 3 steps: lower guidance\.scale"):
        generator.draw(text.part(2, 2, generator.device), Sampler(sample_euler, 3), Guidance(1.0), 1)
