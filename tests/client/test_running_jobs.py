"""Asking things of a running training, terms and filters, backup and restore: client and command line on a service."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from cffa_core.errors import Conflict
from cffa_core.jobs.records import JobFilter
from services.client.cli import app
from services.client.client import CffaClient
from services.client.servers import Servers
from tests.client.conftest import TRAINING

# One service for the whole folder, also where tests are spread over processes.
pytestmark = pytest.mark.xdist_group("client service")
LONG = (
    *(field for field in TRAINING if "every" not in field and field != "steps=3"),
    *(f"{field}=5000" for field in ("steps", "validate_every", "checkpoint_every", "preview_every")),
)


def run(arguments: tuple[str | Path, ...], **environment: str) -> Result:
    return CliRunner(env=environment).invoke(app, [str(argument) for argument in arguments])


def printed(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def until(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + 180.0
    while not (found := what()):
        assert time.monotonic() < end, "did not happen within 180 s"
        time.sleep(0.1)
    return found


def test_a_training_is_asked_for_pictures_while_it_runs_and_backed_up(
    service: Servers, client: CffaClient, pairs_folder: Path, tmp_path: Path
) -> None:
    sets = [argument for field in LONG for argument in ("--set", field)]
    terms = ("--deadline", "3600", "--keep-days", "30")

    def cffa(*arguments: str | Path) -> Result:
        return run(arguments, CFFA_URL=service.url)

    job = printed(cffa("submit", "train", "--dataset", pairs_folder, *sets, *terms, "--json"))
    job_id, dataset_id = job["id"], job["spec"]["dataset_id"]
    assert job["deadline_at"] > job["created_at"] and job["wishes"] == []
    assert [found["id"] for found in printed(cffa("jobs", "--dataset", dataset_id, "--json"))] == [job_id]
    assert printed(cffa("jobs", "--dataset", dataset_id, "--before", "2020-01-01", "--json")) == []
    posted = client.job(job_id).created_at
    assert [found.id for found in client.jobs(within=JobFilter(created_after=posted))] == [job_id]

    until(lambda: client.job(job_id).progress.stage == "training")
    assert printed(cffa("job", "sample", job_id, "--json"))["id"] == job_id
    assert cffa("job", "checkpoint", job_id).exit_code == 0
    until(lambda: not client.job(job_id).wishes)
    result = cffa("job", "previews", job_id, "--out", tmp_path / "pictures")
    assert result.exit_code == 0, result.stderr
    (preview,) = client.previews(job_id)
    assert preview.asked
    with Image.open(tmp_path / "pictures" / f"step_{preview.step:06d}_asked.png") as sheet:
        assert sheet.size == (640, 160)

    home = {"CFFA_HOME": str(service.home)}
    made = printed(run(("backup", "--to", tmp_path / "backup", "--json"), **home))
    assert made["objects"] > 6 and (tmp_path / "backup" / "manifest.json").is_file()
    client.cancel(job_id)
    assert client.wait(job_id, timeout=120).expires_at is not None
    with pytest.raises(Conflict):
        client.checkpoint_now(job_id)

    restored = {"CFFA_HOME": str(tmp_path / "home")}
    assert printed(run(("restore", "--from", tmp_path / "backup", "--json"), **restored))["objects"] == made["objects"]
    checked = printed(run(("verify-store", "--deep", "--json"), **restored))
    assert (checked["objects"], checked["wrong"]) == (made["objects"], 0)
    next((tmp_path / "home" / "objects" / "jobs").rglob("sample/sheet.png")).unlink()
    broken = run(("verify-store",), **restored)
    assert broken.exit_code == 1 and "sample/sheet.png" in broken.stderr
