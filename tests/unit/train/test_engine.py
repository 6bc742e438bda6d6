"""One step of real DeepSpeed in this process, at every ZeRO stage, against plain torch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from data_pipeline.samples import Batch, DataCursor
from train.engine import Engine, EngineConfig
from train.objectives.terms import LossTerms
from train.optim import AdamW, Schedule
from train.ranks import find_ranks

BATCH = 4


@pytest.fixture(scope="module")
def alone():
    """This process as the only rank."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setenv(name, "")  # so that what find_ranks sets is undone, too
            patch.delenv(name)
        yield find_ranks()
    dist.destroy_process_group()


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, batch):
        error = self.layer(batch.tensors["x"].to(self.layer.weight.dtype)).square()
        return LossTerms(error.mean(), {"loss": error.mean().detach()}, error.detach())


def batches(accumulation, spoiled=()):
    """Random numbers, with an infinite one in the last micro-batch of the steps `spoiled`."""
    generator = torch.Generator().manual_seed(1)
    for step in range(100):
        for part in range(accumulation):
            x = torch.randn(BATCH // accumulation, 3, generator=generator)
            if step in spoiled and part == accumulation - 1:
                x[0, 0] = float("inf")
            yield Batch(("k",) * len(x), ("",) * len(x), {"x": x}, (0,), step, DataCursor(step + 1))


def made(ranks, stage, dtype="fp32", accumulation=1, clipping=1.0):
    torch.manual_seed(0)
    config = EngineConfig(stage, dtype, gradient_clipping=clipping)
    return Engine(Regression(), AdamW(0.1, Schedule()), config, ranks, BATCH, accumulation)


def by_torch(spoiled, steps, clipping):
    """Weights after those steps that are not spoiled, and each one's norm before clipping."""
    torch.manual_seed(0)
    module, norms = Regression(), []
    optimizer = AdamW(0.1, Schedule()).build(module, torch.device("cpu"))
    for step, batch in zip(range(steps), batches(1, spoiled), strict=False):
        if step not in spoiled:
            optimizer.zero_grad()
            module(batch).total.backward()
            norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), clipping or float("inf"))))
            optimizer.step()
    return module.state_dict(), norms


@pytest.mark.parametrize(
    ("stage", "dtype", "accumulation", "clipping"),
    [(0, "fp32", 1, 1.0), (0, "fp32", 2, 0.1), (0, "fp32", 1, 0.0), (1, "fp32", 1, 1.0), (2, "fp32", 2, 1.0),
     (3, "fp32", 1, 1.0), (1, "bf16", 1, 1.0), (2, "bf16", 1, 1.0)],
)  # fmt: skip
def test_a_gradient_that_is_not_finite_is_skipped_and_changes_nothing(alone, stage, dtype, accumulation, clipping):
    engine, spoiled = made(alone, stage, dtype, accumulation, clipping), (1, 3)
    stream, applied, norms = batches(accumulation, spoiled), [], []
    for _ in range(5):
        applied.append(engine.train_step(stream, sum(applied), 5).applied)
        norms.append(engine.gradient_norm())
    assert applied == [True, False, True, False, True]
    weights, expected = by_torch(spoiled, 5, clipping)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == "fp32" else {"rtol": 0.05, "atol": 0.02}
    assert [norms[i] for i in (0, 2, 4)] == pytest.approx(expected, rel=close["rtol"])
    for name, value in engine.full_state_dict().items():
        torch.testing.assert_close(value, weights[name], **close)
