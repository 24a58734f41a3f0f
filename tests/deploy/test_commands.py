"""Every service of docker-compose.yml, started by hand: the same commands and environment, against real servers.

Redis runs compose's own command with deploy/redis.conf; PostgreSQL and the S3 store are the system's packages.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest
import redis

from tests.deploy import tools
from tests.deploy.by_hand import PATIENCE, Stage, shown
from tests.deploy.test_compose import seconds
from tests.servers import POSTGRES_PASSWORD, S3_ACCESS_KEY, S3_SECRET_KEY, Server
from tests.servers import _free_port as free_port

pytestmark = [pytest.mark.xdist_group("s3"), pytest.mark.timeout(900)]
WORKERS = ("worker-cpu", "worker-gpu")


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As deploy/secrets.sh makes them, but for those of servers that run already."""
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "cffa_database_password").write_text(POSTGRES_PASSWORD)
    (folder / "cffa_s3_access_key").write_text(S3_ACCESS_KEY)
    (folder / "cffa_s3_secret_key").write_text(S3_SECRET_KEY)
    subprocess.run([str(tools.DEPLOY / "secrets.sh"), str(folder)], check=True, capture_output=True, timeout=60)
    return folder


@pytest.fixture(scope="module")
def broker(secrets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Redis, by compose's command; its folders and its port moved to where a test may have them."""
    if shutil.which("redis-server") is None:
        pytest.skip("needs a real Redis: apt-get install -y redis-server")
    folder, port = tmp_path_factory.mktemp("redis"), free_port()
    config = folder / "redis.conf"
    moved = {"/run/secrets": str(secrets), "/run/redis": str(folder), "/etc/redis/redis.conf": str(config)}
    own = {"port 6379": f"port {port}", "bind * -::*": "bind 127.0.0.1", "dir /tmp": f"dir {folder}"}
    text = (tools.DEPLOY / "redis.conf").read_text()
    for inside, here in (moved | own).items():
        assert inside in text or inside.startswith(("/run/secrets", "/etc")), inside
        text = text.replace(inside, here)
    config.write_text(text)
    command = list(tools.services()["redis"]["entrypoint"])
    for inside, here in moved.items():
        command = [argument.replace(inside, here) for argument in command]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        answer(redis.Redis(port=port, password=(secrets / "cffa_broker_password").read_text()))
        yield process, port
    finally:
        process.kill()
        process.wait()


def answer(client: redis.Redis) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            client.ping()
        except redis.ConnectionError:
            assert time.monotonic() < end, "Redis does not answer"
            time.sleep(0.05)
        else:
            client.close()
            return


@pytest.fixture(scope="module")
def prepared(
    secrets: Path,
    broker: tuple[subprocess.Popen[bytes], int],
    postgres_server: Server,
    s3_server: Server,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stage]:
    """A database and a bucket name of our own; the set-up has run."""
    database = f"compose_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(postgres_server.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {database}")  # type: ignore[arg-type]
    addresses = {
        "postgres:5432/cffa": f"127.0.0.1:{postgres_server.port}/{database}",
        "redis:6379": f"127.0.0.1:{broker[1]}",
        "objects:9000": f"127.0.0.1:{s3_server.port}",
    }
    stage = Stage(tmp_path_factory.mktemp("stage"), secrets, addresses, {"CFFA_S3_BUCKET": database.replace("_", "-")})
    try:
        done = stage.run("setup")
        assert done.returncode == 0, done.stderr
        yield stage
    finally:
        stage.close()


@pytest.fixture(scope="module")
def stage(prepared: Stage) -> Stage:
    """API, both workers and Flower have been started."""
    for service in ("api", *WORKERS, "flower"):
        prepared.start(service)
    return prepared


@pytest.fixture(scope="module")
def api(stage: Stage) -> Iterator[httpx.Client]:
    """The API, once its health check (which asks /readyz) succeeds; requests carry the key."""
    stage.wait_healthy("api")
    key = (stage.secrets / "cffa_bootstrap_key").read_text()
    address = f"http://127.0.0.1:{stage.port('api', 8008)}"
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        yield client


def test_redis_asks_for_the_password_and_shows_it_nowhere(
    broker: tuple[subprocess.Popen[bytes], int], secrets: Path
) -> None:
    process, port = broker
    password = (secrets / "cffa_broker_password").read_text()
    with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    assert "redis-server" in shown(process)
    assert password not in shown(process)
    with redis.Redis(port=port, password=password) as client:
        assert client.info("memory")["maxmemory_policy"] == "noeviction"
        assert client.info("persistence")["aof_enabled"] == 0
        with pytest.raises(redis.ResponseError):
            client.execute_command("CONFIG", "GET", "requirepass")


