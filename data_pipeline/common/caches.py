"""Where packages keep their caches: inside the checkout's .venv, also for scripts that are started by hand."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def keep_caches_in_venv(environment: MutableMapping[str, str] = os.environ, prefix: str = sys.prefix) -> None:
    """Set those variables of .ci/caches that are not set yet. Does nothing if the interpreter is not that of .venv, as
    on a cluster with its own environment."""
    venv, listed = ROOT / ".venv", ROOT / ".ci" / "caches"
    if not listed.is_file() or Path(prefix).resolve() != venv.resolve():
        return
    for line in listed.read_text().splitlines():
        variable, _, folder = line.partition(" ")
        environment.setdefault(variable, str(venv / "cache" / folder))
