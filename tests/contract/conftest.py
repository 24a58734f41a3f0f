"""One record and one object store per test, of every kind there is; a new kind joins by a new parameter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cffa_core.jobs.store import JobStore
from cffa_core.storage.base import ObjectStore
from cffa_core.storage.local import LocalStore
from tests.record_cases import memory_folder
from tests.s3_buckets import s3_store


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as made:
        yield made


@pytest.fixture
def store(record_url: str) -> Iterator[JobStore]:
    opened = JobStore(record_url)
    yield opened
    opened.close()


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.xdist_group("s3"))])
def objects(request: pytest.FixtureRequest, folder: Path) -> Iterator[ObjectStore]:
    if request.param == "local":
        yield LocalStore(folder / "objects", secret=b"s" * 32, base_url="http://127.0.0.1:8008")
    else:
        with s3_store(request.getfixturevalue("s3_server")) as opened:
            yield opened
