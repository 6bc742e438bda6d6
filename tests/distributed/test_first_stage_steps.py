"""First stage and discriminator under the engine on 1 and 2 ranks, against plain torch with an optimizer for each.

What plain torch trains is spelled out here, with torch's own batch norm. One of the steps has a NaN in one rank's
pictures: both players skip it. `make test` has each recipe at ZeRO 1 or 2 on two ranks, and one at 0.
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
from first_stage_steps import (
    BROKEN,
    CONFIGURATIONS,
    OPTIMIZER,
    PER_STREAM,
    RECIPES,
    SEED,
    START,
    STEPS,
    STREAMS,
    Configuration,
    Options,
    batch_at,
    networks,
)
from safetensors import safe_open
from synthetic import run
from torch import Tensor, nn
from torch.nn import functional as F

from train.diffusion.randomness import StreamRandom, generator_at
from train.models.batch_norm import BatchNorm
from train.models.discriminator import PatchDiscriminator

pytestmark = pytest.mark.processes


def is_covering(ranks: int, how: Configuration) -> bool:
    """Whether `make test` has it, too."""
    return ranks == 2 and (how.recipe, how.stage) in {
        ("kl", 0), ("kl", 2), ("batch_norm", 1), ("in_turn", 2), ("in_turn_batch_norm", 1)
    }  # fmt: skip


class Played(NamedTuple):
    weights: dict[str, Tensor]
    parts: list[dict[str, float]]


class Plain(nn.Module):
    """Both networks in plain torch."""

    def __init__(self, recipe: Options) -> None:
        super().__init__()
        self.recipe = recipe
        self.autoencoder, judge = networks(recipe)
        self.log_variance = nn.Parameter(torch.zeros(1)) if "log_variance" in recipe.objective else None
        self.adversary = nn.ModuleDict({"discriminator": with_torchs_batch_norm(judge)})
        self.judge = self.adversary["discriminator"]

    def images(self, step: int) -> tuple[Tensor, StreamRandom]:
        batch = batch_at(step, tuple(range(STREAMS)))
        random = StreamRandom(SEED, step, batch.streams, PER_STREAM, torch.device("cpu"))
        mirror, images = random.uniform("mirror") < 0.5, batch.tensors["image"]
        return torch.where(mirror.view(-1, 1, 1, 1), images.flip(-1), images), random

    def reconstructed(self, images: Tensor, random: StreamRandom) -> tuple[Tensor, Tensor, Tensor]:
        """The reconstruction, the latents, and the penalty."""
        model, options = self.autoencoder, self.recipe.objective
        if self.recipe.model == "kl":
            mean, logvar = model.encode_moments(images).chunk(2, 1)
            kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
            z = mean + (logvar / 2).exp() * random.normal("posterior", mean.shape[1:])
            return model.decode(z), z, options["kl_weight"] * kl
        z = model.encode(images).permute(0, 2, 3, 1)
        codes = self.codes(z)
        to_codes, to_outputs = F.mse_loss(codes, z.detach()), F.mse_loss(z, codes.detach())
        legacy = options.get("vq_loss") == "legacy"
        penalty = 0.25 * to_codes + to_outputs if legacy else to_codes + 0.25 * to_outputs
        again = model.decoded((z + (codes - z).detach()).permute(0, 3, 1, 2))
        return again, z.permute(0, 3, 1, 2), penalty

    def codes(self, z: Tensor) -> Tensor:
        """The nearest ones, of (B, h, w, C)."""
        codebook = self.autoencoder.codebook
        return codebook[torch.cdist(z.detach(), codebook.detach()).argmin(-1)]

    def at_smaller_size(self, images: Tensor, latents: Tensor, step: int) -> Tensor | float:
        """The error of resized latents, weighted."""
        weight = self.recipe.objective.get("equivariance", 0.0)
        if not weight:
            return 0.0
        draw = torch.rand((), generator=generator_at("cpu", SEED, step, "equivariance"))
        scale = 0.5 if draw < 0.5 else 0.25
        images, latents = (F.interpolate(x, scale_factor=scale, mode="bilinear", antialias=True)
                           for x in (images, latents))  # fmt: skip
        if self.recipe.model == "vq":
            latents = latents.permute(0, 2, 3, 1)
            latents = (latents + (self.codes(latents) - latents).detach()).permute(0, 3, 1, 2)
        off = self.autoencoder.decoded(latents) - images
        edges = sum(off.diff(dim=d).abs().mean() for d in (2, 3))
        square = self.recipe.objective.get("reconstruction") == "l2"
        return weight * ((off.square() if square else off.abs()).mean() + 0.7 * edges)

    def likelihood(self, images: Tensor, again: Tensor) -> Tensor:
        off = again - images
        error = off.square().mean() if self.recipe.objective.get("reconstruction") == "l2" else off.abs().mean()
        error = error + 0.7 * sum((again.diff(dim=d) - images.diff(dim=d)).abs().mean() for d in (2, 3))
        return (
            error
            if self.log_variance is None
            else error / self.log_variance.exp().squeeze() + self.log_variance.squeeze()
        )

    def first_stages_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        images, random = self.images(step)
        again, latents, penalty = self.reconstructed(images, random)
        nll, game = self.likelihood(images, again), self.recipe.adversary
        loss = nll + penalty + self.at_smaller_size(images, latents, step)
        if step < START:
            return loss, {"loss": loss.item(), "gan": 0.0, "adaptive_weight": 0.0}
        logits = self.judge(again)
        gan = F.softplus(-logits).mean() if game.get("loss") == "non_saturating" else -logits.mean()
        last = self.autoencoder.decoder.conv_out.weight
        norms = [torch.autograd.grad(each, last, retain_graph=True)[0].norm() for each in (nll, gan)]
        adaptive = (norms[0] / (norms[1] + game.get("adaptive_delta", 1e-6))).clamp(max=game.get("adaptive_max", 1e4))
        weight = 0.4 * min(1.0, (step - START + 1) / game.get("ramp", 1))
        parts = {"loss": loss.item(), "gan": gan.item(), "adaptive_weight": float(adaptive)}
        return loss + weight * adaptive.detach() * gan, parts

    def discriminators_loss(self, step: int) -> tuple[Tensor, float]:
        images, random = self.images(step)
        with torch.no_grad():
            again, _, _ = self.reconstructed(images, random)
        real, fake, game = self.judge(images), self.judge(again), self.recipe.adversary
        if game.get("loss", "hinge") == "hinge":
            own = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        else:
            own = -(F.logsigmoid(real).mean() + F.logsigmoid(-fake).mean()) / 2
        return own + self.r1(images, step), own.item()

    def r1(self, images: Tensor, step: int) -> Tensor | float:
        """In every second of the discriminator's steps, its first one included, twice."""
        weight = self.recipe.adversary.get("r1_weight", 0.0)
        if not weight or (step - START) // 2 % 2:
            return 0.0
        wanted = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.judge(wanted).mean((1, 2, 3)).sum(), wanted, create_graph=True)
        return weight * 2 * gradient.square().sum((1, 2, 3)).mean() / 2


