"""Stored text states with masks, and those of two encoders: what the U-Net gets, and what padding changes (nothing)."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from data_pipeline.common.errors import UserError
from train.diffusion import samplers
from train.diffusion.denoiser import NetworkDenoiser
from train.diffusion.guidance import ClassifierFreeGuidance
from train.diffusion.parameterization import Velocity
from train.diffusion.process import DiscreteVP
from train.models.conditioning import (
    ConditionedUNet,
    Conditioners,
    SecondStoredText,
    StoredText,
)
from train.models.token_conditioners import ClassLabel
from train.models.unet import UNet

DIM, LENGTHS = 24, (3, 1, 5)
SAMPLERS = ("ddim", "ddpm", "euler", "heun", "dpmpp_2m", "unipc")


@pytest.fixture
def facts(make_facts):
    def make(tokens=5, second=None, lengths=True, **changed):
        generator = torch.Generator().manual_seed(7)
        null = {"text": padded(torch.randn(2, DIM, generator=generator), tokens), "text_length": torch.tensor(2.0)}
        shapes = {"text": [tokens, DIM], "pooled": [12], **({"text_length": []} if lengths else {})}
        if second is not None:
            shapes |= {"text_t5": [second, 16], "text_t5_length": []}
            null |= {"text_t5": torch.randn(second, 16, generator=generator), "text_t5_length": torch.tensor(1.0)}
        return make_facts(shapes=shapes, null={**null, "pooled": torch.randn(12, generator=generator)}, **changed)

    return make


def padded(states, tokens):
    """With noise as padding: only a mask keeps it out."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.cat([states, torch.randn(tokens - len(states), DIM, generator=generator)])


def fields_of(tokens, second=None):
    generator = torch.Generator().manual_seed(1)
    states = [padded(torch.randn(n, DIM, generator=generator), tokens) for n in LENGTHS]
    fields = {"text": torch.stack(states), "text_length": torch.tensor(LENGTHS)}
    fields["pooled"] = torch.randn(3, 12, generator=generator)
    if second is not None:
        fields |= {"text_t5": torch.randn(3, second, 16), "text_t5_length": torch.tensor([1, 2, second])}
    return fields


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet(4, 4, (16, 16), 1, context_dim=DIM, vector_dim=12, attention_levels=(True, True), heads=2,
                norm_groups=8).eval()  # fmt: skip


def draw(unet, facts, tokens, sampler):
    """Guided pictures, away from a null or from another prompt."""
    network = ConditionedUNet(unet, Conditioners(facts(tokens), {"text": StoredText}))
    process, fields = DiscreteVP(), fields_of(tokens)
    conditioning = network.condition(fields, ["a"] * 3)
    away = {name: value.flip(0) for name, value in fields.items()}
    drawn = []
    for each in (conditioning, network.condition_against(conditioning, away, ["b"] * 3)):
        denoise = ClassifierFreeGuidance(NetworkDenoiser(network, process, Velocity()), 3.0)
        generator = torch.Generator().manual_seed(3)
        noise = [torch.randn(3, 4, 8, 8, generator=generator) for _ in range(5)]
        times = samplers.uniform_times(process, 3)
        found = getattr(samplers, f"sample_{sampler}")(
            lambda x, t, each=each, denoise=denoise: denoise(x, t, each), noise[-1], times, process,
            lambda step, noise=noise: noise[step] if isinstance(step, int) else noise[0],
        )  # fmt: skip
        drawn.append(found)
    return torch.stack(drawn)


@torch.no_grad()
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_padding_never_changes_a_picture(unet, facts, sampler):
    """Longer padding, and other values in it: the same to rounding, for the prompt, the null and a negative prompt."""
    pictures = draw(unet, facts, 5, sampler)
    torch.testing.assert_close(draw(unet, facts, 13, sampler), pictures, rtol=1e-4, atol=1e-4)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-2


