"""The U-Net is diffusers' U-Net: names, outputs, gradients; and the options that diffusers has not."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from train.models.unet import UNet

CONF = Path(__file__).resolve().parents[4] / "conf/unet"

SHAPES = {"channels": (16, 32, 32), "context_dim": 24, "attention_levels": (True, True, False), "norm_groups": 8}
OURS = {
    "sd1": {**SHAPES, "heads": 4},
    "sd2": {**SHAPES, "heads": (1, 2, 4), "linear_projection": True},
    "deep": {**SHAPES, "heads": 2, "transformer_depth": 2, "layers_per_block": 1},
    "unconditional": {
        **SHAPES, "context_dim": None, "attention_levels": (False, True, True), "heads": (2, 4, 4),
        "transformer_depth": 0,
    },
}  # fmt: skip
THEIRS = {
    "sd1": {"attention_head_dim": 4},  # diffusers' name for the number of heads
    "sd2": {"attention_head_dim": (1, 2, 4), "use_linear_projection": True},
    "deep": {"attention_head_dim": 2, "transformer_layers_per_block": 2, "layers_per_block": 1},
}


def diffusers_unet(name):
    from diffusers import UNet2DConditionModel, UNet2DModel

    if name == "unconditional":
        return UNet2DModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32, 32), norm_num_groups=8,
            attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    down = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32, 32), cross_attention_dim=24, norm_num_groups=8,
        down_block_types=down, up_block_types=up, **THEIRS[name],
    )  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_trained_weights_work_in_diffusers(name, latent_objective, latent_batch, train_a_little, relative_error):
    torch.manual_seed(0)
    ours = UNet(**OURS[name])
    initial = {key: value.clone() for key, value in ours.state_dict().items()}
    train_a_little(latent_objective(ours), latent_batch)
    assert [key for key, value in ours.state_dict().items() if torch.equal(value, initial[key])] == []
    theirs = diffusers_unet(name)
    assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())

    eps = [{name: m.eps for name, m in network.named_modules() if hasattr(m, "eps")} for network in (ours, theirs)]
    assert eps[0] == eps[1]  # too small a difference to be seen in outputs of unit size
    outputs, gradients = outputs_and_gradients(ours, theirs, with_context=name != "unconditional")
    assert relative_error(*outputs) < 1e-5
    for key, expected in gradients[1].items():
        if key.endswith("to_k.bias"):  # softmax does not see a shift of all keys: both are zero but for rounding
            assert max(gradients[0][key].abs().max(), expected.abs().max()) < 1e-5, key
        else:
            assert relative_error(gradients[0][key], expected) < 1e-4, key
    assert relative_error(flat(gradients[0]), flat(gradients[1])) < 1e-5


def outputs_and_gradients(ours, theirs, with_context, dtype=torch.float32, inputs=None):
    """Of both, for the same inputs: outputs, and gradients by name, of the inputs too. inputs: what they round to."""
    drawn = [torch.randn(*shape, dtype=inputs or dtype).to(dtype) for shape in ((3, 4, 8, 8), (3, 7, 24), (3, 4, 8, 8))]
    (x, context, weights), t = drawn, torch.tensor([0.0, 500.0, 999.0])
    outputs, gradients = [], []
    for network in (ours, theirs):
        network.zero_grad()
        inputs = [x.clone().requires_grad_(), *([context.clone().requires_grad_()] if with_context else [])]
        out = network(inputs[0], t, *inputs[1:])
        outputs.append(out if isinstance(out, torch.Tensor) else out.sample)
        (outputs[-1] * weights).sum().backward()
        named = {key: p.grad for key, p in network.named_parameters()}
        gradients.append({**{str(i): value.grad for i, value in enumerate(inputs)}, **named})
    return outputs, gradients


def flat(gradients):
    return torch.cat([gradients[key].flatten() for key in sorted(gradients)]).float()


@pytest.mark.parametrize("name", OURS)
def test_the_same_in_bf16(name, relative_error, monkeypatch):
    """By the same attention kernel. On CPUs ours runs in fp32 (attention.py), and rounding differs: next test."""

    def in_bf16(q, k, v, mask=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    monkeypatch.setattr("train.models.attention.attention", in_bf16)
    ours, theirs = UNet(**OURS[name]).bfloat16(), diffusers_unet(name).bfloat16()
    theirs.load_state_dict(ours.state_dict())
    outputs, gradients = outputs_and_gradients(ours, theirs, name != "unconditional", torch.bfloat16)
    assert relative_error(outputs[0].float(), outputs[1].float()) < 1e-2
    # A convolution behind attention over pixels may meet another memory layout there, and so another kernel.
    assert relative_error(flat(gradients[0]), flat(gradients[1])) < (2e-2 if name == "unconditional" else 1e-2)


@pytest.mark.parametrize("name", OURS)
def test_bf16_is_as_near_to_fp32_as_theirs(name, relative_error):
    """Each is a percent or two from fp32, by bf16's own rounding; so the two are from one another."""
    exact, ours, theirs = UNet(**OURS[name]), UNet(**OURS[name]), diffusers_unet(name)
    for network in (exact, ours, theirs):
        network.load_state_dict({key: value.bfloat16() for key, value in exact.state_dict().items()})
    with_context = name != "unconditional"
    seed = torch.get_rng_state()
    rounded, gradients = outputs_and_gradients(ours.bfloat16(), theirs.bfloat16(), with_context, torch.bfloat16)
    torch.set_rng_state(seed)  # the same inputs
    truth, slope = outputs_and_gradients(exact, exact, with_context, inputs=torch.bfloat16)
    errors = [relative_error(out.float(), truth[0]) for out in rounded]
    assert errors[0] < 0.02
    assert errors[0] < 1.25 * errors[1]
    errors = [relative_error(flat(named), flat(slope[0])) for named in gradients]
    assert errors[0] < 0.04
    assert errors[0] < 1.25 * errors[1]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("sd15", 859_520_964),
        ("sd21", 865_910_724),
        ("ldm_imagenet", 400_920_579),  # 400 M in Rombach et al. 2022, table 14
        ("ldm_unconditional", 274_056_163),  # 274 M in table 12
        ("ldm_text", 872_300_484),
        ("demo", 4_162_256),
    ],
)
def test_published_configurations_have_their_number_of_parameters(name, count):
    options = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert options.pop("_target_") == "train.models.unet.UNet"
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(**options).parameters()) == count


