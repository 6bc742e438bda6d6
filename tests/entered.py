"""Runs the main() of an entry point in this process: a process of its own takes a second more."""

from __future__ import annotations

import contextlib
import importlib
import io
from typing import NamedTuple

from hydra import compose, initialize_config_dir
from synthetic import ROOT

from data_pipeline.common.errors import UserError


class Ended(NamedTuple):
    """As a process would end: its exit code, what it printed, and its error's sentence."""

    code: int
    said: str
    error: str


def entered(script: str, *options: str) -> Ended:
    """data_pipeline/make_shards with options, as its command line has them. Errors without an exit code are raised."""
    said = io.StringIO()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(script.rpartition("/")[2], list(options))
    try:
        with contextlib.redirect_stdout(said):
            importlib.import_module(script.replace("/", ".")).main(cfg)
    except Exception as error:
        wrong = next((each for each in (error, error.__cause__) if isinstance(each, UserError)), None)
        if wrong is None:
            raise
        return Ended(wrong.exit_code, said.getvalue(), str(wrong))
    return Ended(0, said.getvalue(), "")
