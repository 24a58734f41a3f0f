"""Settings for the whole suite: fixed thread count, no network, the marker that needs real retinas, no silent skips."""

from __future__ import annotations

import os
from collections.abc import Generator
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where everything must be there (continuous integration), only absent real images excuse a skipped test."""
    report = yield
    excused = item.get_closest_marker("realdata") is not None
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CFFA_REQUIRE_SERVERS") and not excused:
        report.outcome, report.longrepr = "failed", f"skipped where nothing may be: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real images (only in tests marked `realdata`)."""
    return REAL_DATA
