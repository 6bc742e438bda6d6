"""Makes .venv what the checkout needs and says what it does; silent if nothing is to do. Standard library only.

.venv/installed, written last, records what a complete one was made of; .venv/unfinished exists while it is being made.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pip_run import Refused, run_pip

ROOT = Path(__file__).resolve().parents[1]
FETCHED_GB, ON_DISK_GB = 0.6, 2.4  # with torch's CPU build
WITHOUT_TORCH_FETCHED_GB = 0.4
WITHOUT_TORCH_GB = 1.6  # on disk
SCANT = 30e6  # bytes: Python's own part of a .venv
GPU = Path("/proc/driver/nvidia/version")
TORCH_FAMILY = ("torch", "torchvision", "xformers", "triton")
WEIGHTS = ".ci/weights.txt"
VENV_OPTIONS: tuple[str, ...] = ()
KEPT = {"lock", "unfinished"}  # files of .venv that stay when it is made again


@dataclass(frozen=True, slots=True)
class Made:
    """What a .venv was made of, and where: if moved, it would still run the code at the old place."""

    root: str
    python: str  # the interpreter below it
    version: str  # "3.11"
    needs: str  # hash of what pyproject.toml and constraints.txt ask for
    system_torch: bool

    @classmethod
    def read(cls, note: Path) -> Made | None:
        """None if there is no note, or not one of ours."""
        try:
            return cls(**json.loads(note.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, note: Path) -> None:
        draft = note.with_name("draft")
        draft.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(draft, note)


def wanted(root: Path, before: Made | None, asked: Mapping[str, str]) -> Made:
    """The .venv to make. Without PYTHON= or SYSTEM_TORCH=, these two stay as they were before."""
    python, version = this_python(root), f"{sys.version_info[0]}.{sys.version_info[1]}"
    if before and not asked.get("PYTHON") and version_of(Path(before.python)) == before.version:
        python, version = before.python, before.version
    system_torch = asked.get("SYSTEM_TORCH") or ("1" if before and before.system_torch else "0")
    if system_torch not in ("0", "1"):
        raise Refused(f"SYSTEM_TORCH={system_torch} must be 1 (use the system's torch) or 0 (install one).")
    return Made(str(root), python, version, hash_of_needs(root), system_torch == "1")


def this_python(root: Path) -> str:
    """The Python that runs this, by one name; for .venv's own, the Python below it."""
    if sys.prefix == sys.base_prefix or Path(sys.prefix).resolve() == (root / ".venv").resolve():
        return os.path.realpath(sys._base_executable)
    return str(Path(sys.prefix).resolve() / "bin" / "python")


def hash_of_needs(root: Path) -> str:
    """Hash of dependencies, extras, constraints and weights: other settings in pyproject.toml install nothing."""
    project = tomllib.loads((root / "pyproject.toml").read_text())
    files = [path.read_text() for path in (root / "constraints.txt", root / WEIGHTS) if path.exists()]
    needs = [project["project"], project["tool"]["setuptools"], *files]
    return hashlib.sha256(json.dumps(needs, sort_keys=True).encode()).hexdigest()[:16]


def why_anew(venv: Path, before: Made | None, want: Made) -> str | None:
    """Why .venv must be made from scratch: "" if it is still empty; None if it can be updated."""
    if not any(p.name not in KEPT for p in venv.iterdir()):
        return ""
    if (venv / "unfinished").exists():
        return "the last set-up did not finish"
    runs = version_of(venv / "bin" / "python")
    if runs is None:
        return "its Python is gone"
    if before is None:
        return None  # made by hand
    if before.root != want.root:
        return f"it was made in {before.root}"
    if (before.python, before.version) != (want.python, want.version) or runs != before.version:
        return f"it was made with Python {before.version} of {before.python}"
    if before.system_torch != want.system_torch:
        return f"it was made with SYSTEM_TORCH={int(before.system_torch)}"
    return None


