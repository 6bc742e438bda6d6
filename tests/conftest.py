"""Fast tests first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ORDER = ("test_architecture.py", "unit", "golden", "s3", "distributed", "cluster", "e2e")
TESTS = Path(__file__).parent
os.environ["LDT_CPU_BF16"] = "0"  # engine.dtype=auto is fp32 on any CPU, in runs that tests start, too


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """By folder, in the order above; within a folder as collected."""
    items.sort(key=lambda item: ORDER.index(item.path.relative_to(TESTS).parts[0]))
