"""Which keys were seen before, for more samples than a set of strings could hold."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


class KnownKeys:
    """The keys seen so far: 8 bytes a key, in sorted runs of doubling length. A 64-bit hash stands for a key: among
    10^8 keys, the chance that two different ones are taken for the same is 1 in 4,000."""

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def contains(self, keys: Sequence[str]) -> np.ndarray:
        """Which of the keys were seen before, or earlier in the same list; all count as seen from now on."""
        digests = b"".join(
            hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in keys
        )
        numbers = np.frombuffer(digests, np.uint64)
        firsts = np.unique(numbers, return_index=True)[1]
        known = np.ones(len(numbers), bool)
        known[firsts] = False
        for run in self.runs:
            known |= run[np.searchsorted(run, numbers).clip(max=len(run) - 1)] == numbers
        unique = np.unique(numbers[~known])
        while self.runs and len(self.runs[-1]) <= len(unique):
            unique = np.union1d(unique, self.runs.pop())
        if len(unique):
            self.runs.append(unique)
        return known
