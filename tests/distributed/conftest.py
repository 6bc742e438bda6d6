"""What several files train on."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import TINY_LATENTS, write_splits


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and heldout/ of random numbers; files whose samples matter have their own."""
    return write_splits(tmp_path_factory.mktemp("latents"), TINY_LATENTS)
