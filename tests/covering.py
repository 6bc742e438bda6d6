"""Products of options: a choice of them in which every two values meet, and the rest for `make test-all`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def covering(*options: Iterable[Any]) -> list[Any]:
    """All combinations, for parametrize. A choice in which every two values meet is kept; the others are `exhaustive`.

    The choice is always the same. covering(a, b) keeps all, as each pair is one combination.
    """
    numbered = [list(enumerate(values)) for values in options]
    combinations = [tuple(zip(*each, strict=True)) for each in itertools.product(*numbered)]  # (places, values)
    kept = _chosen([places for places, _ in combinations])
    return [
        pytest.param(*values, marks=() if places in kept else pytest.mark.exhaustive) for places, values in combinations
    ]


def _chosen(product: list[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Combinations in which every pair of places occurs: each time the first that brings most of the rest."""
    to_come = set().union(*map(_pairs, product))
    chosen = set()
    while to_come:
        best = max(product, key=lambda places: len(_pairs(places) & to_come))
        chosen.add(best)
        to_come -= _pairs(best)
    return chosen


def _pairs(places: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    """((option, value), (option, value)) of every two options; of a single option its value."""
    return set(itertools.combinations(enumerate(places), min(2, len(places))))
