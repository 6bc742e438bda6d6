"""A trained network as a function (x_t, t, conditioning) -> x0, the interface that samplers and guidance use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from train.diffusion.parameterization import Parameterization
from train.diffusion.process import DiffusionProcess, like


class Conditioned(Protocol):
    """What guidance needs of a condition: the condition and its null in one batch of twice the size."""

    def for_guidance(self) -> Conditioned: ...


Denoiser = Callable[[Tensor, Tensor, Conditioned], Tensor]


class NetworkDenoiser:
    """x0 from the network's prediction: x_t (B, C, h, w), t scalar -> (B, C, h, w) in the dtype of x_t."""

    def __init__(
        self,
        network: Callable[[Tensor, Tensor, Conditioned], Tensor],
        process: DiffusionProcess,
        parameterization: Parameterization,
    ) -> None:
        self.network, self.process, self.parameterization = network, process, parameterization

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioned) -> Tensor:
        t = t.expand(len(x_t))
        prediction = self.network(x_t, self.process.network_time(t), conditioning).to(x_t.dtype)
        alpha, sigma = like(self.process.alpha(t), x_t), like(self.process.sigma(t), x_t)
        return self.parameterization.x0(x_t, prediction, alpha, sigma)
