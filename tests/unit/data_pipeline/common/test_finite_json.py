"""Reports and members of shards are JSON that every reader takes."""

from __future__ import annotations

import json
import math

import numpy as np

from data_pipeline.common.finite_json import json_of
from data_pipeline.shards.codec import decode, encode

ROW = {"a": math.nan, "b": [1.5, -math.inf], "c": {"d": (np.float64("inf"), 2)}, "e": "nan", "f": True, "g": None}


def strict(content: bytes) -> object:
    """Parsed without Python's own NaN and Infinity."""
    return json.loads(content, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))


def test_what_is_not_finite_is_null() -> None:
    expected = {"a": None, "b": [1.5, None], "c": {"d": [None, 2]}, "e": "nan", "f": True, "g": None}
    assert strict(json_of(ROW)) == expected
    assert strict(encode("json", ROW)) == decode("json", encode("json", ROW)) == expected
