"""Sizes to condition on (conditioning=[size]): in training, each sample's own; in sampling, by default their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from data_pipeline.shards.data_sets import BUCKETS, DataSets
from data_pipeline.shards.json_fields import FROM_JSON, GEOMETRY, mean_size
from train.data.latent_facts import LatentFacts


def fields_in_json(config: Mapping[str, Any], facts: LatentFacts) -> tuple[str, ...]:
    """The run's conditions that are stored in the latents' jsons only; the loader must read these."""
    return tuple(name for name in config["conditioning"] if name in FROM_JSON and name not in facts.shapes)


def with_mean_size(facts: LatentFacts, data: DataSets) -> LatentFacts:
    """Facts with the shape of sizes and the mean size at which sampling draws by default: over all samples of all sets,
    or of each bucket, and by default that of the bucket with the most samples. UserError if the samples have no
    sizes."""
    counts = [each.manifest.samples for each in data]
    means = {each.name: mean_size(each.root, each.manifest)[0] for each in data}
    if data.layout == BUCKETS:
        mean = list(means.values())[max(range(len(counts)), key=counts.__getitem__)]
    else:
        mean = np.average(list(means.values()), axis=0, weights=counts).tolist() if len(data) > 1 else means[""]
    shape = {"size": [2 * len(GEOMETRY)]}
    buckets = {name: {**shapes, **shape} for name, shapes in facts.buckets.items()}
    of_buckets = means if data.layout == BUCKETS else {}
    facts = replace(facts, shapes={**facts.shapes, **shape}, buckets=buckets, bucket_sizes=of_buckets)
    return facts.with_mean_size(mean)


def at_mean_size(samples: Sequence[dict[str, Any]], facts: LatentFacts) -> list[dict[str, Any]]:
    """The samples with the mean size in place of their own; unchanged if there is no mean."""
    mean = facts.conditions.get("size", {}).get("mean")
    return list(samples) if mean is None else [{**s, "size": np.asarray(mean, np.float32)} for s in samples]


def mean_in_words(facts: LatentFacts) -> str:
    """The mean size as text, one line per bucket; "" if there is none."""
    whole = {"over the training data": facts.conditions["size"]["mean"]} if "size" in facts.conditions else {}
    means = {f"of bucket {name}": mean for name, mean in facts.bucket_sizes.items()} or whole
    return "\n".join(_line(of, mean) for of, mean in means.items())


def _line(of: str, mean: Sequence[float]) -> str:
    pairs = [f"{a:.6g}x{b:.6g}" for a, b in zip(mean[::2], mean[1::2], strict=True)]
    return f"sizes conditioned on, mean {of}: original {pairs[0]}, crop {pairs[1]}, target {pairs[2]}"
