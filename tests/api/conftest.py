"""The real application on a fresh home: SQLite, local store, no mocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from cffa_core.settings import Settings
from services.api.access import Backend
from services.api.app import create_app
from tests.api.driving import URL, Worker, good_upload


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", sweep_seconds=0.2, max_upload_bytes=4 << 20)


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
def dataset_id(client: TestClient) -> str:
    response = client.post("/v1/datasets", files={"file": ("set.zip", good_upload())}, data={"name": "clinic A"})
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


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
