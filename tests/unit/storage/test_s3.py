"""What only an S3 store does: buckets, keys that are refused, links for another host, parts, and their memory."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import time
import tracemalloc
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule

from cffa_core.errors import Conflict, InvalidSettings, NotFound, StorageUnavailable
from cffa_core.storage.s3 import SMALLEST_PART, S3Store
from tests.s3_buckets import s3_store, unprepared_store
from tests.servers import S3_ACCESS_KEY, S3_SECRET_KEY, Server

pytestmark = pytest.mark.xdist_group("s3")
MIB = 1 << 20
EVERYTHING: list[tuple[str, Callable[[S3Store], Any]]] = [
    ("put", lambda store: store.put_bytes("jobs/a/b", b"x")),
    ("get", lambda store: store.get_bytes("jobs/a/b")),
    ("range", lambda store: store.open("jobs/a/b", 1, 1)),
    ("size", lambda store: store.size("jobs/a/b")),
    ("list", lambda store: list(store.list("jobs/"))),
    ("delete", lambda store: store.delete("jobs/a/b")),
    ("link", lambda store: store.download_url("jobs/a/b", expires_seconds=60, filename="b")),
]


@pytest.fixture
def store(s3_server: Server) -> Iterator[S3Store]:
    with s3_store(s3_server, part_bytes=SMALLEST_PART) as opened:
        yield opened


@pytest.fixture(scope="module")
def raw(s3_server: Server) -> Minio:
    """The client itself, for what the store does not show."""
    host = urlsplit(s3_server.url).netloc
    return Minio(host, S3_ACCESS_KEY, S3_SECRET_KEY, secure=False, region="us-east-1")


def unfinished_uploads(raw: Minio, bucket: str) -> str:
    answer = raw._execute("GET", bucket, query_params={"uploads": ""})
    return "" if b"<UploadId>" not in answer.data else answer.data.decode()


class Slow(io.RawIOBase):
    """``total`` bytes, all different in each MiB, never in memory at once; ``half_way()`` is called in the middle."""

    def __init__(self, total: int, half_way: Callable[[], None] = lambda: None) -> None:
        self.total, self.left, self.half_way = total, total, half_way
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        count = min(self.left, size, 300_000)
        if self.left > self.total // 2 >= self.left - count:
            self.half_way()
        data = (self.left.to_bytes(8, "big") * (count // 8 + 1))[:count]
        self.left -= count
        self.digest.update(data)
        return data


@pytest.mark.parametrize(
    ("access_key", "secret_key"), [(S3_ACCESS_KEY, "another-secret-than-that"), ("nobody", "x" * 20)]
)
@pytest.mark.parametrize(("name", "ask"), EVERYTHING)
def test_wrong_keys_are_refused(
    s3_server: Server, store: S3Store, access_key: str, secret_key: str, name: str, ask: Callable[[S3Store], Any]
) -> None:
    wrong = {"bucket": store.bucket, "access_key": access_key, "secret_key": secret_key}
    with unprepared_store(s3_server, **wrong) as stranger, pytest.raises(StorageUnavailable, match="refused the keys"):
        ask(stranger)


@pytest.mark.parametrize(("name", "ask"), EVERYTHING)
def test_a_missing_bucket_is_told_from_a_missing_object(
    s3_server: Server, name: str, ask: Callable[[S3Store], Any]
) -> None:
    with unprepared_store(s3_server) as nowhere, pytest.raises(StorageUnavailable, match=f"no bucket {nowhere.bucket}"):
        ask(nowhere)


def test_a_bucket_is_set_up_by_many_at_once(s3_server: Server, raw: Minio) -> None:
    with unprepared_store(s3_server) as new:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(lambda _: new.ensure_bucket(), range(8)))
        rules = raw.get_bucket_lifecycle(new.bucket)
        assert rules is not None
        ends = [rule.abort_incomplete_multipart_upload for rule in rules.rules]
        assert [end.days_after_initiation for end in ends if end] == [3]
        assert new.put_bytes("jobs/a/b", b"x").size == 1


def test_rules_of_an_operator_stay(s3_server: Server, raw: Minio) -> None:
    with unprepared_store(s3_server) as new:
        raw.make_bucket(new.bucket)
        theirs = Rule(ENABLED, rule_filter=Filter(prefix="health/"), rule_id="theirs", expiration=Expiration(days=1))
        raw.set_bucket_lifecycle(new.bucket, LifecycleConfig([theirs]))
        assert new.ensure_bucket()
        assert new.ensure_bucket()
        rules = raw.get_bucket_lifecycle(new.bucket)
        assert rules is not None
        assert sorted(str(rule.rule_id) for rule in rules.rules) == ["cffa-abort-incomplete-uploads", "theirs"]


def test_a_bucket_of_somebody_else_is_not_taken_for_ours(s3_server: Server, store: S3Store) -> None:
    wrong = {"bucket": store.bucket, "secret_key": "another-secret-than-that"}
    with unprepared_store(s3_server, **wrong) as stranger, pytest.raises(StorageUnavailable, match="refused"):
        stranger.ensure_bucket()


def test_a_link_works_under_the_public_host_and_no_other(s3_server: Server, store: S3Store) -> None:
    store.put_bytes("jobs/a/pairs.zip", b"0123456789")
    public = f"http://localhost:{s3_server.port}"
    with unprepared_store(s3_server, bucket=store.bucket, public_endpoint=public) as outside:
        url = outside.download_url("jobs/a/pairs.zip", expires_seconds=60, filename="Müller 1.zip")
    assert url.startswith(f"{public}/")
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == b"0123456789"
        assert answer.headers["content-type"] == "application/zip"
        assert answer.headers["content-disposition"] == (
            f"attachment; filename=\"M_ller_1.zip\"; filename*=UTF-8''{quote('Müller 1.zip')}"
        )
    ranged = urllib.request.Request(url, headers={"Range": "bytes=3-5"})
    with urllib.request.urlopen(ranged) as answer:
        assert (answer.status, answer.read()) == (206, b"345")
    for changed in (url.replace("localhost", "127.0.0.1"), url.replace("pairs.zip", "other.zip"), url[:-1] + "0"):
        if changed != url:
            assert _status(changed) == 403


def test_a_link_is_signed_without_asking_the_public_endpoint(s3_server: Server, store: S3Store) -> None:
    store.put_bytes("jobs/a/b", b"x")
    with unprepared_store(s3_server, bucket=store.bucket, public_endpoint="https://objects.invalid") as outside:
        url = urlsplit(outside.download_url("jobs/a/b", expires_seconds=10**9, filename="b"))
    assert (url.scheme, url.netloc, url.path) == ("https", "objects.invalid", f"/{store.bucket}/jobs/a/b")
    assert "us-east-1" in url.query
    assert "X-Amz-Expires=604800" in url.query


def test_an_expired_link_is_refused(store: S3Store) -> None:
    store.put_bytes("jobs/a/b", b"x")
    url = store.download_url("jobs/a/b", expires_seconds=2, filename="b")
    assert _status(url) == 200
    time.sleep(3.1)
    assert _status(url) == 403


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.parametrize("total", [2 * SMALLEST_PART, 3 * SMALLEST_PART + 17, 7 * SMALLEST_PART])
def test_a_long_stream_is_stored_whole_with_a_few_parts_in_memory(store: S3Store, raw: Minio, total: int) -> None:
    stream = Slow(total)
    tracemalloc.start()
    try:
        info = store.put_stream("jobs/a/long", stream)  # type: ignore[arg-type]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3.5 * SMALLEST_PART
    assert (info.size, info.sha256) == (total, stream.digest.hexdigest())
    with store.open("jobs/a/long") as stored:
        assert hashlib.file_digest(stored, "sha256").hexdigest() == info.sha256  # type: ignore[arg-type]
    assert unfinished_uploads(raw, store.bucket) == ""


def test_a_large_file_keeps_its_digest_and_is_never_overwritten(store: S3Store, raw: Minio, tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(b"1" * (SMALLEST_PART + 1))
    info = store.put_file("jobs/a/large", path)
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert raw.stat_object(store.bucket, "jobs/a/large").metadata["x-amz-meta-sha256"] == info.sha256
    assert store.put_file("jobs/a/large", path) == info
    with path.open("rb") as stream:
        assert store.put_stream("jobs/a/large", stream) == info
    path.write_bytes(b"2" * (SMALLEST_PART + 1))
    with pytest.raises(Conflict):
        store.put_file("jobs/a/large", path)
    with store.open("jobs/a/large", SMALLEST_PART) as stored:
        assert stored.read() == b"1"


def test_a_stream_without_a_kept_digest_is_compared_by_its_bytes(store: S3Store) -> None:
    first = store.put_stream("jobs/a/long", Slow(SMALLEST_PART + 9))  # type: ignore[arg-type]
    assert store.put_stream("jobs/a/long", Slow(SMALLEST_PART + 9)) == first  # type: ignore[arg-type]
    with pytest.raises(Conflict):
        store.put_stream("jobs/a/long", io.BytesIO(b"3" * (SMALLEST_PART + 9)))


@pytest.mark.parametrize("same", [True, False])
def test_of_two_overlapping_uploads_the_first_to_finish_counts(store: S3Store, raw: Minio, same: bool) -> None:
    total = 2 * SMALLEST_PART + 5

    def other() -> None:
        store.put_stream("jobs/a/long", Slow(total) if same else io.BytesIO(b"other"))  # type: ignore[arg-type]

    slow = Slow(total, half_way=other)
    if same:
        assert store.put_stream("jobs/a/long", slow).size == total  # type: ignore[arg-type]
    else:
        with pytest.raises(Conflict):
            store.put_stream("jobs/a/long", slow)  # type: ignore[arg-type]
        assert store.get_bytes("jobs/a/long") == b"other"
    assert unfinished_uploads(raw, store.bucket) == ""


def test_a_long_stream_that_breaks_off_leaves_no_parts(store: S3Store, raw: Minio) -> None:
    class LeaseIsLost(Exception):
        pass

    def stop() -> None:
        assert unfinished_uploads(raw, store.bucket) != ""
        raise LeaseIsLost

    with pytest.raises(LeaseIsLost):
        store.put_stream("jobs/a/long", Slow(3 * SMALLEST_PART, half_way=stop))  # type: ignore[arg-type]
    assert unfinished_uploads(raw, store.bucket) == ""
    assert list(store.list("")) == []


def test_a_file_that_changes_while_it_is_stored_is_refused(store: S3Store, raw: Minio, tmp_path: Path) -> None:
    path = tmp_path / "growing.bin"
    path.write_bytes(b"1" * (2 * SMALLEST_PART))
    look = store._look

    def look_and_change(key: str) -> Any:  # between the two readings of the file
        path.write_bytes(b"2" * (2 * SMALLEST_PART))
        return look(key)

    store._look = look_and_change  # type: ignore[method-assign]
    with pytest.raises(StorageUnavailable, match="changed while it was read"):
        store.put_file("jobs/a/large", path)
    assert list(store.list("")) == []
    assert unfinished_uploads(raw, store.bucket) == ""


WRITER = """
import sys
from cffa_core.errors import Conflict
from cffa_core.storage.s3 import S3Store
endpoint, bucket, access_key, secret_key, mark = sys.argv[1:]
store = S3Store(endpoint=endpoint, bucket=bucket, access_key=access_key, secret_key=secret_key)
print("ready", flush=True)
sys.stdin.readline()
won = []
for index in range(20):
    try:
        store.put_bytes(f"jobs/a/contested-{index}", mark.encode() * 1000)
        won.append(str(index))
    except Conflict:
        pass
