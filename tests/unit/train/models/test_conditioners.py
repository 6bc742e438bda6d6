"""Each conditioner: what it gives the U-Net, its null, and that both halves learn."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from data_pipeline.common.errors import UserError
from train.models.classifier import NoisyClassifier
from train.models.conditioning import (
    ConditionedUNet,
    Conditioners,
    StoredText,
)
from train.models.plane_conditioners import HoleAndRest, LowResolutionImage
from train.models.text_transformer import JointText
from train.models.token_conditioners import ClassLabel, ImageTokens, LayoutTokens, fourier
from train.models.unet import UNet

ALL = {
    "text": StoredText,
    "label": partial(ClassLabel, dim=24),
    "layout": partial(LayoutTokens, dim=24, layers=1, heads=2),
    "image_embedding": partial(ImageTokens, dim=24, tokens=2),
    "low_resolution": LowResolutionImage,
    "hole": HoleAndRest,
    "joint_text": partial(JointText, dim=24, layers=1, heads=2, context_length=6),
}
CAPTIONS = ("a cat", "a red heart", "a dog", "")


@pytest.fixture
def facts(make_facts):
    shapes = {
        "label": [], "boxes": [3, 4], "box_label": [3], "image_embedding": [10], "low_resolution": [3, 4, 4],
        "hole": [1, 8, 8], "masked_latents": [4, 8, 8],
    }  # fmt: skip
    classes = {"classes": ["a", "b", "c"]}
    return make_facts(shapes=shapes, conditions={"label": classes, "layout": classes}, fold=2)


@pytest.fixture
def fields():
    labels = torch.tensor([[0, 1, -1], [2, -1, -1], [1, 1, 1], [0, -1, -1]])
    return {
        "text": torch.randn(4, 5, 24), "pooled": torch.randn(4, 12), "label": torch.tensor([0, 2, 1, 1]),
        "boxes": torch.rand(4, 3, 4) * (labels >= 0)[..., None], "box_label": labels,
        "image_embedding": torch.randn(4, 10), "low_resolution": torch.rand(4, 3, 4, 4),
        "hole": (torch.rand(4, 1, 8, 8) > 0.5).float(), "masked_latents": torch.randn(4, 4, 8, 8),
    }  # fmt: skip


def made(facts, *names):
    torch.manual_seed(0)
    return Conditioners(facts, {name: ALL[name] for name in names})


def unet_for(conditioner, **changed):
    torch.manual_seed(1)
    options = {"context_dim": conditioner.context_dim, "vector_dim": conditioner.vector_dim, **changed}
    return UNet(16 + conditioner.concat_channels, 16, (16, 16), 1, attention_levels=(False, True), heads=2,
                norm_groups=8, **options)  # fmt: skip


@pytest.mark.parametrize("names", [*[(name,) for name in ALL], tuple(ALL), ()], ids="+".join)
def test_it_fits_the_unet_and_every_part_of_it_learns(facts, fields, names):
    conditioner = made(facts, *names)
    network = ConditionedUNet(unet_for(conditioner), conditioner)
    conditioning = network.condition(fields, CAPTIONS)
    conditioning = conditioning.dropped(torch.tensor([True, False, False, False]))
    out = network(torch.randn(4, 16, 4, 4), torch.arange(4) * 200.0, conditioning)
    assert out.shape == (4, 16, 4, 4)
    out.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("names", [*[(name,) for name in ALL], tuple(ALL)], ids="+".join)
def test_rows_do_not_see_one_another_and_all_matter(facts, fields, names):
    """Row i of a batch is what it is alone; and no two rows here are the same."""
    conditioner = made(facts, *names).eval()
    with torch.no_grad():
        whole = conditioner(fields, CAPTIONS)
        for i in range(4):
            alone = conditioner({name: value[i : i + 1] for name, value in fields.items()}, CAPTIONS[i : i + 1])
            for together, single in zip(whole.given, alone.given, strict=True):
                if together is not None:
                    torch.testing.assert_close(together[i : i + 1], single, rtol=1e-5, atol=1e-5)
    for part in filter(torch.is_tensor, whole.given):
        rows = part.flatten(1)
        if names != ("label",):
            assert len({tuple(row.tolist()) for row in rows.round(decimals=4)}) == 4


def test_the_nulls(facts, fields):
    assert torch.equal(made(facts, "text")(fields, CAPTIONS).null.context[0], facts.null["text"])
    label = made(facts, "label")
    table = label.parts["label"].embedding.weight
    assert torch.equal(label(fields, CAPTIONS).null.context, table[3][None, None])
    assert torch.equal(label(fields, CAPTIONS).given.context[1, 0], table[2])
    joint = made(facts, "joint_text")(fields, CAPTIONS)
    torch.testing.assert_close(joint.null.context[0], joint.given.context[3])  # the empty caption
    empty = {"boxes": torch.zeros(1, 3, 4), "box_label": torch.full((1, 3), -1)}
    layout = made(facts, "layout")
    torch.testing.assert_close(layout(empty, ()).given.context, layout(fields, ()).null.context)
    image = made(facts, "image_embedding")
    torch.testing.assert_close(
        image({"image_embedding": torch.zeros(1, 10)}, ()).given.context, image(fields, ()).null.context
    )
    assert float(made(facts, "low_resolution")(fields, ()).null.concat.abs().max()) == 0
    hole = made(facts, "hole")(fields, ()).null.concat
    assert torch.equal(hole, torch.cat([torch.ones(1, 4, 4, 4), torch.zeros(1, 16, 4, 4)], 1))


def test_planes_are_folded_like_the_latents(facts, fields):
    given = made(facts, "low_resolution", "hole")(fields, ()).given.concat
    assert given.shape == (4, 12 + 4 + 16, 4, 4)
    enlarged = F.interpolate(fields["low_resolution"], (8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(given[:, :12], F.pixel_unshuffle(enlarged, 2))
    torch.testing.assert_close(given[:, 12:16], F.pixel_unshuffle(fields["hole"], 2))
    torch.testing.assert_close(given[:, 16:], facts.scaling.to_model(fields["masked_latents"]))


def test_planes_that_are_not_dropped(facts, fields):
    kept = Conditioners(facts, {"low_resolution": partial(LowResolutionImage, drop=False)})(fields, ())
    dropped = kept.dropped(torch.ones(4, dtype=torch.bool))
    assert torch.equal(dropped.given.concat, kept.given.concat)
    assert torch.equal(kept.for_guidance().given.concat[4:], kept.given.concat)


def test_the_order_of_boxes_does_not_matter(facts, fields):
    layout = made(facts, "layout")
    turned = {name: fields[name].flip(1) for name in ("boxes", "box_label")}
    torch.testing.assert_close(layout(turned, ()).given.context.flip(1), layout(fields, ()).given.context)


def test_fourier_features():
    x = torch.tensor([[0.25, 1.0]])
    expected = torch.tensor([[0.25, 0.5, 1.0, 2.0]]) * torch.pi
    got = fourier(x, 2).unflatten(-1, (2, 4))[0]
    torch.testing.assert_close(got[0], torch.cat([expected[0, :2].sin(), expected[0, :2].cos()]))
    torch.testing.assert_close(got[1], torch.cat([expected[0, 2:].sin(), expected[0, 2:].cos()]), atol=1e-5, rtol=0)


def test_what_the_data_lacks_is_named(make_facts):
    with pytest.raises(UserError, match=r"conditioning=label needs label.*conditions=\[label\]"):
        made(make_facts(), "label")


@pytest.mark.parametrize(
    ("changed", "remedy"),
    [
        ({"in_channels": 16}, "set unet.in_channels=28"),
        ({"out_channels": 4}, "set unet.out_channels=16"),
        ({"context_dim": 768}, "set unet.context_dim=24"),
        ({"vector_dim": 7}, "set unet.vector_dim=12"),
        ({"in_channels": 4, "out_channels": 4}, "set unet.in_channels=28 unet.out_channels=16, or use latents"),
        ({"channels": [8] * 4}, "latents of 4x4 .fold=2. can't be halved 3 times"),
    ],
)
def test_a_unet_that_does_not_fit_gets_the_remedy(facts, changed, remedy):
    conditioner = made(facts, "text", "low_resolution")
    fitting = {"in_channels": 28, "out_channels": 16, "context_dim": 24, "vector_dim": 12, "channels": [8] * 3}
    facts.refuse_other_shapes(fitting, conditioner)
    with pytest.raises(UserError, match=remedy):
        facts.refuse_other_shapes({**fitting, **changed}, conditioner)


def test_an_unconditional_unet_has_no_context(facts):
    with pytest.raises(UserError, match=r"set unet\.context_dim=null"):
        facts.refuse_other_shapes(
            {"in_channels": 16, "out_channels": 16, "context_dim": 24, "vector_dim": None, "channels": [8]},
            made(facts),
        )


def test_a_negative_prompt_takes_the_place_of_the_text_alone(facts, fields):
    conditioner = made(facts, "text", "label", "low_resolution")
    conditioning = conditioner(fields, CAPTIONS)
    other = {**fields, "text": torch.randn(4, 5, 24), "pooled": torch.randn(4, 12), "label": torch.tensor([2, 2, 2, 2])}
    null = conditioner.against(other, CAPTIONS)
    torch.testing.assert_close(null.context[:, :5], other["text"])
    torch.testing.assert_close(null.context[:, 5:], conditioning.null.context[:, 5:].expand(4, -1, -1))
    torch.testing.assert_close(null.vector, other["pooled"])
    torch.testing.assert_close(null.concat, conditioning.null.concat)


@pytest.mark.parametrize("channels", [[16, 32, 32], [16, 16], [16]])
def test_the_classifier_halves_between_all_its_levels(channels):
    classifier = NoisyClassifier(4, 3, channels, heads=2, norm_groups=8)
    assert [block.downsamplers is not None for block in classifier.down_blocks] == [True] * (len(channels) - 1) + [
        False
    ]
    noisy, times = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 500.0])
    logits = classifier(noisy, times)
    assert logits.shape == (2, 3)
    in_bf16 = classifier.bfloat16()(noisy, times)
    assert in_bf16.dtype == torch.float32
    torch.testing.assert_close(in_bf16, logits, rtol=0.05, atol=0.02)


def test_in_buckets_a_small_picture_is_enlarged_by_the_same_factors(make_facts):
    """Latents of 8x16 and 12x8 at f=2, of pictures averaged by 4: enlarged twice in both. By 3, sides are rounded."""

    def of(latents, small):
        return make_facts(shapes={"moments": [8, *latents], "low_resolution": [3, *small]}, fold=1)

    conditioner = LowResolutionImage(of((8, 16), (4, 8)))
    assert conditioner.fits(of((12, 8), (6, 4)))
    assert not LowResolutionImage(of((8, 16), (5, 10))).fits(of((12, 8), (8, 5)))
    image = torch.rand(2, 3, 6, 4)
    planes = conditioner({"low_resolution": image}, ()).given.concat
    torch.testing.assert_close(planes, F.interpolate(image, (12, 8), mode="bilinear", antialias=True))
