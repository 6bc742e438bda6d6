"""Micro-conditioning: the sinusoids of six sizes, and the U-Net that takes them, are SDXL's."""

import math
from functools import partial

import pytest
import torch

from data_pipeline.common.errors import UserError
from train.export_diffusers import is_sdxl_vector
from train.models.conditioning import ConditionedUNet, Conditioners, StoredText
from train.models.size_features import SizeFeatures
from train.models.unet import UNet
from train.weights import diffusers, stable_diffusion

SIZES = torch.tensor([[512.0, 640.0, 0.0, 64.0, 256.0, 256.0], [1001.5, 333.0, 12.0, 0.0, 256.0, 192.0]])


@pytest.fixture
def facts(make_facts):
    return make_facts(shapes={"size": [6]})


@pytest.fixture
def fields():
    return {"text": torch.randn(2, 5, 24), "pooled": torch.randn(2, 12), "size": SIZES}


def unet_of(conditioner):
    torch.manual_seed(1)
    widths = {"context_dim": conditioner.context_dim, "vector_dim": conditioner.vector_dim}
    unet = UNet(4, 4, (32, 32), 1, attention_levels=(False, True), heads=2, norm_groups=8, **widths)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet


def test_the_closed_form(facts, fields):
    given = SizeFeatures(facts)(fields, ()).given.vector
    for row, sizes in zip(given, SIZES.tolist(), strict=True):
        for features, size in zip(row.view(6, 256), sizes, strict=True):
            angles = [size * 10_000 ** (-i / 128) for i in range(128)]
            expected = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
            torch.testing.assert_close(features, torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("names", [("text", "size"), ("size", "text")])
def test_with_text_it_is_the_unet_of_sdxl(facts, fields, tmp_path, relative_error, names):
    """diffusers' own loads our weights, and given text_embeds and time_ids, returns what ours returns."""
    from diffusers import UNet2DConditionModel

    parts = {"text": StoredText, "size": SizeFeatures}
    conditioner = Conditioners(facts, {name: parts[name] for name in names})
    assert conditioner.vector_dim == 12 + 6 * 256
    assert is_sdxl_vector(conditioner)
    network = ConditionedUNet(unet_of(conditioner), conditioner)
    diffusers.save_unet(tmp_path, network.unet, with_sizes=True)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path)
    assert theirs.config.addition_embed_type == "text_time"
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0])
    added = {"text_embeds": fields["pooled"], "time_ids": SIZES}
    with torch.no_grad():
        ours = network(x, t, network.condition(fields, ("", "")))
        expected = theirs(x, t, fields["text"], added_cond_kwargs=added).sample
        other = theirs(x, t, fields["text"], added_cond_kwargs={**added, "time_ids": SIZES + 1}).sample
    assert relative_error(ours, expected) < 1e-5
    assert relative_error(other, expected) > 1e-3
    loaded = diffusers.load_unet(tmp_path)  # and back
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in network.unet.state_dict().items())
    with pytest.raises(UserError, match="leave single_file= out"):
        stable_diffusion.unet_map(network.unet)


def test_dropout_and_guidance_keep_the_size_unless_told_otherwise(facts, fields, null):
    for drop, kept in ((False, SizeFeatures(facts)(fields, ()).given.vector), (True, torch.zeros(2, 1536))):
        made = Conditioners(facts, {"text": StoredText, "size": partial(SizeFeatures, drop=drop)})(fields, ("", ""))
        dropped = made.dropped(torch.tensor([True, True])).given.vector
        assert torch.equal(dropped[:, :12], null["pooled"].expand(2, -1))
        assert torch.equal(dropped[:, 12:], kept)
        assert torch.equal(made.for_guidance().given.vector[2:, 12:], kept)


def test_what_is_steered_away_from_may_have_another_size(facts, fields):
    conditioner = Conditioners(facts, {"text": StoredText, "size": SizeFeatures})
    away = {**fields, "pooled": torch.ones(2, 12), "size": SIZES / 2}
    null = conditioner.against(away, ("", ""))
    assert torch.equal(null.vector, conditioner(away, ("", "")).given.vector)


def test_a_unet_that_would_ignore_the_size_is_refused(facts):
    fitting = {"in_channels": 4, "out_channels": 4, "context_dim": 24, "vector_dim": None, "channels": [8]}
    facts.refuse_other_shapes(fitting, Conditioners(facts, {"text": StoredText}))  # the pooled text may be left out
    with pytest.raises(UserError, match=r"unet\.vector_dim=None does not fit .* set unet\.vector_dim=1548"):
        facts.refuse_other_shapes(fitting, Conditioners(facts, {"text": StoredText, "size": SizeFeatures}))


def test_one_pixel_is_seen_in_bfloat16(facts, fields):
    conditioner = Conditioners(facts, {"text": StoredText, "size": SizeFeatures})
    unet = unet_of(conditioner).bfloat16()
    network, more = ConditionedUNet(unet, conditioner), {**fields, "size": SIZES + torch.tensor([1.0, 0, 0, 0, 0, 0])}
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0])
    with torch.no_grad():
        one, other = (network(x, t, network.condition(each, ("", ""))) for each in (fields, more))
    assert not torch.equal(one, other)
