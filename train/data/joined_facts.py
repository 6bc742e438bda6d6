"""Facts on the latents of several data sets that are trained on together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data_pipeline.shards.data_sets import BUCKETS, DataSets
from train.data.latent_facts import LatentFacts
from train.models.latents import OneFactor


def facts_of(data: DataSets, fold: int, scaling: OneFactor | None = None) -> LatentFacts:
    """Facts on one data set, or on several as one. Mean and standard deviation are those of all samples together, as
    precompute would have measured them, independent of the weights of a mix; shapes are those of the set with the most
    samples, and `buckets` has those of each bucket; fingerprints are those that all sets share."""
    each = [LatentFacts.of(one.root, one.manifest, fold, scaling) for one in data]
    sizes = [one.manifest.samples for one in data]
    largest = each[max(range(len(sizes)), key=sizes.__getitem__)]
    mean, std = pooled(each, [n * np.prod(facts.latent_shape[1:]) for n, facts in zip(sizes, each, strict=True)])
    return replace(
        largest,
        mean=mean,
        std=std,
        fingerprints={
            name: mark
            for name, mark in largest.fingerprints.items()
            if all(facts.fingerprints.get(name) == mark for facts in each)
        },
        buckets={one.name: facts.shapes for one, facts in zip(data, each, strict=True)}
        if data.layout == BUCKETS
        else {},
    )


def pooled(each: Sequence[LatentFacts], counts: Sequence[float]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of sets pooled with the numbers of values `counts`. Exactly those of each
    set if all are equal, as in buckets, for which precompute measures all together."""
    if all((facts.mean, facts.std) == (each[0].mean, each[0].std) for facts in each):
        return each[0].mean, each[0].std
    means, stds = (np.array([getattr(facts, name) for facts in each]) for name in ("mean", "std"))
    mean = np.average(means, axis=0, weights=counts)
    variance = np.average(stds**2 + means**2, axis=0, weights=counts) - mean**2
    return mean.tolist(), np.sqrt(variance).tolist()
