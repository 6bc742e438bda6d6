"""What the order promises: once an epoch, the same at any number of ranks, and seeking is starting."""

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from data_pipeline.common.errors import DataError, UserError
from data_pipeline.loading.epoch_plan import EpochPlan

SIZES = [7, 1, 13, 5, 5, 9, 3, 11]  # 54 samples


def plan(streams=4, batch=8, seed=3, sizes=SIZES, **how):
    return EpochPlan(sizes, seed, batch, streams, **how)


def stream_places(a_plan, stream, epoch):
    return [a_plan.at(stream, i) for i in range(*(a_plan.stream_start(stream, e) for e in (epoch, epoch + 1)))]


@pytest.mark.parametrize("streams", [1, 2, 3, 4, 8, 16, 54, 55, 200])  # the last two: more than there are samples
@pytest.mark.parametrize("how", [{"shuffle": False}, {"overlap": False}, {}, {"window_shards": 1}])
def test_each_sample_once_an_epoch(streams, how):
    ours = plan(streams, streams, **how)
    everything = {(shard, i) for shard, size in enumerate(SIZES) for i in range(size)}
    for epoch in range(min(2 * streams, 16)):
        places = [place for stream in range(streams) for place in stream_places(ours, stream, epoch)]
        assert len(places) == len(everything)
        assert set(places) == everything


@pytest.mark.parametrize("streams", [1, 3, 4])
def test_what_an_epoch_leaves_is_in_the_next_batch(streams):
    """54 samples, 12 a step: after 9 steps, two epochs, each sample has come exactly twice, wherever batches ended."""
    ours = plan(streams, 12)
    steps = Counter(place for step in range(9) for place in ours.step(step))
    assert set(steps.values()) == {2}
    assert len(steps) == 54
    starts = [ours.stream_start(stream, 2) for stream in range(streams)]
    assert sum(starts) == 108
    assert max(starts) - min(starts) <= 1  # streams never drift apart


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_one_global_batch(ranks):
    whole = plan()
    for step in (0, 6, 7, 50):
        shares = [plan().step(step, range(r * 4 // ranks, (r + 1) * 4 // ranks)) for r in range(ranks)]
        assert [place for share in shares for place in share] == whole.step(step)


def test_seeking_is_starting():
    walked = plan()
    steps = [walked.step(step) for step in range(60)]
    for step in (59, 0, 31, 30):
        assert plan().step(step) == steps[step]
        assert walked.step(step) == steps[step]  # backwards too


def test_seed_and_epoch_change_the_order():
    assert plan(seed=1).step(0) != plan(seed=2).step(0)
    ours = plan()
    assert stream_places(ours, 0, 0) != stream_places(ours, 0, 1)
    alone = plan(streams=1, window_shards=1)
    shard_orders = [list(dict.fromkeys(shard for shard, _ in stream_places(alone, 0, epoch))) for epoch in (0, 1)]
    assert shard_orders[0] != shard_orders[1]
    assert plan(streams=1, shuffle=False).step(0) == [(0, i) for i in range(7)] + [(1, 0)]


def test_a_window_mixes_its_shards_and_no_others():
    ours = plan(streams=1, batch=1, sizes=[10] * 12, window_shards=3, overlap=False)
    windows = [{ours.at(0, i).shard for i in range(first, first + 30)} for first in range(0, 120, 30)]
    assert [len(window) for window in windows] == [3, 3, 3, 3]
    assert len({ours.at(0, i).shard for i in range(8)}) > 1
    assert ours.shards_in_use() == windows[0]
    assert ours.shards_next() == windows[1]


def test_windows_overlap_and_few_shards_are_one_window():
    """Piles of 30 samples; windows end in the middles of the inner piles, at 45 and 75: each shares a pile's shards."""
    ours = plan(streams=1, batch=1, sizes=[10] * 12, window_shards=3)
    borders = [0, 45, 75, 120]
    windows = []
    following = set()
    for first, end in itertools.pairwise(borders):
        windows.append({ours.at(0, i).shard for i in range(first, end)})
        assert ours.shards_in_use() == windows[-1]
        assert not following or windows[-1] <= following
        following = ours.shards_next()
    assert windows[0] & windows[1]
    assert windows[1] & windows[2]
    assert not windows[0] & windows[2]
    small = {"streams": 1, "batch": 1, "sizes": [10] * 3}
    assert plan(**small).step(7) == plan(**small, overlap=False).step(7)


def test_positions_of_two_epochs_are_not_correlated():
    """Spearman's rank correlation of when each sample comes; a neighbour in its shard comes close, but anywhere."""
    ours = plan(streams=4, batch=4, sizes=[20] * 500)
    when = []
    for epoch in range(3):
        firsts = [ours.stream_start(stream, epoch) for stream in range(4)]
        places = {place: i for s in range(4) for i, place in enumerate(ours.span(s, firsts[s], 2500))}
        when.append(np.argsort(np.argsort([places[s, i] for s in range(500) for i in range(20)], kind="stable")))
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert abs(np.corrcoef(when[one], when[other])[0, 1]) < 0.15  # 500 shards: a standard deviation is 0.045
    in_order = np.arange(10_000)
    assert abs(np.corrcoef(in_order, when[0])[0, 1]) < 0.15


def test_a_hundred_thousand_shards_take_little_memory():
    tracemalloc.start()
    ours = plan(streams=64, batch=2048, sizes=[1000] * 100_000)
    far = ours.step(1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(far)) == 2048
    assert peak < 100 * 2**20  # 1e8 samples would be 800 MB for one number each
    assert plan(streams=64, batch=2048, sizes=[1000] * 100_000).step(1_000_000, [63]) == far[-32:]


def test_a_thousand_streams_work_no_more_than_their_windows(monkeypatch):
    """Far into 10^8 samples, a step of all streams makes each stream's window once and each epoch's order once."""
    made = {"_make_epoch": 0, "_make_window": 0}

    def counted(name, make):
        def count(self, *place):
            made[name] += 1
            return make(self, *place)

        return count

    for name in made:
        monkeypatch.setattr(EpochPlan, name, counted(name, getattr(EpochPlan, name)))
    ours = plan(streams=1024, batch=8192, sizes=[1000] * 100_000)
    ours.step(1_000_000)
    ours.step(1_000_001)
    assert made["_make_window"] <= 2 * 1024
    assert made["_make_epoch"] <= 2


def test_where_extras_go_is_counted_as_by_going_through_all_streams():
    for streams in (1, 3, 7, 16):
        ours = plan(streams, streams)
        for epoch in range(2 * streams):
            sizes = [ours.stream_start(s, epoch + 1) - ours.stream_start(s, epoch) for s in range(streams)]
            ends = np.cumsum(sizes)
            assert [ours._segment(s, epoch) for s in range(streams)] == list(zip(ends - sizes, ends, strict=True))


def test_empty_shards_and_an_empty_set():
    ours = plan(2, 4, sizes=[0, 3, 0, 0, 4, 0], window_shards=1)
    for epoch in range(4):
        assert sorted(p for s in range(2) for p in stream_places(ours, s, epoch)) == [
            (1, 0), (1, 1), (1, 2), (4, 0), (4, 1), (4, 2), (4, 3),
        ]  # fmt: skip
    for sizes in ([], [0], [0, 0]):
        with pytest.raises(DataError, match="has no samples"):
            plan(1, 4, sizes=sizes)


@pytest.mark.parametrize(("streams", "batch"), [(3, 8), (0, 8)])
def test_what_can_not_be_dealt_is_refused(streams, batch):
    with pytest.raises(UserError, match=r"data\.streams"):
        plan(streams, batch)
