"""The scripts that run Redis and the S3 store on one machine: twice, after a kill, on a taken port, with their data."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.s3_buckets import unprepared_store
from tests.servers import SCRIPTS, Kind, Server, running

KINDS = ["redis", pytest.param("s3", marks=pytest.mark.xdist_group("s3"))]


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with running(request.param) as started:
        yield started


def write(server: Server, value: str) -> None:
    if server.kind == "redis":
        with redis.Redis(port=server.port) as client:
            client.set("kept", value)
    else:
        with unprepared_store(server, bucket="kept") as store:
            store.ensure_bucket()
            store.put_bytes("jobs/a/b", value.encode())


def read(server: Server) -> str:
    if server.kind == "redis":
        with redis.Redis(port=server.port, decode_responses=True) as client:
            return str(client.get("kept"))
    with unprepared_store(server, bucket="kept") as store:
        return store.get_bytes("jobs/a/b").decode()


def answers(server: Server) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", server.port)) == 0


def test_data_survive_a_kill_and_every_command_may_be_repeated(server: Server) -> None:
    write(server, "value")
    server.start()
    server.kill()
    assert not answers(server)
    server.kill()
    server.start()
    assert read(server) == "value"
    server.stop()
    assert not answers(server)
    server.stop()


@pytest.mark.parametrize("kind", ["redis", "s3"])
def test_a_taken_port_is_named_and_nothing_is_started(kind: Kind, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [str(SCRIPTS / f"{kind}.sh"), "start", str(tmp_path / "data"), port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"port {port}" in done.stderr
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("kind", ["redis", "s3"])
@pytest.mark.parametrize("arguments", [[], ["start"], ["start", "FOLDER"], ["start", "FOLDER", "six"]])
def test_a_wrong_command_line_shows_the_right_ones(kind: Kind, arguments: list[str], tmp_path: Path) -> None:
    given = [str(tmp_path / "data") if word == "FOLDER" else word for word in arguments]
    command = [str(SCRIPTS / f"{kind}.sh"), *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"{kind}.sh kill FOLDER" in done.stderr
    assert list(tmp_path.iterdir()) == []
