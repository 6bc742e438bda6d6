"""Random draws as a function of their position (seed, step, stream, purpose). So no RNG state has to be saved, and the
noise is independent of the number of ranks (DESIGN.md, invariant 3)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def generator_at(device: torch.device | str, *position: int | str) -> torch.Generator:
    """A generator seeded by a hash of `position`; the same position gives the same draws, in any process."""
    digest = hashlib.blake2b("/".join(map(str, position)).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)


class StreamRandom:
    """Draws for one micro-batch of `len(streams)` streams with `per_stream` samples each, ordered by stream."""

    def __init__(self, seed: int, step: int, streams: Sequence[int], per_stream: int, device: torch.device) -> None:
        self.seed, self.step, self.streams, self.per_stream, self.device = seed, step, streams, per_stream, device

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal (B, *shape), float32."""
        return self._draw(torch.randn, purpose, shape)

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in [0, 1), (B, *shape), float32."""
        return self._draw(torch.rand, purpose, shape)

    def _draw(self, draw: Callable[..., Tensor], purpose: str, shape: Sequence[int]) -> Tensor:
        return torch.cat(
            [
                draw(
                    (self.per_stream, *shape),
                    generator=generator_at(self.device, self.seed, self.step, stream, purpose),
                    device=self.device,
                )
                for stream in self.streams
            ]
        )
