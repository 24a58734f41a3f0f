"""Which kinds of jobs a worker takes: the command line, the setting, and names that do not exist."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cffa_core.errors import InvalidSettings
from cffa_core.jobs.spec import Kind
from services.worker.__main__ import parse_kinds


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("", tuple(Kind)),
        (" , ", tuple(Kind)),
        ("generation", (Kind.GENERATION,)),
        ("generation, training,generation", (Kind.GENERATION, Kind.TRAINING)),
    ],
)
def test_a_list_of_kinds(text: str, kinds: tuple[Kind, ...]) -> None:
    assert parse_kinds(text) == kinds


def test_other_names_are_refused() -> None:
    with pytest.raises(InvalidSettings, match="called painting; there are training, generation, evaluation, export"):
        parse_kinds("training,painting")


def test_a_worker_of_no_known_kind_does_not_start(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.worker", "--kinds", "painting"],
        env={**os.environ, "CFFA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "invalid_settings" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_worker_with_settings_that_are_not_valid_names_them(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.worker"],
        env={**os.environ, "CFFA_HOME": str(tmp_path), "CFFA_MODE": "cluster", "CFFA_S3_SECRET_KEY": "minioadmin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "CFFA_*: cluster mode needs CFFA_DATABASE_URL" in done.stderr
    assert "Traceback" not in done.stderr and "minioadmin" not in done.stderr