def test_health_check_of_redis(broker: tuple[subprocess.Popen[bytes], int], secrets: Path) -> None:
    kind, test = tools.services()["redis"]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    local = test.replace("/run/secrets", str(secrets))
    assert "redis-cli ping" in local
    for port, expected in ((broker[1], 0), (free_port(), 1)):
        command = local.replace("redis-cli", f"redis-cli -p {port}")
        assert subprocess.run(["sh", "-c", command], capture_output=True, timeout=60).returncode == expected


def test_set_up_may_run_again(prepared: Stage) -> None:
    done = prepared.run("setup")
    assert done.returncode == 0, done.stderr


def test_api_is_ready_and_asks_for_the_key(api: httpx.Client) -> None:
    assert api.get("/readyz").status_code == 200
    assert httpx.get(f"{api.base_url}/v1/queue", timeout=60).status_code == 401
    assert api.get("/v1/queue").status_code == 200
    assert "cffa_queue_load" in httpx.get(f"{api.base_url}/metrics", timeout=60).text


@pytest.mark.parametrize("service", [*WORKERS, "flower"])
def test_becomes_healthy(stage: Stage, service: str) -> None:
    stage.wait_healthy(service)


def test_workers_are_in_the_record(stage: Stage, api: httpx.Client) -> None:
    end = time.monotonic() + PATIENCE
    while len(workers := api.get("/v1/workers").json()["items"]) < len(WORKERS):
        assert time.monotonic() < end, "\n".join(stage.log(service) for service in WORKERS)
        time.sleep(0.2)
    assert {worker["info"]["device"] for worker in workers} == {"cpu", "cuda"}


def test_workers_answer_celery(stage: Stage, api: httpx.Client) -> None:
    """Asked as an operator would, with Flower's environment: the broker's password is all that it takes."""
    names = {worker["info"]["celery"] for worker in api.get("/v1/workers").json()["items"]}
    ping = ["celery", "-A", "services.worker.celery_app", "inspect", "--timeout", "10", "--json", "ping"]
    end = time.monotonic() + PATIENCE
    while True:
        done = stage.run("flower", ping)
        answers = json.loads(done.stdout) if done.returncode == 0 else {}
        if set(answers) == names and len(names) == len(WORKERS):
            assert all(text == {"ok": "pong"} for text in answers.values())
            return
        assert time.monotonic() < end, done.stdout + done.stderr + stage.log("worker-cpu")


def test_flower_lists_the_workers(stage: Stage, api: httpx.Client) -> None:
    stage.wait_healthy("flower")
    names = {worker["info"]["celery"] for worker in api.get("/v1/workers").json()["items"]}
    address = f"http://127.0.0.1:{stage.port('flower', 5555)}/workers"
    end = time.monotonic() + PATIENCE
    while True:
        listed = httpx.get(address, params={"json": "1"}, timeout=60).json()["data"]
        if {worker["hostname"] for worker in listed if worker["status"]} == names:
            return
        assert time.monotonic() < end, listed
        time.sleep(0.5)


def test_no_process_shows_a_secret(stage: Stage, api: httpx.Client) -> None:
    for service, process in stage.processes.items():
        for secret in stage.secrets.iterdir():
            if secret.name != "cffa_s3_access_key":  # "cffa" is part of many words here
                assert secret.read_text() not in shown(process), f"{service} shows {secret.name}"
        assert secret_free(stage, service), f"the log of {service} shows a secret"


def secret_free(stage: Stage, service: str) -> bool:
    return not [
        secret.name
        for secret in stage.secrets.iterdir()
        if secret.name != "cffa_s3_access_key" and secret.read_text() in stage.log(service)
    ]


@pytest.mark.parametrize("service", [*WORKERS, "api"])
def test_ends_cleanly_within_its_grace(stage: Stage, api: httpx.Client, service: str) -> None:
    """The last tests of this file: they stop what the others need."""
    process = stage.processes[service]
    assert process.poll() is None, stage.log(service)
    process.send_signal(signal.SIGTERM)
    grace = seconds(tools.services()[service]["stop_grace_period"])
    assert process.wait(grace) == 0, stage.log(service)
