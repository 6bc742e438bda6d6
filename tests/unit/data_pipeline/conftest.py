"""Small real data sets."""

import numpy as np
import pytest

from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import ShardWriter


@pytest.fixture
def picture():
    """picture(number): noise that only this number gives, (size, size, 3) uint8."""

    def make(number, size=8):
        return np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)

    return make


@pytest.fixture
def make_images(picture):
    """make_images(root, sizes): an image-text data set whose captions repeat every five samples."""

    def make(root, sizes, size=8):
        shards, number = [], 0
        for i, count in enumerate(sizes):
            writer = ShardWriter()
            for _ in range(count):
                members = {"png": picture(number, size), "txt": f"thing {number % 5}", "json": {"number": number}}
                writer.add(f"key{number:04d}", members)
                number += 1
            shards.append(writer.publish(root, f"shards/{i:06d}.tar"))
        Manifest("image-text", tuple(shards), {}, {"size": size}).save(root)
        return str(root)

    return make
