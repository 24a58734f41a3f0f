"""The place of the fault tests: one per test process, so that servers and the micro base are made once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.faults.place import Place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Where scenarios happen; see ``Place``."""
    with contextlib.closing(Place(tmp_path_factory.mktemp("faults"))) as made:
        yield made
