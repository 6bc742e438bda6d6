"""Encodes each different caption of a shard once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from data_pipeline.encode.encoders import TextEncoder, TextStates


class CaptionCache:
    """A text encoder that encodes each different caption of a shard once, when first asked; results are kept on the
    CPU.

    The last bits of a row may depend on the batch that it is encoded in. So batches are the shard's different captions
    in order: the bytes are the same, whoever makes the shard and whatever was made before. `size` > 0 also keeps that
    many captions across shards, and for the same reason encodes one at a time: for data with few captions.
    """

    def __init__(self, encoder: TextEncoder, batch_size: int, size: int = 0) -> None:
        self.encoder, self.fingerprint = encoder, encoder.fingerprint
        self.size, self.batch_size = size, 1 if size else batch_size
        self.batches: dict[str, tuple[str, ...]] = {}
        self.states: OrderedDict[str, tuple[Tensor | None, ...]] = OrderedDict()

    def begin(self, captions: Iterable[str]) -> None:
        """Start the next shard, with its captions in order."""
        if not self.size:
            self.states.clear()
        each = list(dict.fromkeys(captions))
        parts = [tuple(each[first : first + self.batch_size]) for first in range(0, len(each), self.batch_size)]
        self.batches = {caption: part for part in parts for caption in part}

    def encode_text(self, captions: Sequence[str]) -> TextStates:
        """Like TextEncoder; captions that were not given to `begin` are encoded all at once and not kept."""
        if not all(caption in self.batches for caption in captions):
            return self.encoder.encode_text(captions)
        found = [self._states_of(caption) for caption in captions]
        while self.size and len(self.states) > self.size:
            self.states.popitem(last=False)
        return TextStates(*(None if part[0] is None else torch.stack(part) for part in zip(*found, strict=True)))

    def _states_of(self, caption: str) -> tuple[Tensor | None, ...]:
        if caption not in self.states:
            part = self.batches[caption]
            made = self.encoder.encode_text(part)
            lengths = [None] * len(part) if made.lengths is None else made.lengths.cpu()
            self.states |= zip(part, zip(made.tokens.cpu(), made.pooled.cpu(), lengths, strict=True), strict=True)
        self.states.move_to_end(caption)
        return self.states[caption]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)  # encode_image, if the encoder has it
