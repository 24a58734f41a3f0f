"""``cffa demo`` as a process, with the micro base: what it leaves, what it says last, and that it cleans up."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from cffa_core.recipes.archive import verify_archive


def start(models_dir: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "services.client.cli",
        "demo",
        "--base",
        "micro",
        "--resolution",
        "64",
        "--pairs",
        "2",
    ]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CFFA_MODELS_DIR": str(models_dir), "CFFA_THREADS": "1"},
    )


def test_the_last_line_says_what_was_made(models_dir: Path, pairs_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = start(models_dir, "--data", pairs_folder, "--steps", "2", "--out", out)
    printed, said = running.communicate(timeout=280)
    assert running.returncode == 0, said
    report = json.loads(printed.splitlines()[-1])
    assert list(report) == ["pairs", "archive", "sha256", "contact_sheet", "seconds", "url"]
    assert report["pairs"] == len(verify_archive(out / "pairs.zip")["pairs"]) == 2
    assert report["sha256"] == hashlib.sha256((out / "pairs.zip").read_bytes()).hexdigest()
    assert Path(report["archive"]) == out / "pairs.zip"
    with Image.open(report["contact_sheet"]) as sheet:
        assert sheet.width > 3 * 256
    for step in range(1, 7):
        assert f"[{step}/6]" in said
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(report["url"], timeout=2)


def test_an_interrupted_demo_stops_what_it_started(models_dir: Path, pairs_folder: Path, tmp_path: Path) -> None:
    running = start(models_dir, "--data", pairs_folder, "--steps", "100000", "--out", tmp_path)
    assert running.stderr is not None
    watchdog = threading.Timer(150, running.kill)
    watchdog.start()
    said = ""
    for line in running.stderr:
        said += line
        if "training: training" in line:
            break
    running.send_signal(signal.SIGINT)
    printed, rest = running.communicate(timeout=60)
    watchdog.cancel()
    assert running.returncode not in (0, -signal.SIGKILL), said
    assert printed == ""
    assert "interrupted: stopping the service" in rest
    assert "Traceback" not in rest
    found = re.search(r"it is at (http://\S+)", said)
    assert found
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{found.group(1)}/livez", timeout=2)