def with_torchs_batch_norm(judge: PatchDiscriminator) -> nn.Module:
    for block in judge.blocks:
        if isinstance(block[1], BatchNorm):
            theirs = nn.BatchNorm2d(len(block[1].weight), track_running_stats=False)
            theirs.load_state_dict(block[1].state_dict())
            block[1] = theirs
    return judge


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)


@functools.cache
def by_plain_torch(name: str) -> Played:
    plain, turns = Plain(RECIPES[name]), RECIPES[name].adversary.get("turns") == "alternate"
    judges = list(plain.judge.parameters())
    others = [p for p in plain.parameters() if all(p is not other for other in judges)]
    ours, theirs, told = adam(others), adam(judges), []
    for step in range(STEPS):
        mine = not turns or step <= START or (step - START) % 2 == 0
        its = not turns or (step > START and (step - START) % 2 == 1)
        loss, parts = plain.first_stages_loss(step)
        own, value = plain.discriminators_loss(step)
        if step == BROKEN:
            told.append({})
            continue
        first = torch.autograd.grad(loss, others, retain_graph=True) if mine else []
        second = torch.autograd.grad(own, judges)
        for optimizer, parameters, gradients in ((ours, others, first), (theirs, judges, second)):
            if (optimizer is ours and mine) or (optimizer is theirs and its):
                silent = optimizer is theirs and step < START
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = torch.zeros_like(gradient) if silent else gradient
                optimizer.step()
        parts |= {"discriminator": value if step >= START else 0.0}
        twice = 2 if turns and step >= START else 1
        kept = {"gan": mine, "adaptive_weight": mine, "discriminator": its}
        told.append({k: (twice * v if kept[k] else 0.0) if k in kept else v for k, v in parts.items()})
    weights = {n: p.detach() for n, p in plain.named_parameters() if not n.startswith("judge.")}
    return Played(weights, told)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, bool], Path]:
    """launched(ranks, covering): what one launch has left of those configurations."""

    @functools.cache
    def launch(ranks: int, covering: bool) -> Path:
        output = tmp_path_factory.mktemp(f"ranks{ranks}")
        names = [str(how) for how in CONFIGURATIONS if is_covering(ranks, how) == covering]
        run("tests/first_stage_steps.py", str(output), *names, ranks=ranks)
        return output

    return launch


@pytest.mark.parametrize(
    ("ranks", "how"),
    [
        pytest.param(*case, id=f"ranks{case[0]}-{case[1]}", marks=[pytest.mark.exhaustive] * (not is_covering(*case)))
        for case in itertools.product((1, 2), CONFIGURATIONS)
    ],
)
def test_both_players_move_as_in_plain_torch(
    launched: Callable[[int, bool], Path], ranks: int, how: Configuration
) -> None:
    with safe_open(launched(ranks, is_covering(ranks, how)) / f"{how}.safetensors", "pt") as file:
        got = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        parts = json.loads(file.metadata()["parts"])
    expected = by_plain_torch(how.recipe)
    start = {n: p.detach() for n, p in Plain(RECIPES[how.recipe]).named_parameters()}
    assert got.keys() == expected.weights.keys()
    assert all(not torch.equal(value, start[name]) for name, value in expected.weights.items())
    for step, (mine, theirs) in enumerate(zip(parts, expected.parts, strict=True)):
        assert {n: mine[n] for n in theirs} == pytest.approx(theirs, rel=2e-5, abs=1e-7), step
    for name, value in expected.weights.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
