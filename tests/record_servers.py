"""One new record per test on each database: a file copied from a migrated one, or a database made from a template."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

import pytest
import sqlalchemy as sa

from cffa_core.jobs.store import JobStore
from tests.record_cases import memory_folder
from tests.servers import Server

Fill = Callable[[JobStore], None]
_numbers = itertools.count()


def leave_empty(store: JobStore) -> None:
    """A template with a schema and no rows."""


@dataclass
class SqliteRecords:
    """Records in files below ``folder``."""

    folder: Path
    _templates: dict[Fill, bytes] = field(default_factory=dict)

    def new(self, fill: Fill = leave_empty) -> str:
        """URL of a new migrated record."""
        if fill not in self._templates:
            path = Path(mkdtemp(dir=self.folder)) / "template.sqlite"
            store = JobStore(f"sqlite:///{path}")
            store.migrate()
            fill(store)
            store.close()
            self._templates[fill] = path.read_bytes()
        path = Path(mkdtemp(dir=self.folder)) / "record.sqlite"
        path.write_bytes(self._templates[fill])
        return f"sqlite:///{path}"

    def bare(self) -> str:
        """URL of a record that was never migrated."""
        return f"sqlite:///{Path(mkdtemp(dir=self.folder)) / 'home' / 'record.sqlite'}"

    def drop(self, url: str) -> None:
        """Remove a record; every store of it is closed."""
        path = Path(str(sa.make_url(url).database))
        for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
            path.with_name(name).unlink(missing_ok=True)


@dataclass
class PostgresRecords:
    """Databases of one server; one that a test gave back is emptied and used again, since making one takes longer.

    Commits do not wait for the disk, which changes nothing that a test of statements could see; what survives a killed
    server is tested with one of its own.
    """

    server: Server
    _template: str | None = None
    _free: list[str] = field(default_factory=list)

    def new(self, fill: Fill = leave_empty) -> str:
        """URL of a new migrated record."""
        if self._template is None:
            self._template = self._create("template1", "cffa_template")
            store = JobStore(self._url(self._template))
            store.migrate()
            store.close()
        url = self._free.pop() if self._free else self._url(self._create(self._template, "cffa_test"))
        store = JobStore(url)
        fill(store)
        store.close()
        return url

    def bare(self) -> str:
        """URL of a record that was never migrated; not to be dropped."""
        return self._url(self._create("template1", "cffa_bare"))

    def drop(self, url: str) -> None:
        """Empty a record for the next test; connections that are left are ended."""
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()"
            )
            # Rows that belong to a job go with it.
            people = ("api_keys", "accounts", "audit", "webhooks", "uploads", "post_keys")
            for table in ("jobs", "owners", "models", "datasets", "workers", "turns", *people):
                connection.exec_driver_sql(f"DELETE FROM {table}")
        self._free.append(url)

    def _create(self, template: str, prefix: str) -> str:
        name = f"{prefix}_{os.getpid()}_{next(_numbers)}"
        engine = sa.create_engine(self.server.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            connection.exec_driver_sql(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return name

    def _url(self, database: str) -> str:
        url = sa.make_url(self.server.url).set(database=database, query={"options": "-csynchronous_commit=off"})
        return url.render_as_string(hide_password=False)


Records = SqliteRecords | PostgresRecords


@pytest.fixture(scope="session")
def sqlite_records() -> Iterator[SqliteRecords]:
    """SQLite records in memory: a power cut is not what tests of statements are about."""
    with memory_folder() as folder:
        yield SqliteRecords(folder)


@pytest.fixture(scope="session")
def postgres_records(postgres_server: Server) -> PostgresRecords:
    """PostgreSQL records on the server that the tests of this process share."""
    return PostgresRecords(postgres_server)


@pytest.fixture(params=["sqlite", "postgres"])
def records(request: pytest.FixtureRequest) -> Records:
    """Maker of records; a test that asks for it runs on each database."""
    made: Records = request.getfixturevalue(f"{request.param}_records")
    return made


@pytest.fixture
def record_url(records: Records) -> Iterator[str]:
    """URL of a new migrated record, on each database."""
    url = records.new()
    yield url
    records.drop(url)
