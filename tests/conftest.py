"""Orders tests, gives each pytest-xdist worker its share of the cores, and shares fixtures.

Fast tests come first; several workers begin with the slow ones instead, so that they end together.

torch is not imported here: it reads its thread count on import, and pytest-xdist's controller does not need torch.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from made_once import changed_files, made_once

ORDER = ("test_architecture.py", "unit", "golden", "s3", "distributed", "cluster", "e2e")
TESTS = Path(__file__).parent
os.environ["LDT_CPU_BF16"] = "0"  # engine.dtype=auto is fp32 on any CPU, also in runs that tests start
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
# On two cores, two processes with two threads each spend nine tenths of their time waiting for each other.
THREADS = max(1, len(os.sched_getaffinity(0)) // WORKERS)
os.environ["OMP_NUM_THREADS"] = str(min(THREADS, int(os.environ.get("OMP_NUM_THREADS") or THREADS)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts by folder, in the order above or in reverse; keeps tests that share a module's fixture on one worker."""
    items.sort(key=_place_in_order, reverse=WORKERS > 1)
    for item in items:
        if _shares_a_fixture(item) and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(TESTS).as_posix()))


def _place_in_order(item: pytest.Item) -> int:
    """Index of the test's folder in ORDER; other folders come last."""
    folder = item.path.relative_to(TESTS).parts[0]
    return ORDER.index(folder) if folder in ORDER else len(ORDER)


def pytest_collection_finish() -> None:
    """Excludes everything imported so far from garbage collection, which would take half a second each time."""
    gc.collect()
    gc.freeze()


def _shares_a_fixture(item: pytest.Item) -> bool:
    """Whether the test has a module fixture, which a second worker would make again."""
    found = item._fixtureinfo.name2fixturedefs if isinstance(item, pytest.Function) else {}
    return any(definitions[-1].scope in ("module", "class") for definitions in found.values())


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Restores torch's thread count, which many parts of the code set for their process."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def shared_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, Callable[[Path], object]], Path]]:
    """shared_once(name, make) -> a folder that `make(folder)` fills once for all workers, then read-only."""
    base, used = tmp_path_factory.getbasetemp(), {}
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker's folder is inside that of the whole run
        base = base.parent

    def shared(name: str, make: Callable[[Path], object]) -> Path:
        used[name] = made_once(base / "shared" / name, make)
        return used[name]

    yield shared
    changed = {name: files for name, folder in used.items() if (files := changed_files(folder))}
    assert not changed, f"tests have written to what others read: {changed}"


@pytest.fixture(scope="session")
def tiny_latents(shared_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """train/ with 64 samples and heldout/ with 8, with the shapes of synthetic.TINY_LATENTS."""
    from synthetic import TINY_LATENTS, write_splits

    return shared_once("tiny_latents", lambda folder: write_splits(folder, TINY_LATENTS))
