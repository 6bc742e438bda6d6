"""The discriminator for training first stages: a PatchGAN (Isola et al. 2017, sec. 3.2.2, app. 6.1.2)."""

from __future__ import annotations

from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from train.models.batch_norm import BatchNorm

NORMS = ("group", "batch")


class PatchDiscriminator(nn.Module):
    """Pictures (B, 3, H, W) -> one logit per patch, (B, 1, about H/2^layers, W/2^layers); above 0 means real.

    norm="batch": the published one. Its statistics are those of one forward pass over all ranks, so real pictures and
    reconstructions each have their own. norm="group": each picture is judged alone, independent of the batch.
    """

    def __init__(self, channels: int = 64, layers: int = 3, norm_groups: int = 32, norm: str = "group") -> None:
        super().__init__()
        if norm not in NORMS:
            raise UserError(f"objective.adversary.discriminator.norm={norm} is not valid: use group or batch.")
        widths = [channels * 2 ** min(i, 3) for i in range(layers + 1)]
        if norm == "group" and channels % norm_groups:
            raise UserError(f"the discriminator's channels={channels} must be a multiple of norm_groups={norm_groups}.")
        self.layers, self.norm = layers, norm
        self.conv_in = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(widths[i], widths[i + 1], 4, stride=2 if i < layers - 1 else 1, padding=1, bias=False),
                    nn.GroupNorm(norm_groups, widths[i + 1]) if norm == "group" else BatchNorm(widths[i + 1]),
                    nn.LeakyReLU(0.2),
                )
                for i in range(layers)
            )
        )
        self.conv_out = nn.Conv2d(widths[-1], 1, 4, padding=1)
        self.apply(_initialise)

    @property
    def smallest_picture(self) -> int:
        """Side in pixels of the smallest picture that gives one patch: the last two convolutions each take one."""
        return 3 * 2**self.layers

    def forward(self, images: Tensor) -> Tensor:
        return self.conv_out(self.blocks(nn.functional.leaky_relu(self.conv_in(images), 0.2)))


def _initialise(module: nn.Module) -> None:
    """Weights from N(0, 0.02^2), those of batch norms from N(1, 0.02^2), as in Isola et al."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, BatchNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
