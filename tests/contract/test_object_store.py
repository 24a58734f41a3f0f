"""What every object store must do: objects are whole, verified, immutable, and listed in order."""

from __future__ import annotations

import hashlib
import io
import threading
from pathlib import Path

import pytest

from cffa_core.errors import Conflict, CorruptArtifact, NotFound
from cffa_core.storage.base import ObjectInfo, ObjectStore, checkpoint_key, dataset_key, part_key, result_key

DATA = bytes(range(256)) * 8


def test_a_stored_object_reads_back_with_its_digest(objects: ObjectStore) -> None:
    info = objects.put_bytes("jobs/job_x/train/a1/log.txt", b"abc")
    # The FIPS 180-2 example digest of "abc".
    assert info == ObjectInfo(
        "jobs/job_x/train/a1/log.txt", 3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    assert objects.get_bytes(info.key) == b"abc"
    assert objects.size(info.key) == 3


def test_files_and_streams_are_stored_alike(objects: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(DATA * 2000)
    from_file = objects.put_file("jobs/a/file", source)
    from_stream = objects.put_stream("jobs/a/stream", io.BytesIO(DATA * 2000))
    assert (from_file.size, from_file.sha256) == (from_stream.size, from_stream.sha256)
    assert from_file.sha256 == hashlib.sha256(DATA * 2000).hexdigest()
    assert objects.get_bytes("jobs/a/stream") == source.read_bytes()


def test_an_empty_object_is_an_object(objects: ObjectStore) -> None:
    assert objects.put_bytes("jobs/a/empty", b"").size == 0
    assert objects.get_bytes("jobs/a/empty") == b""


@pytest.mark.parametrize(
    ("start", "length"), [(0, None), (10, None), (0, 0), (0, 1), (100, 300), (2040, 100), (2048, 5), (5000, 5)]
)
def test_ranges_are_those_of_the_bytes(objects: ObjectStore, start: int, length: int | None) -> None:
    objects.put_bytes("jobs/a/b", DATA)
    with objects.open("jobs/a/b", start, length) as stream:
        assert stream.read() == DATA[start : None if length is None else start + length]


def test_an_object_is_never_overwritten(objects: ObjectStore) -> None:
    objects.put_bytes("jobs/a/b", b"first")
    with pytest.raises(Conflict):
        objects.put_bytes("jobs/a/b", b"other")
    assert objects.get_bytes("jobs/a/b") == b"first"
    assert objects.put_bytes("jobs/a/b", b"first").size == 5


def test_of_two_writers_of_one_key_exactly_one_wins(objects: ObjectStore) -> None:
    won: list[bytes] = []
    start = threading.Barrier(8)

    def put(data: bytes) -> None:
        start.wait()
        try:
            objects.put_bytes("jobs/a/contested", data)
        except Conflict:
            return
        won.append(data)

    threads = [threading.Thread(target=put, args=(bytes([index]) * 4096,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [objects.get_bytes("jobs/a/contested")]


def test_missing_objects_are_not_found(objects: ObjectStore) -> None:
    objects.put_bytes("jobs/a/b", b"x")
    for key in ("jobs/a/c", "jobs/a", "jobs/a/b/c"):
        for ask in (objects.get_bytes, objects.open, objects.size):
            with pytest.raises(NotFound):
                ask(key)
        with pytest.raises(NotFound):
            objects.download_url(key, expires_seconds=60, filename="x")


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "/etc/passwd",
        "../x",
        "jobs/../../x",
        "jobs/./x",
        "jobs//x",
        "jobs/x/",
        "jobs/.hidden",
        "a\\..\\b",
        "a\0b",
    ],
)
def test_keys_cannot_leave_the_store(objects: ObjectStore, key: str, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(NotFound):
        objects.put_bytes(key, b"x")
    with pytest.raises(NotFound):
        objects.get_bytes(key)
    with pytest.raises(NotFound):
        objects.delete(key)
    assert sorted(folder.rglob("*")) == before


def test_names_of_real_files_are_kept(objects: ObjectStore) -> None:
    key = dataset_key("ds_00000000000000000000", "cf/Müller, Jörg (OD) 第1.png")
    objects.put_bytes(key, b"x")
    assert list(objects.list("datasets/")) == [key]


def test_keys_are_listed_in_order_below_a_prefix(objects: ObjectStore) -> None:
    keys = ["jobs/a-b/x", "jobs/a/b/c", "jobs/a/b2", "jobs/a0/x", "jobs/ab/x", "datasets/d/x"]
    for key in keys:
        objects.put_bytes(key, b"x")
    assert list(objects.list("")) == sorted(keys)
    assert list(objects.list("jobs/a/")) == ["jobs/a/b/c", "jobs/a/b2"]
    assert list(objects.list("jobs/a")) == sorted(key for key in keys if key.startswith("jobs/a"))
    assert list(objects.list("nothing/")) == []


def test_deleting_is_final_and_may_be_repeated(objects: ObjectStore) -> None:
    objects.put_bytes("jobs/a/b", b"x")
    objects.put_bytes("jobs/a/c", b"y")
    objects.delete("jobs/a/b")
    objects.delete("jobs/a/b")
    assert list(objects.list("")) == ["jobs/a/c"]
    objects.delete("jobs/a/c")
    assert objects.put_bytes("jobs/a/b", b"again").size == 5


def test_fetching_verifies_every_byte(objects: ObjectStore, tmp_path: Path) -> None:
    info = objects.put_bytes("jobs/a/b", DATA)
    target = tmp_path / "new" / "copy.bin"
    objects.fetch(info, target)
    assert target.read_bytes() == DATA
    target.unlink()
    for wrong in (ObjectInfo(info.key, info.size, "0" * 64), ObjectInfo(info.key, info.size + 1, info.sha256)):
        with pytest.raises(CorruptArtifact):
            objects.fetch(wrong, target)
        assert list(target.parent.iterdir()) == []
    with pytest.raises(NotFound):
        objects.fetch(ObjectInfo("jobs/a/none", 1, "0" * 64), target)


def test_a_failed_fetch_leaves_the_old_file(objects: ObjectStore, tmp_path: Path) -> None:
    info = objects.put_bytes("jobs/a/b", DATA)
    target = tmp_path / "copy.bin"
    target.write_bytes(b"older")
    with pytest.raises(CorruptArtifact):
        objects.fetch(ObjectInfo(info.key, info.size, "0" * 64), target)
    assert target.read_bytes() == b"older"


def test_a_stream_that_breaks_off_leaves_nothing(objects: ObjectStore) -> None:
    class Broken(io.RawIOBase):
        left = 3

        def read(self, size: int = -1) -> bytes:
            self.left -= 1
            if not self.left:
                raise ConnectionResetError("the client went away")
            return b"x" * 1000

    with pytest.raises(Exception, match="client went away"):
        objects.put_stream("jobs/a/b", Broken())  # type: ignore[arg-type]
    assert list(objects.list("")) == []
    with pytest.raises(NotFound):
        objects.size("jobs/a/b")


def test_keys_of_all_products_are_valid(objects: ObjectStore) -> None:
    job = "job_" + "0" * 20
    keys = [
        part_key(job, 3, 2, "pairs.zip"),
        checkpoint_key(job, 500, 1, "best/lora_cf.safetensors"),
        result_key(job, "finalize", 1, "archive.zip"),
    ]
    for key in keys:
        objects.put_bytes(key, b"x")
    assert list(objects.list(f"jobs/{job}/")) == sorted(keys)