def test_stable_diffusion_on_the_meta_device():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        sd1 = UNet()
        sd2 = UNet(context_dim=1024, heads=(5, 10, 20, 20), linear_projection=True)
        theirs1 = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        theirs2 = UNet2DConditionModel(
            cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        )
    assert sum(p.numel() for p in sd1.parameters()) == 859_520_964
    for ours, theirs in ((sd1, theirs1), (sd2, theirs2)):
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }


@pytest.fixture
def demo_unet():
    """demo_unet(...): as the demo's, with every option that Stable Diffusion lacks."""

    def make(**changed):
        torch.manual_seed(0)
        options = {
            "channels": (16, 32), "layers_per_block": 1, "context_dim": 24, "vector_dim": 12, "heads": 4,
            "attention_levels": (True, True), "self_attention_levels": (False, True), "norm_groups": 8,
        }  # fmt: skip
        return UNet(**{**options, **changed})

    return make


def test_self_attention_is_where_asked(demo_unet):
    with_self = {name.split(".attentions")[0] for name, _ in demo_unet().named_parameters() if ".attn1." in name}
    with_cross = {name.split(".attentions")[0] for name, _ in demo_unet().named_parameters() if ".attn2." in name}
    assert with_self == {"down_blocks.1", "mid_block", "up_blocks.0"}
    assert with_cross == with_self | {"down_blocks.0", "up_blocks.1"}


