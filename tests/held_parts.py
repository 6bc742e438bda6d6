"""Parts for entries that hold their third call: until the pipe at $HOLD, if there is one, has lost its writer."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from torch import Tensor

from train.models.autoencoder import Identity

CALLS = itertools.count(1)


def hold() -> None:
    if next(CALLS) == 3 and "HOLD" in os.environ:
        Path(os.environ["HOLD"]).read_bytes()


def times(u: Tensor) -> Tensor:
    """Uniform timesteps."""
    hold()
    return u


class Pixels(Identity):
    """No first stage."""

    def encode_stored(self, images: Tensor) -> Tensor:
        hold()
        return images