print(" ".join(won))
"""


def test_of_two_processes_that_put_one_key_exactly_one_wins(s3_server: Server, store: S3Store) -> None:
    usual = [sys.executable, "-c", WRITER, s3_server.url, store.bucket, S3_ACCESS_KEY, S3_SECRET_KEY]
    writers = {
        mark: subprocess.Popen([*usual, mark], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for mark in ("a", "b")
    }
    try:
        for writer in writers.values():
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
        for writer in writers.values():
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        won = {mark: set(writer.communicate(timeout=120)[0].split()) for mark, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.kill()
            writer.wait()
    assert won["a"] & won["b"] == set()
    assert won["a"] | won["b"] == {str(index) for index in range(20)}
    for mark, indices in won.items():
        for index in indices:
            assert store.get_bytes(f"jobs/a/contested-{index}") == mark.encode() * 1000


@pytest.mark.slow
def test_more_keys_than_a_page_are_listed_in_order(store: S3Store, raw: Minio) -> None:
    keys = [f"jobs/a/{index:05d}" for index in range(1003)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: raw.put_object(store.bucket, key, io.BytesIO(b""), 0), keys))
    assert list(store.list("jobs/")) == keys
    assert list(store.list("jobs/a/0100")) == keys[1000:]


def test_a_key_that_is_too_long_for_s3_is_refused_by_every_store(store: S3Store) -> None:
    longest = "/".join(["k" * 200] * 5)
    assert store.put_bytes(longest + "k" * 20, b"x").size == 1  # 1024 bytes
    for key in (longest + "k" * 21, "k" * 241, "jobs/\ud800"):
        with pytest.raises(NotFound):
            store.put_bytes(key, b"x")


@pytest.mark.parametrize(
    "endpoint",
    ["", "127.0.0.1:9000", "ftp://host", "http://", "http://user:word@host:9000", "https://host/objects"],
)
@pytest.mark.parametrize("which", ["endpoint", "public_endpoint"])
def test_an_endpoint_that_is_none_is_named(which: str, endpoint: str) -> None:
    if which == "public_endpoint" and not endpoint:
        return  # means: the same
    given = {"endpoint": "http://127.0.0.1:9000"} | {which: endpoint}
    with pytest.raises(InvalidSettings, match=f"CFFA_S3_{which.upper()}"):
        S3Store(**given, bucket="cffa", access_key="a", secret_key="b")  # type: ignore[arg-type]


def test_parts_below_the_smallest_of_s3_are_refused() -> None:
    with pytest.raises(ValueError, match="parts"):
        S3Store(endpoint="http://h", bucket="cffa", access_key="a", secret_key="b", part_bytes=MIB)
