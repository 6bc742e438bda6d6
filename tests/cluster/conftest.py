"""One Slurm for all tests of this folder; where none can be made, they are skipped and the reason is printed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from slurm_cluster import Cluster, missing

_reason: list[str] = []


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes with two pretended GPUs each."""
    if reason := missing():
        _reason.append(reason)
        pytest.skip(f"no Slurm: {reason}")
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as started:
        yield started


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _reason:
        terminalreporter.write_line(f"tests/cluster skipped: {_reason[0]}")
