"""What is planned is what is then written."""

import numpy as np
import pytest

from data_pipeline.plan_storage import Shapes, array_bytes, member_sum, plan
from data_pipeline.shard_writer import ShardWriter


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("samples", "shard_size"), [(300, 100), (64, 64)])
def test_bytes_are_those_that_are_written(tmp_path, dtype, samples, shard_size):
    shapes = Shapes("moments", (8, 16, 16), (16, 48), (48,))
    written = 0
    for first in range(0, samples, shard_size):
        writer = ShardWriter()
        for i in range(first, first + shard_size):
            arrays = {"moments": shapes.latents, "text": shapes.text, "pooled": shapes.pooled}
            members = {f"{name}.npy": np.zeros(shape, dtype) for name, shape in arrays.items()}
            writer.add(f"{i:06d}", {**members, "json": {"caption": "a red heart", "group": "hearts"}})
        written += writer.publish(tmp_path, f"shards/{first:06d}.tar").bytes
    line = plan(shapes, samples, shard_size, dtype, 1.0, 1000.0)[1]
    assert line.bytes == pytest.approx(written, rel=0.02)


def test_sizes_by_hand():
    assert array_bytes((8, 64, 64), "float16") == 128 + 8 * 64 * 64 * 2
    assert array_bytes((32, 32), "int32") == 128 + 4 * 1024
    assert member_sum([1, 512, 513]) == 3 * 512 + 512 + 512 + 1024


def test_text_stored_once_a_caption_costs_as_many_times_less():
    shapes = Shapes("moments", (8, 64, 64), (77, 768), (768,))
    each, once, online = (line.bytes_per_sample for line in plan(shapes, 10**6, 1000, "float16", 5.0, 1000.0)[1:])
    assert once - online == pytest.approx((each - online) / 5)
