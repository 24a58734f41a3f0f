"""Where scenarios happen: one folder, one micro base and one server of each kind per process, fresh homes in between.

A scenario asks for an installation with short leases and gets the same ``World`` that the worker's tests use, on
SQLite and a folder, on PostgreSQL and a folder, or on the servers of a cluster. Nothing here breaks anything.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tests.faults.worlds import FaultCluster, FaultWorld, WholeCluster
from tests.servers import S3_ACCESS_KEY, S3_SECRET_KEY, Server, running
from tests.servers import Kind as ServerKind

LEASE = 2.0
RENEW = 0.4


class Place:
    """Everything scenarios of one process share. Servers are started when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept: dict[str, Any] = {}
        self._homes = 0
        self._stack = ExitStack()
        self._servers: dict[ServerKind, Server] = {}

    @property
    def models_dir(self) -> Path:
        """A models folder with the micro base in it."""
        folder = self.folder / "models"
        if not folder.exists():
            from tests.micro_base import write_micro_base  # torch, which scenarios in processes of their own do without

            write_micro_base(folder / "micro")
        return folder

    def server(self, kind: ServerKind) -> Server:
        """A running server: the one of this process, started again if a scenario left it dead."""
        if kind not in self._servers:
            self._servers[kind] = self._stack.enter_context(running(kind))
        else:
            self._servers[kind].start()
        return self._servers[kind]

    def new_folder(self) -> Path:
        """An empty folder."""
        self._homes += 1
        folder = self.folder / f"home-{self._homes}"
        folder.mkdir()
        return folder

    @contextmanager
    def world(self, **changes: Any) -> Iterator[FaultWorld]:
        """A fresh embedded installation: SQLite and a local folder."""
        with self._opened(FaultWorld, changes) as world:
            yield world

    @contextmanager
    def postgres_world(self, url: str | None = None, **changes: Any) -> Iterator[FaultWorld]:
        """As :meth:`world`, with the record in a new database of PostgreSQL, which may be reached through ``url``."""
        database = self.new_database()
        reached = sa.make_url(database if url is None else url).set(database=sa.make_url(database).database)
        shown = reached.render_as_string(hide_password=False)
        with self._opened(FaultWorld, {"database_url": shown, **changes}) as world:
            yield world

    @contextmanager
    def cluster(self, *, postgres: bool = False, **changes: Any) -> Iterator[FaultCluster]:
        """A fresh installation behind Redis, with a folder for its objects; the record is SQLite or PostgreSQL."""
        own = {"database_url": self.new_database()} if postgres else {}
        with self._opened(FaultCluster, {"redis_port": self.server("redis").port, **own, **changes}) as world:
            yield world

    @contextmanager
    def whole_cluster(self, **changes: Any) -> Iterator[WholeCluster]:
        """A fresh installation on all three servers: a new database and a new bucket."""
        own = {
            "mode": "cluster",
            "database_url": self.new_database(),
            "broker_url": self.server("redis").url,
            "s3_endpoint": self.server("s3").url,
            "s3_bucket": f"faults-{secrets.token_hex(6)}",
            "s3_access_key": S3_ACCESS_KEY,
            "s3_secret_key": S3_SECRET_KEY,
        }
        with self._opened(WholeCluster, own | changes) as world:
            yield world

    def new_database(self) -> str:
        """URL of a new, empty database."""
        url = sa.make_url(self.server("postgres").url)
        name = f"faults_{secrets.token_hex(6)}"
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                connection.execute(sa.text(f"CREATE DATABASE {name}"))
        finally:
            engine.dispose()
        return url.set(database=name).render_as_string(hide_password=False)

    @contextmanager
    def _opened(self, kind: type[Any], changes: dict[str, Any]) -> Iterator[Any]:
        home = self.new_folder()
        values = {"lease_seconds": LEASE, "renew_seconds": RENEW} | changes
        world = kind(home, self.models_dir, **values)
        try:
            yield world
        finally:
            world.close()
            shutil.rmtree(home, ignore_errors=True)

    def close(self) -> None:
        """Stop the servers."""
        with contextlib.suppress(OSError):
            self._stack.close()
