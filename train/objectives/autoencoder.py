"""Reconstruction, regularisation, adversary: the objective of the first stage (Rombach et al. 2022, app. G, eq. 25)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from data_pipeline.loading.batch import Batch
from train.diffusion.randomness import StreamRandom, generator_at
from train.distributed.collectives import mean_over_ranks
from train.models.autoencoder import Autoencoder, VQModel
from train.models.perceptual import PerceptualTerm
from train.models.quantizer import Quantized, counts_of, usage
from train.objectives.adversary import Adversary, no_gradient
from train.objectives.equivariance import Equivariance, resized
from train.objectives.terms import LossTerms

KL_WEIGHT = 1e-4
COMMITMENT_WEIGHT = 0.25  # van den Oord et al. 2017, beta of eq. 3
REVIVAL_WEIGHT = 0.1  # a tenth of the weight that the codebook loss gives a code of average use
CHOICES = {"reconstruction": ("l1", "l2"), "vq_loss": ("standard", "legacy"), "log_variance": (None, "learned"),
           "train": ("all", "decoder")}  # fmt: skip


class FirstStageOutput(NamedTuple):
    """Result of a pass through a first stage: the reconstruction, the latents that were decoded (a VQ model's before
    quantization), the penalty (B,), and metrics, each (B,) or ()."""

    reconstruction: Tensor
    latents: Tensor
    penalty: Tensor
    parts: dict[str, Tensor]


class AutoencoderObjective(nn.Module):
    """L1 + gradient_weight * L1 of finite differences [+ perceptual distance] + regularisation [+ adversary].

    Everything is a mean per value of a picture or latent; docs/first_stages.md has CompVis' units. The finite
    differences stand in for a perceptual distance where there are no weights of one.

    reconstruction="l2": mean squares in place of L1. log_variance="learned": the reconstruction loss e becomes
    e / exp(s) + s with a learned scalar s, from 0 (Dai & Wipf 2019; CompVis' form, whose own runs left s at 0).
    Regularisation of a KL model: kl_weight * KL per latent value. Of a VQ model: codebook loss + commitment_weight *
    commitment loss + revival_weight * revival of unused codes (0: none); vq_loss="legacy": commitment_weight weighs the
    codebook loss instead, as in taming-transformers. None: the constant above; weights of the other kind of model must
    be None.

    train="decoder": encoder, quant_conv and codebook are frozen, and the loss has no regularisation.

    equivariance: weight of the reconstruction error of latents that are resized by one of equivariance_scales, against
    equally resized pictures; without the adversary.

    Trains on random crops of `crop` pixels (0: never) until step `crop_until`, at one position per batch, then on whole
    pictures: crops are cheaper, and as good for a convolutional network. Half of all pictures are mirrored.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        kl_weight: float | None = None,
        commitment_weight: float | None = None,
        revival_weight: float | None = None,
        gradient_weight: float = 0.5,
        crop: int = 0,
        crop_until: int = 0,
        adversary: Adversary | None = None,
        perceptual: PerceptualTerm | None = None,
        seed: int = 0,
        reconstruction: str = "l1",
        vq_loss: str | None = None,
        log_variance: str | None = None,
        train: str = "all",
        equivariance: float = 0.0,
        equivariance_scales: Sequence[float] = (0.5, 0.25),
    ) -> None:
        super().__init__()
        self.quantizes, self.decoder_only = isinstance(autoencoder, VQModel), train == "decoder"
        choices = {"reconstruction": reconstruction, "vq_loss": vq_loss, "log_variance": log_variance, "train": train}
        _refuse_choices(choices)
        if self.decoder_only:
            autoencoder.freeze_encoder()
        vq = {"commitment_weight": commitment_weight, "revival_weight": revival_weight, "vq_loss": vq_loss}
        _refuse_weights_of_others(autoencoder, {"kl_weight": kl_weight} if self.quantizes else vq)
        _refuse_small_crops(adversary, perceptual, crop)
        self.autoencoder, self.gradient_weight, self.adversary = autoencoder, gradient_weight, adversary
        self.perceptual = perceptual
        self.equivariance = Equivariance(equivariance, equivariance_scales) if equivariance else None
        self.kl_weight = KL_WEIGHT if kl_weight is None else kl_weight
        self.commitment_weight = COMMITMENT_WEIGHT if commitment_weight is None else commitment_weight
        self.revival_weight = REVIVAL_WEIGHT if revival_weight is None else revival_weight
        self.crop, self.crop_until, self.seed = crop, crop_until, seed
        self.reconstruction, self.vq_loss = reconstruction, vq_loss or "standard"
        self.log_variance = nn.Parameter(torch.zeros(1)) if log_variance else None  # DeepSpeed takes no scalars
        if self.quantizes:
            generator = generator_at("cpu", seed, "anchors")
            anchors = torch.randn(autoencoder.codebook.shape, generator=generator, device="cpu")
            self.register_buffer("anchors", anchors, persistent=False)

    @property
    def players(self) -> tuple[str, ...]:
        """Prefixes of the parameters that an optimizer must be able to leave out of a step: those of both players, if
        they learn in turn. "" has what no other prefix has."""
        return ("", "adversary.") if self.adversary is not None and self.adversary.turns == "alternate" else ()

    @property
    def perceptual_space(self) -> str:
        """What stands for perceptual distance in the loss, for records."""
        if self.perceptual is not None:
            return self.perceptual.distance.space
        stand_in = f"L1 of finite differences, weight {self.gradient_weight:g}, stands in"
        return f"none: {stand_in}" if self.gradient_weight else "none"

    def decoded_sizes(self, whole: Sequence[int]) -> int:
        """How many sizes of pictures are decoded in training on pictures of (height, width). UserError for equivariance
        at a size that it can't have."""
        sizes = [whole, *([(self.crop, self.crop)] if self.crop and self.crop_until else [])]
        if self.equivariance is None:
            return len(sizes)
        smallest = 2 if self.perceptual is None else self.perceptual.distance.smallest_picture
        self.equivariance.refuse_sizes(sizes, self.autoencoder.factor, smallest)
        return len(sizes) * (1 + len(self.equivariance.scales))

    def forward(self, batch: Batch) -> LossTerms:
        images = batch.tensors["image"]
        random = StreamRandom(self.seed, batch.step, batch.streams, len(batch) // len(batch.streams), images.device)
        images = self.augmented(images, random, batch.step)
        idle = self._idle(batch.step)
        with torch.set_grad_enabled(torch.is_grad_enabled() and idle != ""):
            reconstruction, latents, penalty, parts = self.reconstructed(images, random)
            error, of_error = self.errors(reconstruction, images)
            smaller = self.error_at_smaller_size(latents, images, batch.step)
        nll, parts = self._likelihood(error, of_error | parts)
        loss = nll if self.decoder_only else nll + penalty
        if smaller is not None:
            loss, parts = loss + self.equivariance.weight * smaller, parts | {"equivariance": smaller}
        total, parts = self._descended(loss, idle), {"loss": loss, **parts}
        if self.adversary is not None:
            against = self.adversary(images, reconstruction, nll.mean(), self.autoencoder.last_layer, batch.step)
            total, parts = total + against.total, parts | against.parts
        return LossTerms(total, {name: v.detach().mean() for name, v in parts.items()}, loss.detach(), idle=idle)

    def _idle(self, step: int) -> str | None:
        """The one of `players` that does not learn in this step."""
        turn = "both" if self.adversary is None else self.adversary.turn(step)
        return {"both": None, "first_stage": "adversary.", "discriminator": ""}[turn]

    def _descended(self, loss: Tensor, idle: str | None) -> Tensor:
        """What the first stage minimises: zero if it is the discriminator's turn."""
        if idle != "":
            return loss.mean()
        variance = 0.0 if self.log_variance is None else (0.0 * self.log_variance).sum()
        return no_gradient(self.autoencoder) + variance

    def reconstructed(self, images: Tensor, random: StreamRandom) -> FirstStageOutput:
        """A pass of pictures (B, 3, H, W) through the first stage."""
        through = self.through_codebook if self.quantizes else self.through_posterior
        return through(images.to(self.autoencoder.last_layer.dtype), random)

    def errors(self, reconstruction: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The reconstruction error, and its parts, each (B,)."""
        difference = reconstruction - images
        pixels = difference.abs() if self.reconstruction == "l1" else difference.square()
        error, edges = pixels.mean((1, 2, 3)), gradient_l1(reconstruction, images)
        parts = {self.reconstruction: error, "gradient_l1": edges}
        error = error + self.gradient_weight * edges
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual.distance(images, reconstruction)
            error = error + self.perceptual.weight * parts["perceptual"]
        return error, parts

    def error_at_smaller_size(self, latents: Tensor, images: Tensor, step: int) -> Tensor | None:
        """The reconstruction error of resized latents, (B,); None without equivariance."""
        if self.equivariance is None:
            return None
        scale = self.equivariance.scale_at(self.seed, step)
        decoded = self.autoencoder.decode(resized(latents, scale).to(latents.dtype))
        return self.errors(decoded.float(), resized(images, scale))[0]

    def _likelihood(self, error: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The error, or with a learned variance the negative log-likelihood, both per value and (B,)."""
        if self.log_variance is None:
            return error, parts
        s = self.log_variance.float()
        return error / s.exp() + s, parts | {"log_variance": s}

    def through_posterior(self, images: Tensor, random: StreamRandom) -> FirstStageOutput:
        """Decodes a posterior sample: (B, 3, H, W) -> the same shape in fp32."""
        posterior = self.autoencoder.encode(images)
        noise = random.normal("posterior", posterior.mean.shape[1:]).to(posterior.mean)
        kl = posterior.kl().float() / posterior.mean[0].numel()
        z = posterior.sample(noise)
        return FirstStageOutput(self.autoencoder.decode(z).float(), z, self.kl_weight * kl, {"kl": kl})

    def through_codebook(self, images: Tensor, random: StreamRandom) -> FirstStageOutput:
        """Decodes the nearest codes: (B, 3, H, W) -> the same shape in fp32. Usage and perplexity are those of all
        ranks' micro-batches of this pass, so lower than for a larger batch."""
        z = self.autoencoder.encode(images)
        codes = self.autoencoder.quantize(z, self.anchors if self.revival_weight and not self.decoder_only else None)
        used, perplexity = usage(mean_over_ranks(counts_of(codes.indices, len(self.anchors))))
        penalty, parts = self._distance(codes), {"quantization": codes.codebook}
        if codes.revival is not None:  # one scalar per batch, added to each sample
            penalty, parts = penalty + self.revival_weight * codes.revival, parts | {"revival": codes.revival}
        parts |= {"codes_used": used, "code_perplexity": perplexity}
        return FirstStageOutput(self.autoencoder.decoded(codes.z).float(), z, penalty, parts)

    def _distance(self, codes: Quantized) -> Tensor:
        """Of outputs and codes, (B,)."""
        if self.vq_loss == "legacy":
            return self.commitment_weight * codes.codebook + codes.commitment
        return codes.codebook + self.commitment_weight * codes.commitment

    def augmented(self, images: Tensor, random: StreamRandom, step: int) -> Tensor:
        """Mirrors half of the pictures and, early in training, crops all: (B, 3, H, W) -> (B, 3, crop, crop)."""
        mirror = random.uniform("mirror") < 0.5
        images = torch.where(mirror.view(-1, 1, 1, 1), images.flip(-1), images)
        if self.crop and step < self.crop_until:
            # One position for the whole global batch: it must not depend on which streams this rank has.
            draws = torch.rand(2, generator=generator_at("cpu", self.seed, step, "crop"))
            top, left = (int(d * (size - self.crop + 1)) for d, size in zip(draws, images.shape[-2:], strict=True))
            images = images[..., top : top + self.crop, left : left + self.crop]
        return images


def gradient_l1(a: Tensor, b: Tensor) -> Tensor:
    """L1 between vertical and horizontal finite differences, which keeps edges sharp: two (B, C, H, W) -> (B,)."""
    d = a - b
    down = (d[..., 1:, :] - d[..., :-1, :]).abs().mean((1, 2, 3))
    across = (d[..., :, 1:] - d[..., :, :-1]).abs().mean((1, 2, 3))
    return down + across


def _refuse_weights_of_others(autoencoder: nn.Module, weights: dict[str, float | None]) -> None:
    for name, value in weights.items():
        if value is not None:
            raise UserError(
                f"objective.{name}={value} has no effect on a {type(autoencoder).__name__}: set objective.{name}=null."
            )


def _refuse_choices(given: dict[str, str | None]) -> None:
    for name, value in given.items():
        if value is not None and value not in CHOICES[name]:
            allowed = ", ".join("null" if choice is None else choice for choice in CHOICES[name])
            raise UserError(f"objective.{name}={value} is not valid: use {allowed}.")


def _refuse_small_crops(adversary: Adversary | None, perceptual: PerceptualTerm | None, crop: int) -> None:
    users = {"discriminator": adversary.discriminator} if adversary is not None else {}
    users |= {"perceptual distance": perceptual.distance} if perceptual is not None else {}
    for name, user in users.items():
        if crop and crop < user.smallest_picture:
            raise UserError(
                f"objective.crop={crop} is too small for the {name}: use at least {user.smallest_picture}, or 0 for no "
                "crop."
            )
