"""An S3 store behind a broken network: typed errors in bounded time, nothing half-written readable."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cffa_core.errors import CffaError, Conflict, CorruptArtifact, NotFound, StorageUnavailable
from cffa_core.storage.base import ObjectInfo
from cffa_core.storage.s3 import SMALLEST_PART, S3Store
from cffa_core.storage.s3_transport import RESUMES
from tests.faulty_proxy import Fault, FaultyProxy, Plan, faulty_proxy
from tests.s3_buckets import s3_store, unprepared_store
from tests.servers import Server

pytestmark = pytest.mark.xdist_group("s3")
LARGE = os.urandom(1 << 16) * (SMALLEST_PART // (1 << 16)) + b"the second part"
LARGE_SHA256 = hashlib.sha256(LARGE).hexdigest()
# What one upload in two parts asks: look, start, first part, look, last part, put together, look.
REQUESTS = 7


@pytest.fixture(scope="module")
def store(s3_server: Server) -> Iterator[S3Store]:
    """The store as it is, for checking what is really there; keys are used once."""
    with s3_store(s3_server) as opened:
        yield opened


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.bin"
    path.write_bytes(LARGE)
    return path


@contextmanager
def behind(
    server: Server, store: S3Store, plan: Plan, *, retries: int = 1, read_seconds: float = 10.0
) -> Iterator[tuple[S3Store, FaultyProxy]]:
    with (
        faulty_proxy(server.port, plan) as proxy,
        unprepared_store(
            server,
            endpoint=proxy.url,
            bucket=store.bucket,
            part_bytes=SMALLEST_PART,
            retries=retries,
            connect_seconds=2.0,
            read_seconds=read_seconds,
        ) as broken,
    ):
        yield broken, proxy


def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


BUSY = Fault(answer=answer("503 Service Unavailable", b"", "Retry-After: 3600"))


def at(wanted: int, fault: Fault) -> Plan:
    return lambda number, head: fault if number == wanted else None


def since(wanted: int, fault: Fault) -> Plan:
    return lambda number, head: fault if number >= wanted else None


def stored(store: S3Store, key: str) -> bytes | None:
    try:
        return store.get_bytes(key)
    except NotFound:
        return None


def test_an_undisturbed_upload_in_parts_asks_what_the_tests_below_count(
    s3_server: Server, store: S3Store, large: Path
) -> None:
    with behind(s3_server, store, lambda number, head: None) as (through, proxy):
        assert through.put_file("jobs/count/large", large).sha256 == LARGE_SHA256
        methods = [head.split(" ")[0] for head in proxy.heads]
    assert methods == ["HEAD", "POST", "PUT", "HEAD", "PUT", "POST", "HEAD"]
    assert len(methods) == REQUESTS


@pytest.mark.parametrize("number", range(REQUESTS))
@pytest.mark.parametrize(
    ("kind", "fault"),
    [("busy", BUSY), ("reset", Fault(cut_request_after=50)), ("answer lost", Fault(cut_answer_after=0))],
)
def test_one_failure_at_any_request_of_an_upload_is_made_up_for(
    s3_server: Server, store: S3Store, large: Path, kind: str, fault: Fault, number: int
) -> None:
    key = f"jobs/one/{kind}-{number}"
    with behind(s3_server, store, at(number, fault)) as (broken, _):
        assert broken.put_file(key, large) == ObjectInfo(key, len(LARGE), LARGE_SHA256)
    assert stored(store, key) == LARGE


@pytest.mark.parametrize("number", range(REQUESTS))
@pytest.mark.parametrize("kind", ["busy", "cut"])
def test_a_store_that_fails_from_any_request_on_shows_nothing_partial(
    s3_server: Server, store: S3Store, large: Path, kind: str, number: int
) -> None:
    key = f"jobs/all/{kind}-{number}"
    # In the middle of the first part, or in the head of any other request: none arrives whole.
    fault = BUSY if kind == "busy" else Fault(cut_request_after=3_000_000 if number == 2 else 400)
    with behind(s3_server, store, since(number, fault)) as (broken, _), pytest.raises(StorageUnavailable):
        broken.put_file(key, large)
    complete = number == REQUESTS - 1  # all was done, only the last look failed
    assert stored(store, key) == (LARGE if complete else None)
    assert store.put_file(key, large).sha256 == LARGE_SHA256


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    "fault", [BUSY, Fault(cut_request_after=700), Fault(cut_request_after=20_000), Fault(cut_answer_after=0)]
)
def test_a_small_put_is_tried_again_and_counts_once(
    s3_server: Server, store: S3Store, fault: Fault, number: int
) -> None:
    key = f"jobs/small/{abs(hash(fault))}-{number}"
    data = os.urandom(30_000)
    with behind(s3_server, store, at(number, fault)) as (broken, _):
        broken.put_bytes(key, data)
        with pytest.raises(Conflict):
            broken.put_bytes(key, b"other")
    assert stored(store, key) == data


def test_a_small_put_that_is_always_cut_shows_nothing(s3_server: Server, store: S3Store) -> None:
    with behind(s3_server, store, since(1, Fault(cut_request_after=20_000))) as (broken, proxy):
        with pytest.raises(StorageUnavailable, match="cannot be reached"):
            broken.put_bytes("jobs/small/cut", os.urandom(30_000))
        assert len(proxy.heads) == 3  # a look, the put, the one retry
    assert stored(store, "jobs/small/cut") is None


def test_a_failure_reported_in_the_answer_of_a_success_is_a_failure(
    s3_server: Server, store: S3Store, large: Path
) -> None:
    sorry = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>try again</Message></Error>"
    plan = at(5, Fault(answer=answer("200 OK", sorry, "Content-Type: application/xml")))
    with behind(s3_server, store, plan) as (broken, _), pytest.raises(StorageUnavailable, match="together"):
        broken.put_file("jobs/sorry/large", large)
    assert stored(store, "jobs/sorry/large") is None


def test_an_upload_that_was_done_but_whose_every_answer_was_lost_is_found(
    s3_server: Server, store: S3Store, large: Path
) -> None:
    gone = b"<Error><Code>NoSuchKey</Code></Error>"
    faults = {
        5: Fault(cut_answer_after=0),
        6: BUSY,
        7: Fault(answer=answer("404 Not Found", gone, "Content-Type: application/xml")),  # to the clearing up
    }
    with behind(s3_server, store, lambda number, head: faults.get(number)) as (broken, proxy):
        assert broken.put_file("jobs/lost/large", large).sha256 == LARGE_SHA256
        assert [head.split(" ")[0] for head in proxy.heads[5:]] == ["POST", "POST", "DELETE", "HEAD"]
    assert stored(store, "jobs/lost/large") == LARGE


def test_the_reason_of_a_stopped_upload_is_told_even_if_the_store_fails_too(s3_server: Server, store: S3Store) -> None:
    class Stopped(Exception):
        pass

    class Stream(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if data := super().read(size):
                return data
            raise Stopped

    with behind(s3_server, store, since(3, BUSY)) as (broken, proxy):
        with pytest.raises(Stopped):
            broken.put_stream("jobs/stopped/large", Stream(LARGE))
        assert [head.split(" ")[0] for head in proxy.heads] == ["HEAD", "POST", "PUT", "DELETE", "DELETE"]
    assert stored(store, "jobs/stopped/large") is None


def test_an_upload_that_came_second_is_told_so_or_to_come_again(s3_server: Server, store: S3Store) -> None:
    def other_first(number: int, head: str) -> Fault | None:
        if number == 3:  # the look before the end
            store.put_bytes("jobs/second/large", b"other")
        return BUSY if number >= 4 else None  # nor can the parts be cleared away

    with behind(s3_server, store, other_first) as (broken, _), pytest.raises(StorageUnavailable):
        broken.put_stream("jobs/second/large", io.BytesIO(LARGE))
    with pytest.raises(Conflict):
        store.put_stream("jobs/second/large", io.BytesIO(LARGE))


def test_a_server_without_conditional_writes_is_looked_at_first(s3_server: Server, store: S3Store) -> None:
    def refuse(number: int, head: str) -> Fault | None:
        refusal = b"<Error><Code>NotImplemented</Code></Error>"
        asked = "if-none-match" in head.lower()
        return Fault(answer=answer("501 Not Implemented", refusal, "Content-Type: application/xml")) if asked else None

    with behind(s3_server, store, refuse) as (simple, proxy):
        simple.put_bytes("jobs/simple/a", b"first")
        with pytest.raises(Conflict):
            simple.put_bytes("jobs/simple/a", b"other")
        simple.put_bytes("jobs/simple/b", b"second")
        assert sum("if-none-match" in head.lower() for head in proxy.heads) == 1
    assert (stored(store, "jobs/simple/a"), stored(store, "jobs/simple/b")) == (b"first", b"second")


def test_a_broken_download_goes_on_where_it_ended(s3_server: Server, store: S3Store, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    info = store.put_bytes("jobs/down/a", data)

    def cut(number: int, head: str) -> Fault | None:
        return Fault(cut_answer_after=1_000_000) if number < RESUMES else None

    with behind(s3_server, store, cut) as (broken, proxy):
        broken.fetch(info, tmp_path / "copy.bin")
        ranges = [line for head in proxy.heads for line in head.splitlines() if line.lower().startswith("range")]
        assert len(ranges) == RESUMES
        with broken.open("jobs/down/a", 1_500_000, 1_400_000) as stream:
            assert stream.read() == data[1_500_000:2_900_000]
    assert (tmp_path / "copy.bin").read_bytes() == data


def test_a_download_that_is_always_cut_is_never_taken_for_complete(
    s3_server: Server, store: S3Store, tmp_path: Path
) -> None:
    data = os.urandom(100_000)
    info = store.put_bytes("jobs/down/b", data)
    with behind(s3_server, store, since(0, Fault(cut_answer_after=5_000))) as (broken, proxy):
        with pytest.raises(StorageUnavailable, match="cut off"):
            broken.fetch(info, tmp_path / "copy.bin")
        assert len(proxy.heads) == RESUMES + 1
        with pytest.raises(StorageUnavailable, match="cut off"), broken.open("jobs/down/b", 10, 50_000) as stream:
            stream.read()
        with pytest.raises(StorageUnavailable, match="cut off"):
            broken.get_bytes("jobs/down/b")
    assert list(tmp_path.iterdir()) == []


def test_a_changed_byte_on_the_way_is_found(s3_server: Server, store: S3Store, tmp_path: Path) -> None:
    info = store.put_bytes("jobs/down/c", b"0123456789")
    with (
        behind(s3_server, store, at(0, Fault(answer=answer("200 OK", b"0123X56789")))) as (broken, _),
        pytest.raises(CorruptArtifact),
    ):
        broken.fetch(info, tmp_path / "copy.bin")
    assert list(tmp_path.iterdir()) == []


def test_a_range_that_is_ignored_is_not_taken_for_one(s3_server: Server, store: S3Store) -> None:
    store.put_bytes("jobs/down/d", b"0123456789")
    with (
        behind(s3_server, store, at(0, Fault(answer=answer("200 OK", b"0123456789")))) as (broken, _),
        pytest.raises(StorageUnavailable, match="range"),
    ):
        broken.open("jobs/down/d", 5, 5)


READS: list[tuple[str, Callable[[S3Store], Any]]] = [
    ("get", lambda store: store.get_bytes("jobs/x/a")),
    ("size", lambda store: store.size("jobs/x/a")),
    ("list", lambda store: list(store.list("jobs/"))),
    ("delete", lambda store: store.delete("jobs/x/a")),
    ("put", lambda store: store.put_bytes("jobs/x/a", b"x")),
    ("bucket", lambda store: store.ensure_bucket()),
]
NONSENSE = {
    "an html page": answer("502 Bad Gateway", b"<html>" * 10, "Content-Type: text/html"),
    "not xml": answer("400 Bad Request", b"oops", "Content-Type: application/xml"),
    "not utf-8": answer("500 Internal Server Error", b"\xff\xfe\x00", "Content-Type: application/xml"),
    "elsewhere": answer("307 Temporary Redirect", b"", "Location: http://127.0.0.1:1/"),
    "not http": b"SSH-2.0-OpenSSH_9.2\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("name", sorted(NONSENSE))
@pytest.mark.parametrize(("operation", "ask"), READS, ids=[name for name, _ in READS])
def test_any_other_answer_is_a_typed_error(
    s3_server: Server, store: S3Store, operation: str, ask: Callable[[S3Store], Any], name: str
) -> None:
    with (
        behind(s3_server, store, since(0, Fault(answer=NONSENSE[name])), retries=0) as (broken, _),
        pytest.raises(StorageUnavailable),
    ):
        ask(broken)


def test_a_page_that_is_no_listing_is_not_an_empty_one(s3_server: Server, store: S3Store) -> None:
    page = answer("200 OK", b"<html><br></html>", "Content-Type: text/html")
    with behind(s3_server, store, since(0, Fault(answer=page))) as (broken, _), pytest.raises(StorageUnavailable):
        list(broken.list("jobs/"))


@pytest.mark.parametrize(("operation", "ask"), READS, ids=[name for name, _ in READS])
def test_a_server_that_hangs_or_is_gone_is_given_up(
    s3_server: Server, store: S3Store, operation: str, ask: Callable[[S3Store], Any]
) -> None:
    began = time.monotonic()
    with (
        behind(s3_server, store, since(0, Fault(hang=True)), read_seconds=0.2) as (broken, _),
        pytest.raises(StorageUnavailable, match="cannot be reached"),
    ):
        ask(broken)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with (
        unprepared_store(s3_server, endpoint=f"http://127.0.0.1:{port}", retries=1) as gone,
        pytest.raises(StorageUnavailable, match="cannot be reached") as caught,
    ):
        ask(gone)
    assert str(port) not in caught.value.message
    assert isinstance(caught.value, CffaError)
    assert time.monotonic() - began < 10.0
