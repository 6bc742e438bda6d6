"""Set-up: .venv made, mended and left alone, and what it says. Where pip takes minutes, something stands in for it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from pathlib import Path

import environment
import pip_run
import pytest
from environment import SystemTorch
from pip_run import Refused

ROOT = Path(__file__).resolve().parents[2]
NEEDS = """
[project]
name = "small"
dependencies = ["torch"]
[tool.setuptools.packages.find]
include = ["train*"]
"""
Room = namedtuple("Room", "total used free")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With blanks in its name. Its .venv is a real one, but without pip, and nothing is installed."""
    root = tmp_path / "a b"
    root.mkdir()
    (root / "pyproject.toml").write_text(NEEDS)
    (root / "constraints.txt").write_text("torch==2.13.0\ntorchvision==0.28.0\nnumpy==2.4.6\n")
    monkeypatch.setattr(environment, "check_torch", lambda venv: None)
    monkeypatch.setattr(environment, "VENV_OPTIONS", ("--without-pip",))
    monkeypatch.setattr(environment, "run_pip", lambda venv, arguments, cwd, lock: (venv / "packages").touch())
    return root


def fails(venv: Path, arguments: list[str], cwd: str, lock: int) -> None:
    raise Refused("no network")


def fail_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(environment, "run_pip", fails)
        with pytest.raises(Refused, match="no network"):
            environment.set_up(root, {})


def set_up(root: Path, capsys: pytest.CaptureFixture[str], **asked: str) -> str:
    environment.set_up(root, asked)
    return capsys.readouterr().out


def test_a_whole_one_is_left_alone_in_silence(checkout, capsys):
    said = set_up(checkout, capsys)
    assert said.startswith("Setting up .venv, once.\n")
    assert "GB to download" in said
    assert "minutes" in said
    assert (checkout / ".venv" / "bin" / "python").exists()
    (checkout / ".venv" / "packages").unlink()
    assert set_up(checkout, capsys) == ""
    assert not (checkout / ".venv" / "packages").exists()
    assert [p.name for p in checkout.parent.iterdir()] == ["a b"]


def kill(root: Path) -> None:
    """As it lies when killed after Python's own part."""
    (root / ".venv" / "installed").rename(root / ".venv" / "unfinished")


def take_python_away(root: Path) -> None:
    python = root / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python3.11")


def put_another_python(root: Path) -> None:
    python = root / ".venv" / "bin" / "python"
    python.unlink()
    python.write_text("#!/bin/sh\necho 3.99\n")
    python.chmod(0o755)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [(kill, "did not finish"), (take_python_away, "Python is gone"), (put_another_python, "made with Python")],
)
def test_what_is_not_whole_is_made_anew(checkout, capsys, harm, reason):
    set_up(checkout, capsys)
    (checkout / ".venv" / "left over").touch()
    harm(checkout)
    assert reason in set_up(checkout, capsys).splitlines()[0]
    assert not (checkout / ".venv" / "left over").exists()
    assert set_up(checkout, capsys) == ""


def test_a_moved_checkout_does_not_run_the_old_place(checkout, capsys):
    set_up(checkout, capsys)
    moved = checkout.rename(checkout.with_name("c d"))
    assert f"it was made in {checkout}." in set_up(moved, capsys)
    assert set_up(moved, capsys) == ""


def test_new_needs_are_added_and_other_settings_change_nothing(checkout, capsys):
    set_up(checkout, capsys)
    (checkout / ".venv" / "kept").touch()
    (checkout / "pyproject.toml").write_text(NEEDS + "[tool.ruff]\nline-length = 120\n")
    assert set_up(checkout, capsys) == ""
    (checkout / "constraints.txt").write_text("torch==2.14.0\n")
    assert set_up(checkout, capsys).startswith("Bringing .venv up to date")
    assert (checkout / ".venv" / "kept").exists()


def test_failed_additions_leave_the_old_one_in_use(checkout, capsys, monkeypatch):
    set_up(checkout, capsys)
    (checkout / "constraints.txt").write_text("torch==2.14.0\n")
    fail_once(checkout, monkeypatch)
    capsys.readouterr()
    assert set_up(checkout, capsys).startswith("Bringing .venv up to date")


def test_failed_first_set_up_is_begun_again(checkout, capsys, monkeypatch):
    fail_once(checkout, monkeypatch)
    assert "did not finish" in set_up(checkout, capsys)
    assert set_up(checkout, capsys) == ""


