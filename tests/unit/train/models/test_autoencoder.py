"""The autoencoders are diffusers' AutoencoderKL and VQModel; the posterior is torch's Gaussian."""

from pathlib import Path

import pytest
import torch
import yaml

from data_pipeline.common.errors import UserError
from train.models import autoencoder as first_stages
from train.models.autoencoder import AutoencoderKL, DiagonalGaussian, Identity, VQModel
from train.objectives.autoencoder import AutoencoderObjective

CONF = Path(__file__).resolve().parents[4] / "conf/autoencoder"
SMALL = {"channels": (16, 32, 32), "layers_per_block": 1, "norm_groups": 8}
ATTENDING = {"attention_levels": (False, True, True)}
PUBLISHED = ("kl_f4", "kl_f8", "kl_f16", "kl_f32", "vq_f4", "vq_f8", "vq_f16")


@pytest.fixture
def make_theirs():
    """make_theirs(options): diffusers' class with the same keyword arguments."""
    import diffusers

    def make(options):
        marks = ["Attn" if attends else "" for attends in options.get("attention_levels") or [0] * 9]
        marks = marks[: len(options["channels"])]
        vq = {}
        if "codebook_size" in options:
            vq = {"num_vq_embeddings": options["codebook_size"]}
        return (diffusers.VQModel if vq else diffusers.AutoencoderKL)(
            down_block_types=[f"{mark}DownEncoderBlock2D" for mark in marks],
            up_block_types=[f"{mark}UpDecoderBlock2D" for mark in reversed(marks)],
            block_out_channels=options["channels"], layers_per_block=options["layers_per_block"],
            latent_channels=options["latent_channels"], norm_num_groups=options["norm_groups"], **vq,
        )  # fmt: skip

    return make


@pytest.fixture
def both(make_theirs, image_batch, train_a_little):
    """both(cls, **options): ours after a few steps of training, and diffusers' with the same weights."""

    def make(cls, **options):
        torch.manual_seed(0)
        options = {**SMALL, "latent_channels": 4, **options}
        ours, theirs = cls(**options), make_theirs(options)
        if cls is VQModel:
            torch.nn.init.normal_(ours.codebook)
        train_a_little(AutoencoderObjective(ours), image_batch).zero_grad()
        assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        eps = [{name: m.eps for name, m in network.named_modules() if hasattr(m, "eps")} for network in (ours, theirs)]
        assert eps[0] == eps[1]  # too small a difference to be seen in outputs of unit size
        return ours, theirs

    return make


@pytest.fixture
def same_gradients(relative_error):
    """same_gradients(ours, theirs): of every parameter; both have been through a backward."""

    def compare(ours, theirs):
        expected = {name: p.grad for name, p in theirs.named_parameters()}
        largest = max(gradient.norm() for gradient in expected.values())
        for name, parameter in ours.named_parameters():
            # A key's bias changes no softmax: its gradient is zero but for rounding.
            assert (parameter.grad - expected[name]).norm() < 1e-5 * max(expected[name].norm(), 1e-3 * largest), name

    return compare


@pytest.mark.parametrize("options", [{}, ATTENDING], ids=["plain", "attending"])
def test_trained_kl_weights_work_in_diffusers(both, same_gradients, relative_error, options):
    ours, theirs = both(AutoencoderKL, **options)
    images, z = torch.rand(2, 3, 24, 16) * 2 - 1, torch.randn(2, 4, 6, 4)
    moments, posterior = ours.encode_moments(images), theirs.encode(images).latent_dist
    assert moments.shape == (2, 8, 6, 4)
    assert torch.equal(ours.encode_stored(images), moments)
    assert relative_error(moments, posterior.parameters) < 1e-5
    assert relative_error(ours.encode(images).mean, posterior.mean) < 1e-5
    assert relative_error(ours.encode(images).logvar, posterior.logvar) < 1e-5
    assert relative_error(ours.posterior_of(moments)[0], posterior.mean) < 1e-5
    assert relative_error(ours.posterior_of(moments)[1], posterior.var) < 1e-5
    assert relative_error(ours.decode(z), theirs.decode(z).sample) < 1e-5
    assert relative_error(ours.reconstruct(images), theirs.decode(posterior.mode()).sample) < 1e-5
    ours.decode(ours.encode(images).mean).square().mean().backward()
    theirs(images).sample.square().mean().backward()
    same_gradients(ours, theirs)


