"""The API of a cluster on a real PostgreSQL and a real S3 store, with no Redis: nothing it does needs one."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import threading
import time
import uuid
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import httpx
import psycopg
import pytest
from fastapi.testclient import TestClient

from cffa_core.errors import InvalidSettings, StorageUnavailable
from cffa_core.jobs.spec import Kind
from cffa_core.people.rows import ADMIN
from cffa_core.settings import Settings
from services.api.access import Backend
from services.api.app import create_app
from services.api.setup import set_up
from services.worker import loop
from tests.api.driving import URL, Worker, good_upload, png, problem, sha256
from tests.servers import S3_ACCESS_KEY, S3_SECRET_KEY, Server
from tests.worker.world import running_worker

pytestmark = pytest.mark.xdist_group("s3")
KEY = "k" * 40


def fresh(postgres: Server, s3: Server, home: Path) -> dict[str, str]:
    """Settings, as variables, of a cluster with a database and a bucket of its own; nobody listens at its broker."""
    name = f"api{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
    return {
        "CFFA_MODE": "cluster",
        "CFFA_HOME": str(home),
        "CFFA_DATABASE_URL": postgres.url.rsplit("/", 1)[0] + f"/{name}",
        "CFFA_BROKER_URL": "redis://127.0.0.1:9/0",
        "CFFA_S3_ENDPOINT": s3.url,
        "CFFA_S3_BUCKET": name,
        "CFFA_S3_ACCESS_KEY": S3_ACCESS_KEY,
        "CFFA_S3_SECRET_KEY": S3_SECRET_KEY,
        "CFFA_BOOTSTRAP_KEY": KEY,
        "CFFA_KEY_SECRET": "s" * 40,
    }


def settings_of(variables: dict[str, str]) -> Settings:
    return Settings(**{name.removeprefix("CFFA_").lower(): value for name, value in variables.items()})  # type: ignore[arg-type]


def replica(settings: Settings) -> TestClient:
    headers = {"Authorization": f"Bearer {KEY}"}
    return TestClient(create_app(settings), base_url=URL, raise_server_exceptions=False, headers=headers)


@pytest.fixture(scope="module")
def settings(postgres_server: Server, s3_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A cluster that was set up."""
    made = settings_of(fresh(postgres_server, s3_server, tmp_path_factory.mktemp("home")))
    set_up(made, timeout=30)
    return made


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[TestClient]:
    with replica(settings) as opened:
        yield opened


