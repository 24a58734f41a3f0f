"""What is special about storage in a folder: signed tokens, a full disk, killed writers, damaged files."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cffa_core.errors import CorruptArtifact, Gone, NotFound, StorageUnavailable
from cffa_core.storage.local import BlobGrant, LocalStore, link_new

SECRET = b"k" * 32


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "objects", secret=SECRET, base_url="http://127.0.0.1:8008/")


def token_of(url: str) -> str:
    head, token = url.rsplit("/", 1)
    assert head == "http://127.0.0.1:8008/v1/blobs"
    return token


def test_a_download_url_carries_a_grant(store: LocalStore) -> None:
    store.put_bytes("jobs/a/archive.zip", b"x")
    before = int(time.time())
    url = store.download_url("jobs/a/archive.zip", expires_seconds=60, filename="pairs ä.zip", sha256="ab" * 32)
    grant = store.read_token(token_of(url))
    assert (grant.key, grant.method, grant.filename) == ("jobs/a/archive.zip", "GET", "pairs ä.zip")
    assert grant.sha256 == "ab" * 32
    assert before + 60 <= grant.expires <= before + 62


def test_the_signature_is_hmac_sha256_over_the_whole_grant(store: LocalStore) -> None:
    body, signature = store.token("k", "PUT", "f", 60).split(".")
    raw = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    expected = hmac.new(SECRET, b"cffa-blob/1\0" + raw, hashlib.sha256).digest()
    assert base64.urlsafe_b64decode(signature + "=" * (-len(signature) % 4)) == expected
    signed = json.loads(raw)
    assert (signed.pop("e") > time.time(), signed) == (True, {"k": "k", "m": "PUT", "f": "f", "h": None, "n": None})


def test_a_forged_or_foreign_token_is_not_found(store: LocalStore, tmp_path: Path) -> None:
    token = store.token("jobs/a/b", "GET", "f", 60)
    body, signature = token.split(".")
    other_key = base64.urlsafe_b64encode(
        json.dumps({"k": "datasets/secret", "m": "GET", "f": "f", "e": 2**40}).encode()
    ).decode()
    foreign = LocalStore(tmp_path, secret=b"z" * 32, base_url="http://x").token("jobs/a/b", "GET", "f", 60)
    flipped = body[:-2] + ("A" if body[-2] != "A" else "B") + body[-1]
    for bad in (
        f"{other_key}.{signature}",
        foreign,
        f"{flipped}.{signature}",
        body,
        "",
        ".",
        "a.b.c",
        "é.é",
        f"{body}.",
    ):
        with pytest.raises(NotFound):
            store.read_token(bad)
    assert store.read_token(token) == BlobGrant("jobs/a/b", "GET", "f", store.read_token(token).expires)


def test_an_expired_token_is_gone(store: LocalStore) -> None:
    with pytest.raises(Gone):
        store.read_token(store.token("jobs/a/b", "GET", "f", -1))


def test_a_full_disk_is_reported_and_leaves_nothing(store: LocalStore, tmp_path: Path) -> None:
    store.put_bytes("jobs/a/small", b"x")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # the kernel refuses to write more to any file
    try:
        with pytest.raises(StorageUnavailable):
            store.put_bytes("jobs/a/big", b"x" * (3 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(store.list("")) == ["jobs/a/small"]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["small"]


def test_damaged_bytes_on_disk_are_named(store: LocalStore, tmp_path: Path) -> None:
    info = store.put_bytes("jobs/a/b", b"x" * 100)
    path = tmp_path / "objects" / "jobs" / "a" / "b"
    path.write_bytes(b"x" * 99 + b"y")
    with pytest.raises(CorruptArtifact, match="jobs/a/b"):
        store.fetch(info, tmp_path / "copy")


def test_killed_writers_leave_no_object_and_their_rests_are_removed(store: LocalStore, tmp_path: Path) -> None:
    program = """
import io, os, signal, sys
from pathlib import Path
from cffa_core.storage.local import LocalStore

class Endless(io.RawIOBase):
    sent = 0
    def read(self, size=-1):
        self.sent += 1
        if self.sent > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return b"x" * 1000

LocalStore(Path(sys.argv[1]), secret=b"k", base_url="").put_stream("jobs/a/b", Endless())
"""
    done = subprocess.run([sys.executable, "-c", program, str(store.root)], check=False, cwd=Path.cwd())
    assert done.returncode == -9
    assert list(store.list("")) == []
    rests = list((store.root / ".incoming").iterdir())
    assert len(rests) == 1
    assert store.remove_abandoned() == 0
    os.utime(rests[0], (time.time() - 90_000, time.time() - 90_000))
    assert store.remove_abandoned() == 1
    assert store.put_bytes("jobs/a/b", b"next").size == 4


def test_linking_never_replaces(tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "old").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        link_new(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_bytes() == b"old"


def test_a_link_among_the_objects_is_not_followed_when_listing(store: LocalStore, tmp_path: Path) -> None:
    store.put_bytes("jobs/a/b", b"x")
    (store.root / "jobs" / "loop").symlink_to(store.root, target_is_directory=True)
    assert "jobs/a/b" in list(store.list(""))
    assert len(list(store.list(""))) == 2


def test_negative_ranges_are_refused(store: LocalStore) -> None:
    store.put_bytes("jobs/a/b", b"x")
    with pytest.raises(ValueError, match="negative"):
        store.open("jobs/a/b", -1)
