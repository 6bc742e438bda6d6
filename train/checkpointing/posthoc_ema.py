"""An average of any length, rebuilt after training from snapshots of power-function averages (Karras et al. 2024).

An average over t updates with exponent gamma gives the weights after update s the weight
(gamma + 1) s^gamma / t^(gamma + 1). The least-squares projection of the wanted weighting function onto those of the
snapshots gives the coefficients (section 3.2, algorithm 3).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, UserError
from train.checkpointing.files import CheckpointPaths, local_copy
from train.checkpointing.safetensors_io import Header
from train.engine.ema import gamma_of

FARTHEST = 0.25  # largest distance, relative to the norm of the wanted weighting function


class Profile(NamedTuple):
    """An average's weighting function: its number of updates, and its exponent."""

    updates: float
    gamma: float


class Snapshot(NamedTuple):
    """One saved average: its file (local or s3), its kind in that file, its weighting function."""

    path: str
    kind: str
    profile: Profile


def inner_products(a: Sequence[Profile], b: Sequence[Profile]) -> np.ndarray:
    """(len(a), len(b)): integrals of the products of weighting functions; the largest number of updates is time 1."""
    (ta, ga), (tb, gb) = (np.array(profiles, np.float64).T for profiles in (a, b))
    ta, ga, tb, gb = ta[:, None], ga[:, None], tb[None], gb[None]
    scale = max(ta.max(), tb.max())
    ta, tb = ta / scale, tb / scale
    logs = (ga + gb + 1) * np.log(np.minimum(ta, tb)) - (ga + 1) * np.log(ta) - (gb + 1) * np.log(tb)
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * np.exp(logs)


def coefficients(snapshots: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """(len(snapshots),): the coefficients of the best approximation to the wanted average; UserError if it is poor.

    They are constrained to sum to 1, unlike in the paper: otherwise all weights would be scaled.
    """
    products = inner_products([*snapshots, wanted], [*snapshots, wanted])
    gram, toward, whole = products[:-1, :-1], products[:-1, -1], products[-1, -1]
    ones = np.ones((len(snapshots), 1))
    system = np.block([[gram, ones], [ones.T, np.zeros((1, 1))]])
    shares = np.linalg.lstsq(system, np.append(toward, 1.0), rcond=1e-12)[0][:-1]
    distance = (shares @ gram @ shares - 2 * shares @ toward + whole) / whole
    if distance > FARTHEST**2:
        raise UserError(
            f"this average can't be built from the snapshots (the nearest is {100 * distance**0.5:.0f} % away): use a "
            "sigma_rel nearer to those of training.power_ema, or the updates= of a snapshot."
        )
    return shares


def find_snapshots(run: Path) -> list[Snapshot]:
    """All snapshots of a run; UserError if there are none."""
    found = []
    root = CheckpointPaths.of_run(run).snapshots
    for name in storage.files(root, ".safetensors"):
        path = storage.join(root, name)
        facts = Header.of(path).metadata
        try:
            updates = float(facts["updates"])
            widths = {kind: float(kind.removeprefix("ema_")) for kind in facts["kinds"].split(",")}
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not a snapshot of EMA weights: copy it again, or move it away.") from error
        found += [Snapshot(path, kind, Profile(updates, gamma_of(width))) for kind, width in widths.items()]
    if not found:
        raise UserError(f"{run} has no snapshots of power-function averages: train with training.power_ema=[0.05,0.1].")
    return found


def rebuilt(snapshots: Sequence[Snapshot], wanted: Profile) -> dict[str, Tensor]:
    """The wanted average's weights by name, one parameter at a time, in float64. A file in a bucket is downloaded
    only while it is read; DataError if one is damaged."""
    shares = coefficients([snapshot.profile for snapshot in snapshots], wanted)
    total: dict[str, Tensor] = {}
    by_file = groupby(zip(snapshots, shares, strict=True), key=lambda one: one[0].path)
    for path, kept in by_file:
        with _opened(path) as file:
            keys = list(file.keys())
            for prefix, share in [(f"{snapshot.kind}/", float(share)) for snapshot, share in kept]:
                for key in (key for key in keys if key.startswith(prefix)):
                    term = file.get_tensor(key).double() * share
                    name = key.removeprefix(prefix)
                    total[name] = total[name] + term if name in total else term
    return {name: value.to(torch.float32) for name, value in total.items()}


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """A snapshot file, checked against the digest beside it; snapshots of older runs have no digest."""
    note = storage.read_if_there(f"{path.removesuffix('.safetensors')}.json")
    with local_copy(path, json.loads(note) if note else None) as file:
        if file is None:
            raise DataError(f"{path} is damaged: copy it again, or move it away to do without it.")
        with safe_open(file, "pt") as opened:
            yield opened
