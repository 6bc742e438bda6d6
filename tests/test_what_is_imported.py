"""What a command loads before it answers, and before its main: data_pipeline/entry.py says how that is kept small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GUARD = 'if __name__ == "__main__"'
ENTRIES = sorted(
    p for folder in ("train", "data_pipeline") for p in (ROOT / folder).glob("*.py") if GUARD in p.read_text()
)
SECONDS = [
    "deepspeed",
    "transformers",
    "timm",
    "wandb",
    "matplotlib",
    "open_clip",
    "diffusers",
    "torchvision",
    "xformers",
    "torch._dynamo",
    "sympy",
    "s3fs",
    "aiobotocore",
    "pyarrow",
    "webdataset",
]

# Run as a script is, but for the last line: which of the modules named have been imported.
AS_A_SCRIPT = """
import runpy, sys
script, names, sys.argv = sys.argv[1], sys.argv[2].split(), sys.argv[1:2] + sys.argv[3:]
try:
    runpy.run_path(script, run_name="__main__")
finally:
    print("imported:", *(name for name in names if name in sys.modules))
"""


def imported(code: str, *arguments: str) -> tuple[str, list[str]]:
    """All that a process said, and which modules it named at its end."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    said, _, names = done.stdout.rpartition("imported:")
    assert _, done.stderr
    return said + done.stderr, names.split()


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_all_scripts_are_among_the_entries() -> None:
    configured = {p.stem for p in (ROOT / "conf").glob("*.yaml")} - {"quiet"}
    assert {p.stem for p in ENTRIES} == configured


@pytest.mark.parametrize("script", ENTRIES, ids=name)
def test_help_needs_neither_torch_nor_numpy(script: Path) -> None:
    said, loaded = imported(AS_A_SCRIPT, str(script), " ".join(["torch", "numpy", *SECONDS]), "--help")
    assert loaded == []
    assert f"python {name(script)}" in said
    assert "Options (override with key=value" in said


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        ("no_such=1", "error: there is no option no_such"),
        ("engine=zero9", "error: engine=zero9 is not to be had"),
        ("seed=1", "must be given: add"),
        ("training.steps=[1", "error: "),
    ],
)
def test_a_mistake_in_the_options_is_answered_as_fast(mistake: str, sentence: str) -> None:
    said, loaded = imported(AS_A_SCRIPT, str(ROOT / "train/train_ldm.py"), "torch numpy", mistake)
    assert sentence in said
    assert loaded == []


def test_main_begins_with_torch_and_little_else() -> None:
    """All entries in one process, as `start_entry` imports them: what is above their mains."""
    modules = [name(path).removesuffix(".py").replace("/", ".") for path in ENTRIES]
    code = f"import sys, {', '.join(modules)}\nprint('imported:', *(n for n in {SECONDS} if n in sys.modules))"
    assert imported(code)[1] == []