def test_a_link_to_anothers_environment_is_refused_and_kept(checkout, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "pyvenv.cfg").touch()
    (checkout / ".venv").symlink_to(theirs)
    with pytest.raises(Refused, match="remove the link"):
        environment.set_up(checkout, {})
    assert (theirs / "pyvenv.cfg").exists()


def test_a_link_to_an_empty_folder_is_used(checkout, tmp_path, capsys):
    (tmp_path / "scratch").mkdir()
    (checkout / ".venv").symlink_to(tmp_path / "scratch")
    set_up(checkout, capsys)
    assert (tmp_path / "scratch" / "bin" / "python").exists()
    assert set_up(checkout, capsys) == ""


def test_a_full_disk_is_said_before_anything_is_fetched(checkout, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Room(9e9, 8e9, 1e9))
    with pytest.raises(Refused, match=r"has 1\.0 GB free, but set-up needs about [\d.]+ GB there: free some"):
        environment.set_up(checkout, {})


def test_two_at_once_come_one_after_the_other(checkout, capsys):
    (checkout / ".venv").mkdir()
    with (checkout / ".venv" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        other = threading.Thread(target=environment.set_up, args=(checkout, {}))
        other.start()
        other.join(0.5)
        assert not (checkout / ".venv" / "bin").exists()
    other.join()
    assert capsys.readouterr().out.startswith("Another make is setting up .venv: waiting for it.\nSetting up .venv")


def test_the_systems_torch_is_taken_and_remembered(checkout, capsys):
    said = set_up(checkout, capsys, SYSTEM_TORCH="1")
    system = environment.torch_of_system(environment.Made.read(checkout / ".venv" / "installed"))
    version = system.versions["torch"]
    assert f"torch {version}, the system's" in said
    constraints = (checkout / ".venv" / "constraints.txt").read_text().split()
    assert [line for line in constraints if line.startswith("torch==")] == [f"torch=={version}"]
    assert "numpy==2.4.6" in constraints
    found = [checkout / ".venv/bin/python", "-c", "import importlib.metadata as m; print(m.version('torch'))"]
    assert subprocess.run(found, capture_output=True, text=True, check=True).stdout.strip() == version
    assert set_up(checkout, capsys) == ""
    assert "made with SYSTEM_TORCH=1" in set_up(checkout, capsys, SYSTEM_TORCH="0")


def test_without_a_torch_of_the_systems_it_is_refused(checkout, monkeypatch):
    monkeypatch.setattr(environment, "TORCH_FAMILY", ("no-such-torch", "torch-not-there"))
    with pytest.raises(Refused, match="has no torch: name a Python that has one"):
        environment.set_up(checkout, {"SYSTEM_TORCH": "1"})


def test_constraints_of_a_system_without_torchvision_leave_it_open(checkout):
    want = environment.wanted(checkout, None, {"SYSTEM_TORCH": "1"})
    (checkout / ".venv").mkdir()
    path = environment.constraints_beside(checkout / ".venv", want, SystemTorch({"torch": "2.14.0+cu130"}, ()))
    assert path.read_text().split() == ["numpy==2.4.6", "torch==2.14.0+cu130"]


def setup_script(tmp_path: Path, python: str, **asked: str) -> subprocess.CompletedProcess[str]:
    """.ci/setup, where python3 is that script and there is no other."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "dirname").symlink_to(shutil.which("dirname"))
    (programs / "python3").write_text(python)
    (programs / "python3").chmod(0o755)
    shutil.copytree(ROOT / ".ci", tmp_path / "a b" / ".ci")
    command = ["/bin/sh", str(tmp_path / "a b" / ".ci" / "setup")]
    return subprocess.run(command, env={"PATH": str(programs), **asked}, capture_output=True, text=True, check=False)


OLD = """#!/bin/sh
case "$2" in *exit*) exit 1;; *) echo 3.9.2;; esac
"""


@pytest.mark.parametrize(
    ("asked", "words"),
    [({}, "python3 is 3.9.2"), ({"PYTHON": "python4"}, "python4 cannot be run"), ({"PYTHON": "python3"}, "is 3.9.2")],
)
def test_an_old_python_is_said_with_what_to_name(tmp_path, asked, words):
    done = setup_script(tmp_path, OLD, **asked)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Python 3.11 or newer is needed")
    assert words in done.stderr
    assert "PYTHON=" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "a b" / ".venv").exists()


def test_recipes_keep_to_a_checkout_with_blanks_in_its_path(tmp_path):
    root = tmp_path / "a b"
    shutil.copytree(ROOT / ".ci", root / ".ci")
    shutil.copy(ROOT / "Makefile", root)
    python = tmp_path / "my python"
    python.write_text('#!/bin/sh\nfor one; do echo "<$one>"; done\nenv\n')
    python.chmod(0o755)
    command = ["make", "--no-print-directory", "demo", "test", f"RUN={python}", "DEMO=smoke"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "<train/quickstart.py>\n<demo=smoke>\n<output=demo-smoke>\n" in done.stdout
    assert "<-m>\n<pytest>\n<-n>\n<auto>" in done.stdout
    caches = {line for line in done.stdout.splitlines() if "_CACHE_HOME=" in line or "_EXTENSIONS_DIR=" in line}
    assert caches == {f"XDG_CACHE_HOME={root}/.venv/cache", f"TORCH_EXTENSIONS_DIR={root}/.venv/cache/torch_extensions"}


@pytest.fixture
def with_pip(tmp_path: Path) -> Path:
    """A folder like .venv, whose Python is the one that runs the tests."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    return tmp_path


