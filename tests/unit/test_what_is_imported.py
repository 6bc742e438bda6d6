"""What a command loads before it answers, and before its main (data_pipeline/common/entry.py keeps that small)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUARD = '\nif __name__ == "__main__"'  # at a line's beginning
SOURCES = [path for folder in ("train", "data_pipeline") for path in (ROOT / folder).glob("*.py")]
ENTRIES = sorted(path for path in SOURCES if GUARD in path.read_text())
STARTED = ("train_ldm", "precompute_latents", "make_shards")  # the others begin alike, and exhaustively
SECONDS = {"deepspeed", "transformers", "timm", "wandb", "matplotlib", "open_clip", "diffusers", "torchvision"}
SECONDS |= {"xformers", "torch._dynamo", "sympy", "s3fs", "aiobotocore", "pyarrow", "webdataset"}

pytestmark = pytest.mark.processes


def started(*command: str) -> tuple[int, str, set[str]]:
    """Python with these arguments: its exit code, what it said, and what it imported, by its own log."""
    done = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, cwd=ROOT)
    log = re.compile(r"^import time:.*\| +(\S+)\n", re.MULTILINE)
    modules = set(log.findall(done.stderr))
    assert "pathlib" in modules
    return done.returncode, done.stdout + log.sub("", done.stderr), modules


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_all_scripts_are_among_the_entries() -> None:
    configured = {path.stem for path in (ROOT / "conf").glob("*.yaml")} - {"quiet"}
    assert {path.stem for path in ENTRIES} == configured


@pytest.mark.parametrize("script", ENTRIES, ids=name)
def test_an_entry_begins_with_start_entry_and_imports_nothing_before(script: Path) -> None:
    before = ast.parse(script.read_text().partition(GUARD)[0]).body
    assert all(isinstance(node, ast.Expr | ast.ImportFrom) for node in before)
    assert {n.module for n in before if isinstance(n, ast.ImportFrom)} == {"__future__", "data_pipeline.common.entry"}


@pytest.mark.parametrize(
    "script", [e if e.stem in STARTED else pytest.param(e, marks=pytest.mark.exhaustive) for e in ENTRIES], ids=name
)
def test_help_needs_neither_torch_nor_numpy(script: Path) -> None:
    code, said, modules = started(str(script), "--help")
    assert modules & {"torch", "numpy", *SECONDS} == set()
    assert code == 0
    assert f"python {name(script)}" in said


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        ("no_such=1", "there is no option no_such"),
        ("engine=zero9", "engine=zero9 does not exist: use"),
        ("seed=1", "autoencoder.path, input, output must be given"),
        ("seed=[1", "seed=[1 can't be read, as a [ is not closed"),
    ],
)
def test_nor_does_a_mistake_in_the_options(mistake: str, sentence: str) -> None:
    code, said, modules = started("train/train_ldm.py", mistake)
    assert modules & {"torch", "numpy", *SECONDS} == set()
    assert code == 2
    assert f"error: {sentence}" in said


def test_main_begins_with_torch_and_little_else() -> None:
    """All entries in one process, as `start_entry` imports them: what stands above their mains."""
    wanted = ", ".join(name(path).removesuffix(".py").replace("/", ".") for path in ENTRIES)
    code, _, modules = started("-c", f"import {wanted}")
    assert code == 0
    assert modules & {"torch", *SECONDS} == {"torch"}
