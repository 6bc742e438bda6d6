"""What several files train on."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def latents(tiny_latents: Path) -> Path:
    """train/ and heldout/ of random numbers; files whose samples matter have their own."""
    return tiny_latents
