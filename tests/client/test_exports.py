"""``cffa export`` and the client's exports: of a running service and of an archive on this machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cffa_core.errors import CorruptArtifact
from cffa_core.jobs.spec import ExportSettings, GenerationSpec, Kind
from cffa_core.jobs.state import UnitKind
from cffa_core.jobs.store import JobStore
from cffa_core.recipes.archive import verify_archive
from cffa_core.settings import Settings
from cffa_core.storage.open import open_store
from services.client.cli import app
from services.client.client import CffaClient
from services.client.exports import fetch_export
from services.client.problems import ApiConflict
from services.client.resources import Archives
from services.client.servers import free_port
from services.worker import loop
from tests.api.driving import Worker
from tests.client.test_people import served
from tests.generated_parts import commit_part, commit_whole, write_archive
from tests.record_cases import training_job
from tests.worker.world import running_worker

COUNT = 5


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def report_of(result: Any) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("exports") / "home", port=free_port(), poll_seconds=0.1)


@pytest.fixture(scope="module")
def url(settings: Settings) -> Iterator[str]:
    """A served API with a real worker that takes exports."""
    with served(settings) as address, running_worker(loop.Worker(settings, kinds=[Kind.EXPORT])):
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[CffaClient]:
    with CffaClient(url) as connected:
        yield connected


@pytest.fixture(scope="module")
def generated(settings: Settings, url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A succeeded generation job whose pairs nobody drew."""
    folder = tmp_path_factory.mktemp("by hand")
    store, objects = JobStore(settings.record_url), open_store(settings)
    training_job(store, "local")
    hand = Worker(store, objects, folder)
    job, _ = store.create_job("local", GenerationSpec(model_id=hand.train(), count=COUNT, part_size=2))
    while (claim := store.claim("by hand", [Kind.GENERATION], lease_seconds=60)) is not None:
        (commit_part if claim.kind is UnitKind.PART else commit_whole)(store, objects, claim, folder)
    yield job.id
    store.close()


def test_a_service_and_this_machine_export_the_same(
    url: str, client: CffaClient, generated: str, tmp_path: Path
) -> None:
    wanted = ("--shard-size", "3", "--pairs", "0-3", "--json")
    told = report_of(run("export", generated, "-o", tmp_path / "one", *wanted, "--url", url))
    assert [(file["filename"], file["pairs"]) for file in told["files"]] == [
        ("pairs-000000.zip", 3),
        ("pairs-000001.zip", 1),
    ]
    manifests = [verify_archive(path) for path in sorted((tmp_path / "one").glob("*.zip"))]
    assert [pair["index"] for manifest in manifests for pair in manifest["pairs"]] == [0, 1, 2, 3]
    client.download_archive(generated, tmp_path / "whole.zip")
    whole = verify_archive(tmp_path / "whole.zip")
    assert [pair for manifest in manifests for pair in manifest["pairs"]] == whole["pairs"][:4]
    assert manifests[0]["synthetic"] is True and manifests[0]["model_digest"] == whole["model_digest"]
    here = report_of(run("export", tmp_path / "whole.zip", "-o", tmp_path / "two", *wanted))
    assert [file["sha256"] for file in here["files"]] == [file["sha256"] for file in told["files"]]


def test_an_export_can_be_fetched_later_and_again(url: str, client: CffaClient, generated: str, tmp_path: Path) -> None:
    later = ("--form", "dicom", "--no-wait", "--json", "--url", url)
    posted = report_of(run("export", generated, "-o", tmp_path, *later))
    assert posted["kind"] == "export"
    client.wait(posted["id"], timeout=120)
    downloaded = run("download", posted["id"], "-o", tmp_path / "out", "--url", url)
    assert downloaded.exit_code == 0 and "dicom-000000.zip" in downloaded.stdout
    seen: list[tuple[int, int]] = []
    found = client.download_export(posted["id"], tmp_path / "out", on_bytes=lambda *counts: seen.append(counts))
    assert seen == [], "everything is there already"
    (tmp_path / "out" / "manifest.json").unlink()
    client.download_export(posted["id"], tmp_path / "out", on_bytes=lambda *counts: seen.append(counts))
    total = sum(file.bytes for file in found.parts) + (found.manifest.bytes if found.manifest else 0)
    assert seen[-1] == (total, total)
    for file in found.parts:
        data = (tmp_path / "out" / file.filename).read_bytes()
        assert hashlib.sha256(data).hexdigest() == file.sha256


def test_what_is_not_there_is_said(url: str, client: CffaClient, generated: str, tmp_path: Path) -> None:
    refused = run("export", generated, "-o", tmp_path / "out", "--accepted-only", "--url", url)
    assert refused.exit_code == 1 and "no_gate" in refused.output
    failed = run("export", generated, "-o", tmp_path / "out", "--min-alignment", "2", "--url", url)
    assert failed.exit_code == 1 and "no pair fits" in failed.output
    job = client.submit_export(generated, ExportSettings())
    with pytest.raises(ApiConflict):
        client.submit_export(job.id, ExportSettings())
    assert not (tmp_path / "out").exists()


def test_an_archive_here_needs_no_service(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "source", 6)
    told = report_of(
        run("export", archive, "-o", tmp_path / "out", "--form", "webdataset", "--pairs", "1,3-4", "--json")
    )
    assert [(file["name"], file["pairs"]) for file in told["files"]] == [("pairs-000000.tar", 3)]
    again = run("export", archive, "-o", tmp_path / "out")
    assert again.exit_code == 1 and "nothing is written over" in again.output


@pytest.mark.parametrize("pairs", ["x", "3-1", "1,", "-2", "0-100000,5"])
def test_bad_numbers_are_refused(tmp_path: Path, pairs: str) -> None:
    refused = run("export", tmp_path, "-o", tmp_path / "out", f"--pairs={pairs}")
    assert refused.exit_code == 1 and "--pairs" in refused.output


@pytest.mark.parametrize("name", ["../evil.tar", "a/b.tar", "", ".."])
def test_names_that_leave_the_folder_are_refused(client: CffaClient, tmp_path: Path, name: str) -> None:
    file = {"number": 0, "pairs": 1, "filename": name, "bytes": 1, "sha256": "0" * 64, "url": "http://127.0.0.1:9/"}
    manifest = {"name": "manifest.json", "bytes": 1, "sha256": "0" * 64, "url": "http://127.0.0.1:9/"}
    listing = Archives.model_validate({"parts": [file | {"expires_at": "2026-11-21T12:00:00Z"}], "manifest": manifest})
    with pytest.raises(CorruptArtifact, match="no name for a file"):
        fetch_export(client._transport.signed, lambda: listing, lambda number: listing.parts[0], tmp_path, None)
    assert list(tmp_path.iterdir()) == []
