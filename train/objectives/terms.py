"""The value that an objective returns to the engine."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LossTerms(NamedTuple):
    """`total`: the scalar to minimise; `parts`: named means, detached; `per_sample`: (B,), detached; `t`: (B,) or None.
    `idle`: the prefix of the parameters that keep their values in this step, one of the objective's `players`.

    A tuple, because DeepSpeed's hooks look for tensors in tuples and dictionaries only.
    """

    total: Tensor
    parts: dict[str, Tensor]
    per_sample: Tensor
    t: Tensor | None = None
    idle: str | None = None