@pytest.mark.parametrize("options", [{}, ATTENDING], ids=["plain", "attending"])
def test_trained_vq_weights_work_in_diffusers(both, same_gradients, relative_error, options):
    ours, theirs = both(VQModel, codebook_size=40, **options)
    theirs.quantize.legacy = False  # else beta weighs the codebook loss, where the paper's weighs the commitment
    images, z = torch.rand(2, 3, 24, 16) * 2 - 1, torch.randn(2, 4, 6, 4)
    assert relative_error(ours.encode(images), theirs.encode(images).latents) < 1e-5
    assert relative_error(ours.decode(z), theirs.decode(z).sample) < 1e-5
    expected, _, (_, _, indices) = theirs.quantize(z)
    quantized = ours.quantize(z)
    assert len(quantized.indices.unique()) > 10
    assert torch.equal(quantized.indices.flatten(), indices)
    assert relative_error(quantized.z, expected) < 1e-6
    stored = ours.encode_stored(images)
    assert stored.shape == (2, 6, 4)
    assert stored.dtype == torch.int64
    codes, variance = ours.posterior_of(stored)
    assert torch.equal(codes, ours.quantize(ours.encode(images)).z)
    assert not variance.any()
    assert relative_error(ours.decode(codes), ours.reconstruct(images)) < 1e-6  # a code is its own nearest
    reconstruction, loss = theirs(images, return_dict=False)
    assert relative_error(ours.reconstruct(images), reconstruction) < 1e-5
    (reconstruction.square().mean() + loss).backward()
    quantized = ours.quantize(ours.encode(images))
    regularisation = quantized.codebook.mean() + 0.25 * quantized.commitment.mean()
    (ours.decoded(quantized.z).square().mean() + regularisation).backward()
    assert relative_error(regularisation, loss) < 1e-5
    same_gradients(ours, theirs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(make_theirs, name):
    options = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    cls = getattr(first_stages, options.pop("_target_").rpartition(".")[2])
    with torch.device("meta"):
        ours, theirs = cls(**options), make_theirs(options)
    assert ours.factor == int(name.rpartition("f")[2])
    shapes = [{n: tuple(p.shape) for n, p in network.named_parameters()} for network in (ours, theirs)]
    assert shapes[0] == shapes[1]
    # From 256 pixels, attention where LDM's first stages have it: at 16 or 8, VQ f8 at 32; and in the middle.
    sizes = [256 // 2**i for i, level in enumerate(ours.encoder.down_blocks) if level.attentions]
    assert sizes == {"kl_f16": [16], "kl_f32": [16, 8], "vq_f8": [32], "vq_f16": [16]}.get(name, [])


def test_stable_diffusions_first_stage_on_the_meta_device():
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoencoderKL().parameters()) == 83_653_863


@pytest.mark.parametrize("cls", [AutoencoderKL, VQModel])
@pytest.mark.parametrize("options", [{"patch": 2}, {"patch": 2, "mid_attention": False, "latent_channels": 6}])
def test_demo_options(cls, options, relative_error):
    torch.manual_seed(0)
    plain = cls(**SMALL, **options)
    last = cls(**SMALL, **options, channels_last=True).to(memory_format=torch.channels_last)
    last.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    encoded = plain.encoded(images)
    assert plain.factor == 8
    channels = options.get("latent_channels", plain.latent_channels) * (2 if cls is AutoencoderKL else 1)
    assert encoded.shape == (2, channels, 4, 6)
    assert plain.reconstruct(images).shape == images.shape
    assert relative_error(last.encoded(images), encoded) < 1e-5
    assert relative_error(last.reconstruct(images), plain.reconstruct(images)) < 1e-5


@pytest.mark.parametrize("cls", [AutoencoderKL, VQModel])
def test_checkpointed_activations_give_the_same_gradients_and_keep_less(cls, image_batch):
    torch.manual_seed(0)
    model = cls(**SMALL, **ATTENDING)
    found, kept = [], []
    for checkpointed in (False, True):
        model.tune(compiled=False, checkpoint_activations=checkpointed)
        objective, held = AutoencoderObjective(model), {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, h=held: h.setdefault(x.data_ptr(), x), lambda x: x):
            objective(image_batch())
        model.zero_grad()
        terms = objective(image_batch())
        terms.total.backward()
        found.append([terms.total.detach(), *(p.grad for p in model.parameters())])
        kept.append(sum(x.numel() for x in held.values()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert kept[1] < 0.5 * kept[0]


def test_levels_without_a_word_on_attention_are_refused():
    with pytest.raises(UserError, match=r"attention_levels=\[True\] must have 3 entries"):
        AutoencoderKL(**SMALL, attention_levels=[True])


def test_no_first_stage_changes_nothing():
    images, identity = torch.rand(2, 3, 8, 8), Identity()
    mean, variance = identity.posterior_of(identity.encode_stored(images))
    assert torch.equal(mean, images)
    assert not variance.any()
    assert torch.equal(identity.decode(mean), images)
    assert torch.equal(identity.reconstruct(images), images)
    about = (identity.stored_as, identity.factor, identity.latent_channels, identity.fingerprint)
    assert about == ("pixels", 1, 3, "identity")


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
