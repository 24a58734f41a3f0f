"""Transactions on the record: run whole, repeated where the database lost them, typed errors, and the migration.

A transaction is a function of an open connection, so that it can be run again: after a deadlock or a serialisation
failure, and after a lost connection, also one lost during COMMIT, when nobody knows whether it took effect (see
``receipts``). What a connection is like says ``engine``; the statements are elsewhere.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from cffa_core.errors import InvalidSpec, StorageUnavailable
from cffa_core.jobs import receipts
from cffa_core.jobs.engine import BUSY_SECONDS, make_engine, reading

T = TypeVar("T")
Work = Callable[[sa.Connection], T]
Landed = Callable[[sa.Connection, T], bool]

MIGRATIONS = Path(__file__).with_name("migrations")
PAUSES = (0.05, 0.2, 0.6)
"""Seconds before the second, third and fourth try of a transaction."""
GIVE_UP_SECONDS = 8.0
_MIGRATION_LOCK = 0x0CFFA
_UNDONE = ("40001", "40P01")  # serialization_failure, deadlock_detected: rolled back by the server
_GONE = ("08", "57P01", "57P02", "57P03", "25P03", "25P04", "40003")  # the server, or the connection to it


@dataclass(frozen=True)
class _Unknown(Generic[T]):
    """A transaction whose COMMIT got no answer: what it would have returned, and how to recognise it."""

    result: T
    receipt: receipts.Receipt | None


class Database:
    """One engine and its transactions; raises :class:`StorageUnavailable` when the database does not answer.

    ``application`` is the name under which PostgreSQL lists the connections.
    """

    def __init__(self, url: str, *, application: str = "cffa") -> None:
        self.url = sa.make_url(url)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = make_engine(self.url, application)
        self._reading = reading(self.engine)

    def read(self, work: Work[T]) -> T:
        """Run a transaction that only reads: one consistent view, never waits for writers."""
        for pause in self._pauses():
            try:
                with self._reading.begin() as connection:
                    return work(connection)
            except (PoolTimeout, DBAPIError) as error:
                self._again(error, pause)
        raise AssertionError("unreachable: the last pause is None")

    def write(self, work: Work[T], landed: Landed[T] | None = None) -> T:
        """Run a transaction that writes: committed and durable when this returns, undone if ``work`` raises.

        ``work`` runs again, at most three times, if the database undid it or the connection was lost. If COMMIT itself
        got no answer, its receipt, or else ``landed(connection, result)``, tells whether it took effect; without
        either ``work`` must be one that may be done twice.
        """
        unknown: _Unknown[T] | None = None
        for pause in self._pauses():
            attempt: _Unknown[T] | None = None
            try:
                with self.engine.begin() as connection:
                    if unknown is not None and _took_effect(connection, unknown, landed):
                        return unknown.result
                    receipts.take(connection)
                    result = work(connection)
                    attempt = _Unknown(result, receipts.take(connection))
                return result
            except (PoolTimeout, DBAPIError) as error:
                if self._again(error, pause) == "lost" and attempt is not None:
                    unknown = attempt
        raise AssertionError("unreachable: the last pause is None")

    def migrate(self, to: str = "head") -> None:
        """Upgrade to a revision (the newest) under a lock, so that processes starting together do it once."""
        if self.sqlite:
            Path(str(self.url.database)).parent.mkdir(parents=True, exist_ok=True)
            self._switch_to_wal()
        self.write(lambda connection: self._upgrade(connection, to))

    def _upgrade(self, connection: sa.Connection, to: str) -> None:
        if not self.sqlite:
            for limit in ("statement_timeout", "lock_timeout"):  # a large table takes its time
                connection.exec_driver_sql(f"SET LOCAL {limit} = 0")
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        command.upgrade(migrations(connection), to)

    def close(self) -> None:
        """Close all pooled connections."""
        self.engine.dispose()

    def _pauses(self) -> Iterator[float | None]:
        """One turn of the loop per try: the pause that may follow it, None after the last."""
        begun = time.monotonic()
        if not self.sqlite:  # a file does not come back by waiting
            for pause in PAUSES:
                if time.monotonic() - begun > GIVE_UP_SECONDS:
                    break
                yield pause
        yield None

    def _again(self, error: PoolTimeout | DBAPIError, pause: float | None) -> Literal["undone", "lost"]:
        """Pause before the next try and say why there is one; raises the error, typed, where there is none."""
        if isinstance(error, PoolTimeout):
            raise StorageUnavailable(f"all connections to the record are in use: {error}") from error
        outcome = None if self.sqlite else _outcome(error)
        if outcome is None or pause is None:
            typed = _typed(error)
            raise typed from (error if typed is not error else None)
        time.sleep(pause * random.uniform(0.5, 1.5))
        return outcome

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


def migrations(connection: sa.Connection) -> Config:
    """Alembic's view of the record's migrations, to be run in the open transaction."""
    config = Config()
    config.set_main_option("script_location", MIGRATIONS.as_posix().replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _took_effect(connection: sa.Connection, unknown: _Unknown[T], landed: Landed[T] | None) -> bool:
    if unknown.receipt is not None:
        return receipts.landed(connection, unknown.receipt)
    return landed is not None and landed(connection, unknown.result)


def _outcome(error: DBAPIError) -> Literal["undone", "lost"] | None:
    """What became of a PostgreSQL transaction: undone by the server, lost with its connection, or neither."""
    state = getattr(error.orig, "sqlstate", None)
    if state in _UNDONE:
        return "undone"
    # Without a state the client library speaks: it could not connect, or what it had broke.
    if error.connection_invalidated or (state or "08").startswith(_GONE):
        return "lost" if isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError) or state else None
    return None


def _typed(error: DBAPIError) -> Exception:
    """The error as callers know it; one that only a bug can cause stays what it is."""
    # Exactly DatabaseError is what SQLite says of a file that is damaged or no database at all; InternalError covers
    # a PostgreSQL that became read-only.
    away = sa.exc.OperationalError | sa.exc.InterfaceError | sa.exc.InternalError
    if isinstance(error, away) or type(error) is sa.exc.DatabaseError or error.connection_invalidated:
        return StorageUnavailable(f"the record does not answer: {error.orig}")
    if isinstance(error, sa.exc.DataError):
        return InvalidSpec(f"the record cannot hold a value of this request: {error.orig}")
    return error


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except PoolTimeout as error:
        raise StorageUnavailable(f"the record does not answer: {error}") from error
    except DBAPIError as error:
        typed = _typed(error)
        raise typed from (error if typed is not error else None)
