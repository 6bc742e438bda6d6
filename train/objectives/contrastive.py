"""Symmetric cross-entropy between pictures and captions (Radford et al. 2021, fig. 3), with negatives of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.common.errors import UserError
from data_pipeline.loading.batch import Batch
from train.diffusion.randomness import StreamRandom
from train.distributed.collectives import gathered_objects
from train.models.clip import CLIP
from train.models.open_clip_alone import open_clip
from train.objectives.terms import LossTerms

LOSSES = ("softmax", "sigmoid")


class Contrastive(nn.Module):
    """Batch of pictures and captions -> LossTerms. Mirrors half of the pictures; shifts all by up to `shift` pixels."""

    def __init__(
        self,
        clip: CLIP,
        rank: int = 0,
        world_size: int = 1,
        shift: int = 4,
        loss: str = "softmax",  # or "sigmoid": SigLIP's (Zhai et al. 2023)
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.clip, self.shift, self.seed = clip, shift, seed
        if loss not in LOSSES:
            raise UserError(f"objective.loss={loss} is not a loss of pairs: use one of {', '.join(LOSSES)}.")
        if loss == "sigmoid" and clip.logit_bias is None:
            raise UserError(
                "objective.loss=sigmoid needs a bias of the logits: add clip.logit_bias=-10 clip.logit_scale=2.303, as "
                "in the paper."
            )
        self.pair_loss = self._sigmoid if loss == "sigmoid" else self._cross_entropy
        self.bounds = {"clip.towers.logit_scale": (0.0, log(100.0))}  # as open_clip clamps it after each step
        # Each rank scores its own rows against all ranks' columns; the averaged gradients equal those of the full loss.
        clip_loss = open_clip().loss.ClipLoss
        self.clip_loss = clip_loss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)

    def forward(self, batch: Batch) -> LossTerms:
        images = batch.tensors["image"]
        random = StreamRandom(self.seed, batch.step, batch.streams, len(batch) // len(batch.streams), images.device)
        mirror = random.uniform("mirror") < 0.5
        images = torch.where(mirror.view(-1, 1, 1, 1), images.flip(-1), images)
        if self.shift:
            images = self.shifted(images, random)
        image, text, scale = (part.float() for part in self.clip(images, batch.captions))
        loss = self.pair_loss(image, text, scale, batch.keys)
        right = (image @ text.T).argmax(1) == torch.arange(len(image), device=image.device)
        parts = {"loss": loss.detach(), "batch_top1": right.float().mean(), "logit_scale": scale.detach().mean()}
        return LossTerms(loss, parts, loss.detach().expand(len(image)))

    def _cross_entropy(self, image: Tensor, text: Tensor, scale: Tensor, keys: Sequence[str]) -> Tensor:
        """ClipLoss.forward, except that copies of a pair, as in a batch that spans two epochs, are not negatives."""
        logits = self.clip_loss.get_logits(image, text, scale)
        labels = self.clip_loss.get_ground_truth(image.device, len(image))
        everyones = [key for of_rank in gathered_objects(tuple(keys)) for key in of_rank]
        if len(set(everyones)) < len(everyones):
            copies = torch.tensor([[a == b for b in everyones] for a in keys], device=image.device)
            copies[torch.arange(len(keys), device=image.device), labels] = False
            logits = tuple(each.masked_fill(copies, -torch.inf) for each in logits)
        return sum(functional.cross_entropy(each, labels) for each in logits) / 2

    def _sigmoid(self, image: Tensor, text: Tensor, scale: Tensor, keys: Sequence[str]) -> Tensor:
        """SigLipLoss.forward over the pairs of all ranks, without copies of a pair as negatives."""
        images, texts = image, text
        if self.clip_loss.world_size > 1:
            _, texts = open_clip().loss.gather_features(
                image, text, local_loss=True, gather_with_grad=True, rank=self.clip_loss.rank,
                world_size=self.clip_loss.world_size,
            )  # fmt: skip
        logits = scale * images @ texts.T + self.clip.logit_bias.float()
        own = self.clip_loss.get_ground_truth(image.device, len(image))
        signs = 2 * functional.one_hot(own, len(texts)) - 1
        everyones = [key for of_rank in gathered_objects(tuple(keys)) for key in of_rank]
        counts = torch.tensor([[a != b for b in everyones] for a in keys], device=image.device) | (signs > 0)
        return -(functional.logsigmoid(signs * logits) * counts).sum() / len(image)

    def shifted(self, images: Tensor, random: StreamRandom) -> Tensor:
        """Shifts each picture separately by -shift..shift pixels, filled with white: (B, 3, H, W) -> same shape."""
        size, reach = images.shape[-1], 2 * self.shift + 1
        padded = nn.functional.pad(images, [self.shift] * 4, value=1.0)
        offsets = (random.uniform("shift", (2,)) * reach).long().tolist()
        return torch.stack([p[:, y : y + size, x : x + size] for p, (y, x) in zip(padded, offsets, strict=True)])
