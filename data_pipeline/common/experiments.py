"""experiment=NAME on a command line: whether it is for this program, and what Hydra can't do with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.common.errors import UserError
from data_pipeline.common.hydra_messages import any_of, loaded


def with_experiment(arguments: Sequence[str], conf: Path, root: str) -> list[str]:
    """The arguments, with ~GROUP in place of GROUP=null where the experiment chooses a file of that group, as Hydra
    takes no null there. UserError for an experiment of other programs."""
    names = [argument.partition("=")[2] for argument in arguments if argument.startswith("experiment=")]
    if not names or not (conf / "experiment" / f"{names[-1]}.yaml").exists():
        return list(arguments)
    chosen = chosen_groups(conf, names[-1])
    if not chosen <= groups_of(conf, root):
        able = sorted(f"{path.stem}.py" for path in conf.glob("*.yaml") if chosen <= groups_of(conf, path.stem))
        raise UserError(f"experiment={names[-1]} is for {any_of(able)}, not for {root}.py: choose another.")
    removed = {f"{group}=null": f"~{group}" for group in chosen}
    return [removed.get(argument, argument) for argument in arguments]


def chosen_groups(conf: Path, experiment: str) -> set[str]:
    """Groups that an experiment's file chooses a file of, with those of experiments that it builds on."""
    found = {"experiment"}
    for default in loaded(conf / "experiment" / f"{experiment}.yaml").get("defaults", []):
        if isinstance(default, dict):
            found.add(next(iter(default)).removeprefix("override ").removeprefix("/"))
        elif default != "_self_":
            found |= chosen_groups(conf, default)
    return found


def groups_of(conf: Path, root: str) -> set[str]:
    """Groups of a program's configuration."""
    listed = loaded(conf / f"{root}.yaml").get("defaults", [])
    return {next(iter(default)) for default in listed if isinstance(default, dict)}
