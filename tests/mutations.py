"""Hand-made faults, each of which a test must find: applies each to a copy of the checkout and runs its tests there.

    python tests/mutations.py                                all of mutations.yaml: more than half an hour
    python tests/mutations.py velocity resume                those whose names contain one of these words
    python tests/mutations.py --checkout ../older            with the code and tests of another checkout

Exits with 0 if the tests pass without faults and each fault is found. docs/testing.md has the results.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name("mutations.yaml")
# Foreign packages, imported once for all faults: their imports take longer than most tests.
COMMON = (
    "torch", "deepspeed", "hydra", "matplotlib.pyplot", "safetensors.torch", "webdataset", "torchvision", "open_clip",
    "diffusers", "s3fs", "_pytest.config",
)  # fmt: skip
OWN_FOLDERS = ("", str(ROOT), str(ROOT / "tests"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
NOT_EXHAUSTIVE = ["-m", "not exhaustive"]
PASSED, FAILED = 0, 1  # pytest's exit codes; a failed import or a missing test has other codes
FIRST_FAILURE = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Fault:
    """Replaces `old`, which must occur exactly once in `file`, by `new`; found_by: test files, or tests in them."""

    name: str
    file: str
    old: str
    new: str
    found_by: tuple[str, ...]

    def in_place_of(self, text: str) -> str:
        """The text of `file` with the fault applied."""
        assert text.count(self.old) == 1, f"{self.name}: {self.file} has {text.count(self.old)} x {self.old!r}"
        return text.replace(self.old, self.new)


def listed(path: Path = LIST) -> list[Fault]:
    return [Fault(**{**each, "found_by": tuple(each["found_by"])}) for each in yaml.safe_load(path.read_text())]


@contextlib.contextmanager
def copied(checkout: Path) -> Iterator[Path]:
    """A copy of a checkout's tracked files, in their present state on disk."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        known = subprocess.run(["git", "ls-files", "-z"], cwd=checkout, check=True, capture_output=True, text=True)
        for name in filter(None, known.stdout.split("\0")):
            if (checkout / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(checkout / name, Path(folder) / name)
        yield Path(folder)


def preload() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if importlib.import_module("torch").cuda.is_available() else "cpu")
    for name in COMMON:
        with contextlib.suppress(Exception):  # such as torchvision with another torch; tests report what is missing
            importlib.import_module(name)


def tested(copy: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit code and output for these tests of the copy, up to the first failure. Runs in a fork, which need
    not repeat the imports. No bytecode is written: its timestamps are whole seconds, so old files could be used."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.chdir(copy)
            os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
            sys.dont_write_bytecode = True
            sys.path[:] = [str(copy), *(folder for folder in sys.path if folder not in OWN_FOLDERS)]
            os._exit(pytest.main(["-x", "-q", "-rfE", "-p", "no:cacheprovider", *NOT_EXHAUSTIVE, *tests]))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return code, output.read()


def tried(copy: Path, fault: Fault) -> str:
    """The test that found the fault; otherwise what happened instead, in brackets."""
    path = copy / fault.file
    sound = path.read_text()
    if sound.count(fault.old) != 1:
        return "(there is no such line)"
    path.write_text(fault.in_place_of(sound))
    try:
        code, said = tested(copy, fault.found_by)
    finally:
        path.write_text(sound)
    if code != FAILED:
        return "(not found)" if code == PASSED else f"(pytest ended with {code}: {said.strip().splitlines()[-1]})"
    return next(iter(FIRST_FAILURE.findall(said)), "found")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("words", nargs="*", help="of the names of the faults; none: all")
    options.add_argument("--checkout", type=Path, default=ROOT)
    options.add_argument("--list", type=Path, default=LIST)
    options.add_argument("--without-faults", action=argparse.BooleanOptionalAction, default=True)
    given = options.parse_args()
    chosen = [f for f in listed(given.list) if not given.words or any(word in f.name for word in given.words)]
    preload()
    missed = []
    with copied(given.checkout.resolve()) as copy:
        if given.without_faults:
            code, said = tested(copy, sorted({test for fault in chosen for test in fault.found_by}))
            print(f"without a fault: {said.strip().splitlines()[-1]}", flush=True)
            if code != PASSED:
                print(said)
                return 1
        for fault in chosen:
            result = tried(copy, fault)
            missed += [fault.name] * result.startswith("(")
            print(f"{fault.name:<64} {result}", flush=True)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} found{': not ' if missed else ''}{'; '.join(missed)}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