def test_training_on_longer_padding_is_the_same(unet, facts):
    gradients = []
    for tokens in (5, 13):
        network = ConditionedUNet(unet, Conditioners(facts(tokens), {"text": StoredText}))
        conditioning = network.condition(fields_of(tokens), ["a"] * 3).dropped(torch.tensor([False, True, False]))
        x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        loss = network(x, torch.tensor([1.0, 500.0, 999.0]), conditioning).square().mean()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(unet.parameters()))]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_a_dropped_prompt_gets_the_masks_of_the_null(facts):
    made = Conditioners(facts(), {"text": StoredText})(fields_of(5), ["a"] * 3)
    assert made.given.mask.sum(1).tolist() == list(LENGTHS)
    dropped = made.dropped(torch.tensor([True, False, True])).given.mask
    assert dropped.sum(1).tolist() == [2, 1, 2]
    assert made.for_guidance().given.mask.sum(1).tolist() == [*LENGTHS, 2, 2, 2]


def test_without_lengths_there_is_no_mask(facts):
    """What CLIP's states cost is what they cost before."""
    fields = {name: value for name, value in fields_of(5).items() if name != "text_length"}
    assert Conditioners(facts(lengths=False), {"text": StoredText})(fields, ["a"] * 3).given.mask is None
    unmasked = Conditioners(facts(), {"text": partial(StoredText, mask=False)})
    assert unmasked(fields_of(5), ["a"] * 3).given.mask is None
    with pytest.raises(UserError, match=r"needs the captions' lengths, .* with conditions\.text\.mask=true"):
        Conditioners(facts(lengths=False), {"text": partial(StoredText, mask=True)})


def test_tokens_of_two_encoders_follow_one_another_as_wide_as_the_wider(facts):
    both = Conditioners(facts(second=7), {"text": StoredText, "text_t5": SecondStoredText})
    fields = fields_of(5, 7)
    given, null = both(fields, ["a"] * 3)
    assert both.context_dims == {"text": DIM}
    assert torch.equal(given.context[:, :5], fields["text"])
    assert torch.equal(given.context[:, 5:], F.pad(fields["text_t5"], (0, DIM - 16)))
    first, second = (torch.arange(count) < torch.tensor(n)[:, None] for count, n in ((5, LENGTHS), (7, (1, 2, 7))))
    assert torch.equal(given.mask, torch.cat([first, second], 1))
    assert null.mask.tolist() == [[True, True, False, False, False, True, *[False] * 6]]
    assert given.vector.shape == (3, 12)


def test_tokens_of_two_encoders_side_by_side(facts):
    data = facts(second=5)
    both = Conditioners(data, {"text_t5": partial(SecondStoredText, join="channels"), "text": StoredText})
    fields = fields_of(5, 5)
    given, null = both(fields, ["a"] * 3)
    assert both.context_dims == {"text": DIM + 16}
    assert torch.equal(given.context, torch.cat([fields["text"], fields["text_t5"]], -1))
    assert given.mask.sum(1).tolist() == [3, 2, 5]  # the longer of both
    assert null.context.shape == (1, 5, DIM + 16)
    data.refuse_other_shapes({"in_channels": 4, "out_channels": 4, "context_dim": 40, "vector_dim": 12,
                              "channels": [8]}, both)  # fmt: skip
    with pytest.raises(UserError, match=r"have 5 and 7: use join=tokens, or .* text_encoder\.context_length=5"):
        Conditioners(facts(second=7), {"text_t5": partial(SecondStoredText, join="channels")})
    with pytest.raises(UserError, match="must be tokens or channels"):
        Conditioners(data, {"text_t5": partial(SecondStoredText, join="width")})


def test_what_has_no_mask_beside_what_has_one_is_attended_to(facts):
    data = replace(facts(), conditions={"label": {"classes": ["a", "b"]}})
    data = replace(data, shapes={**data.shapes, "label": []})
    both = Conditioners(data, {"label": partial(ClassLabel, dim=DIM), "text": StoredText})
    made = both({**fields_of(5), "label": torch.tensor([0, 1, 1])}, ["a"] * 3)
    assert made.given.mask[:, 0].all()
    assert made.given.mask.sum(1).tolist() == [1 + n for n in LENGTHS]
    assert made.null.mask.shape == (1, 6)
