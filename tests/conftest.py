"""Settings for the whole suite: fixed thread count, no network, and the marker that needs real retinas."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest_plugins = ["tests.servers", "tests.record_servers"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The micro models are too small for two threads: on a busy machine these only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `realdata` tests where the real images are absent, and say where they belong."""
    if REAL_DATA.is_dir():
        return
    absent = pytest.mark.skip(reason="real images are not beside this checkout (../shared/data)")
    for item in items:
        if item.get_closest_marker("realdata"):
            item.add_marker(absent)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real images (only in tests marked `realdata`)."""
    return REAL_DATA
