"""EMA, learning rate and run state, against what they are by hand."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from data_pipeline.common.errors import UserError
from data_pipeline.loading.batch import DataCursor
from train.engine.ema import Ema, gamma_of
from train.engine.optimizer import SCHEDULES, AdamW, Schedule, set_lr
from train.engine.train_state import TrainState, due


def weights_at(n):
    """Two shards as they are after n steps."""
    return [torch.tensor([math.sin(n / 50), n / 1000, 3.0]), torch.tensor([[math.cos(n / 30)]])]


def average(decays, initial, values):
    """sum over n of (1 - d_n) (product of all later d) w_n, and what is left of the start: in float64, all at once."""
    decays = np.array(decays)
    after = np.append(np.cumprod(decays[::-1])[::-1][1:], 1.0)
    return initial * np.prod(decays) + sum(
        (1 - d) * rest * value for d, rest, value in zip(decays, after, values, strict=True)
    )


def test_ema_after_1000_updates_is_the_closed_form():
    ema = Ema(weights_at(0), decay=0.99)
    for n in range(1, 1001):
        ema.update(weights_at(n))
    decays = [min(0.99, (1 + n) / (10 + n)) for n in range(1, 1001)]
    assert decays[0] == pytest.approx(2 / 11)
    assert decays.count(0.99) > 100  # both the ramp and what follows it
    for i, shard in enumerate(ema.shards):
        history = [weights_at(n)[i].double().numpy() for n in range(1001)]
        np.testing.assert_allclose(shard.numpy(), average(decays, history[0], history[1:]), rtol=1e-5, atol=1e-5)


def test_ema_of_constant_weights_is_those_and_is_a_copy():
    weights = [torch.ones(3)]
    ema = Ema(weights, 0.999)
    weights[0].mul_(5)
    assert torch.equal(ema.shards[0], torch.ones(3))
    for _ in range(1000):
        ema.update(weights)
    torch.testing.assert_close(ema.shards[0], torch.full((3,), 5.0))


def test_ema_goes_on_from_what_was_saved_bit_for_bit():
    through, first, second = (Ema(weights_at(n), 0.99, [0.1]) for n in (0, 0, 5))
    for n in range(1, 201):
        through.update(weights_at(n))
        if n <= 80:
            first.update(weights_at(n))
    for kind, shards in first.tensors().items():
        for saved, shard in zip(shards, second.tensors()[kind], strict=True):
            shard.copy_(saved)
    second.load_scalars(first.scalars())
    for n in range(81, 201):
        second.update(weights_at(n))
    assert second.updates == through.updates == 200
    for kind, shards in second.tensors().items():
        assert all(torch.equal(a, b) for a, b in zip(shards, through.tensors()[kind], strict=True))


def test_power_function_average_is_its_definition():
    """Weights of t^gamma over the past (Karras et al. 2024, eq. 1), and a relative width as asked for (eq. 126)."""
    for sigma_rel in (0.05, 0.1, 0.2):
        gamma = gamma_of(sigma_rel)
        assert sigma_rel == pytest.approx((gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5))
        ema = Ema([torch.full((1,), 99.0)], 0.9, [sigma_rel])
        steps = 2000
        for n in range(1, steps + 1):
            ema.update([torch.tensor([n / steps], dtype=torch.float64).float()])
        times = np.arange(1, steps + 1) / steps
        mean = float((times * times**gamma).sum() / (times**gamma).sum())
        assert float(ema.powers[f"ema_{sigma_rel:g}"][0]) == pytest.approx(mean, rel=2e-3)
    for wrong in (0.0, 0.3, -1.0):
        with pytest.raises(UserError, match="is not a valid width of an average"):
            gamma_of(wrong)


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (Schedule("constant"), {0: 1, 999: 1}),
        (Schedule("constant", warmup=10), {0: 0.1, 4: 0.5, 9: 1, 10: 1, 999: 1}),
        (Schedule("cosine", warmup=100), {0: 0.01, 99: 1, 100: 1, 550: 0.5, 325: 0.5 + 0.5**1.5, 1000: 0}),
        (Schedule("linear", warmup=100), {0: 0.01, 100: 1, 550: 0.5, 1000: 0}),
        (Schedule("inverse_sqrt", warmup=10, start=100), {9: 1, 100: 1, 400: 0.5, 900: 1 / 3}),
        (Schedule("linear_tail", warmup=4, tail=0.25), {0: 0.25, 4: 1, 750: 1, 875: 0.5, 999: 0.004}),
    ],
)
def test_schedules_at_their_key_points(schedule, points):
    optimizer = AdamW(2e-4, schedule)
    for step, factor in points.items():
        assert optimizer.lr_at(step, 1000) == pytest.approx(2e-4 * factor, abs=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_never_jump_up_after_the_warm_up_nor_fall_below_0(kind):
    factors = [Schedule(kind, warmup=20).factor(step, 300) for step in range(300)]
    assert all(a < b for a, b in pairwise(factors[:20]))
    assert all(a >= b for a, b in pairwise(factors[20:]))
    assert min(factors) > 0
    assert max(factors) == 1


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UserError, match="kind=triangle is not valid: use one of constant, cosine, linear, linear_tail"):
        Schedule("triangle")


def test_vectors_are_not_decayed_and_frozen_weights_not_trained():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    module[2].requires_grad_(False)
    optimizer = AdamW(0.1, Schedule(), weight_decay=0.5).build(module, torch.device("cpu"))
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    trained = {"0.weight": 0.5, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0}
    assert {name: decayed[id(p)] for name, p in module.named_parameters() if id(p) in decayed} == trained
    set_lr(optimizer.param_groups, 0.01)
    before = module[0].weight.detach().clone()
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(module[0].weight, before * (1 - 0.01 * 0.5))  # decay alone, at the rate just set
    assert torch.equal(module[1].weight, torch.ones(4))


def test_state_counts_and_goes_on_to_its_own_total():
    state = TrainState(3, run_id="abc")
    state.advance(DataCursor(1), 16, applied=True)
    state.advance(DataCursor(2), 16, applied=False)
    assert (state.step, state.applied_steps, state.samples_seen) == (2, 1, 32)
    assert not state.finished
    assert state.cursor == DataCursor(2)
    longer = TrainState(5, run_id="new")
    longer.load_state_dict(state.state_dict())
    assert longer == replace(TrainState(5, 2, 1, 32, "abc"), first_total=3)
    state.advance(DataCursor(3), 16, applied=True)
    assert state.finished


def test_due():
    assert [step for step in range(1, 8) if due(step, 3, 7)] == [3, 6, 7]
    assert [step for step in range(1, 8) if due(step, 3)] == [3, 6]
    assert not any(due(step, None, 7) for step in range(1, 8))
