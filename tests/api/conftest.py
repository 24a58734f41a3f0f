"""The real application on a fresh home: SQLite, local store, no mocks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from cffa_core.jobs.records import StoredFiles
from cffa_core.jobs.store import JobStore
from cffa_core.settings import Settings
from services.api.access import Backend
from services.api.app import create_app
from tests.api.driving import URL, Worker


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty record at the newest schema: copied into each home, so that not every test migrates."""
    path = tmp_path_factory.mktemp("migrated") / "record.sqlite"
    store = JobStore(f"sqlite:///{path}")
    store.migrate()
    store.close()
    return path


def fresh_home(folder: Path, migrated: Path) -> Settings:
    """Settings of a new home below ``folder``."""
    settings = Settings(home=folder / "home", sweep_seconds=0.2, max_upload_bytes=4 << 20)
    settings.home.mkdir()
    shutil.copy(migrated, settings.home)
    return settings


@pytest.fixture
def settings(tmp_path: Path, migrated: Path) -> Settings:
    return fresh_home(tmp_path, migrated)


@pytest.fixture(scope="module")
def plain_client(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Iterator[TestClient]:
    """One application for the requests of a module that leave nothing behind."""
    app = create_app(fresh_home(tmp_path_factory.mktemp("plain"), migrated))
    with TestClient(app, base_url=URL, raise_server_exceptions=False) as opened:
        yield opened


@pytest.fixture
def app(settings: Settings) -> FastAPI:
    return create_app(settings)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, base_url=URL, raise_server_exceptions=False) as opened:
        yield opened


@pytest.fixture
def backend(app: FastAPI, client: TestClient) -> Backend:
    found = app.state.backend
    assert isinstance(found, Backend)
    return found


@pytest.fixture
def worker(backend: Backend, tmp_path: Path) -> Worker:
    return Worker(backend.store, backend.objects, tmp_path / "worker")


@pytest.fixture
def dataset_id(backend: Backend) -> str:
    """A data set in the record; how one gets there is the matter of test_datasets."""
    added = backend.store.add_dataset(
        "local",
        dataset_id=backend.store.new_id("ds"),
        name="A",
        digest="0" * 64,
        pairs=3,
        report={},
        stored=StoredFiles(),
    )
    return added.id


@pytest.fixture
def model_id(client: TestClient, worker: Worker, dataset_id: str) -> str:
    assert client.post("/v1/training-jobs", json={"dataset_id": dataset_id, "steps": 2}).status_code == 202
    return worker.train()


@pytest.fixture
def generation(client: TestClient, model_id: str) -> str:
    """A queued generation job of 5 pairs in 3 parts of 2."""
    response = client.post("/v1/generation-jobs", json={"model_id": model_id, "count": 5, "part_size": 2, "seed": 7})
    assert response.status_code == 202, response.text
    return str(response.json()["id"])