@pytest.fixture(scope="module")
def other(settings: Settings, client: TestClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A second replica, with a scratch folder of its own."""
    with replica(settings.model_copy(update={"home": tmp_path_factory.mktemp("other")})) as opened:
        yield opened


@pytest.fixture(scope="module")
def worker(client: TestClient, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    backend = client.app.state.backend  # type: ignore[attr-defined]
    assert isinstance(backend, Backend)
    return Worker(backend.store, backend.objects, tmp_path_factory.mktemp("worker"))


@pytest.fixture(scope="module")
def dataset(client: TestClient) -> str:
    files = {"file": ("set.zip", good_upload(3), "application/zip")}
    answer = client.post("/v1/datasets", files=files, data={"name": "clinic A"})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


@pytest.fixture(scope="module")
def model(client: TestClient, worker: Worker, dataset: str) -> str:
    assert client.post("/v1/training-jobs", json={"dataset_id": dataset, "steps": 2}).status_code == 202
    return worker.train()


@pytest.fixture(scope="module")
def generation(client: TestClient, worker: Worker, model: str) -> str:
    """A succeeded job of 5 pairs in 3 parts."""
    body = {"model_id": model, "count": 5, "part_size": 2, "seed": 7}
    posted = client.post("/v1/generation-jobs", json=body)
    assert posted.status_code == 202, posted.text
    for _ in range(4):
        worker.make_part()
    job = str(posted.json()["id"])
    assert client.get(f"/v1/jobs/{job}").json()["state"] == "succeeded"
    return job


def test_an_upload_lies_in_the_object_store(client: TestClient, settings: Settings, dataset: str) -> None:
    pairs = client.get(f"/v1/datasets/{dataset}/pairs").json()["items"]
    assert [pair["name"] for pair in pairs] == ["m000", "m001", "m002"]
    assert not pairs[0]["cf_url"].startswith(URL)
    with httpx.Client() as signed:  # the link is the whole permission: no key
        answer = signed.get(pairs[1]["cf_url"])
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert sha256(answer.content) == sha256(png(1))
    assert list((settings.scratch_dir / "uploads").iterdir()) == []


def test_a_refused_upload_leaves_nothing(client: TestClient) -> None:
    backend = client.app.state.backend  # type: ignore[attr-defined]
    before = set(backend.objects.list("datasets/"))
    files = {"file": ("set.zip", b"no zip at all", "application/zip")}
    problem(client.post("/v1/datasets", files=files, data={"name": "bad"}), 422, "invalid_dataset")
    assert set(backend.objects.list("datasets/")) == before


def test_a_worker_exports_from_the_object_store_into_it(
    client: TestClient, settings: Settings, generation: str, tmp_path: Path
) -> None:
    body = {"form": "webdataset", "shard_size": 2, "selection": {"first": 1}}
    results, digests = [], []
    with running_worker(loop.Worker(settings.model_copy(update={"home": tmp_path}), kinds=[Kind.EXPORT])):
        for _ in range(2):
            posted = client.post(f"/v1/jobs/{generation}/exports", json=body)
            assert posted.status_code == 202, posted.text
            job = f"/v1/jobs/{posted.json()['id']}"
            end = time.monotonic() + 120
            while not (seen := client.get(job).json())["terminal"]:
                assert time.monotonic() < end, seen
                time.sleep(0.1)
            assert seen["state"] == "succeeded", seen["error"]
            results.append(seen["result"])
            listed = client.get(f"{job}/archives").json()
            digests.append([part["sha256"] for part in listed["parts"]])
    assert results[0] == results[1] and digests[0] == digests[1] and results[0]["pairs"] == 4
    shard = listed["parts"][1]
    with httpx.Client() as signed:  # resumed, by the link alone
        half = signed.get(shard["url"], headers={"Range": "bytes=0-999"})
        rest = signed.get(shard["url"], headers={"Range": "bytes=1000-"})
    assert (half.status_code, rest.status_code) == (206, 206)
    assert sha256(half.content + rest.content) == shard["sha256"]
    with tarfile.open(fileobj=BytesIO(half.content + rest.content)) as tar:
        image = tar.extractfile("000004.fa.png")
        assert image is not None and image.read() == png(4, colour=False)


def test_images_are_ranges_of_stored_archives(client: TestClient, generation: str) -> None:
    for index in (0, 3, 4):
        answer = client.get(f"/v1/jobs/{generation}/pairs/{index}/fa.png")
        assert answer.content == png(index, colour=False)
    part = client.get(f"/v1/jobs/{generation}/pairs/1/cf.png", headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, png(1)[10:20])


def test_archives_come_through_signed_links(client: TestClient, generation: str) -> None:
    listed = client.get(f"/v1/jobs/{generation}/archives").json()
    archives = [*listed["parts"], listed["whole"]]
    assert [archive["pairs"] for archive in archives] == [2, 2, 1, 5]
    with httpx.Client() as signed:
        for archive in archives:
            answer = signed.get(archive["url"])
            assert hashlib.sha256(answer.content).hexdigest() == archive["sha256"]
            assert archive["filename"] in answer.headers["content-disposition"]
        with ZipFile(BytesIO(answer.content)) as opened:
            assert opened.read("fa/000004.png") == png(4, colour=False)
        resumed = signed.get(listed["whole"]["url"], headers={"Range": "bytes=100-"})
        assert (resumed.status_code, resumed.content) == (206, answer.content[100:])
        tampered = listed["whole"]["url"].replace(generation, "job_00000000000000000000")
        assert signed.get(tampered).status_code in (403, 404)


def test_everything_belongs_to_the_owner_of_the_key(client: TestClient, generation: str) -> None:
    store = client.app.state.backend.store  # type: ignore[attr-defined]
    assert store.get_job(ADMIN, generation).owner == ADMIN
    assert generation in [job["id"] for job in client.get("/v1/jobs").json()["items"]]


def test_keys_made_at_one_replica_count_at_the_other(client: TestClient, other: TestClient, generation: str) -> None:
    assert client.post("/v1/accounts", json={"owner": "anna"}).status_code == 201
    made = [client.post("/v1/api-keys", json={"owner": "anna", "name": name}).json() for name in ("kept", "revoked")]
    assert client.delete(f"/v1/api-keys/{made[1]['id']}").status_code == 204
    kept, revoked = ({"Authorization": f"Bearer {key['key']}"} for key in made)
    assert other.get("/v1/me", headers=kept).json()["owner"] == "anna"
    problem(other.get("/v1/me", headers=revoked), 401, "unauthorized")
    problem(other.get(f"/v1/jobs/{generation}", headers=kept), 404, "not_found")
    done = [entry["action"] for entry in other.get("/v1/audit").json()["items"][:4]]
    assert done == ["revokeApiKey", "createApiKey", "createApiKey", "createAccount"]


def test_replicas_are_one_service(client: TestClient, other: TestClient, model: str, worker: Worker) -> None:
    body = {"model_id": model, "count": 1, "part_size": 1}
    posted = [
        each.post("/v1/generation-jobs", json=body, headers={"Idempotency-Key": "once"}) for each in (client, other)
    ]
    assert [answer.status_code for answer in posted] == [202, 202]
    assert posted[1].headers["idempotency-replayed"] == "true"
    job = posted[0].json()["id"]
    assert posted[1].json()["id"] == job
    etag = other.get(f"/v1/jobs/{job}").headers["etag"]
    cancel = threading.Timer(0.5, lambda: client.post(f"/v1/jobs/{job}:cancel"))
    cancel.start()
    began = time.monotonic()
    seen = other.get(f"/v1/jobs/{job}", params={"wait": 20}, headers={"If-None-Match": etag})
    cancel.join()
    assert (seen.status_code, seen.json()["state"]) == (200, "canceled")
    assert time.monotonic() - began < 15


def test_the_same_upload_through_two_replicas_is_one_data_set(client: TestClient, other: TestClient) -> None:
    answers = []

    def send(each: TestClient) -> None:
        files = {"file": ("set.zip", good_upload(2), "application/zip")}
        headers = {"Idempotency-Key": "the-same"}
        answers.append(each.post("/v1/datasets", files=files, data={"name": "twice"}, headers=headers))

    threads = [threading.Thread(target=send, args=(each,)) for each in (client, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [201, 201], [answer.text for answer in answers]
    assert answers[0].json()["id"] == answers[1].json()["id"]


def test_no_broker_is_no_reason_to_be_unready(client: TestClient) -> None:
    assert client.get("/readyz").json() == {"status": "ok", "checks": {"record": "ok", "storage": "ok"}}
    assert client.get("/metrics").status_code == 200


def test_set_up_may_run_often_and_at_once(postgres_server: Server, s3_server: Server, tmp_path: Path) -> None:
    variables = fresh(postgres_server, s3_server, tmp_path)
    settings = settings_of(variables)
    with replica(settings) as early:
        body = problem(early.get("/readyz"), 503, "storage_unavailable")
        assert {item["pointer"]: item["code"] for item in body["errors"]}["record"] == "record_outdated"
        command = [sys.executable, "-m", "services.api.setup", "--timeout", "60"]
        running = [
            subprocess.Popen(command, env=os.environ | variables, stderr=subprocess.PIPE, text=True) for _ in range(3)
        ]
        for process in running:
            _, said = process.communicate(timeout=120)
            assert process.returncode == 0, said
        set_up(settings, timeout=30)
        assert early.get("/readyz").status_code == 200  # without a restart


def test_the_process_refuses_a_record_that_was_not_set_up(
    postgres_server: Server, s3_server: Server, tmp_path: Path
) -> None:
    variables = fresh(postgres_server, s3_server, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "services.api"],
        env=os.environ | variables | {"CFFA_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "python -m services.api.setup" in done.stderr and "Traceback" not in done.stderr


def test_set_up_waits_no_longer_than_it_may(tmp_path: Path) -> None:
    nowhere = {
        "mode": "cluster",
        "database_url": "postgresql+psycopg://cffa@127.0.0.1:9/cffa",
        "broker_url": "redis://127.0.0.1:9/0",
        "s3_endpoint": "http://127.0.0.1:9",
        "s3_access_key": "cffa",
        "s3_secret_key": S3_SECRET_KEY,
    }
    with pytest.raises(StorageUnavailable, match="record"):
        set_up(Settings(home=tmp_path, **nowhere), timeout=1)  # type: ignore[arg-type]
    with pytest.raises(InvalidSettings, match="embedded"):
        set_up(Settings(home=tmp_path), timeout=1)


def test_set_up_names_what_is_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.api.setup"],
        env=os.environ | {"CFFA_MODE": "cluster", "CFFA_S3_SECRET_KEY": "minioadmin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "CFFA_DATABASE_URL" in done.stderr and "minioadmin" not in done.stderr
