"""What every store must do with files that users send straight to it: whole or in parts, counted, joined, given up."""

from __future__ import annotations

import httpx
import pytest

from cffa_core.errors import NotFound
from cffa_core.storage.base import ObjectStore
from cffa_core.storage.local import LocalStore

PART = 5 << 20
KEY = "uploads/up_00000000000000000000/f00000"


def send(objects: ObjectStore, url: str, data: bytes) -> None:
    """PUT as a user does; the local store's links are the API's, whose route is tested with the API."""
    if isinstance(objects, LocalStore):
        grant = objects.read_token(url.rpartition("/")[2])
        assert (grant.method, grant.size) == ("PUT", len(data))
        objects.put_bytes(grant.key, data)
    else:
        httpx.put(url, content=data, timeout=30).raise_for_status()


def test_a_file_is_put_whole(objects: ObjectStore) -> None:
    direct = objects.direct()
    send(objects, direct.put_url(KEY, size=3, expires_seconds=60), b"abc")
    assert objects.get_bytes(KEY) == b"abc"
    assert list(direct.sizes("uploads/")) == [(KEY, 3)]


def test_a_large_file_comes_in_parts_in_any_order(objects: ObjectStore) -> None:
    direct = objects.direct()
    pieces = {1: b"a" * PART, 2: b"b" * PART, 3: b"c" * 7}
    multipart = direct.begin_parts(KEY)
    for number in (3, 1, 2):
        url = direct.part_url(KEY, multipart, number, size=len(pieces[number]), expires_seconds=60)
        send(objects, url, pieces[number])
    assert direct.parts(KEY, multipart) == {1: PART, 2: PART, 3: 7}
    direct.join(KEY, multipart)
    assert objects.get_bytes(KEY) == pieces[1] + pieces[2] + pieces[3]
    direct.join(KEY, multipart)
    assert direct.parts(KEY, multipart) == {}
    assert list(direct.sizes("uploads/")) == [(KEY, 2 * PART + 7)]


def test_an_upload_in_parts_is_given_up(objects: ObjectStore) -> None:
    direct = objects.direct()
    multipart = direct.begin_parts(KEY)
    send(objects, direct.part_url(KEY, multipart, 1, size=4, expires_seconds=60), b"left")
    for _ in range(2):
        direct.abort(KEY, multipart)
    assert direct.parts(KEY, multipart) == {}
    assert list(objects.list("")) == []
    with pytest.raises(NotFound):
        direct.join(KEY, multipart)


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "uploads//x", "uploads/.x"])
def test_links_cannot_leave_the_store(objects: ObjectStore, key: str) -> None:
    with pytest.raises(NotFound):
        objects.direct().put_url(key, size=1, expires_seconds=60)
