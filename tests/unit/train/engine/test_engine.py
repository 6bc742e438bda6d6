"""One step of real DeepSpeed in this process, at every ZeRO stage, against plain torch."""

import math
import os
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import nn

from data_pipeline.common.errors import UserError
from data_pipeline.loading.batch import Batch, DataCursor
from train.distributed.ranks import find_ranks
from train.engine.config import EngineConfig
from train.engine.deepspeed_engine import Engine
from train.engine.flops import peak
from train.engine.optimizer import AdamW, Schedule
from train.models.clip import CLIP
from train.models.unet import UNet
from train.objectives.contrastive import Contrastive
from train.objectives.terms import LossTerms

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
        error = (self.layer(batch.tensors["x"].to(self.layer.weight.dtype)) - batch.tensors.get("target", 0.0)).square()
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
     (3, "fp32", 1, 1.0), (1, "bf16", 1, 1.0), (2, "bf16", 1, 1.0), (1, "bf16", 2, 1.0), (2, "bf16", 2, 1.0)],
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


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_infinite_loss_is_skipped_though_its_gradients_are_finite(alone, stage):
    engine, stream = made(alone, stage), batches(1)
    before = engine.full_state_dict()
    far = next(stream)
    far = replace(far, tensors=far.tensors | {"target": torch.tensor(2e19)})  # its square is beyond fp32
    result = engine.train_step(iter([far]), 0, 5)
    assert (float(result.parts["loss"]), result.applied) == (float("inf"), False)
    assert all(torch.equal(value, before[name]) for name, value in engine.full_state_dict().items())
    assert engine.train_step(stream, 0, 5).applied


class Denoiser(nn.Module):
    """A U-Net in the place of the objective, as the engine finds it there."""

    def __init__(self):
        super().__init__()
        self.unet = UNet(4, 4, [8], 1, 6, None, [True], heads=2, norm_groups=4)

    def forward(self, batch):
        x = batch.tensors["x"].to(self.unet.conv_in.weight.dtype)
        error = self.unet(x, torch.full((len(x),), 500.0), x[:, :3, 0, :6]).float().square()
        return LossTerms(error.mean(), {"loss": error.mean().detach()}, error.detach())


def pictures():
    generator = torch.Generator().manual_seed(1)
    for step in range(100):
        x = torch.randn(BATCH, 4, 8, 8, generator=generator)
        yield Batch(("k",) * BATCH, ("",) * BATCH, {"x": x}, (0,), step, DataCursor(step + 1))


def trained(ranks, stage, steps=3, **options):
    torch.manual_seed(0)
    engine = Engine(Denoiser(), AdamW(0.01, Schedule(), eps=1e-3), EngineConfig(stage, **options), ranks, BATCH, 1)
    steps_taken = pictures()
    losses = [float(engine.train_step(steps_taken, step, steps).parts["loss"]) for step in range(steps)]
    return losses, engine.full_state_dict()


