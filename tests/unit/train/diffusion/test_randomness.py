"""Draws are functions of seed, step, stream and purpose, and of nothing else."""

import hashlib

import torch

from train.diffusion.randomness import StreamRandom, generator_at

CPU = torch.device("cpu")


def draw(seed=0, step=0, streams=(0, 1, 2, 3), per_stream=3, purpose="noise"):
    return StreamRandom(seed, step, streams, per_stream, CPU).normal(purpose, (4, 5))


def test_a_stream_draws_the_same_in_any_company():
    whole = draw()
    assert whole.shape == (12, 4, 5)
    for stream in range(4):
        assert torch.equal(draw(streams=(stream,)), whole[3 * stream : 3 * stream + 3])
    assert torch.equal(draw(streams=(3, 1)), torch.cat([whole[9:], whole[3:6]]))


def test_every_coordinate_matters():
    draws = [draw(), draw(seed=1), draw(step=1), draw(streams=(4, 5, 6, 7)), draw(purpose="posterior"), draw(seed=10)]
    flat = torch.stack([d.flatten() for d in draws])
    correlations = torch.corrcoef(flat) - torch.eye(len(draws))
    assert correlations.abs().max() < 0.3  # 240 values each: 0.3 is 4.6 standard deviations
    # Coordinates don't run into one another.
    assert generator_at(CPU, 1, 23).initial_seed() != generator_at(CPU, 12, 3).initial_seed()


def test_order_of_use_and_the_global_seed_do_not_matter():
    random = StreamRandom(0, 0, (0,), 3, CPU)
    first = random.uniform("time"), random.normal("noise", (2,))
    torch.manual_seed(1234)
    torch.rand(7)
    again = random.normal("noise", (2,)), random.uniform("time")
    assert torch.equal(first[0], again[1])
    assert torch.equal(first[1], again[0])


def test_a_position_has_the_same_seed_in_every_process():
    digest = hashlib.blake2b(b"7/3/start", digest_size=8).digest()  # not Python's hash(), which differs by process
    assert generator_at("cpu", 7, 3, "start").initial_seed() == int.from_bytes(digest, "little") // 2


def test_distributions():
    random = StreamRandom(0, 0, tuple(range(64)), 64, CPU)
    normal, uniform = random.normal("noise", (16,)), random.uniform("time")
    assert abs(float(normal.mean())) < 0.02
    assert abs(float(normal.std()) - 1) < 0.02
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    assert torch.histc(uniform, 8, 0, 1).min() > 4096 / 8 * 0.8
