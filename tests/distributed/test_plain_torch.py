"""Steps of the engine on 1, 2 and 4 ranks, in every configuration, against plain torch in one process.

What plain torch trains is spelled out here: the draws by their place in the run, and the loss. A launch of each number
of ranks goes through its configurations. `make test` has each stage with and without accumulation, clipping and other
ranks, and each two of these together; the others are exhaustive.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from engine_steps import BATCH, CONFIGURATIONS, DROPOUT, OPTIMIZER, SEED, STEPS, STREAMS, Configuration, network
from loaders import loader_of
from safetensors import safe_open
from synthetic import TINY_LATENTS, run, write_latents
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.loading.batch import Batch
from train.diffusion.randomness import generator_at

pytestmark = pytest.mark.processes

CLIPPINGS = sorted({how.clipping for how in CONFIGURATIONS})


def is_covering(ranks: int, how: Configuration) -> bool:
    """Whether `make test` has it, too."""
    both = how.accumulation > 1 and how.clipping > 0
    neither = how.accumulation == 1 and not how.clipping
    return {1: both or neither, 2: not (both or neither), 4: False}[ranks]


class Trained(NamedTuple):
    """Weights by name, and of each step the loss and the gradient's norm."""

    weights: dict[str, Tensor]
    losses: list[float]
    norms: list[float]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("latents")
    write_latents(root, 96, TINY_LATENTS)
    return root


def drawn(batch: Batch, purpose: str, *shape: int) -> Tensor:
    """Of each stream by itself, stream after stream: normal where there is a shape, else uniform."""
    draw, each = (torch.randn if shape else torch.rand), BATCH // STREAMS
    made = [draw((each, *shape), generator=generator_at("cpu", SEED, batch.step, s, purpose)) for s in range(STREAMS)]
    return torch.cat(made)


def loss_of(unet: nn.Module, batch: Batch) -> Tensor:
    """Rectified flow on the whole batch: the mean of (network((1 - t) x0 + t noise) - (noise - x0))^2."""
    mean, logvar = batch.tensors["moments"].chunk(2, 1)
    latents = mean + (logvar.clamp(-30, 20) / 2).exp() * drawn(batch, "posterior", *mean.shape[1:])
    x0 = F.pixel_unshuffle(latents, 2)
    noise, t = drawn(batch, "noise", *x0.shape[1:]), drawn(batch, "time")
    kept = (drawn(batch, "prompt") >= DROPOUT).float()  # the null of these latents is zero
    text, pooled = batch.tensors["text"] * kept[:, None, None], batch.tensors["pooled"] * kept[:, None]
    at = t[:, None, None, None]
    prediction = unet((1 - at) * x0 + at * noise, 1000 * t, text, pooled)
    return F.mse_loss(prediction, noise - x0)


def by_plain_torch(root: Path, clipping: float) -> Trained:
    """torch's AdamW and clip_grad_norm_; weights of one dimension are not decayed. The rate warms up over two steps."""
    model, losses, norms = network(str(root)), [], []
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    for step, batch in zip(range(STEPS), loader_of(str(root), BATCH, STREAMS, seed=SEED), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZER.lr * (step + 1) / 2
        optimizer.zero_grad()
        loss = loss_of(model.unet, batch.to("cpu"))
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clipping or float("inf"))))
        optimizer.step()
        losses.append(loss.item())
    return Trained(model.state_dict(), losses, norms)


@pytest.fixture(scope="module")
def plain(latents: Path) -> dict[float, Trained]:
    """By clipping, all that can make a difference."""
    return {clipping: by_plain_torch(latents, clipping) for clipping in CLIPPINGS}


@pytest.fixture(scope="module")
def launched(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, bool], Path]:
    """launched(ranks, covering): what one launch has left of those configurations."""

    @functools.cache
    def launch(ranks: int, covering: bool) -> Path:
        output = tmp_path_factory.mktemp(f"ranks{ranks}")
        names = [str(how) for how in CONFIGURATIONS if is_covering(ranks, how) == covering]
        run("tests/engine_steps.py", str(latents), str(output), *names, ranks=ranks)
        return output

    return launch


def read(path: Path) -> Trained:
    with safe_open(path, "pt") as file:
        said = {name: json.loads(text) for name, text in file.metadata().items()}
        return Trained({name: file.get_tensor(name) for name in file.keys()}, **said)  # noqa: SIM118  (no mapping)


def test_clipping_makes_the_difference_that_it_should(plain: dict[float, Trained], latents: Path) -> None:
    none, clipped = (plain[clipping] for clipping in CLIPPINGS)
    assert min(none.norms) > 5 * CLIPPINGS[1]
    assert clipped.norms[0] == none.norms[0]  # before clipping
    start = network(str(latents)).state_dict()
    apart = max(float((clipped.weights[name] - none.weights[name]).abs().max()) for name in start)
    assert apart > 1e-3
    assert all(not torch.equal(none.weights[name], value) for name, value in start.items())


@pytest.mark.parametrize(
    ("ranks", "how"),
    [
        pytest.param(*case, id=f"ranks{case[0]}-{case[1]}", marks=[pytest.mark.exhaustive] * (not is_covering(*case)))
        for case in itertools.product((1, 2, 4), CONFIGURATIONS)
    ],
)
def test_a_step_is_that_of_plain_torch(
    launched: Callable[[int, bool], Path], plain: dict[float, Trained], ranks: int, how: Configuration
) -> None:
    output = launched(ranks, is_covering(ranks, how))
    got, expected = read(output / f"{how}.safetensors"), plain[how.clipping]
    assert got.losses == pytest.approx(expected.losses, rel=2e-6)
    assert got.norms == pytest.approx(expected.norms, rel=1e-5)
    assert got.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        torch.testing.assert_close(got.weights[name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
