"""Attention and captioned jobs from the command line and the client; a worker's half is done by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from cffa_core.errors import CorruptArtifact
from cffa_core.jobs.spec import AttentionSettings, CaptionedSettings, CaptionedTrainSettings, Kind
from cffa_core.jobs.store import JobStore
from cffa_core.settings import Settings
from cffa_core.storage.open import open_store
from services.client.cli import app
from services.client.client import CffaClient
from services.client.servers import free_port
from tests.api.driving import Worker, captions, good_upload, png
from tests.client.test_people import served

FILES = {"report.json": b"{}", "report.md": b"# Attention\n", "overlays/cf vessels.png": png(1)}


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def posted(*arguments: str | Path) -> dict[str, Any]:
    """The job that a command posts."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    job: dict[str, Any] = json.loads(result.stdout)
    return job


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("methods") / "home", port=free_port())


@pytest.fixture(scope="module")
def url(settings: Settings) -> Iterator[str]:
    with served(settings) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[CffaClient]:
    with CffaClient(url) as connected:
        yield connected


@pytest.fixture(scope="module")
def worker(settings: Settings, url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    store = JobStore(settings.record_url)
    yield Worker(store, open_store(settings), tmp_path_factory.mktemp("by hand"))
    store.close()


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zip of three pairs with captions."""
    path = tmp_path_factory.mktemp("eyes") / "eyes.zip"
    path.write_bytes(good_upload(3, captions("m000", "m001", "m002")))
    return path


@pytest.fixture(scope="module")
def models(url: str, worker: Worker, eyes: Path) -> tuple[str, str, str]:
    """A data set, the training of a captioned model on it, and a pair model."""
    job = posted("submit", "captioned-train", "--dataset", eyes, "--steps", "2", "--modality", "cf", "--url", url)
    assert (job["kind"], job["spec"]["steps"], job["spec"]["modality"]) == ("captioned_training", 2, "cf")
    worker.train(Kind.CAPTIONED_TRAINING)
    dataset_id = job["spec"]["dataset_id"]
    posted("submit", "train", "--dataset", dataset_id, "--steps", "2", "--url", url)
    return dataset_id, job["id"], worker.train()


def test_attention_from_post_to_a_folder_of_files(
    url: str, client: CffaClient, worker: Worker, models: tuple[str, str, str], tmp_path: Path
) -> None:
    options = ("--kind", "cross", "--kind", "self", "--point", "0.5,0.25", "--token", "vessels", "--index", "3")
    job = posted("submit", "attention", "--model", models[2], *options, "--steps", "4", "--url", url)
    spec = job["spec"]
    assert (spec["kinds"], spec["points"], spec["tokens"]) == (["cross", "self"], [[0.5, 0.25]], ["vessels"])
    assert (spec["index"], spec["sampler"]["steps"]) == (3, 4)
    worker.compute(Kind.ATTENTION, FILES)
    result = run("download", job["id"], "--out", tmp_path, "--json", "--url", url)
    assert result.exit_code == 0, result.output
    folder = tmp_path / f"{job['id']}-report"
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == FILES
    by_client = client.submit_attention(models[2], AttentionSettings(index=3), priority=1)
    assert (by_client.kind, by_client.priority) == (Kind.ATTENTION, 1)
    client.cancel(by_client.id)


def test_texts_and_data_sets_for_a_captioned_model(
    url: str, client: CffaClient, models: tuple[str, str, str], tmp_path: Path
) -> None:
    dataset_id, training, _ = models
    (tmp_path / "texts.txt").write_text("second\n\nthird\n")
    drawn = posted(
        *("submit", "captioned", "--model", training, "--text", "first", "--texts", tmp_path / "texts.txt"),
        *("--per-text", "2", "--no-diffusion", "--url", url),
    )["spec"]
    assert (drawn["task"], drawn["texts"]) == ("text_to_image", ["first", "second", "third"])
    assert (drawn["images_per_text"], drawn["use_diffusion"]) == (2, False)
    said = posted("submit", "captioned", "--model", training, "--dataset", dataset_id, "--captions", "2", "--url", url)
    assert (said["spec"]["task"], said["spec"]["dataset_id"], said["spec"]["captions"]) == (
        *("image_to_text", dataset_id),
        2,
    )
    again = client.submit_captioned(
        said["spec"]["model_id"], CaptionedSettings(task="image_to_text"), dataset_id=dataset_id
    )
    assert again.spec["dataset_id"] == dataset_id
    assert client.submit_captioned_training(dataset_id, CaptionedTrainSettings(steps=3)).spec["steps"] == 3


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("captioned", "--model", "mdl_" + "0" * 20), "task"),
        (("captioned", "--model", "mdl_" + "0" * 20, "--text", "a", "--dataset", "ds_" + "0" * 20), "one of the two"),
        (("captioned", "--text", "a"), "--model"),
        (("captioned-train",), "--dataset"),
        (("attention",), "--model"),
        (("attention", "--model", "mdl_" + "0" * 20, "--kind", "cross", "--kind", "cross"), "each once"),
    ],
)
def test_what_is_missing_or_double_is_said_before_anything_is_sent(arguments: tuple[str, ...], fault: str) -> None:
    result = run("submit", *arguments, "--url", "http://127.0.0.1:9")
    assert result.exit_code == 1 and fault in result.output


def test_a_point_that_is_none_is_wrong_usage() -> None:
    assert run("submit", "attention", "--model", "x", "--point", "middle").exit_code == 2


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "a/../../evil.png", "", ".", "a\\b.png"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    file = {"name": name, "bytes": 1, "sha256": "0" * 64, "url": "http://127.0.0.1:9/"}
    body = {"report": {}, "files": [file], "expires_at": "2026-11-21T12:00:00Z"}
    answers = httpx.MockTransport(lambda request: httpx.Response(200, json=body))
    with CffaClient("http://service", transport=answers) as client, pytest.raises(CorruptArtifact, match="no name"):
        client.download_report("job_" + "0" * 20, tmp_path / "out")
    assert not (tmp_path / "out").exists()
