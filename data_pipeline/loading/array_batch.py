"""A batch's arrays, copied once: from the shards straight into the batch, in the same dtype. Each array is checked: as
its line in the manifest says, and finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from data_pipeline.shards.codec import BFLOAT16, array_header
from data_pipeline.shards.tar_index import IndexEntry

# Each float type: its bits as signed and unsigned integers, and those of infinity; NaNs are above. The top bit is the
# sign.
INFINITY = {
    torch.float16: (torch.int16, np.uint16, 0x7C00),
    torch.bfloat16: (torch.int16, np.uint16, 0x7F80),
    torch.float32: (torch.int32, np.uint32, 0x7F800000),
    torch.float64: (torch.int64, np.uint64, 0x7FF0000000000000),
}
COPIED = {*map(np.dtype, ("f2", "f4", "f8", "u1", "i1", "i2", "i4", "i8")), BFLOAT16}


class Bytes(Protocol):
    """A shard's bytes: mapped, or in a bucket."""

    def __getitem__(self, place: slice) -> bytes | np.ndarray: ...


class ArrayLayout(NamedTuple):
    """What all arrays of a field have in common: the bytes before their values, dtype and shape."""

    header: bytes
    dtype: np.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, data: bytes) -> ArrayLayout | None:
        """The layout of a .npy that can be decoded; None for values that a tensor can't hold as they are stored."""
        shape, fortran_order, dtype, offset = array_header(data)
        plain = dtype in COPIED and dtype.isnative and (not fortran_order or len(shape) < 2)
        return cls(data[:offset], dtype, shape) if plain else None


def stacked(
    members: Sequence[str], layout: ArrayLayout, found: Sequence[tuple[Bytes, IndexEntry]], pinned: bool
) -> Tensor | None:
    """(B, *shape) of one member of each of B samples, each given as its shard's bytes and its entry; None if one of
    them does not match `layout`."""
    values, tensor = empty((len(found), *layout.shape), layout.dtype, pinned)
    begin = len(layout.header)
    row_bytes = math.prod(layout.shape) * layout.dtype.itemsize
    rows = values.reshape(-1).view(np.uint8).reshape(len(found), row_bytes)
    for row, member, (data, entry) in zip(rows, members, found, strict=True):
        offset, size = entry.members.get(member, (0, 0))
        if size != begin + row_bytes or bytes(data[offset : offset + begin]) != layout.header:
            return None
        row[:] = np.frombuffer(data[offset + begin : offset + size], np.uint8)
    return tensor


def empty(shape: Sequence[int], dtype: np.dtype, pinned: bool) -> tuple[np.ndarray, Tensor]:
    """The same memory as array and as tensor. numpy asks for huge pages, which torch does not on a CPU: without them a
    new batch of tens of MB would cost a page fault per 4 KiB, ten times the copying."""
    wide = np.dtype("i2") if dtype == BFLOAT16 else dtype
    if pinned:
        kind = torch.from_numpy(np.empty(0, wide)).dtype
        tensor = torch.empty(tuple(shape), dtype=kind, pin_memory=True)
        values = tensor.numpy()
    else:
        values = np.empty(tuple(shape), wide)
        tensor = torch.from_numpy(values)
    return values, tensor.view(torch.bfloat16) if dtype == BFLOAT16 else tensor


def not_finite(values: Tensor) -> int | None:
    """The first row of (B, ...), contiguous on the CPU, that has an infinity or a NaN; None: no row has.

    Compares bits, of which infinities and NaNs have the largest values: exact, and two maxima where np.isfinite
    converts each half: 5 microseconds in place of 200 for a sample of Stable Diffusion's latents and text.
    """
    if values.dtype not in INFINITY or not values.numel():
        return None
    signed, unsigned, infinity = INFINITY[values.dtype]
    bits = values.view(signed).numpy()
    negative = infinity | 1 << 8 * bits.itemsize - 1
    if bits.max() < infinity and bits.view(unsigned).max() < negative:
        return None
    rows = bits.reshape(len(bits), -1)
    return int(((rows >= infinity) | (rows.view(unsigned) >= negative)).any(1).argmax())
