"""``make cluster`` as processes on ports of their own: start, use, survive a kill, start again, stop, keep the data."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cffa_core.recipes.archive import verify_archive
from services.client.client import CffaClient
from tests.servers import NEEDS, require

pytestmark = [pytest.mark.xdist_group("s3"), pytest.mark.slow, pytest.mark.timeout(900)]
TOOL = Path(__file__).resolve().parents[2] / "deploy" / "local" / "cluster.py"
PORTS = ("CLUSTER_API_PORT", "CLUSTER_REDIS_PORT", "CLUSTER_POSTGRES_PORT", "CLUSTER_S3_PORT", "CLUSTER_METRICS_PORT")
SECONDS = 600


class Cluster:
    """The tool with a folder and ports of its own."""

    def __init__(self, home: Path, **variables: str) -> None:
        self.home = home
        with Sockets() as free:
            ports = {name: str(free.port()) for name in PORTS}
        self.environment = {**os.environ, **ports, "CLUSTER_HOME": str(home), "CLUSTER_WORKERS": "1", **variables}
        self.url = f"http://127.0.0.1:{ports['CLUSTER_API_PORT']}"

    def __call__(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOL), *map(str, arguments)]
        environment = self.environment | variables
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)

    def keeper(self) -> int:
        return int(json.loads((self.home / "keeper.json").read_text())["pid"])

    def key(self) -> str:
        return (self.home / "secrets" / "cffa_bootstrap_key").read_text()

    def processes(self) -> list[str]:
        """Command lines and working folders of processes that work below the folder."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                folder = str((process / "cwd").readlink())
                variables = (process / "environ").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(self.home) in words + folder + variables and int(process.name) != os.getpid():
                found.append(words)
        return found


class Sockets:
    """Ports that were free a moment ago, each another."""

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    def port(self) -> int:
        self._held.append(socket.socket())
        self._held[-1].bind(("127.0.0.1", 0))
        return int(self._held[-1].getsockname()[1])

    def __enter__(self) -> Sockets:
        return self

    def __exit__(self, *_: object) -> None:
        for held in self._held:
            held.close()


@pytest.fixture(scope="module")
def cluster(models_dir: Path) -> Iterator[Cluster]:
    for kind in NEEDS:
        require(kind)
    # Not below pytest's own folder, which is closed to the user postgres.
    with tempfile.TemporaryDirectory(prefix="cffa-cluster-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o711)
        settings = {"CFFA_MODELS_DIR": str(models_dir), "CFFA_THREADS": "1", "CFFA_S3_SECRET_KEY": "minioadmin"}
        made = Cluster(Path(folder) / "home", **settings)
        try:
            started = made("start")
            assert started.returncode == 0, started.stderr + started.stdout
            yield made
        finally:
            stopped = made("stop")
            assert stopped.returncode == 0, stopped.stderr
            assert made.processes() == []


def test_its_secrets_are_its_own_and_closed(cluster: Cluster) -> None:
    files = list((cluster.home / "secrets").iterdir())
    assert len(files) == 5 and all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    assert len({path.read_text() for path in files}) == 5
    assert all(path.read_text() not in " ".join(cluster.processes()) for path in files)


def test_it_wants_its_key(cluster: Cluster) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{cluster.url}/v1/jobs", timeout=30)
    assert refused.value.code == 401
    refused.value.close()
    with CffaClient(cluster.url, api_key=cluster.key()) as client:
        assert client.queue().workers >= 1


def test_starting_it_again_changes_nothing(cluster: Cluster) -> None:
    keeper, key = cluster.keeper(), cluster.key()
    again = cluster("start")
    assert again.returncode == 0, again.stderr
    assert (cluster.keeper(), cluster.key()) == (keeper, key)
    assert cluster.url in again.stdout and "secrets/cffa_bootstrap_key" in again.stdout
    assert key not in again.stdout
    status = cluster("status")
    assert (status.returncode, status.stdout.count("answers")) == (0, 3), status.stdout
    assert "make cluster-down" in cluster("start", CLUSTER_WORKERS="2").stderr


def report_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_the_demo_runs_against_it(cluster: Cluster, pairs_folder: Path, tmp_path: Path) -> None:
    small = ("--base", "micro", "--resolution", "64", "--pairs", "2", "--steps", "2")
    report = report_of(cluster("demo", *small, "--data", pairs_folder, "--out", tmp_path))
    assert list(report) == ["pairs", "archive", "sha256", "contact_sheet", "seconds", "url"]
    assert len(verify_archive(tmp_path / "pairs.zip")["pairs"]) == report["pairs"] == 2
    assert report["url"].startswith(f"{cluster.url}/v1/jobs/job_")


def test_what_dies_comes_back(cluster: Cluster) -> None:
    api = [
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if b"services.api\0" in read(process / "cmdline") and str(cluster.home).encode() in read(process / "environ")
    ]
    assert len(api) == 1
    os.kill(api[0], signal.SIGKILL)
    end = time.monotonic() + 60
    while cluster("status").returncode != 0:
        assert time.monotonic() < end
    assert "api ended by signal 9" in (cluster.home / "logs" / "keeper.log").read_text()


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_it_stops_alone_and_keeps_its_data(cluster: Cluster) -> None:
    with CffaClient(cluster.url, api_key=cluster.key()) as client:
        before = [job.id for job in client.jobs()]
    assert cluster("stop").returncode == 0
    assert cluster.processes() == []
    assert cluster("status").returncode == 3
    # A file that names a stranger: stopping must not touch it.
    (cluster.home / "keeper.json").write_text(json.dumps({"pid": os.getpid(), "birth": "1"}))
    assert cluster("stop").returncode == 0
    started = cluster("start")
    assert started.returncode == 0, started.stderr
    with CffaClient(cluster.url, api_key=cluster.key()) as client:
        assert [job.id for job in client.jobs()] == before


def test_a_folder_postgresql_may_not_enter_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("PostgreSQL runs as another user only where this runs as root")
    (tmp_path / "closed").mkdir(mode=0o700)
    refused = Cluster(tmp_path / "closed" / "home")("start")
    assert refused.returncode == 1
    assert "CLUSTER_HOME=" in refused.stderr and "Traceback" not in refused.stderr


def test_missing_packages_are_named(tmp_path: Path) -> None:
    refused = Cluster(tmp_path)("start", PATH=str(tmp_path))
    assert refused.returncode == 1
    assert "apt-get install -y --no-install-recommends" in refused.stderr
    assert "redis-server" in refused.stderr and "radosgw" in refused.stderr
