"""Tests of one xdist_group stay on one worker: a pytest that pytest-xdist does not know lets them apart in silence."""

from __future__ import annotations

import os

import pytest


@pytest.mark.xdist_group("checked")
def test_a_group_is_part_of_the_id_by_which_tests_are_dealt_out(request: pytest.FixtureRequest) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("one process has no workers to deal tests out to")
    assert request.node.nodeid.endswith("@checked")