def write_wheel(folder: Path, version: str) -> None:
    with zipfile.ZipFile(folder / f"small-{version}-py3-none-any.whl", "w") as wheel:
        about = f"small-{version}.dist-info"
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: small\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--index-url=http://127.0.0.1:9/simple", "no-such-package-1"], "index could not be reached: check the net"),
        (["--no-index", "no-such-package-1"], "index does not have what this Python needs: .*no-such-package-1"),
        (["--no-index", "--find-links=.", "small==1", "small<1"], "required versions conflict: Cannot install small"),
    ],
)  # fmt: skip
def test_pips_failures_are_a_sentence(with_pip, monkeypatch, capfd, arguments, sentence):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "1")
    write_wheel(with_pip, "1")
    write_wheel(with_pip, "0.5")
    command = ["install", "--dry-run", "--ignore-installed", "--no-deps", *arguments]
    with (with_pip / "lock").open("w") as lock, pytest.raises(Refused, match=sentence) as caught:
        pip_run.run_pip(with_pip, command, str(with_pip), lock.fileno())
    assert "\n" not in str(caught.value)
    assert "ERROR" in (with_pip / "pip.log").read_text()
    assert "ERROR" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk .* is full"),
        ("error: command 'g++' failed: No such file or directory", "needs a C\\+\\+ compiler: install one"),
        ("WARNING: Retrying after connection broken by 'NewConnectionError(...)'", "could not be reached"),
        ("ERROR: something new", "^pip failed: something new$"),
    ],
)  # fmt: skip
def test_what_pip_says_is_understood(tmp_path, said, sentence):
    with pytest.raises(Refused, match=sentence):
        raise Refused(pip_run.why([said], 1, tmp_path))


LINES = """import sys
print("Collecting torch")
print("  Downloading torch-2.13.0-cp311-cp311-linux.whl (526.6 MB)")
print("WARNING: Location is ignored")
print("Requirement already satisfied: pip in /x")
print("Collecting nvidia-cudnn-cu13==9.2")
print("Collecting cuda-toolkit==13.0")
print("Installing collected packages: a, b, c")
print(f"terminal: {sys.stdout.isatty()}")
"""
KEPT = [
    "downloading torch-2.13.0-cp311-cp311-linux.whl (526.6 MB)",
    "this torch is a CUDA build: about 3 GB to download, 6 GB on disk",
    "installing 3 packages",
]


@pytest.mark.parametrize("terminal", [False, True])
def test_of_pips_lines_the_large_things_are_shown(with_pip, capsys, monkeypatch, terminal):
    (with_pip / "pip.py").write_text(LINES)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    with (with_pip / "lock").open("w") as lock:
        pip_run.run_pip(with_pip, [], str(with_pip), lock.fileno())
    said = capsys.readouterr().out
    shown = [line.rpartition("\x1b[2K")[2].strip() for line in said.split("\n")]
    assert [line for line in shown if line] == KEPT
    assert ("Requirement already satisfied" in said) == terminal
    assert f"terminal: {terminal}" in (with_pip / "pip.log").read_text()


def test_of_a_line_written_over_itself_the_last_is_seen():
    assert pip_run.as_seen("\x1b[?25l\r\x1b[2K ━━ 1/3 MB\r\x1b[2K ━━ 3/3 MB\r") == "━━ 3/3 MB"
