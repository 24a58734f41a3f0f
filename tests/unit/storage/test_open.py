"""The store of a settings object, and the key that signs its URLs."""

from __future__ import annotations

import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cffa_core.errors import InvalidSettings, StorageUnavailable
from cffa_core.settings import Settings
from cffa_core.storage.open import blob_secret, open_local, open_s3, open_store
from cffa_core.storage.s3 import S3Store
from tests.servers import S3_ACCESS_KEY, S3_SECRET_KEY, Server


def test_embedded_mode_stores_below_home(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    open_store(settings).put_bytes("jobs/a/b", b"x")
    assert (tmp_path / "home" / "objects" / "jobs" / "a" / "b").read_bytes() == b"x"


CLUSTER = {
    "mode": "cluster",
    "database_url": "postgresql+psycopg://cffa@db/cffa",
    "broker_url": "redis://broker:6379/0",
    "s3_endpoint": "http://127.0.0.1:1",
    "s3_bucket": "the-bucket",
    "s3_access_key": "an-access-key",
    "s3_secret_key": "a-secret-of-some-length",
    "bootstrap_key": "k" * 40,
}


def test_cluster_mode_uses_the_bucket_and_asks_nobody_at_first(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", **CLUSTER)
    opened = open_store(settings)
    assert isinstance(opened, S3Store)
    assert opened.bucket == "the-bucket"
    assert not (tmp_path / "home").exists()


def test_an_endpoint_without_a_scheme_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="CFFA_S3_ENDPOINT"):
        open_store(Settings(home=tmp_path, **(CLUSTER | {"s3_endpoint": "objects:9000"})))


@pytest.mark.xdist_group("s3")
def test_the_settings_of_a_cluster_reach_the_server(tmp_path: Path, s3_server: Server) -> None:
    there = {"s3_endpoint": s3_server.url, "s3_access_key": S3_ACCESS_KEY, "s3_secret_key": S3_SECRET_KEY}
    public = {"s3_public_endpoint": "https://pairs.example.org", "s3_region": "us-east-1"}
    store = open_s3(Settings(home=tmp_path, **(CLUSTER | there | public | {"s3_bucket": "test-of-the-settings"})))
    store.ensure_bucket()
    store.put_bytes("jobs/a/b", b"x")
    url = store.download_url("jobs/a/b", expires_seconds=60, filename="b")
    assert url.startswith("https://pairs.example.org/test-of-the-settings/jobs/a/b?")
    store.close()


def test_embedded_mode_does_without_the_s3_client(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from cffa_core.settings import Settings;"
        "from cffa_core.storage.open import open_store; open_store(Settings(home=Path(sys.argv[1])));"
        "assert 'cffa_core.storage.local' in sys.modules; assert 'minio' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_key_is_made_once_and_is_private(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: blob_secret(settings), range(16)))
    assert len(keys) == 1
    path = tmp_path / "home" / "blob.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [found.name for found in (tmp_path / "home").iterdir()] == ["blob.key"]
    assert blob_secret(Settings(home=tmp_path / "home")) in keys


def test_a_given_key_is_used_and_not_written(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", blob_secret="given" * 8)
    assert blob_secret(settings) == b"given" * 8
    assert not (tmp_path / "home").exists()


def test_two_processes_accept_each_others_urls(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    token = open_local(settings).token("jobs/a/b", "GET", "f", 60)
    assert open_local(Settings(home=tmp_path / "home")).read_token(token).key == "jobs/a/b"


def test_a_damaged_key_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "blob.key").write_bytes(b"short")
    with pytest.raises(StorageUnavailable, match="damaged"):
        blob_secret(Settings(home=tmp_path))
