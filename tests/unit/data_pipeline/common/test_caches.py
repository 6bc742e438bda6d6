"""Caches lie inside .venv: those of make's commands and those of scripts started by hand, in the same places."""

import os
import subprocess
import sys
from pathlib import Path

from data_pipeline.common import caches

MAKE = {"PATH": os.environ["PATH"], "HOME": "/nowhere"}


def test_scripts_have_the_caches_of_make(tmp_path, monkeypatch):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".ci").symlink_to(caches.ROOT / ".ci")
    monkeypatch.setattr(caches, "ROOT", tmp_path)
    by_hand = {"HF_HOME": "the/users/own"}
    caches.keep_caches_in_venv(by_hand, str(tmp_path / ".venv"))
    shown = subprocess.run(
        ["sh", "-c", ". .ci/env && env"], cwd=tmp_path, env=MAKE, capture_output=True, text=True, check=True
    ).stdout
    by_make = dict(line.split("=", 1) for line in shown.splitlines())
    assert by_hand.pop("HF_HOME") == "the/users/own"
    assert {"TRITON_CACHE_DIR", "WANDB_CACHE_DIR", "MPLCONFIGDIR", "TORCH_EXTENSIONS_DIR"} <= by_hand.keys()
    assert all(Path(value) == Path(by_make[name]) for name, value in by_hand.items())
    assert all(Path(value).is_relative_to(tmp_path / ".venv") for value in by_hand.values())


def test_another_environment_keeps_its_own(tmp_path):
    found = {}
    caches.keep_caches_in_venv(found, sys.base_prefix)
    assert found == {}
