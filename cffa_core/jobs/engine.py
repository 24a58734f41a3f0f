"""The SQLAlchemy engine of each database: how connections are opened, pooled, bounded in time, and configured.

SQLite runs in WAL with ``synchronous=FULL`` and every write begins IMMEDIATE, so that writers queue instead of
failing half-way. PostgreSQL writes at READ COMMITTED with rows locked where they are read for change, and reads at
REPEATABLE READ, so that one answer is one view; each connection limits how long it waits, for locks too.
"""

from __future__ import annotations

import json
import math
from typing import Any

import sqlalchemy as sa

BUSY_SECONDS = 30.0
CONNECT_SECONDS = 5
POOL_SIZE = 10
POOL_OVERFLOW = 10
POOL_SECONDS = 10.0
RECYCLE_SECONDS = 1800
STATEMENT_SECONDS = 30
LOCK_SECONDS = 10
IDLE_IN_TRANSACTION_SECONDS = 30
# A peer that vanished without a word is noticed within half a minute.
KEEPALIVES = {"keepalives": 1, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
TCP_USER_TIMEOUT_MS = 20_000


def make_engine(url: sa.URL, application: str) -> sa.Engine:
    """The engine of ``url``; ``application`` is how PostgreSQL lists its connections. Nothing is connected yet."""
    if url.get_backend_name() == "sqlite":
        engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS}, json_serializer=to_json)
        sa.event.listen(engine, "connect", _configure_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine
    asked = {"connect_timeout": CONNECT_SECONDS, "application_name": application, **KEEPALIVES}
    asked |= {"tcp_user_timeout": TCP_USER_TIMEOUT_MS}
    engine = sa.create_engine(
        url,
        connect_args={key: value for key, value in asked.items() if key not in url.query},
        pool_pre_ping=True,
        pool_size=POOL_SIZE,
        max_overflow=POOL_OVERFLOW,
        pool_timeout=POOL_SECONDS,
        pool_recycle=RECYCLE_SECONDS,
        json_serializer=to_json,
    )
    sa.event.listen(engine, "connect", _configure_postgresql)
    return engine


def reading(engine: sa.Engine) -> sa.Engine:
    """The same connections for transactions that only read: one consistent view, no write lock."""
    if engine.dialect.name == "sqlite":
        return engine.execution_options(cffa_reads=True)
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def to_json(value: Any) -> str:
    """JSON text of a value; numbers that are none (a diverged loss) become null, which is all that JSON has."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _configure_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver must not begin transactions of its own
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    if options.get("cffa_autocommit"):
        return
    connection.exec_driver_sql("BEGIN" if options.get("cffa_reads") else "BEGIN IMMEDIATE")


def _configure_postgresql(connection: Any, _: Any) -> None:
    limits = {
        "statement_timeout": f"{STATEMENT_SECONDS}s",
        "lock_timeout": f"{LOCK_SECONDS}s",
        "idle_in_transaction_session_timeout": f"{IDLE_IN_TRANSACTION_SECONDS}s",
        # The server's side of the connection: a vanished process must not keep its locks.
        "tcp_keepalives_idle": KEEPALIVES["keepalives_idle"],
        "tcp_keepalives_interval": KEEPALIVES["keepalives_interval"],
        "tcp_keepalives_count": KEEPALIVES["keepalives_count"],
    }
    connection.autocommit = True
    connection.execute("; ".join(f"SET {name} = '{value}'" for name, value in limits.items()))
    connection.autocommit = False
