"""What a mix and buckets promise: exact parts, each sample once per epoch of its set, and seeking is starting."""

import copy
import itertools
import pickle
import random
from collections import Counter

import pytest

from data_pipeline.loading.bucket_plan import BucketPlan, Turns
from data_pipeline.loading.epoch_plan import EpochPlan
from data_pipeline.loading.mix_plan import MixPlan, Shares

SETS = [[7, 1, 13, 5], [9, 0, 3], [2, 1]]  # shards of three sets with 26, 12 and 3 samples
STARTS = [0, 4, 7]
SHARES = [5, 3, 1]


def plans(streams=4, batch=8, seed=3):
    return [EpochPlan(sizes, seed + i, batch, streams, window_shards=2) for i, sizes in enumerate(SETS)]


def mix(streams=4, batch=8, seed=3):
    return MixPlan(plans(streams, batch, seed), STARTS, SHARES, seed)


def buckets(streams=4, batch=8, seed=3):
    return BucketPlan(plans(streams, batch, seed), STARTS, seed)


def set_of(place):
    return sum(place.shard >= start for start in STARTS) - 1


def some_shares(rng, most):
    """Alike, or of very different size."""
    kind = rng.random()
    if kind < 0.2:
        return [1] * rng.randint(2, most)
    return [rng.randint(1, 9 if kind < 0.5 else 10 ** rng.randint(1, 7)) for _ in range(rng.randint(2, most))]


@pytest.mark.parametrize("cases", [40, pytest.param(1500, marks=pytest.mark.exhaustive)])
def test_a_mix_is_within_a_batch_of_its_weights_after_any_prefix(cases):
    """By walking through it, and far on by its formula; the two agree."""
    rng = random.Random(1)
    for case in range(cases):
        streams, shares = rng.choice([2, 4, 8, 24, 64]), some_shares(rng, 10)
        ours, total = Shares(shares, streams, case), sum(shares)
        walked = [[0] * len(shares) for _ in range(streams)]
        for position in range(1, 30):
            for stream, counts in enumerate(walked):
                which, before = ours.at(stream, position - 1)
                assert before == counts[which]
                counts[which] += 1
            off = [sum(counts) * total - position * streams * share for counts, share in zip(zip(*walked), shares)]  # noqa: B905
            assert max(map(abs, off)) <= streams * total
        assert walked == [ours.counts(stream, 29) for stream in range(streams)]
        far = rng.randint(10**4, 10**9)
        sums = [sum(counts) for counts in zip(*(ours.counts(s, far) for s in range(streams)), strict=True)]
        assert sum(sums) == far * streams
        assert max(abs(n * total - far * streams * w) for n, w in zip(sums, shares, strict=True)) <= streams * total


@pytest.mark.parametrize("cases", [40, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_buckets_are_within_a_step_of_their_sizes_after_any_prefix(cases):
    rng = random.Random(2)
    for case in range(cases):
        shares = some_shares(rng, 16)
        turns, total, counts = Turns(shares, case), sum(shares), [0] * len(shares)
        for turn in range(1, 300):
            which, before = turns.at(turn - 1)
            assert before == counts[which]
            counts[which] += 1
            assert all(abs(n * total - turn * w) < total for n, w in zip(counts, shares, strict=True))
        assert turns.counts(299) == counts
        assert Turns(shares, case).at(250) == turns.at(250)


@pytest.mark.parametrize("make", [mix, buckets])
def test_each_sample_once_per_epoch_of_its_set(make):
    """Also of the set that has fewer samples than there are streams, and less than a batch."""
    ours, came = make(), [[[] for _ in range(4)] for _ in SETS]
    for step in range(400):
        for i, place in enumerate(ours.step(step)):
            came[set_of(place)][i // 2].append(place)
    for which, (sizes, of_streams) in enumerate(zip(SETS, came, strict=True)):
        plan, everything = plans()[which], sum(sizes)
        for epoch in range(3):
            spans = [(plan.stream_start(s, epoch), plan.stream_start(s, epoch + 1)) for s in range(4)]
            seen = Counter(p for taken, span in zip(of_streams, spans, strict=True) for p in taken[slice(*span)])
            assert set(seen.values()) == {1}
            assert len(seen) == everything


@pytest.mark.parametrize("make", [mix, buckets])
def test_seeking_is_starting_and_copies_are_whole(make):
    walked = make()
    steps = [walked.step(step) for step in range(150)]
    for step in (149, 0, 77, 76):
        assert make().step(step) == steps[step]
        assert walked.step(step) == steps[step]
    for other in (copy.deepcopy(walked), pickle.loads(pickle.dumps(walked))):
        assert other.windows_made == 0
        assert other.step(33) == steps[33]
    assert make(seed=4).step(0) != steps[0]


@pytest.mark.parametrize("make", [mix, buckets])
def test_ranks_share_one_global_batch_and_its_shards_are_in_use(make):
    whole = make()
    for step in (0, 6, 7, 50):
        shares = [make().step(step, range(r, r + 1)) for r in range(4)]
        assert list(itertools.chain(*shares)) == whole.step(step)
        shards = {place.shard for place in whole.step(step)}
        assert shards <= whole.shards_in_use()
        for place in whole.step(step):
            assert any(first <= place.sample < end for first, end in whole.pieces(place.shard))


def test_a_step_of_buckets_takes_one_and_epochs_are_counted():
    ours = buckets()
    taken = Counter()
    for step in range(100):
        places = ours.step(step)
        assert {set_of(place) for place in places} == {ours.set_of(step)}
        taken[ours.set_of(step)] += len(places)
    assert ours.epochs(100) == [taken[i] / sum(sizes) for i, sizes in enumerate(SETS)]
    of_mix, taken = mix(), Counter()
    for step in range(100):
        taken.update(set_of(place) for place in of_mix.step(step))
    assert of_mix.epochs(100) == [taken[i] / sum(sizes) for i, sizes in enumerate(SETS)]
