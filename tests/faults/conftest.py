"""Fixtures of the fault tests: an installation with short leases, and the micro base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.micro_base import write_micro_base
from tests.worker.world import World


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with the micro base in it."""
    folder = tmp_path_factory.mktemp("models")
    write_micro_base(folder / "micro")
    return folder


@pytest.fixture
def world(tmp_path: Path, models_dir: Path) -> Iterator[World]:
    """A fresh installation that notices within 6 s that a worker is gone."""
    world = World(tmp_path / "home", models_dir, lease_seconds=6.0)
    yield world
    world.close()
