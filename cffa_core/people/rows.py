"""Rows of accounts and keys <-> the values that are handed out; the statements that several methods share."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from cffa_core.errors import NotFound
from cffa_core.jobs.rows import moment
from cffa_core.jobs.schema import clock
from cffa_core.jobs.service_tables import accounts, api_keys
from cffa_core.people.keys import Scope

ADMIN = "admin"
LOCAL = "local"
BUILT_IN = frozenset({ADMIN, LOCAL})
"""Owners that exist without an account having been made for them; a row is written when there is something to keep."""


@dataclass(frozen=True)
class Account:
    """An account. ``limits`` are its own; what they do not name is the service's."""

    owner: str
    limits: dict[str, int]
    created_at: datetime
    disabled_at: datetime | None


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key; the key itself is not. ``shown`` is its beginning."""

    id: str
    owner: str
    name: str
    scope: Scope
    shown: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


def alive() -> sa.ColumnElement[bool]:
    """Whether a key was not revoked and has not expired; its account may still be disabled."""
    return sa.and_(
        api_keys.c.revoked_at.is_(None), sa.or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > clock())
    )


def is_alive(connection: sa.Connection, key_id: str) -> bool:
    """Whether this key counts, as far as :func:`alive` says."""
    return connection.scalar(sa.select(api_keys.c.id).where(api_keys.c.id == key_id, alive())) is not None


def insert_account(connection: sa.Connection) -> Any:
    """An insert of this database's dialect, which may be told what to do about a row that is there."""
    return (sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert)(accounts)


def require_account(connection: sa.Connection, owner: str) -> None:
    """Lock an account, made first if it is built in; raises :class:`NotFound`."""
    if owner in BUILT_IN:
        values = {"owner": owner, "limits": {}, "created_at": clock()}
        connection.execute(insert_account(connection).values(values).on_conflict_do_nothing())
    found = connection.scalar(sa.select(accounts.c.owner).where(accounts.c.owner == owner).with_for_update())
    if found is None:
        raise NotFound(f"no account {owner}")


def account(connection: sa.Connection, owner: str) -> Account:
    """One account; raises :class:`NotFound`."""
    row = connection.execute(sa.select(accounts).where(accounts.c.owner == owner)).one_or_none()
    if row is None:
        raise NotFound(f"no account {owner}")
    return account_of(row)


def account_of(row: sa.Row[Any]) -> Account:
    """A row of ``accounts``."""
    return Account(row.owner, dict(row.limits), moment(row.created_at), _when(row.disabled_at))


def api_key(connection: sa.Connection, key_id: str, owner: str | None) -> ApiKey:
    """One key (of ``owner``, if given); raises :class:`NotFound`."""
    query = sa.select(api_keys).where(api_keys.c.id == key_id)
    if owner is not None:
        query = query.where(api_keys.c.owner == owner)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFound(f"no key {key_id}")
    return key_of(row)


def holds_key(connection: sa.Connection, key_id: str) -> bool:
    """Whether this key was made."""
    return connection.scalar(sa.select(api_keys.c.id).where(api_keys.c.id == key_id)) is not None


def key_of(row: sa.Row[Any]) -> ApiKey:
    """A row of ``api_keys``."""
    return ApiKey(
        id=row.id,
        owner=row.owner,
        name=row.name,
        scope=Scope(row.scope),
        shown=row.shown,
        created_at=moment(row.created_at),
        expires_at=_when(row.expires_at),
        revoked_at=_when(row.revoked_at),
        last_used_at=_when(row.last_used_at),
    )


def _when(seconds: float | None) -> datetime | None:
    return None if seconds is None else moment(seconds)
