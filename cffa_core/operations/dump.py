"""The record as one file, and back: SQLite by its online backup, PostgreSQL by pg_dump and pg_restore.

Both dumps are one view of the record, taken while the service runs. Passwords go through the environment of the
programs and stand in no argument.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sa

from cffa_core.errors import Conflict, CorruptArtifact, InvalidSettings, StorageUnavailable
from cffa_core.jobs.database import Database, Work

T = TypeVar("T")
PROGRAMS = Path("/usr/lib/postgresql")
"""Where Debian keeps the programs of each PostgreSQL version."""


def dump(database: Database, target: Path, look: Work[T]) -> T:
    """Write the record to ``target`` and return what ``look`` finds in exactly that view of it."""
    target.unlink(missing_ok=True)
    if database.sqlite:
        _copy_sqlite(Path(str(database.url.database)), target)
        copy = Database(f"sqlite:///{target}")
        try:
            return copy.read(look)
        finally:
            copy.close()

    def dump_and_look(connection: sa.Connection) -> T:
        for limit in ("statement_timeout", "idle_in_transaction_session_timeout"):  # as long as pg_dump takes
            connection.exec_driver_sql(f"SET LOCAL {limit} = 0")
        snapshot = connection.exec_driver_sql("SELECT pg_export_snapshot()").scalar_one()
        to_file = ["--format=custom", "--no-owner", "--no-privileges", f"--snapshot={snapshot}", f"--file={target}"]
        _run("pg_dump", to_file, database.url)
        return look(connection)

    return database.read(dump_and_look)


def load_sqlite(source: Path, target: Path) -> None:
    """Copy a dump to where a record is to be prepared."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    _copy_sqlite(source, target)


def load_postgresql(source: Path, database: Database) -> None:
    """Fill an empty database from a dump, all or nothing."""
    whole = ["--single-transaction", "--exit-on-error", "--no-owner", "--no-privileges"]
    _run("pg_restore", [*whole, str(source)], database.url)


def require_empty(database: Database) -> None:
    """Raise :class:`Conflict` unless there is no record yet: no file, or a database without tables."""
    if database.sqlite:
        path = Path(str(database.url.database))
        if path.exists():
            raise Conflict(f"{path} exists; restore into a folder (CFFA_HOME) without a record")
        return
    tables = database.read(lambda connection: sa.inspect(connection).get_table_names())
    if tables:
        raise Conflict(f"the database holds {len(tables)} tables; restore into an empty one")


def _copy_sqlite(source: Path, target: Path) -> None:
    if not source.is_file():
        raise StorageUnavailable(f"there is no record at {source}")
    try:
        with closing(sqlite3.connect(source)) as origin, closing(sqlite3.connect(target)) as copy:
            origin.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, nothing beside it
            found = copy.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        raise StorageUnavailable(f"the record at {source} cannot be copied: {error}") from error
    if found != "ok":
        raise CorruptArtifact(f"the record at {source} is damaged: {found}")


def _run(program: str, arguments: Sequence[str], url: sa.URL) -> None:
    """Run a program of PostgreSQL on the database of ``url``; raises with what it said."""
    bare = sa.URL.create("postgresql", url.username, None, url.host, url.port, url.database, url.query)
    target = bare.render_as_string(hide_password=False)
    environment = {**os.environ, "PGPASSWORD": url.password or "", "PGCONNECT_TIMEOUT": "10"}
    command = [_program(program), f"--dbname={target}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StorageUnavailable(f"{program} failed: {done.stderr.strip() or f'exit code {done.returncode}'}")


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        newest = sorted(PROGRAMS.glob(f"*/bin/{name}"), key=lambda path: int(path.parents[1].name))
        found = str(newest[-1]) if newest else None
    if found is None:
        raise InvalidSettings(f"{name} is not installed; it comes with the package postgresql-client")
    return found
