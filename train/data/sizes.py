"""Sizes to condition on (conditioning=[size]): in training, each sample's own; in sampling, by default their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from data_pipeline.shards.data_sets import DataSets
from data_pipeline.shards.json_fields import FROM_JSON, GEOMETRY, mean_size
from train.data.latent_facts import LatentFacts


def fields_in_json(config: Mapping[str, Any], facts: LatentFacts) -> tuple[str, ...]:
    """The run's conditions that are stored in the latents' jsons only; the loader must read these."""
    return tuple(name for name in config["conditioning"] if name in FROM_JSON and name not in facts.shapes)


def with_mean_size(facts: LatentFacts, data: DataSets) -> LatentFacts:
    """Facts with the shape of sizes and their mean over all samples of all sets, at which sampling draws by default.
    UserError if the samples have no sizes."""
    means = [mean_size(each.root, each.manifest)[0] for each in data]
    mean = np.average(means, axis=0, weights=[each.manifest.samples for each in data]).tolist()
    conditions = {**facts.conditions, "size": {"name": "size", "mean": means[0] if len(means) == 1 else mean}}
    return replace(facts, shapes={**facts.shapes, "size": [2 * len(GEOMETRY)]}, conditions=conditions)


def at_mean_size(samples: Sequence[dict[str, Any]], facts: LatentFacts) -> list[dict[str, Any]]:
    """The samples with the mean size in place of their own; unchanged if there is no mean."""
    mean = facts.conditions.get("size", {}).get("mean")
    return list(samples) if mean is None else [{**s, "size": np.asarray(mean, np.float32)} for s in samples]


def mean_in_words(facts: LatentFacts) -> str:
    """The mean size as text; "" if there is none."""
    mean = facts.conditions.get("size", {}).get("mean")
    if mean is None:
        return ""
    pairs = [f"{a:.6g}x{b:.6g}" for a, b in zip(mean[::2], mean[1::2], strict=True)]
    return f"sizes conditioned on, mean over the training data: original {pairs[0]}, crop {pairs[1]}, target {pairs[2]}"
