"""Pairwise test parameters: combinations that cover every pair of values; the rest run in `make test-all`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def covering(*options: Iterable[Any]) -> list[Any]:
    """All combinations, for parametrize. A subset that covers every pair of values is kept; others are `exhaustive`.

    The subset is always the same. covering(a, b) keeps all, as each pair is one combination.
    """
    numbered = [list(enumerate(values)) for values in options]
    combinations = [tuple(zip(*each, strict=True)) for each in itertools.product(*numbered)]  # (places, values)
    kept = _chosen([places for places, _ in combinations])
    return [
        pytest.param(*values, marks=() if places in kept else pytest.mark.exhaustive) for places, values in combinations
    ]


def _chosen(product: list[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Combinations that cover every pair of places: greedily the first that covers most of the remaining pairs."""
    to_come = set().union(*map(_pairs, product))
    chosen = set()
    while to_come:
        best = max(product, key=lambda places: len(_pairs(places) & to_come))
        chosen.add(best)
        to_come -= _pairs(best)
    return chosen


def _pairs(places: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    """((option, value), (option, value)) for each pair of options; for a single option, its value."""
    return set(itertools.combinations(enumerate(places), min(2, len(places))))
