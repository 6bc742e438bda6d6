"""What an option can't be gets one sentence that says what it may be; what it may be passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from data_pipeline.common.errors import UserError
from data_pipeline.common.option_checks import OneOf, Within, described, fits
from train.checkpointing.posthoc_ema import Profile, Snapshot
from train.engine.config import EngineConfig
from train.engine.optimizer import AdamW, Schedule
from train.loop.recipe import Training, refuse_wrong_entry
from train.rebuild_ema import requested_updates

ENGINE = [
    ("reduce_bucket_size", 0, "a number of 1 or more"), ("allgather_bucket_size", -5, "a number of 1 or more"),
    ("gradient_clipping", -1, "a number of 0 or more"), ("gradient_clipping", float("nan"), "a number of 0 or more"),
    ("compile", "maybe", "true or false"), ("overlap_comm", 1, "true or false"),
    ("zero_stage", "two", "one of 0, 1, 2, 3"), ("dtype", "fp8", "one of fp32, bf16, fp16"),
]  # fmt: skip
TRAINING = [
    ("power_ema", 0.1, "a list, as [a,b], each a number"), ("power_ema", [0], "above 0 and below 0.288"),
    ("hang_timeout_s", "abc", "a number of 1 or more"), ("asynchronous_save", "maybe", "true or false"),
    ("ema_decay", 1.5, "a number from 0 to 1"), ("ema_decay", -0.1, "a number from 0 to 1"),
    ("save_every", 0, "a whole number of 1 or more, or null"), ("save_every", -1, "a whole number of 1 or more, or"),
    ("log_every", 0, "a whole number of 1 or more."), ("keep_every", 0, "a whole number of 1 or more, or null"),
    ("steps", 2.5, "a whole number of 1 or more."), ("batch_size", True, "a whole number of 1 or more."),
    ("allow_mismatch", "seed", "a list, as [a,b], each a text"), ("resume", "on", "one of auto, must, never"),
    ("accumulation", 2, "set only one of them"),
]  # fmt: skip
OPTIMIZER = [
    ("lr", -1, "a number of 0 or more"), ("betas", [0.9], "a list of 2, each a number from 0 below 1"),
    ("betas", [0.9, 1], "a list of 2, each a number from 0 below 1"), ("weight_decay", -1, "a number of 0 or more"),
]  # fmt: skip
SCHEDULE = [
    ("warmup", -5, "a whole number of 0 or more"), ("start", 0, "a whole number of 1 or more"),
    ("tail", 2, "a number from 0 to 1"), ("kind", "step", "one of constant, cosine"),
]  # fmt: skip
ENTRY = [
    ("seed", "abc", "a whole number"), ("scaling_factor", 0, "a number above 0, or null"),
    ("preview_every", 0, "a whole number of 1 or more, or null"), ("validate_every", 0, "a whole number of 1 or more"),
    ("objective.prompt_dropout", 2, "a number from 0 to 1"), ("fold", 1.5, "a whole number of 1 or more"),
]  # fmt: skip
MAKE = {
    "engine": EngineConfig,
    "training": lambda **given: Training(**{"steps": 10, "batch_size": 8, "micro_batch": 4, **given}),
    "optimizer": lambda **given: AdamW(**{"lr": 1e-3, "schedule": Schedule(), **given}),
    "optimizer.schedule": Schedule,
}
WRONG = [
    (group, *case) for group, cases in zip(MAKE, (ENGINE, TRAINING, OPTIMIZER, SCHEDULE), strict=True) for case in cases
]


@pytest.mark.parametrize(("group", "name", "value", "remedy"), WRONG, ids=lambda part: str(part).split(",")[0])
def test_what_an_option_can_not_be(group: str, name: str, value: object, remedy: str) -> None:
    with pytest.raises(UserError) as refused:
        MAKE[group](**{name: value})
    assert remedy in str(refused.value)
    assert str(refused.value).startswith(f"{group}.{name}={value} ") or "sigma_rel=0" in str(refused.value)


@pytest.mark.parametrize(("name", "value", "remedy"), ENTRY, ids=str)
def test_what_an_entrys_own_option_can_not_be(name: str, value: object, remedy: str) -> None:
    given = OmegaConf.create({"seed": 0, "validate_every": None, "objective": {"prompt_dropout": 0.1}})
    refuse_wrong_entry(given)
    OmegaConf.update(given, name, value)
    with pytest.raises(UserError, match=rf"^{name}={value} can't be: take {remedy}"):
        refuse_wrong_entry(given)


def test_what_may_be_passes() -> None:
    """As hydra hands it over: lists of its own kind, whole numbers where fractions may be."""
    made = instantiate(OmegaConf.create({
        "_target_": "train.loop.recipe.Training", "steps": 1, "batch_size": 8, "power_ema": [0.05, 0.1], "ema_decay": 1,
        "save_every": None, "allow_mismatch": ["seed"], "hang_timeout_s": 20, "stability": {"_target_":
        "train.loop.stability_monitor.StabilityConfig"},
    }))  # fmt: skip
    assert list(made.power_ema) == [0.05, 0.1]
    config = EngineConfig(reduce_bucket_size=5e8, zero_stage=2).for_deepspeed(1, 1, 1)
    assert config["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    assert AdamW(0, Schedule("inverse_sqrt", start=1), betas=[0, 0.5]).lr_at(5, 10) == 0


@pytest.mark.parametrize(
    ("hint", "right", "wrong", "words"),
    [
        (float, [1, 2.5, float("inf")], [True, "1", None], "a number"),
        (Annotated[float, Within(0, 1, above=True)], [1, 0.5], [0, 1.1, float("nan")], "a number above 0 to 1"),
        (Annotated[int, Within(2)] | None, [2, None], [1, 2.0, False], "a whole number of 2 or more, or null"),
        (Annotated[str, OneOf(("a", "b"))], ["a"], ["c", ["a"], 1], "one of a, b"),
        (Sequence[str], [[], ("a",)], ["a", [1], None], "a list, as [a,b], each a text"),
        (tuple[int, bool], [(1, True)], [(1,), (1, 1), 1], "a list of 2"),
    ],
)
def test_kinds(hint: object, right: list[object], wrong: list[object], words: str) -> None:
    assert [value for value in right if not fits(value, hint)] == []
    assert [value for value in wrong if fits(value, hint)] == []
    assert described(hint).startswith(words)


@pytest.mark.parametrize("updates", [101, 49, "late"])
def test_an_average_that_the_snapshots_do_not_reach_is_refused(updates: object) -> None:
    snapshots = [Snapshot("", "ema_0.1", Profile(float(n), 3.0)) for n in (50, 100)]
    assert [requested_updates(asked, snapshots) for asked in (None, 50, 99.5, 100)] == [100, 50, 99.5, 100]
    with pytest.raises(UserError, match=rf"updates={updates} is not valid: use a number from 50 .* to 100"):
        requested_updates(updates, snapshots)