def version_of(python: Path) -> str | None:
    ask = [str(python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def set_up(root: Path = ROOT, asked: Mapping[str, str] = os.environ) -> None:
    venv = root / ".venv"
    if os.pathsep in str(root):
        raise Refused(f"Python can't make an environment in a path with '{os.pathsep}' ({root}): rename the folder.")
    venv.resolve().mkdir(exist_ok=True)
    with alone(venv) as lock:
        before = Made.read(venv / "unfinished") or Made.read(venv / "installed")
        want = wanted(root, before, asked)
        reason = why_anew(venv, before, want)
        if reason is None and before == want:
            return
        if venv.is_symlink() and not (before and before.root == want.root) and reason != "":
            raise Refused(f".venv is a link to {venv.resolve()}, which this checkout did not make: remove the link.")
        go_on_with(want.python, root, asked)
        build(venv, before, want, reason, lock)


def go_on_with(python: str, root: Path, asked: Mapping[str, str]) -> None:
    """Continue in that Python, if it is another one: only it can tell what packages it has."""
    if python != this_python(root):
        sys.stdout.flush()
        os.execve(python, [python, __file__], {**asked, "PYTHON": python})  # releases the lock


@contextmanager
def alone(venv: Path) -> Iterator[int]:
    """One set-up at a time in a checkout. pip inherits the lock: it may outlive the process that started it."""
    with (venv / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another make is setting up .venv: waiting for it.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def build(venv: Path, before: Made | None, want: Made, reason: str | None, lock: int) -> None:
    """Make .venv from scratch if there is a reason, else update what is there."""
    if reason is not None:
        check_python(want)
    system = torch_of_system(want) if want.system_torch else None
    want.write(venv / "unfinished")
    (venv / "installed").unlink(missing_ok=True)
    if reason is None:
        print("Bringing .venv up to date with pyproject.toml and constraints.txt.", flush=True)
    else:
        print(f"Setting up .venv again: {reason}." if reason else "Setting up .venv, once.", flush=True)
        announce(venv, want, system)
        make_venv(venv, want, system, lock)
    try:
        install(venv, want, system, lock)
    except Refused:
        if reason is None:  # pip has left .venv as it was
            leave(venv, before)
        raise
    check_torch(venv)  # raises: the next set-up starts from scratch, as pip would take the broken torch for installed
    leave(venv, want)


def install(venv: Path, want: Made, system: SystemTorch | None, lock: int) -> None:
    constraints = constraints_beside(venv, want, system)
    run_pip(venv, ["install", "-c", str(constraints), "-e", ".[test]"], want.root, lock)
    if Path(want.root, WEIGHTS).exists():
        run_pip(venv, ["install", "--no-deps", "-r", WEIGHTS], want.root, lock)


def leave(venv: Path, made: Made | None) -> None:
    """Mark .venv as complete, and record what it was made of."""
    (venv / "unfinished").unlink()
    if made:
        made.write(venv / "installed")


def check_python(want: Made) -> None:
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        raise Refused(
            f"{want.python} has no module {missing[0]}: install it (Debian, Ubuntu: apt install "
            f"python{want.version}-venv), or use another Python: make ... PYTHON=/path/to/python3.11"
        )


def make_venv(venv: Path, want: Made, system: SystemTorch | None, lock: int) -> None:
    for path in venv.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    options = [*VENV_OPTIONS, *(["--system-site-packages"] if system else [])]
    command = [want.python, "-m", "venv", *options, str(venv.resolve())]  # venv refuses a link
    done = subprocess.run(command, capture_output=True, text=True, check=False, pass_fds=[lock])
    if done.returncode:
        if shutil.disk_usage(venv).free < SCANT:  # Python's message does not say so
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        said = (done.stdout + done.stderr).strip().splitlines() or [f"exit {done.returncode}"]
        raise Refused(f"{want.python} -m venv failed: {said[-1]}")
    if system and system.beyond_base:  # PYTHON= is a venv's: its packages are not those of the Python below it
        site = venv / "lib" / f"python{want.version}" / "site-packages"
        (site / "system.pth").write_text("\n".join(system.beyond_base) + "\n")


@dataclass(frozen=True, slots=True)
class SystemTorch:
    """What this Python has of torch's family, and where, if that is not its own folder."""

    versions: Mapping[str, str]
    beyond_base: tuple[str, ...]


def torch_of_system(want: Made) -> SystemTorch:
    versions = {}
    for name in TORCH_FAMILY:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "torch" not in versions:
        raise Refused(
            f"SYSTEM_TORCH=1 is set, but {sys.executable} has no torch: name a Python that has one (PYTHON=...), "
            "or omit SYSTEM_TORCH."
        )
    beyond = [p for p in sys.path if p.endswith("site-packages")] if sys.prefix != sys.base_prefix else []
    return SystemTorch(versions, tuple(beyond))


def constraints_beside(venv: Path, want: Made, system: SystemTorch | None) -> Path:
    """constraints.txt, or a copy in which torch and its family are the system's versions."""
    given = Path(want.root, "constraints.txt")
    if system is None:
        return given
    family = ("torch==", "torchvision==", *(f"{name}==" for name in system.versions))
    lines = [line for line in given.read_text().splitlines() if not line.startswith(family)]
    lines += [f"{name}=={version}" for name, version in system.versions.items()]
    (venv / "constraints.txt").write_text("\n".join(lines) + "\n")
    return venv / "constraints.txt"


def announce(venv: Path, want: Made, system: SystemTorch | None) -> None:
    """Print which Python and torch are used and what that costs, before it is spent; refuse if there is no room."""
    print(f"  Python {want.version} of {want.python}; NVIDIA GPU: {'found' if GPU.exists() else 'not found'}")
    fetched, on_disk = (WITHOUT_TORCH_FETCHED_GB, WITHOUT_TORCH_GB) if system else (FETCHED_GB, ON_DISK_GB)
    if system:
        print(f"  torch {system.versions['torch']}, the system's")
    else:
        print("  torch from pip's package index: the CPU build if the index has one, otherwise the CUDA build")
    check_room(venv, on_disk, fetched)
    print(f"  up to {fetched} GB to download (less if it is in pip's cache), {on_disk} GB on disk, 1.5 to 3 minutes")
    print(f"  pip's output: {venv / 'pip.log'}", flush=True)


def check_room(venv: Path, on_disk_gb: float, fetched_gb: float) -> None:
    for place, needed in ((venv, on_disk_gb), (Path(tempfile.gettempdir()), fetched_gb)):
        free = shutil.disk_usage(place).free / 1e9
        if free < needed:
            raise Refused(
                f"{place} has {free:.1f} GB free, but set-up needs about {needed} GB there: free some space"
                + ("." if place == venv else ", or set TMPDIR= to another folder.")
            )


def check_torch(venv: Path) -> None:
    """Import torch once, so that a build that this machine can't load is reported now."""
    ask = "import torch; print(torch.__version__, torch.version.cuda or 'CPU', torch.cuda.is_available())"
    done = subprocess.run([str(venv / "bin" / "python"), "-c", ask], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(f"the installed torch can't be loaded: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    version, build_for, gpu = done.stdout.split()
    print(f".venv is ready: torch {version} ({'CUDA ' * (build_for != 'CPU')}{build_for}).")
    if GPU.exists() and gpu == "False":
        print("  This torch can't use the machine's GPU: make setup SYSTEM_TORCH=1 uses the system's torch.")


def main() -> int:
    try:
        set_up()
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nSet-up interrupted: the next make starts it again.", file=sys.stderr)
        return 130
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk or quota is full: free some space" if full else "check the folder's permissions"
        print(f"error: .venv can't be written ({error}): {what}, and start again.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
