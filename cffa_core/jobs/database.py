"""Connections to the record: one engine per process, read and write transactions, migration to the newest schema.

SQLite runs in WAL with ``synchronous=FULL`` and every write begins IMMEDIATE, so that writers queue instead of
failing half-way; PostgreSQL runs at its default isolation and rows are locked where they are read for change.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from cffa_core.errors import StorageUnavailable

MIGRATIONS = Path(__file__).with_name("migrations")
BUSY_SECONDS = 30.0
_MIGRATION_LOCK = 0x0CFFA


class Database:
    """One engine and its transactions; raises :class:`StorageUnavailable` when the database does not answer."""

    def __init__(self, url: str) -> None:
        self.url = sa.make_url(url)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        connect_args: dict[str, Any] = {"timeout": BUSY_SECONDS} if self.sqlite else {}
        self.engine = sa.create_engine(self.url, connect_args=connect_args, pool_pre_ping=not self.sqlite)
        if self.sqlite:
            sa.event.listen(self.engine, "connect", _configure_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that only reads: one consistent view, never waits for writers."""
        with _typed_errors(), self.engine.connect().execution_options(cffa_reads=True) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that writes: committed and durable when the block ends, undone if it raises."""
        with _typed_errors(), self.engine.begin() as connection:
            yield connection

    def migrate(self) -> None:
        """Upgrade to the newest schema under a lock, so that processes starting together do it once."""
        if self.sqlite:
            Path(str(self.url.database)).parent.mkdir(parents=True, exist_ok=True)
            self._switch_to_wal()
        with self.write() as connection:
            if not self.sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            config = Config()
            config.set_main_option("script_location", MIGRATIONS.as_posix().replace("%", "%%"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        """Close all pooled connections."""
        self.engine.dispose()

    def _switch_to_wal(self) -> None:
        """Set the file's journal mode once; SQLite refuses at once, without waiting, while another process does."""
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                with _typed_errors(), self.engine.connect().execution_options(cffa_autocommit=True) as connection:
                    mode = connection.exec_driver_sql("PRAGMA journal_mode=WAL").scalar_one()
            except StorageUnavailable:
                if time.monotonic() > deadline:
                    raise
            else:
                if mode == "wal":
                    return
                if time.monotonic() > deadline:
                    raise StorageUnavailable(f"the record at {self.url.database} cannot use WAL (journal mode {mode})")
            time.sleep(0.05)


def _configure_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver must not begin transactions of its own
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    if options.get("cffa_autocommit"):
        return
    connection.exec_driver_sql("BEGIN" if options.get("cffa_reads") else "BEGIN IMMEDIATE")


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except PoolTimeout as error:
        raise StorageUnavailable(f"the record does not answer: {error}") from error
    except DBAPIError as error:
        # Exactly DatabaseError is what SQLite says of a file that is damaged or no database at all.
        if isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError) or type(error) is sa.exc.DatabaseError:
            raise StorageUnavailable(f"the record does not answer: {error.orig}") from error
        raise
