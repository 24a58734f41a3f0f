"""Uploads file by file on PostgreSQL and a real S3 server: presigned PUTs, parts, wrong sizes, versions that share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from cffa_core.jobs import upload_sweep
from services.api.access import Backend
from services.api.keys import ADMIN
from services.api.setup import set_up
from tests.api.driving import png, problem
from tests.api.test_cluster import fresh, replica, settings_of
from tests.servers import Server

pytestmark = pytest.mark.xdist_group("s3")
PART = 5 << 20


@pytest.fixture(scope="module")
def client(
    postgres_server: Server, s3_server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestClient]:
    made = settings_of(fresh(postgres_server, s3_server, tmp_path_factory.mktemp("home")))
    made = made.model_copy(update={"upload_part_bytes": PART})
    set_up(made, timeout=30)
    with replica(made) as opened:
        yield opened


@pytest.fixture(scope="module")
def backend(client: TestClient) -> Backend:
    found = client.app.state.backend  # type: ignore[attr-defined]
    assert isinstance(found, Backend)
    return found


def large_png(seed: int) -> bytes:
    """A PNG of two parts: noise does not shrink."""
    data = png(seed, side=1400)
    assert PART < len(data) < 2 * PART
    return data


def members() -> dict[str, bytes]:
    made = {f"cf/m{index}.png": png(index, side=48) for index in range(2)}
    made |= {f"fa/m{index}.png": png(index, colour=False, side=48) for index in range(2)}
    return made | {"cf/big.png": large_png(5), "fa/big.png": png(6, colour=False, side=1400)}


def put(url: str, data: bytes) -> None:
    httpx.put(url, content=data, timeout=60).raise_for_status()


def test_pieces_go_straight_to_the_store_and_become_versions(client: TestClient, backend: Backend) -> None:
    files = members()
    body = {"name": "large", "files": [{"path": path, "size": len(data)} for path, data in files.items()]}
    upload = client.post("/v1/uploads", json=body).json()
    pieces = [(file["path"], piece) for file in upload["files"] for piece in file["puts"]]
    assert [piece["number"] for path, piece in pieces if path == "cf/big.png"] == [1, 2]
    for path, piece in pieces[:-1]:
        data = files[path][piece["offset"] : piece["offset"] + piece["size"]]
        put(piece["url"], data + b"more" if path == "cf/m0.png" else data)
    refused = problem(client.post(upload["links"]["complete"]), 409, "conflict")
    assert {item["pointer"]: item["code"] for item in refused["errors"]} == {
        "cf/m0.png": "wrong_size",
        pieces[-1][0]: "missing",
    }
    resumed = client.get(upload["links"]["self"]).json()
    missing = [(file["path"], piece) for file in resumed["files"] for piece in file["puts"]]
    assert {path for path, _ in missing} == {"cf/m0.png", pieces[-1][0]}
    for path, piece in missing:
        put(piece["url"], files[path][piece["offset"] : piece["offset"] + piece["size"]])
    done = client.post(upload["links"]["complete"])
    assert done.status_code == 201, done.text
    assert list(backend.objects.list("uploads/")) == []
    put(missing[0][1]["url"], files["cf/m0.png"])  # the link outlives its upload
    assert upload_sweep.remove_strays(backend.store, backend.objects) == 1
    _versions(client, backend, done.json())


def _versions(client: TestClient, backend: Backend, made: dict[str, Any]) -> None:
    version = client.post(f"/v1/datasets/{made['id']}/versions", json={"reject": ["m1"]}).json()
    assert client.delete(f"/v1/datasets/{made['id']}").status_code == 204
    for pair in client.get(f"/v1/datasets/{version['id']}/pairs").json()["items"]:
        assert httpx.get(pair["cf_url"]).status_code == 200
    assert client.delete(f"/v1/datasets/{version['id']}").status_code == 204
    left = [key for key in backend.objects.list("datasets/") if "/report/" not in key]
    assert left == []


def test_an_owner_imports_from_their_own_folder_alone(client: TestClient, backend: Backend) -> None:
    for path, data in members().items():
        if "big" not in path:
            backend.objects.put_bytes(f"imports/{ADMIN}/set/{path}", data)
            backend.objects.put_bytes(f"imports/somebody/set/{path}", data)
    asked = {"name": "x", "prefix": "set"}
    assert client.post("/v1/datasets:import", json=asked).json()["pairs"] == 2
    problem(client.post("/v1/datasets:import", json={**asked, "prefix": "somebody/set"}), 404, "not_found")


def test_an_upload_in_parts_that_expires_leaves_no_parts(client: TestClient, backend: Backend) -> None:
    data = np.zeros(PART + 1, np.uint8).tobytes()
    upload = client.post("/v1/uploads", json={"name": "x", "files": [{"path": "cf/a.png", "size": len(data)}]}).json()
    first = upload["files"][0]["puts"][0]
    put(first["url"], data[: first["size"]])
    known = backend.store.get_upload(ADMIN, upload["id"])
    (file,) = known.files
    assert file.multipart_id is not None
    assert backend.objects.direct().parts(file.key, file.multipart_id) == {1: PART}
    upload_sweep.remove_objects(backend.objects, known)
    assert backend.objects.direct().parts(file.key, file.multipart_id) == {}
