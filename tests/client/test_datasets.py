"""Data sets by client and command line: file by file, broken off and resumed, versions, report, deletion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cffa_core.errors import Conflict, InvalidDataset, NotFound
from services.client.cli import app
from services.client.client import CffaClient
from services.client.datasets import DatasetCalls, Put
from services.client.servers import Servers


class Broken(Exception):
    """The network went away."""


def test_a_folder_is_sent_file_by_file_and_goes_on_after_a_break(
    client: CffaClient, pairs_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    real = DatasetCalls._put

    def put(self: DatasetCalls, piece: Put, path: Path) -> None:
        if len(sent) == 5:
            raise Broken
        sent.append(path.name)
        real(self, piece, path)

    monkeypatch.setattr(DatasetCalls, "_put", put)
    with pytest.raises(Broken):
        client.sets.upload_folder(pairs_folder, "broken off")
    first, sent[:] = len(sent), []
    monkeypatch.setattr(
        DatasetCalls, "_put", lambda self, piece, path: (sent.append(path.name), real(self, piece, path))
    )
    progress: list[tuple[int, int]] = []
    made = client.sets.upload_folder(
        pairs_folder, "broken off", resume=True, on_bytes=lambda done, total: progress.append((done, total))
    )
    files = sum(1 for path in pairs_folder.rglob("*") if path.is_file())
    assert first + len(sent) == files
    assert progress[-1][0] == progress[-1][1]
    assert made.digest == client.upload_dataset(pairs_folder, "as a zip").digest


def test_an_upload_is_given_up(client: CffaClient) -> None:
    upload = client.sets.announce("given up", {"cf/a.png": 5})
    with pytest.raises(Conflict, match="not there yet"):
        client.sets.complete(upload.id)
    client.sets.abandon(upload.id)
    assert upload.id not in {found.id for found in client.sets.uploads()}


def test_what_is_wrong_with_a_folder_is_named(client: CffaClient, tmp_path: Path) -> None:
    for name in ("cf/a.png", "fa/b.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(InvalidDataset) as caught:
        client.sets.upload_folder(tmp_path)
    assert {problem.pointer for problem in caught.value.problems} >= {"cf/a.png", "fa/b.png"}
    with pytest.raises(NotFound):
        client.sets.import_prefix("nowhere")


def test_the_command_line_uploads_versions_reports_and_deletes(
    service: Servers, client: CffaClient, pairs_folder: Path, tmp_path: Path
) -> None:
    def run(*arguments: object) -> object:
        at = [] if arguments[0] == "check" else ["--url", service.url]
        done = CliRunner().invoke(app, ["dataset", *map(str, arguments), "--json", *at])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    patient = ("--patient-pattern", "^p0000([0-2])")
    made = run("upload", pairs_folder, "--name", "by hand", "--eye-pattern", "^p[0-9]+", *patient)
    assert isinstance(made, dict)
    assert [pair.patient for pair in client.inspect.dataset_pairs(made["id"])] == ["0", "1", "2", None, None, None]
    assert made["digest"] == client.upload_dataset(pairs_folder, patient_pattern=patient[1]).digest
    checked = run("check", pairs_folder, "--quick", *patient)
    assert isinstance(checked, dict) and checked["counts"]["patients"] == 3
    version = run("version", made["id"], "--reject", "p00000", "--split", 3, 1, 1, "--seed", 4)
    assert isinstance(version, dict)
    parts = [pair.part for pair in client.inspect.dataset_pairs(version["id"])]
    assert sorted(map(str, parts)) == ["test", "train", "train", "train", "validation"]
    told = CliRunner().invoke(app, ["dataset", "report", version["id"], "--wait", "200", "--url", service.url])
    shown = [line.split() for line in told.stdout.splitlines() if line.startswith("p0")]
    assert [part for row in shown for part in row if part in ("train", "validation", "test")] == parts
    assert (version["pairs"], version["split"]) == (5, {"train": 3, "validation": 1, "test": 1})
    told = run("version", version["id"], "--patient-pattern", "^p0000([3-5])", "--split", 1, 1, 0)
    assert isinstance(told, dict)
    assert [pair.patient for pair in client.inspect.dataset_pairs(told["id"])] == ["1", "2", "3", "4", "5"]
    client.sets.delete(told["id"])
    listed = run("list")
    assert isinstance(listed, list)
    assert {made["id"], version["id"]} <= {item["id"] for item in listed}
    report = run("report", made["id"], "--wait", 200, "--pictures", tmp_path)
    assert isinstance(report, dict)
    assert report["survey"]["summary"]["pairs"] == 6
    assert bool(report["survey"]["summary"]["flagged"]) == bool(list(tmp_path.glob("*.png")))
    for item in (made, version):
        done = CliRunner().invoke(app, ["dataset", "delete", item["id"], "--url", service.url])
        assert done.exit_code == 0, done.output
    assert made["id"] not in {item["id"] for item in run("list")}  # type: ignore[attr-defined]


def test_a_check_looks_into_the_pairs(pairs_folder: Path) -> None:
    done = CliRunner().invoke(app, ["dataset", "check", str(pairs_folder), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["survey"]["summary"]["pairs"] == 6
    patterns = ["--eye-pattern", "^p0000(.)", "--patient-pattern", "^p0000([01])"]
    shown = CliRunner().invoke(app, ["dataset", "check", str(pairs_folder), "--quick", *patterns])
    assert "6 pairs, 6 eyes of 2 known patients, layout: folders" in " ".join(shown.output.split())
    assert shown.stdout.split()[:3] == ["pair", "eye", "patient"]
    plain = CliRunner().invoke(app, ["dataset", "check", str(pairs_folder), "--quick"])
    assert plain.stdout.split()[:3] == ["pair", "eye", "size"]
    quick = CliRunner().invoke(app, ["dataset", "check", str(pairs_folder), "--json", "--quick"])
    assert "survey" not in json.loads(quick.stdout)


def test_a_number_that_is_none_is_refused_in_one_line(service: Servers) -> None:
    asked = ["dataset", "version", "ds_" + "0" * 20, "--split", "nan", "0", "1", "--url", service.url]
    done = CliRunner().invoke(app, asked)
    assert (done.exit_code, isinstance(done.exception, SystemExit)) == (1, True)
    assert "not finite" in done.output


def test_a_zip_may_be_registered_on_its_way_in(service: Servers, pairs_folder: Path) -> None:
    done = CliRunner().invoke(app, ["upload", str(pairs_folder), "--auto-register", "--json", "--url", service.url])
    assert done.exit_code == 0, done.output
