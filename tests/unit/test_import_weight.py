"""The API, the record, storage and the check of uploads start without torch; asked of a fresh interpreter each."""

from __future__ import annotations

import importlib.util
import json
import pkgutil
import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate")
PROGRAM = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def modules_of(package: str) -> list[str]:
    """A package and its modules, apart from those that only Alembic runs."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is gone: this test would prove nothing"
    paths = spec.submodule_search_locations or []
    found = [info.name for info in pkgutil.walk_packages(paths, f"{package}.")]
    return [package, *(name for name in found if ".migrations" not in name and not name.endswith("__main__"))]


GROUPS = {
    "record": [*modules_of("cffa_core.jobs"), "cffa_core.errors", "cffa_core.settings"],
    "storage": modules_of("cffa_core.storage"),
    "people": modules_of("cffa_core.people"),
    "ingest": ["cffa_core.data.ingest"],
    "api": modules_of("services.api"),
    "client": modules_of("services.client"),
}


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_nothing_heavy_is_imported(group: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *GROUPS[group]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert "cffa_core" in loaded or "services" in loaded
    assert [name for name in HEAVY if name in loaded] == []
