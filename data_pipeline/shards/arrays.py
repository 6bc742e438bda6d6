"""The dtypes that arrays are stored in, what the manifest says of them, and which values are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.common.errors import DataError
from data_pipeline.shards.codec import BFLOAT16, ArrayHeader, widened

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LARGEST = 1e6  # far above the moments of any first stage and the states of any encoder


def as_stored(value: Tensor, dtype: str) -> np.ndarray:
    """Floats in `dtype` (too large: infinite), integers in 32 bits. numpy has no bfloat16: see codec.BFLOAT16."""
    if not value.is_floating_point():
        return value.to(torch.int32).cpu().numpy()
    value = value.to(DTYPES[dtype]).contiguous().cpu()
    if dtype == "bfloat16":
        return value.view(torch.int16).numpy().view(BFLOAT16)
    return value.numpy()


def readable(stored: np.ndarray) -> np.ndarray:
    """The values in a dtype that numpy can compute with."""
    return widened(stored) if stored.dtype == BFLOAT16 else stored


def narrowed(value: np.ndarray, dtype: str) -> np.ndarray:
    """Values read from a data set of that dtype, as they are stored there: the exact inverse of `readable`."""
    if dtype != "bfloat16" or value.dtype != np.float32:
        return value
    return (value.view(np.uint32) >> 16).astype(np.uint16).view(BFLOAT16)


def described(stored: np.ndarray) -> dict[str, Any]:
    """A field's line in the manifest, from its values (B, ...)."""
    name = "bfloat16" if stored.dtype == BFLOAT16 else stored.dtype.name
    return {"dtype": name, "shape": list(stored.shape[1:])}


def unusable(stored: Mapping[str, np.ndarray], codes: int | None, dtype: str) -> Iterator[tuple[int, str]]:
    """(row, reason) of samples whose values can't be trained on, each row once. codes: the size of the codebook."""
    named: dict[int, str] = {}
    for name, values in stored.items():
        axes = tuple(range(1, values.ndim))
        if values.dtype.kind == "i":
            is_codes = codes is not None and name.startswith("indices")
            bad = ((values < 0) | (values >= codes)).any(axes) if is_codes else np.zeros(len(values), bool)
            reasons = [(bad, f"{name} has codes that are not in the codebook")]
        else:
            numbers = readable(values)
            finite = np.isfinite(numbers).all(axes)
            remedy = "" if dtype == "float32" else ": use dtype=float32"
            large = (np.abs(numbers) > LARGEST).any(axes) if numbers.dtype == np.float32 else ~finite
            reasons = [
                (~finite, f"{name} is not finite in {dtype}{remedy}"),
                (large, f"{name} has values beyond {LARGEST:g}"),
            ]
        for bad, reason in reasons:
            for row in np.flatnonzero(bad):
                named.setdefault(int(row), reason)
    yield from sorted(named.items())


def dtype_named(name: str) -> np.dtype:
    """The dtype of a field's line in a manifest."""
    try:
        return BFLOAT16 if name == "bfloat16" else np.dtype(name)
    except TypeError as error:
        raise DataError(f"the manifest names a dtype {name}, which does not exist: make the data set again") from error


def differing(name: str, header: ArrayHeader, field: Mapping[str, Any]) -> Iterator[str]:
    """How a .npy's header differs from its line in the manifest, apart from byte order. A line without dtype or shape
    allows any numbers of any shape."""
    actual, claimed = header.dtype.newbyteorder("="), field.get("dtype")
    if claimed and actual != dtype_named(claimed):
        yield f"{name} is {actual.str}, not {dtype_named(claimed).str} as the manifest says"
    elif actual.kind not in "fiub" and actual != BFLOAT16:
        yield f"{name} is {actual.str}, which is not numeric"
    if list(header.shape) != list(field.get("shape", header.shape)):
        yield f"{name} has shape {list(header.shape)}, not {field['shape']} as the manifest says"
