"""Batch norm whose statistics are those of all ranks' samples; torch's SyncBatchNorm does not run on CPUs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F


class BatchNorm(nn.Module):
    """(B, C, h, w) -> the same shape, normalised per channel over all samples of all ranks (Ioffe & Szegedy 2015).

    Always by the statistics of the batch: no running averages, so no state to save. Each rank must have equally many
    values. Costs two all-reduces of C numbers in each direction at several ranks, and nothing at one.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels)), eps

    def forward(self, x: Tensor) -> Tensor:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        values = x.float()
        mean = _mean_over_ranks(values.mean((0, 2, 3), keepdim=True))
        variance = _mean_over_ranks((values - mean).square().mean((0, 2, 3), keepdim=True))
        scale = self.weight.float().view_as(mean[0]) * (variance + self.eps).rsqrt()
        return ((values - mean) * scale + self.bias.float().view_as(mean[0])).to(x.dtype)


def _mean_over_ranks(value: Tensor) -> Tensor:
    """The gradient of each rank's value comes from the losses of all ranks."""
    return all_reduce(value) / dist.get_world_size()