def test_every_condition_changes_the_output(demo_unet):
    unet = demo_unet()
    x, t, context, vector = (
        torch.randn(2, 4, 8, 8),
        torch.tensor([10.0, 900.0]),
        torch.randn(2, 5, 24),
        torch.ones(2, 12),
    )
    with torch.no_grad():
        base = unet(x, t, context, vector)
        assert base.shape == x.shape
        for other in (
            unet(x + 0.1, t, context, vector),
            unet(x, t + 50, context, vector),
            unet(x, t, context + 0.1, vector),
            unet(x, t, context, vector + 0.1),
        ):
            assert (other - base).abs().max() > 1e-4
        # A picture's prediction is its own: not of what it is batched with, and not of its tokens' order.
        torch.testing.assert_close(unet(x[1:], t[1:], context[1:], vector[1:]), base[1:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(unet(x, t, context.flip(1), vector), base, rtol=1e-4, atol=1e-5)


def test_channels_last_is_the_same_function(demo_unet, relative_error):
    plain, last = demo_unet(), demo_unet(channels_last=True).to(memory_format=torch.channels_last)
    last.load_state_dict(plain.state_dict())
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0]), torch.randn(2, 5, 24), torch.randn(2, 12)
    outputs = []
    for unet in (plain, last):
        outputs.append(unet(*inputs))
        outputs[-1].square().sum().backward()
    assert relative_error(outputs[1], outputs[0]) < 1e-5
    for (name, a), b in zip(plain.named_parameters(), last.parameters(), strict=True):
        assert relative_error(b.grad, a.grad) < 1e-4, name


def test_without_text(demo_unet):
    unet = demo_unet(context_dim=None, vector_dim=None)
    assert unet(torch.randn(2, 4, 8, 8), torch.zeros(2)).shape == (2, 4, 8, 8)


def test_computes_in_the_weights_dtype(demo_unet):
    unet = demo_unet().to(torch.bfloat16)
    x, context, vector = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24), torch.randn(2, 12)
    with torch.no_grad():
        out = unet(x, torch.tensor([1.0, 999.0]), context, vector)
        exact = unet.float()(x, torch.tensor([1.0, 999.0]), context, vector)
    assert out.dtype == torch.bfloat16
    assert nn.functional.cosine_similarity(out.float().flatten(), exact.flatten(), dim=0) > 0.99


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"attention_levels": (True,)}, "2 channels, 1 attention_levels, .* each must have one entry per level"),
        ({"self_attention_levels": (True,) * 3}, "3 self_attention_levels .* each must have one entry per level"),
        ({"heads": (1, 2, 3)}, "3 heads: each must have one entry per level"),
        ({"heads": 5}, "16 channels must be a multiple of 5 heads"),
        ({"norm_groups": 32}, "16 channels must be a multiple of .* 32 norm groups"),
        ({"transformer_depth": 0}, "uses no context: set unet.context_dim=null"),
        ({"transformer_depth": 0, "context_dim": None}, "leave unet.self_attention_levels=null"),
    ],
)
def test_levels_that_do_not_fit(demo_unet, changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        demo_unet(**changed)


@pytest.mark.parametrize("options", [{"context_dim": 24}, {"context_dim": None, "transformer_depth": 0}])
def test_zero_init_starts_every_branch_at_nothing(options):
    """As in CompVis' code: the output is zero, each residual branch adds nothing, and gradients still arrive. All other
    weights are those without it, so that a seed means the same network."""
    given = {"channels": (32, 64), "attention_levels": (False, True), "heads": 2, "layers_per_block": 1, **options}
    torch.manual_seed(0)
    plain = UNet(**given)
    torch.manual_seed(0)
    unet = UNet(**given, zero_init=True)
    changed = {name for name, value in unet.state_dict().items() if not torch.equal(value, plain.state_dict()[name])}
    last = "proj_out" if options["context_dim"] else "to_out.0"
    assert changed >= {
        "conv_out.weight", "conv_out.bias", "mid_block.resnets.0.conv2.weight", "up_blocks.1.resnets.0.conv2.bias",
    }  # fmt: skip
    assert all(f".{last}." in n or ".conv2." in n or n.startswith("conv_out.") for n in changed)
    assert sum(f".{last}." in n for n in changed) == 2 * sum(n.endswith(f".{last}.weight") for n in unet.state_dict())
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 900.0])
    context = torch.randn(2, 3, 24) if options["context_dim"] else None
    out = unet(x, t, context)
    assert not out.any()
    (out - x).square().mean().backward()
    assert unet.conv_out.weight.grad.any()
