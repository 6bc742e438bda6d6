"""Objectives of the autoencoder and of CLIP."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from data_pipeline.common.errors import UserError
from train.diffusion.randomness import StreamRandom
from train.models.autoencoder import AutoencoderKL, VQModel
from train.models.clip import CLIP
from train.models.discriminator import PatchDiscriminator
from train.models.perceptual import LPIPS, PerceptualTerm
from train.objectives.adversary import Adversary
from train.objectives.autoencoder import AutoencoderObjective, gradient_l1
from train.objectives.contrastive import Contrastive
from train.objectives.equivariance import Equivariance
from train.train_autoencoder import refuse_sizes


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    return AutoencoderKL(channels=(8, 16), layers_per_block=1, norm_groups=4)


@pytest.fixture
def vq():
    torch.manual_seed(0)
    model = VQModel(codebook_size=30, channels=(8, 16), layers_per_block=1, norm_groups=4)
    torch.nn.init.normal_(model.codebook)
    return model


@pytest.fixture
def adversary():
    """Two layers, as the pictures have 16 pixels; takes part from step 3 on."""
    torch.manual_seed(1)
    return Adversary(PatchDiscriminator(channels=8, layers=2, norm_groups=4), weight=0.4, start=3)


@pytest.fixture
def mirrored():
    """The batch's pictures, mirrored as the run's randomness says."""

    def make(batch, seed):
        random = StreamRandom(seed, batch.step, batch.streams, len(batch) // len(batch.streams), torch.device("cpu"))
        flip = (random.uniform("mirror") < 0.5).tolist()
        assert 0 < sum(flip) < len(flip)
        images = [image.flip(-1) if f else image for image, f in zip(batch.tensors["image"], flip, strict=True)]
        return torch.stack(images), random

    return make


def test_autoencoder_loss_is_its_formula(autoencoder, image_batch, mirrored):
    objective = AutoencoderObjective(autoencoder, kl_weight=0.03, gradient_weight=0.7, seed=2)
    batch = image_batch(step=4)
    terms = objective(batch)
    images, random = mirrored(batch, 2)
    mean, logvar = autoencoder.encode_moments(images).chunk(2, 1)
    posterior = Normal(mean, (logvar / 2).exp())
    kl = kl_divergence(posterior, Normal(0.0, 1.0)).mean((1, 2, 3))  # per latent value
    got = autoencoder.decode(posterior.mean + posterior.stddev * random.normal("posterior", mean.shape[1:]))
    l1 = (got - images).abs().mean((1, 2, 3))
    edges = sum((got.diff(dim=d) - images.diff(dim=d)).abs().mean((1, 2, 3)) for d in (2, 3))
    expected = l1 + 0.7 * edges + 0.03 * kl
    torch.testing.assert_close(terms.per_sample, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.total, expected.mean(), rtol=1e-4, atol=1e-5)
    for name, value in (("kl", kl), ("l1", l1), ("gradient_l1", edges), ("loss", expected)):
        torch.testing.assert_close(terms.parts[name], value.mean().detach(), rtol=1e-4, atol=1e-5)


def test_vq_loss_is_its_formula(vq, image_batch, mirrored):
    objective = AutoencoderObjective(vq, commitment_weight=0.3, revival_weight=0.2, gradient_weight=0.7, seed=2)
    batch = image_batch(step=4)
    terms = objective(batch)
    images, _ = mirrored(batch, 2)
    z = vq.encode(images).permute(0, 2, 3, 1)  # (B, C, h, w) -> (B, h, w, C)
    indices = torch.cdist(z, vq.codebook).argmin(-1)
    codes = vq.codebook[indices]
    distance = (z - codes).square().mean((1, 2, 3))
    got = vq.decoded(codes.permute(0, 3, 1, 2))
    l1 = (got - images).abs().mean((1, 2, 3))
    edges = sum((got.diff(dim=d) - images.diff(dim=d)).abs().mean((1, 2, 3)) for d in (2, 3))
    shares = indices.flatten().bincount(minlength=30) / indices.numel()
    revival = terms.parts["revival"]
    expected = l1 + 0.7 * edges + 1.3 * distance + 0.2 * revival
    torch.testing.assert_close(terms.per_sample, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.total, expected.mean(), rtol=1e-4, atol=1e-5)
    assert revival > 0
    assert terms.parts["codes_used"] == len(indices.unique()) < 30
    perplexity = torch.special.entr(shares).sum().exp()
    torch.testing.assert_close(terms.parts["code_perplexity"], perplexity)
    torch.testing.assert_close(terms.parts["quantization"], distance.mean().detach())
    unused = torch.ones(30, dtype=torch.bool).index_fill_(0, indices.flatten(), False)
    terms.total.backward()
    assert (vq.codebook.grad[unused].norm(dim=1) > 0).all()


def test_revival_is_the_same_in_any_process_and_not_saved(vq, image_batch):
    first, again, other = (AutoencoderObjective(vq, seed=seed) for seed in (5, 5, 6))
    assert first(image_batch()).total == again(image_batch()).total
    assert not torch.equal(first.anchors, other.anchors)
    assert not [name for name in first.state_dict() if not name.startswith("autoencoder.")]


@pytest.mark.parametrize(
    ("name", "option"), [("vq", "kl_weight"), ("autoencoder", "commitment_weight"), ("autoencoder", "revival_weight")]
)
def test_a_weight_of_the_other_regularisation_is_refused(request, name, option):
    model = request.getfixturevalue(name)
    with pytest.raises(UserError, match=rf"{option}=0.1 .* {type(model).__name__}: set objective.{option}=null"):
        AutoencoderObjective(model, **{option: 0.1})


def test_perceptual_distance_in_the_loss(autoencoder, image_batch, mirrored):
    """Beside the L1 in the error, against which the adversary is weighed; its network is not a part of the model."""
    term = PerceptualTerm(LPIPS(), 0.6)
    objective = AutoencoderObjective(autoencoder, gradient_weight=0.0, perceptual=term, seed=2)
    batch = image_batch(step=4)
    without = AutoencoderObjective(autoencoder, gradient_weight=0.0, seed=2)
    terms, plain = objective(batch), without(batch)
    images, random = mirrored(batch, 2)
    posterior = autoencoder.encode(images)
    got = autoencoder.decode(posterior.sample(random.normal("posterior", posterior.mean.shape[1:])))
    distance = term.distance(images, got)
    assert distance.min() > 0
    torch.testing.assert_close(terms.parts["perceptual"], distance.mean().detach())
    torch.testing.assert_close(terms.per_sample, plain.per_sample + 0.6 * distance.detach())
    torch.testing.assert_close(terms.total, plain.total + 0.6 * distance.mean())
    assert objective.state_dict().keys() == without.state_dict().keys()
    assert {id(p) for p in objective.parameters()} == {id(p) for p in without.parameters()}
    assert objective.perceptual_space == "LPIPS VGG16"
    assert without.perceptual_space == "none"
    stand_in = AutoencoderObjective(autoencoder, gradient_weight=0.5).perceptual_space
    assert stand_in == "none: L1 of finite differences, weight 0.5, stands in"


def test_crops_that_leave_no_patch_are_refused(autoencoder, adversary):
    with pytest.raises(UserError, match=r"crop=8 .* at least 12"):
        AutoencoderObjective(autoencoder, crop=8, crop_until=9, adversary=adversary)
    AutoencoderObjective(autoencoder, crop=0, adversary=adversary)
    with pytest.raises(UserError, match=r"crop=8 is too small for the perceptual distance: use at least 16"):
        AutoencoderObjective(autoencoder, crop=8, crop_until=9, perceptual=PerceptualTerm(LPIPS(), 1.0))


def gradients_of(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["autoencoder", "vq"])
def test_one_backward_gives_what_two_would(request, name, adversary, image_batch, mirrored, monkeypatch):
    model = request.getfixturevalue(name)
    objective = AutoencoderObjective(model, gradient_weight=0.7, adversary=adversary, seed=2)
    terms, (images, _) = objective(image_batch(step=4)), mirrored(image_batch(step=4), 2)
    terms.total.backward()
    got, parts = gradients_of(objective), terms.parts
    objective.zero_grad()

    # The same in plain torch: first the autoencoder against a frozen discriminator, then that by itself.
    seen = {}
    monkeypatch.setattr(model.decoder.conv_out, "forward", keeping(model.decoder.conv_out.forward, seen))
    plain = AutoencoderObjective(model, gradient_weight=0.7, seed=2)(image_batch(step=4))
    judge, reconstruction = adversary.discriminator.requires_grad_(False), seen["output"]
    error = (reconstruction - images).abs().mean() + 0.7 * sum(
        (reconstruction.diff(dim=d) - images.diff(dim=d)).abs().mean() for d in (2, 3)
    )
    gan = -judge(reconstruction).mean()
    last = model.decoder.conv_out.weight
    norms = [float(torch.autograd.grad(loss, last, retain_graph=True)[0].norm()) for loss in (error, gan)]
    (plain.total + 0.4 * norms[0] / norms[1] * gan).backward()
    expected = {f"autoencoder.{n}": gradient for n, gradient in gradients_of(model).items()}
    judge.requires_grad_(True)
    real, fake = judge(images), judge(reconstruction.detach())
    own = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    own.backward()
    expected |= {f"adversary.discriminator.{n}": gradient for n, gradient in gradients_of(judge).items()}

    assert got.keys() == expected.keys() == dict(objective.named_parameters()).keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=1e-7, msg=key)
    torch.testing.assert_close(parts["gan"], gan.detach())
    torch.testing.assert_close(parts["discriminator"], own.detach())
    assert float(parts["adaptive_weight"]) == pytest.approx(norms[0] / norms[1], rel=1e-3)
    torch.testing.assert_close(terms.per_sample, plain.per_sample)


def test_latents_of_a_smaller_picture(autoencoder, image_batch, mirrored):
    """The loss at half the size against plain convolutions: in the middle, each value is 1/8, 3/8, 3/8, 1/8 of four."""
    objective = AutoencoderObjective(autoencoder, equivariance=0.3, equivariance_scales=[0.5], seed=2)
    batch = image_batch(step=4)
    terms, plain = objective(batch), AutoencoderObjective(autoencoder, seed=2)(batch)
    images, random = mirrored(batch, 2)
    posterior = autoencoder.encode(images)
    z = posterior.sample(random.normal("posterior", posterior.mean.shape[1:]))
    difference = autoencoder.decode(halved(z)) - halved(images)
    edges = sum(difference.diff(dim=d).abs().mean((1, 2, 3)) for d in (2, 3))
    expected = difference.abs().mean((1, 2, 3)) + 0.5 * edges
    torch.testing.assert_close(terms.parts["equivariance"], expected.mean().detach())
    torch.testing.assert_close(terms.per_sample, (plain.per_sample + 0.3 * expected).detach())
    terms.total.backward()
    got = gradients_of(autoencoder)
    autoencoder.zero_grad()
    (plain.total + 0.3 * expected.mean()).backward()
    for name, gradient in gradients_of(autoencoder).items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def halved(x):
    """Weights 1, 3, 3, 1 along each axis with a stride of two; at the edges, those of values inside."""
    for axis in (2, 3):
        count = x.shape[axis]
        rows = torch.zeros(count // 2, count + 2)
        for i in range(count // 2):
            rows[i, 2 * i : 2 * i + 4] = torch.tensor([1.0, 3.0, 3.0, 1.0])
        rows = rows[:, 1:-1]
        x = (x.transpose(axis, -1) @ (rows / rows.sum(1, keepdim=True)).T).transpose(axis, -1)
    return x


def test_the_smaller_size_is_drawn_by_step():
    equivariance = Equivariance(1.0, (0.5, 0.25, 0.125))
    drawn = [equivariance.scale_at(5, step) for step in range(60)]
    assert drawn == [equivariance.scale_at(5, step) for step in range(60)]
    assert drawn != [equivariance.scale_at(6, step) for step in range(60)]
    assert {*drawn} == {0.5, 0.25, 0.125}


def test_sizes_of_equivariance_that_are_refused(autoencoder):
    with pytest.raises(UserError, match=r"equivariance_scales=\[1\] must be one or more numbers between 0 and 1"):
        Equivariance(1.0, [1])
    objective = AutoencoderObjective(autoencoder, equivariance=1.0, crop=8, crop_until=9)
    assert objective.decoded_sizes((16, 16)) == 6  # whole pictures and crops, at three sizes each
    assert AutoencoderObjective(autoencoder).decoded_sizes((16, 16)) == 1
    with pytest.raises(UserError, match=r"latents of 12x12 pixels scaled by 0\.25 have 1\.5x1\.5 values"):
        objective.decoded_sizes((12, 12))
    term = PerceptualTerm(LPIPS(), 1.0)
    small = AutoencoderObjective(autoencoder, equivariance=1.0, perceptual=term)
    with pytest.raises(UserError, match=r"scaled by 0\.25 have 4x4 values, but need whole numbers and 16 pixels"):
        small.decoded_sizes((32, 32))


@pytest.mark.parametrize("name", ["autoencoder", "vq"])
def test_a_decoder_alone(request, name, image_batch):
    """Its gradients are those without regularisation; the encoder, next to the latents and the codebook are fixed."""
    model = request.getfixturevalue(name)
    none = {"kl_weight": 0.0} if name == "autoencoder" else {"commitment_weight": 0.0, "revival_weight": 0.0}
    AutoencoderObjective(model, seed=2, **none)(image_batch(step=4)).total.backward()
    expected = {n: g for n, g in gradients_of(model).items() if n.partition(".")[0] in ("decoder", "post_quant_conv")}
    model.zero_grad()
    terms = AutoencoderObjective(model, seed=2, train="decoder")(image_batch(step=4))
    terms.total.backward()
    got = gradients_of(model)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[n], expected[n]) for n in got)
    error = terms.parts["l1"] + 0.5 * terms.parts["gradient_l1"]
    torch.testing.assert_close(terms.parts["loss"], error)
    with pytest.raises(UserError, match=r"objective\.train=encoder is not valid: use all, decoder"):
        AutoencoderObjective(model, train="encoder")


def keeping(forward, seen):
    """The same function; what it gave last is in seen["output"]."""

    def kept(x):
        seen["output"] = forward(x)
        return seen["output"]

    return kept


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)  # compiles C++ on a CPU, for minutes
def test_compiled_against_an_adversary(adversary, image_batch):
    """The gradients at the last layer are taken twice, before the whole backward pass."""
    torch.manual_seed(0)
    model = AutoencoderKL(channels=(8, 16), layers_per_block=1, norm_groups=4)
    objective, found = AutoencoderObjective(model, adversary=adversary, seed=2), []
    for compiled in (False, True):
        model.tune(compiled, checkpoint_activations=False)
        objective.zero_grad()
        terms = objective(image_batch(step=3))
        terms.total.backward()
        found.append({"total": terms.total.detach(), **terms.parts, **gradients_of(objective)})
    plain, same = found
    assert plain.keys() == same.keys()
    for key, value in plain.items():
        torch.testing.assert_close(same[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def test_before_its_start_the_adversary_changes_nothing(autoencoder, adversary, image_batch):
    plain = AutoencoderObjective(autoencoder)(image_batch(step=2))
    plain.total.backward()
    expected = gradients_of(autoencoder)
    autoencoder.zero_grad()
    objective = AutoencoderObjective(autoencoder, adversary=adversary)
    terms = objective(image_batch(step=2))
    terms.total.backward()
    assert terms.total == plain.total
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients_of(autoencoder).items())
    # ZeRO needs a gradient of each parameter, and Adam must not move by it.
    own = gradients_of(adversary.discriminator)
    assert own.keys() == dict(adversary.discriminator.named_parameters()).keys()
    assert not any(gradient.any() for gradient in own.values())
    assert [float(terms.parts[name]) for name in ("gan", "discriminator", "adaptive_weight")] == [0, 0, 0]
    assert terms.parts.keys() == objective(image_batch(step=3)).parts.keys()  # so that means over steps are of all


def test_gradient_l1_sees_edges_and_not_brightness():
    a = np.random.default_rng(0).random((2, 3, 5, 7))
    b = np.random.default_rng(1).random((2, 3, 5, 7))
    expected = [
        np.abs(np.diff(x - y, axis=1)).mean() + np.abs(np.diff(x - y, axis=2)).mean() for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(gradient_l1(torch.tensor(a), torch.tensor(b)), expected)
    np.testing.assert_allclose(gradient_l1(torch.tensor(a), torch.tensor(a + 0.5)), 0, atol=1e-12)


def test_early_crops_are_one_place_of_all_ranks_and_end(autoencoder, image_batch):
    objective = AutoencoderObjective(autoencoder, crop=8, crop_until=20, seed=1)
    places = set()
    for step in range(20):
        whole = image_batch(step=step)
        random = StreamRandom(1, step, whole.streams, 2, torch.device("cpu"))
        crops = objective.augmented(whole.tensors["image"], random, step)
        mirrors = random.uniform("mirror") < 0.5
        found = set()
        for crop, image, mirror in zip(crops, whole.tensors["image"], mirrors, strict=True):
            source = image.flip(-1) if mirror else image
            windows = source.unfold(1, 8, 1).unfold(2, 8, 1)  # (3, 9, 9, 8, 8)
            hit = (windows == crop[:, None, None]).all(-1).all(-1).all(0).nonzero().tolist()
            found.add(tuple(map(tuple, hit)))
        assert len(found) == 1  # so also whatever streams a rank holds
        ((place,),) = found
        places.add(place)
    assert len(places) > 10
    assert objective.augmented(image_batch(step=20).tensors["image"], random, 20).shape[-2:] == (16, 16)


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return CLIP(
        12,
        {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
        {"context_length": 8, "vocab_size": 49408, "width": 16, "layers": 1, "heads": 2},
    )


def test_contrastive_loss_is_symmetric_cross_entropy(clip, image_batch, mirrored):
    captions = [f"picture {name}" for name in ("a", "b", "c", "d", "e", "f", "g", "h")]
    batch = image_batch(step=1, captions=captions)
    terms = Contrastive(clip, shift=0, seed=3)(batch)
    images, _ = mirrored(batch, 3)
    image = F.normalize(clip.towers.encode_image(images), dim=-1)
    text = F.normalize(clip.towers.encode_text(clip.tokenizer(captions)), dim=-1)
    logits = clip.towers.logit_scale.exp() * image @ text.T
    rows, columns = logits.log_softmax(1).diagonal(), logits.log_softmax(0).diagonal()
    torch.testing.assert_close(terms.total, -(rows + columns).mean() / 2, rtol=1e-4, atol=1e-5)
    top1 = (logits.argmax(1) == torch.arange(8)).float().mean()
    torch.testing.assert_close(terms.parts["batch_top1"], top1)
    gradient = torch.autograd.grad(terms.total, clip.towers.text_projection)[0]
    assert gradient.abs().max() > 0


def test_copies_of_a_pair_are_no_negatives(clip, image_batch):
    """A pair twice in a batch: each of the two is told from all others, but not from its copy."""
    objective, scale = Contrastive(clip, shift=0), torch.tensor(100.0)
    features = torch.eye(8)[[0, 1, 2, 3, 4, 5, 6, 0]]
    told_apart = objective._cross_entropy(features, features, scale, [*"abcdefga"])
    taken_for_others = objective._cross_entropy(features, features, scale, [*"abcdefgh"])
    assert told_apart < 1e-6
    assert taken_for_others == pytest.approx(math.log(2) / 4, abs=1e-4)  # two of eight
    keys = image_batch(step=1).keys
    whole = objective(replace(image_batch(step=1, captions=["a"] * 8), keys=(keys[0],) * 8))
    assert float(whole.total.detach()) == 0.0  # nothing is left to be told from


def test_contrastive_loss_in_bf16_is_that_in_fp32_to_its_rounding(clip, image_batch):
    batch, objective = image_batch(step=1, captions=[f"picture {i}" for i in range(8)]), Contrastive(clip)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        objective.to(dtype).zero_grad()
        terms = objective(batch)
        terms.total.backward()
        losses.append(terms.per_sample)
        assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in objective.parameters())
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0.0)


def test_shifted_pictures_keep_their_pixels_over_white(clip):
    objective = Contrastive(clip, shift=2)
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    image = torch.stack([rows, columns, torch.zeros(16, 16)]) / 100 - 1  # each pixel says where it came from
    shifted = objective.shifted(image.expand(200, 3, 16, 16), StreamRandom(0, 0, (0,), 200, torch.device("cpu")))
    places = set()
    for picture in shifted:
        inside = picture[2] < 0
        assert (picture[:, ~inside] == 1).all()
        y, x = inside.nonzero().T
        dy, dx = ((picture[:2, y, x] + 1) * 100).round() - torch.stack([y, x])
        assert len(dy.unique()) == len(dx.unique()) == 1
        assert len(y) == (16 - abs(int(dy[0]))) * (16 - abs(int(dx[0])))
        places.add((int(dy[0]), int(dx[0])))
    assert places == {(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)}


@pytest.mark.parametrize(
    ("size", "crop", "sentence"),
    [
        ((30, 30), 0, "pictures of 30x30 are not divisible by the autoencoder's factor 4"),
        ((64, 30), 0, "pictures of 64x30"),
        ((64, 64), 30, r"objective\.crop=30 must be a multiple of 4 and at most 64"),
        ((32, 64), 64, r"objective\.crop=64 must be a multiple of 4 and at most 32"),
    ],
)
def test_sizes_that_a_first_stage_can_not_shrink(size, crop, sentence):
    with pytest.raises(UserError, match=sentence):
        refuse_sizes(size, crop, 4)
    refuse_sizes((64, 32), 32, 4)
    refuse_sizes((64, 32), 0, 4)
