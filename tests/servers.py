"""Real servers for tests: Redis, PostgreSQL and an S3 gateway, started from the system's packages.

``deploy/local/NAME.sh start FOLDER PORT | stop FOLDER | kill FOLDER`` do the work. A session-scoped fixture of each
kind serves the tests of one process; every test takes a database, a bucket or a key prefix of its own. Fault tests
start servers of their own with :func:`running` and may kill those. What was started here, and nothing else, is stopped.
Without the packages such tests are skipped and say how to get them; where ``CFFA_REQUIRE_SERVERS`` is set (continuous
integration) they fail instead.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

Kind = Literal["redis", "postgres", "s3"]
SCRIPTS = Path(__file__).resolve().parents[1] / "deploy" / "local"
S3_ACCESS_KEY = "cffa"
S3_SECRET_KEY = "only-for-servers-on-loopback"
POSTGRES_PASSWORD = "only-for-servers-on-loopback"
# A program of each server, and the Debian packages that bring it.
NEEDS: dict[Kind, tuple[str, str]] = {
    "redis": ("redis-server", "redis-server"),
    "postgres": ("/usr/lib/postgresql", "postgresql"),
    "s3": ("radosgw", "ceph-mon ceph-osd radosgw ceph-common"),
}


@dataclass(frozen=True)
class Server:
    """One running server of a test."""

    kind: Kind
    folder: Path
    port: int

    def start(self) -> None:
        """Start it (again); returns when it answers. Its data are those it had."""
        self._script("start", str(self.folder), str(self.port))

    def stop(self) -> None:
        """Ask it to end, and wait until it has."""
        self._script("stop", str(self.folder))

    def kill(self) -> None:
        """End all its processes with SIGKILL."""
        self._script("kill", str(self.folder))

    @property
    def url(self) -> str:
        """Address, with user and password where it has them: redis://, postgresql+psycopg:// or http://."""
        if self.kind == "redis":
            return f"redis://127.0.0.1:{self.port}/0"
        if self.kind == "postgres":
            return f"postgresql+psycopg://cffa:{POSTGRES_PASSWORD}@127.0.0.1:{self.port}/cffa"
        return f"http://127.0.0.1:{self.port}"

    def _script(self, *arguments: str) -> None:
        command = [str(SCRIPTS / f"{self.kind}.sh"), *arguments]
        secrets = {
            "POSTGRES_PASSWORD": POSTGRES_PASSWORD,
            "S3_ACCESS_KEY": S3_ACCESS_KEY,
            "S3_SECRET_KEY": S3_SECRET_KEY,
        }
        done = subprocess.run(command, env={**os.environ, **secrets}, capture_output=True, text=True, timeout=180)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


@contextlib.contextmanager
def running(kind: Kind) -> Iterator[Server]:
    """A server of its own, on a free port with an empty folder; both are gone afterwards."""
    require(kind)
    folder = Path(tempfile.mkdtemp(prefix=f"cffa-{kind}-"))
    folder.chmod(0o755)  # PostgreSQL runs as another user where the tests run as root
    server = Server(kind, folder, _free_port())
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Server]:
    """Redis without a password; tests share its database 0 and use key prefixes or databases 1..15 of their own."""
    with running("redis") as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """PostgreSQL with the role ``cffa``, who may create databases; ``url`` names the database ``cffa``."""
    with running("postgres") as server:
        yield server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    """An S3 gateway with one user; tests make buckets of their own. Mark tests with ``xdist_group("s3")``."""
    with running("s3") as server:
        yield server


def require(kind: Kind) -> None:
    """Skip the test (or fail it, see above) unless the programs of this server are installed."""
    program, packages = NEEDS[kind]
    if shutil.which(program) is not None or Path(program).is_dir():
        return
    how = f"needs a real {kind} server: apt-get install -y --no-install-recommends {packages}"
    if os.environ.get("CFFA_REQUIRE_SERVERS"):
        pytest.fail(how)
    pytest.skip(how)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
