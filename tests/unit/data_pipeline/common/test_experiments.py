"""Experiments belong to programs; what one of them chooses can be taken away again."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.common.entry import CONF
from data_pipeline.common.errors import UserError
from data_pipeline.common.experiments import with_experiment


@pytest.mark.parametrize(
    ("program", "experiment", "others"),
    [
        ("train_ldm", "ldm_kl_f8", "train_autoencoder.py"),
        ("train_ldm", "sd_kl_f8", "train_autoencoder.py"),
        ("train_autoencoder", "ldm_imagenet", "train_ldm.py"),
    ],
)
def test_an_experiment_of_another_program_is_refused(program: str, experiment: str, others: str) -> None:
    with pytest.raises(UserError, match=f"experiment={experiment} is for {others}, not for {program}.py"):
        with_experiment(["input=a", f"experiment={experiment}"], Path(CONF), program)


def test_every_experiment_is_some_programs() -> None:
    for path in (Path(CONF) / "experiment").glob("*.yaml"):
        taken = 0
        for program in ("train_ldm", "train_autoencoder"):
            try:
                taken += bool(with_experiment([f"experiment={path.stem}"], Path(CONF), program))
            except UserError:
                continue
        assert taken >= 1, path


def test_null_takes_a_chosen_group_away() -> None:
    given = ["experiment=sd_kl_f8", "objective/perceptual=null", "objective.crop=null"]
    read = with_experiment(given, Path(CONF), "train_autoencoder")
    assert read == ["experiment=sd_kl_f8", "~objective/perceptual", "objective.crop=null"]
    assert with_experiment(given[1:], Path(CONF), "train_autoencoder") == given[1:]
    assert with_experiment(["experiment=nosuch"], Path(CONF), "train_ldm") == ["experiment=nosuch"]  # Hydra refuses it
