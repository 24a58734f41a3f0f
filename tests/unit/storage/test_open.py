"""The store of a settings object, and the key that signs its URLs."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cffa_core.errors import StorageUnavailable
from cffa_core.settings import Settings
from cffa_core.storage.open import blob_secret, open_local, open_store


def test_embedded_mode_stores_below_home(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    open_store(settings).put_bytes("jobs/a/b", b"x")
    assert (tmp_path / "home" / "objects" / "jobs" / "a" / "b").read_bytes() == b"x"


def test_cluster_mode_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(StorageUnavailable, match="S3"):
        open_store(Settings(home=tmp_path, mode="cluster", database_url="postgresql://db/cffa"))


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