@pytest.fixture(scope="module")
def plainly_trained(alone):
    return trained(alone, 0)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (0, {"checkpoint_activations": True}),
        (3, {"checkpoint_activations": True}),
        (1, {"offload": "optimizer"}),
        (2, {"offload": "optimizer"}),
        (3, {"offload": "all"}),
        pytest.param(
            1,
            {"compile": True},
            marks=pytest.mark.skipif(
                not (torch.cuda.is_available() or os.environ.get("TEST_COMPILE")),
                reason="torch.compile takes one to two minutes on a CPU: set TEST_COMPILE=1",
            ),
        ),
    ],
)
def test_how_it_is_computed_does_not_change_what(alone, plainly_trained, stage, options):
    expected_losses, expected = plainly_trained
    losses, weights = trained(alone, stage, **options)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_activation_checkpointing_keeps_less(alone):
    """What is held between the passes: all of it, or what goes into each block."""
    kept = {}
    for checkpointed in (False, True):
        network = Denoiser()
        network.unet.tune(compiled=False, checkpoint_activations=checkpointed)
        held = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, h=held: h.setdefault(x.data_ptr(), x), lambda x: x):
            network(next(pictures()))
        kept[checkpointed] = sum(x.numel() for x in held.values())
    assert kept[True] < 0.5 * kept[False]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"offload": "disk"}, "use one of none, optimizer, all"),
        ({"zero_stage": 0, "offload": "optimizer"}, "offload=optimizer needs ZeRO"),
        ({"zero_stage": 2, "offload": "all"}, "needs ZeRO stage 3"),
        ({"zero_stage": 2, "offload": "optimizer", "dtype": "bf16"}, "use engine=zero3"),
        ({"zero_stage": 3, "compile": True}, "use engine=zero2"),
        ({"zero_stage": 0, "dtype": "bf16"}, "use engine=zero1"),
    ],
)
def test_what_an_engine_can_not_be(options, sentence):
    with pytest.raises(UserError, match=sentence):
        EngineConfig(**options)


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-c++")
    with pytest.raises(
        UserError, match=r"compile=true needs the compiler no-such-c\+\+, which is not installed: install it"
    ):
        EngineConfig(compile=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is for GPUs")
def test_fp16_is_refused_without_a_gpu():
    with pytest.raises(UserError, match=r"fp16 needs a GPU: use engine\.dtype=auto"):
        EngineConfig(dtype="fp16")


def test_a_network_that_can_not_be_compiled_is_said(alone):
    with pytest.raises(UserError, match="are only available for the U-Net and first stages"):
        Engine(Regression(), AdamW(0.1, Schedule()), EngineConfig(compile=True), alone, BATCH, 1)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_steps_flops_are_those_of_its_products(alone, stage):
    """y = x W^T: 2 B n m forward, and twice as many backward. Counting, also between steps, as at the first batch of a
    bucket, changes no bit of what comes."""
    engine, other = made(alone, stage, accumulation=2), made(alone, stage, accumulation=2)
    assert engine.flops(next(batches(2))) == 3 * (2 * BATCH * 3 * 2)
    assert peak(torch.device("cpu"), torch.float32) is None
    for one in (engine, other):
        stream = batches(2)
        for step in range(3):
            if one is engine and step == 2:
                one.flops(next(batches(2)))
            one.train_step(stream, step, 10)
    weights = engine.full_state_dict()
    for name, value in other.full_state_dict().items():
        assert torch.equal(weights[name], value)


class Bounded(Regression):
    """Its bias is pulled towards 3, and may not pass 0.25."""

    bounds: ClassVar = {"layer.bias": (0.0, 0.25)}

    def forward(self, batch):
        error = (self.layer(batch.tensors["x"].to(self.layer.weight.dtype)) - 3.0).square()
        return LossTerms(error.mean(), {"loss": error.mean().detach()}, error.detach())


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]
)
def test_what_a_module_bounds_is_held_after_each_step(alone, stage, dtype):
    """As open_clip holds the logit scale: the master weights, from which the EMA is made, and what is computed with."""
    torch.manual_seed(0)
    engine = Engine(Bounded(), AdamW(0.1, Schedule()), EngineConfig(stage, dtype), alone, BATCH, 1)
    given = batches(1)
    for step in range(8):
        engine.train_step(given, step, 8)
        bias = engine.full_state_dict()["layer.bias"]
        assert bias.min() >= 0
        assert bias.max() <= 0.25
    torch.testing.assert_close(bias, torch.full((2,), 0.25))
    x = torch.zeros(4, 3, dtype=engine.dtype)
    used = engine.deepspeed(replace(next(given), tensors={"x": x}))
    torch.testing.assert_close(used.per_sample.float(), torch.full((4, 2), 2.75**2))  # (0.25 - 3)^2


def test_embeddings_that_a_module_exempts_have_no_decay():
    module = nn.Sequential(nn.Linear(2, 2), nn.Embedding(3, 2))
    module[1].no_weight_decay = lambda: {"weight"}
    optimizer = AdamW(0.1, Schedule(), weight_decay=0.5).build(module, torch.device("cpu"))
    decays = {p.shape: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {(2, 2): 0.5, (2,): 0.0, (3, 2): 0.0}


def test_clips_logit_scale_is_held_at_100(alone):
    """As open_clip clamps its logarithm to [0, ln 100] after each step; here it starts above."""
    torch.manual_seed(0)
    tower = {"width": 16, "layers": 1}
    text = {"context_length": 8, "vocab_size": 49408, "heads": 2, **tower}
    clip = CLIP(12, {"image_size": 16, "patch_size": 8, "head_width": 8, **tower}, text, logit_scale=5.0)
    engine = Engine(Contrastive(clip, shift=0), AdamW(1e-4, Schedule()), EngineConfig(2), alone, 8, 1)
    batch = Batch(tuple("abcdefgh"), tuple("abcdefgh"), {"image": torch.rand(8, 3, 16, 16)}, (0,), 0, DataCursor(1))
    seen = [float(engine.train_step(iter([batch]), step, 3).parts["logit_scale"]) for step in range(2)]
    assert seen == pytest.approx([math.exp(5), 100], rel=1e-5)
