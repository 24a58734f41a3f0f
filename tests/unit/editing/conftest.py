"""Fixtures of this folder: the micro base and the shipped base, loaded once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from cffa_core.models.base import Base, load_base
from tests.micro_base import write_micro_base


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_micro_base(tmp_path_factory.mktemp("base") / "micro")


@pytest.fixture(scope="session")
def base(base_folder: Path) -> Base:
    return load_base(base_folder)


@pytest.fixture(scope="session")
def tiny() -> Base:
    return load_base("tiny")
