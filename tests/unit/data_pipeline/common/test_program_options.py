"""Every option of every program is checked for type, finiteness and range before the program's code is imported."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from data_pipeline.common.composition import _user_error_behind
from data_pipeline.common.entry import CONF
from data_pipeline.common.errors import UserError
from data_pipeline.common.hydra_messages import loaded, names_in
from data_pipeline.common.option_checks import fits
from data_pipeline.common.program_options import COMMON, ELSEWHERE, PROGRAMS, leaves, refuse_wrong_options
from train.engine.config import EngineConfig

ALL = sorted(path.stem for path in Path(CONF).glob("*.yaml") if path.stem != "quiet")
WRONG = ("abc", math.nan, math.inf, -1, 0, [], True)
# Files of a group that are placed elsewhere than below the group's name.
PACKAGES = {
    "objective/adversary": "", "objective/perceptual": "objective.perceptual.", "experiment": None, "demo": None,
    "spacing": None,
}  # fmt: skip


def composed(program: str, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose(program, list(overrides))
    for name in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, name, "somewhere")
    return OmegaConf.to_container(cfg, resolve=True)


def with_value(options: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    changed = node = copy.deepcopy(options)
    *parents, last = name.split(".")
    for parent in parents:
        node = node[parent]
    node[last] = value
    return changed


def numbers(options: dict[str, Any]) -> list[str]:
    found = [name for name, value in leaves(options) if isinstance(value, int | float) and not isinstance(value, bool)]
    return [name for name in found if not name.startswith("demo.")]


@pytest.mark.parametrize("program", ALL)
def test_no_numeric_option_takes_what_is_none(program: str) -> None:
    """Each number of the composed configuration, and each option of the table that is there with null."""
    options, hints = composed(program), {**COMMON, **PROGRAMS[program]}
    refuse_wrong_options(options, program)
    elsewhere = () if program == "plan_storage" else ELSEWHERE
    numeric = numbers(options)
    there = [name for name, _ in leaves(options) if name in hints and not name.startswith(elsewhere)]
    assert [name for name in numeric if name not in there and not name.startswith(elsewhere)] == []
    for name in there:
        for value in WRONG:
            if not fits(value, hints[name]):
                with pytest.raises(UserError, match=f"^{name}=.* (is not valid: use|is a list: use) "):
                    refuse_wrong_options(with_value(options, name, value), program)
        taken = [
            value for value in ("abc", math.nan, math.inf) if name in numbers(options) and fits(value, hints[name])
        ]
        assert taken == [], name


def test_numbers_that_their_own_classes_check() -> None:
    """Those of training, engine and optimizer: built as Recipe builds them."""
    options = composed("train_ldm")
    options["engine"]["dtype"] = "fp32"
    assert isinstance(instantiate(options["engine"]), EngineConfig)
    optional = {"training.stability.spike_factor": 2.0, "training.micro_batch": 4, "training.keep_every": 5}
    checked = [name for name in numbers(options) if name.startswith(ELSEWHERE)]
    assert len(checked) > 20
    for name in (*checked, *optional):
        for value in ("abc", math.nan, math.inf):
            with pytest.raises(InstantiationException) as refused:
                instantiate(with_value(options, name, value)[name.partition(".")[0]], _convert_="all")
            assert isinstance(_user_error_behind(refused.value), UserError), name


@pytest.mark.parametrize("program", ALL)
def test_the_table_has_the_numbers_of_all_files_of_conf(program: str) -> None:
    own, hints = loaded(Path(CONF) / f"{program}.yaml"), {**COMMON, **PROGRAMS[program]}
    missing = []
    for default in own.get("defaults", []):
        group = next(iter(default)) if isinstance(default, dict) else ""
        package = PACKAGES.get(group, f"{group}.")
        for path in (Path(CONF) / group).glob("*.yaml") if group and package is not None else ():
            content = loaded(path)
            named = [f"{package}{name}" for name in names_in(content)]
            values = dict(leaves(content, package))
            missing += [name for name in named if isinstance(values.get(name), int | float) and name not in hints]
    assert [name for name in missing if not name.startswith(ELSEWHERE)] == []


@pytest.mark.parametrize(
    ("program", "overrides", "sentence"),
    [
        ("sample_images", {"input": ["a", "b"]}, r"input=\['a', 'b'\] is a list: use one folder, as input=FOLDER"),
        ("make_shards", {"output": ""}, r"output= is not valid: use a folder\."),
        ("make_shards", {"output": " "}, "output=  is not valid"),
        ("train_ldm", {"input": 5}, "input=5 is not valid: use a folder, or a list"),
        ("train_ldm", {"guidance.scale": "abc"}, "guidance.scale=abc is not valid: use a number that is finite"),
        ("sample_images", {"sampler.steps": math.inf}, "sampler.steps=inf is not valid: use a whole number of 1"),
        ("plan_storage", {"bytes_per_pixel.jpg": "x"}, "bytes_per_pixel.jpg=x is not valid: use a number above 0"),
    ],
)
def test_sentences(program: str, overrides: dict[str, Any], sentence: str) -> None:
    options = composed(program)
    for name, value in overrides.items():
        options = with_value(options, name, value)
    with pytest.raises(UserError, match=sentence):
        refuse_wrong_options(options, program)


def test_a_class_of_the_users_own_is_left_alone() -> None:
    options = composed("train_ldm")
    options["unet"] = {"_target_": "mine.Net", "heads": "many"}
    refuse_wrong_options(options, "train_ldm")
    options["unet"]["_target_"] = "train.models.unet.UNet"
    with pytest.raises(UserError, match=r"unet\.heads=many is not valid: use a whole number of 1 or more, or a list"):
        refuse_wrong_options(options, "train_ldm")
