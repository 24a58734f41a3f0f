"""Accounts and their keys: who there is, which key speaks for whom, what an account's own limits are.

``find`` answers for every request, so what it learned counts for a few seconds: a key that another process revoked is
good for that long. How a key looks is in ``keys``, what the limits mean in ``quotas``; nothing here knows of HTTP.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from cffa_core.errors import InvalidSpec, Problem, StorageUnavailable
from cffa_core.jobs.database import Database
from cffa_core.jobs.paging import newest_first
from cffa_core.jobs.post_keys import Post, erase_marks
from cffa_core.jobs.records import Page
from cffa_core.jobs.rows import new_id, page_limits
from cffa_core.jobs.schema import clock
from cffa_core.jobs.service_tables import accounts, api_keys
from cffa_core.people import keys, quotas
from cffa_core.people.keys import Caller, Scope
from cffa_core.people.making import NewAccount, NewKey, make_account, make_key
from cffa_core.people.quotas import Limits, Usage
from cffa_core.people.rows import (
    Account,
    ApiKey,
    account,
    account_of,
    alive,
    api_key,
    holds_key,
    key_of,
    require_account,
)

OWNER = re.compile(r"[a-z0-9][a-z0-9._@-]{0,63}")
LIMITS = frozenset(Limits.__dataclass_fields__)
REMEMBERED_SECONDS = 5.0
REMEMBERED_KEYS = 10_000
USED_EVERY = 60.0
_log = logging.getLogger("cffa.people")


class Accounts:
    """Accounts and keys of a record; safe to share between threads, one per process.

    ``secret`` is that of :func:`cffa_core.people.keys.digest`, ``defaults`` are the service's own limits, ``now`` is
    the clock by which answers of :meth:`find` grow old.
    """

    def __init__(
        self,
        database: Database,
        secret: bytes,
        *,
        defaults: Limits | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._db = database
        self._secret = secret
        self._defaults = defaults or Limits()
        self._now = now
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, Caller | None]] = {}

    # --- accounts -------------------------------------------------------------------------------------------------

    def create_account(self, owner: str, limits: Mapping[str, int] | None = None) -> Account:
        """Make an account; raises :class:`Conflict` if there is one, :class:`InvalidSpec` for a bad name or limit."""
        return self.post_account(None, owner, limits).account

    def post_account(self, post: Post | None, owner: str, limits: Mapping[str, int] | None = None) -> NewAccount:
        """As :meth:`create_account`; a repetition of ``post`` returns the account that it made, as it is now.

        Raises :class:`Conflict` also, with the code ``idempotency_key_reused``, for a key with another body.
        """
        if OWNER.fullmatch(owner) is None:
            _refuse(
                "/owner", "bad_owner", "a name has 1 to 64 of a-z, 0-9, '.', '_', '@', '-' and begins with a-z, 0-9"
            )
        own = checked_limits(limits or {})
        return self._db.write(lambda connection: make_account(connection, owner, own, post))

    def get_account(self, owner: str) -> Account:
        """One account; raises :class:`NotFound`."""
        return self._db.read(lambda connection: account(connection, owner))

    def list_accounts(self, page_size: int = 50, page_token: str | None = None) -> Page[Account]:
        """All accounts by name; the token of the next page is the last name of this one."""
        size, _ = page_limits(page_size, None)
        query = sa.select(accounts).order_by(accounts.c.owner).limit(size + 1)
        if page_token is not None:
            if OWNER.fullmatch(page_token) is None:
                _refuse("/page_token", "bad_token", "page_token must be the next_token of an earlier page")
            query = query.where(accounts.c.owner > page_token)
        rows = self._db.read(lambda connection: connection.execute(query).all())
        found = tuple(account_of(row) for row in rows)
        return Page(found[:size], found[size - 1].owner if len(found) > size else None)

    def set_limits(self, owner: str, limits: Mapping[str, int]) -> Account:
        """Replace an account's own limits; what is left out is the service's again, 0 means no limit."""
        own = checked_limits(limits)
        return self._change(owner, limits=own)

    def disable(self, owner: str) -> Account:
        """Make all keys of an account worthless until :meth:`enable`; its data and jobs are not touched."""
        return self._change(owner, disabled_at=sa.func.coalesce(accounts.c.disabled_at, clock()))

    def enable(self, owner: str) -> Account:
        """Let an account's keys count again."""
        return self._change(owner, disabled_at=None)

    def _change(self, owner: str, **values: Any) -> Account:
        def change(connection: sa.Connection) -> Account:
            require_account(connection, owner)
            connection.execute(accounts.update().where(accounts.c.owner == owner).values(**values))
            return account(connection, owner)

        changed = self._db.write(change)
        self._forget()
        return changed

    def limits(self, owner: str) -> Limits:
        """The limits that hold for an owner."""
        return self._db.read(lambda connection: quotas.limits_of(connection, owner, self._defaults))

    def usage(self, owner: str) -> Usage:
        """What an owner has of what is limited."""
        return self._db.read(lambda connection: quotas.usage_of(connection, owner))

    # --- keys -----------------------------------------------------------------------------------------------------

    def create_key(
        self, owner: str, *, name: str, scope: Scope, expires_at: datetime | None = None
    ) -> tuple[ApiKey, str]:
        """Make a key for an account; returns what is known of it, and the key, which nobody can look up again.

        Raises :class:`NotFound` for an unknown account, :class:`InvalidSpec` for a time that has passed.
        """
        made = self.post_key(None, owner, name=name, scope=scope, expires_at=expires_at)
        assert made.key is not None, "only a repeated post is not told its key"
        return made.known, made.key

    def post_key(
        self, post: Post | None, owner: str, *, name: str, scope: Scope, expires_at: datetime | None = None
    ) -> NewKey:
        """As :meth:`create_key`; a repetition of ``post`` returns the key that it made, for a day with the key itself.

        Raises :class:`Conflict`, with the code ``idempotency_key_reused``, for a key with another body.
        """
        key_id, until = new_id("key"), None if expires_at is None else expires_at.timestamp()

        def create(connection: sa.Connection) -> NewKey:
            return make_key(
                connection, owner, key_id, name=name, scope=scope, until=until, secret=self._secret, post=post
            )

        return self._db.write(create, landed=lambda connection, new: holds_key(connection, new.known.id))

    def erase_marks(self) -> int:
        """Erase what keys of posts could be derived from again, once they are told no more; returns how many."""
        return self._db.write(erase_marks)

    def list_keys(
        self, owner: str | None, page_size: int = 50, page_token: str | None = None, *, spent: bool = False
    ) -> Page[ApiKey]:
        """Keys of an owner (None: of all), newest first; ``spent`` adds those that were revoked or have expired."""
        query = sa.select(api_keys)
        if owner is not None:
            query = query.where(api_keys.c.owner == owner)
        if not spent:
            query = query.where(alive())
        page = self._db.read(lambda c: newest_first(c, query, api_keys.c.number, page_size, page_token))
        return Page(tuple(key_of(row) for row in page.items), page.next_token)

    def revoke_key(self, key_id: str, owner: str | None = None) -> ApiKey:
        """Make a key worthless for good; repeating it is harmless. With ``owner`` it must be theirs, or it is not
        found."""

        def revoke(connection: sa.Connection) -> ApiKey:
            api_key(connection, key_id, owner)
            connection.execute(
                api_keys.update()
                .where(api_keys.c.id == key_id)
                .values(revoked_at=sa.func.coalesce(api_keys.c.revoked_at, clock()))
            )
            return api_key(connection, key_id, owner)

        revoked = self._db.write(revoke)
        self._forget()
        return revoked

    def has_admin(self) -> bool:
        """Whether some key of scope admin is good now."""
        query = (
            sa.select(api_keys.c.id)
            .join(accounts, accounts.c.owner == api_keys.c.owner)
            .where(api_keys.c.scope == Scope.ADMIN.value, alive(), accounts.c.disabled_at.is_(None))
            .limit(1)
        )
        return self._db.read(lambda connection: connection.scalar(query)) is not None

    def find(self, key: str) -> Caller | None:
        """Who a key speaks for, or None: mistyped (nobody is asked), unknown, revoked, expired, account disabled.

        The record is asked at most once in :data:`REMEMBERED_SECONDS` for a key.
        """
        if not keys.is_well_formed(key):
            return None
        digest, now = keys.digest(key, self._secret), self._now()
        known = self._known_of(digest, now)
        if known is not None:
            return known[1]
        caller = self._ask(digest)
        with self._lock:
            if len(self._known) >= REMEMBERED_KEYS:  # somebody tries keys: what is remembered must not grow
                self._known.clear()
            self._known[digest] = (now + REMEMBERED_SECONDS, caller)
        return caller

    def remembered(self, key: str) -> Caller | None:
        """As :meth:`find`, from memory alone: no question is asked, None may also mean that there is one to ask."""
        if not keys.is_well_formed(key):
            return None
        known = self._known_of(keys.digest(key, self._secret), self._now())
        return None if known is None else known[1]

    def _known_of(self, digest: str, now: float) -> tuple[float, Caller | None] | None:
        with self._lock:
            known = self._known.get(digest)
        return known if known is not None and now < known[0] else None

    def _ask(self, digest: str) -> Caller | None:
        unused = sa.or_(api_keys.c.last_used_at.is_(None), api_keys.c.last_used_at < clock() - USED_EVERY)
        query = (
            sa.select(api_keys.c.id, api_keys.c.owner, api_keys.c.scope, unused.label("stale"))
            .join(accounts, accounts.c.owner == api_keys.c.owner)
            .where(api_keys.c.digest == digest, alive(), accounts.c.disabled_at.is_(None))
        )
        row = self._db.read(lambda connection: connection.execute(query).one_or_none())
        if row is None:
            return None
        if row.stale:
            note = api_keys.update().where(api_keys.c.id == row.id, unused).values(last_used_at=clock())
            try:
                self._db.write(lambda connection: connection.execute(note))
            except StorageUnavailable as error:  # a record that cannot be written can still be read
                _log.warning("the use of key %s was not noted: %s", row.id, error.message)
        return Caller(row.owner, Scope(row.scope), row.id)

    def _forget(self) -> None:
        with self._lock:
            self._known.clear()


def checked_limits(limits: Mapping[str, int]) -> dict[str, int]:
    """Limits as they are kept; raises :class:`InvalidSpec` naming each bad one."""
    problems = [
        Problem(f"/limits/{name}", "bad_limit", f"limits are {', '.join(sorted(LIMITS))}: whole numbers from 0 on")
        for name, value in limits.items()
        if name not in LIMITS or isinstance(value, bool) or not 0 <= value < 2**63
    ]
    if problems:
        raise InvalidSpec(problems[0].message, problems=tuple(problems))
    return dict(limits)


def _refuse(pointer: str, code: str, message: str) -> None:
    raise InvalidSpec(message, problems=(Problem(pointer, code, message),))
