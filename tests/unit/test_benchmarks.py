"""Every program of benchmarks/ can be imported: what it takes from the library, the services and the tests is there."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = sorted(path.stem for path in FOLDER.glob("*.py"))
assert MODULES, "no benchmark was found: this test would prove nothing"


@pytest.mark.parametrize("name", MODULES)
def test_a_benchmark_can_be_imported(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")
