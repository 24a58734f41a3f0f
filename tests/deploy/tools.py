"""What lies in deploy/, as the real tools see it: compose's resolved configuration, the chart as Helm renders it.

The tools come from requirements/deploy.txt. Without them these tests are skipped and say how to get them; where
``CFFA_REQUIRE_SERVERS`` is set (continuous integration) they fail instead.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "cffa"
OWN_SERVICES = ("api", "setup", "worker-cpu", "worker-gpu", "flower")
SERVERS = ("postgres", "redis", "objects", "prometheus", "grafana")
_HOW = f"{Path(sys.executable).name} -m pip install --require-hashes --no-deps -r requirements/deploy.txt"


def program(name: str) -> str:
    """Path of a tool's program, beside this Python or on the path."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        _missing(name)
    return str(found)


def module(name: str) -> Any:
    """A tool that is a Python module."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        _missing(name)


def _missing(name: str) -> None:
    message = f"needs {name}: {_HOW}"
    if os.environ.get("CFFA_REQUIRE_SERVERS"):
        pytest.fail(message)
    pytest.skip(message)


@cache
def compose(*overrides: str) -> dict[str, Any]:
    """``docker compose config`` of docker-compose.yml with all profiles: merged, interpolated, validated.

    What compose escapes for a second reading (``$$``) is as the container gets it.
    """
    files = [argument for name in ("docker-compose.yml", *overrides) for argument in ("-f", str(ROOT / name))]
    # Only the defaults of the file count, not what this machine happens to have set.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CFFA_", "TORCH_"))}
    done = subprocess.run(
        [program("docker-compose"), *files, "--profile", "*", "config", "--format", "json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    resolved: dict[str, Any] = json.loads(done.stdout.replace("$$", "$"))
    return resolved


def services() -> dict[str, Any]:
    """The services of docker-compose.yml by name."""
    found: dict[str, Any] = compose()["services"]
    return found


def render(**values: Any) -> list[dict[str, Any]]:
    """The chart's objects, as release ``demo`` in the namespace ``eyes``; raises what Helm raises."""
    chart = module("helm_python").Chart.load(CHART)
    rendered = chart.render(values, name="demo", namespace="eyes")
    objects = [
        found for path, text in sorted(rendered.items()) if path.endswith(".yaml") for found in yaml.safe_load_all(text)
    ]
    return [found for found in objects if found is not None]
