"""Statements that make accounts and API keys, once for each post; each takes the caller's open connection.

Who may make them is decided before; what a key looks like is in ``keys``, how a repeated post is known in
``cffa_core.jobs.post_keys``.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from cffa_core.errors import Conflict, InvalidSpec, Problem
from cffa_core.jobs import post_keys
from cffa_core.jobs.post_keys import Made, Post
from cffa_core.jobs.schema import clock
from cffa_core.jobs.service_tables import accounts, api_keys
from cffa_core.people import keys
from cffa_core.people.keys import Scope
from cffa_core.people.rows import Account, ApiKey, account, api_key, insert_account, is_alive, require_account

LONGEST_LIFE = 100 * 366 * 86_400.0


@dataclass(frozen=True)
class NewAccount:
    """What making an account gives. ``replayed``: an earlier post with the same idempotency key had made it."""

    account: Account
    replayed: bool = False


@dataclass(frozen=True)
class NewKey:
    """What making a key gives. ``replayed`` as in :class:`NewAccount`; then ``key`` is None once it is older than a
    day, is good no more, or was made under another secret of the service."""

    known: ApiKey
    key: str | None
    replayed: bool = False


def make_account(connection: sa.Connection, owner: str, limits: Mapping[str, int], post: Post | None) -> NewAccount:
    """See :meth:`Accounts.post_account`."""
    if post is not None and (made := post_keys.note(connection, post, owner)) is not None:
        return NewAccount(account(connection, made.made), made.replayed)
    values = {"owner": owner, "limits": dict(limits), "created_at": clock()}
    new = insert_account(connection).values(values).on_conflict_do_nothing().returning(accounts.c.owner)
    if connection.scalar(new) is None:
        raise Conflict(f"there is an account {owner} already")
    return NewAccount(account(connection, owner))


def make_key(
    connection: sa.Connection,
    owner: str,
    key_id: str,
    *,
    name: str,
    scope: Scope,
    until: float | None,
    secret: bytes,
    post: Post | None,
) -> NewKey:
    """See :meth:`Accounts.post_key`; ``until`` is in seconds since 1970."""
    if post is not None and (made := post_keys.note(connection, post, key_id)) is not None:
        return _replayed(connection, secret, post, made)
    require_account(connection, owner)
    now = connection.scalar(sa.select(clock())) or 0.0
    if until is not None and not now < until < now + LONGEST_LIFE:
        message = "a key expires some time within the next hundred years"
        raise InvalidSpec(message, problems=(Problem("/expires_at", "out_of_range", message),))
    key = keys.new_key() if post is None else keys.key_of_post(secret, post.key, post.mark)
    connection.execute(
        api_keys.insert().values(
            id=key_id,
            owner=owner,
            name=name,
            scope=scope.value,
            shown=keys.shown(key),
            digest=keys.digest(key, secret),
            created_at=clock(),
            expires_at=until,
        )
    )
    return NewKey(api_key(connection, key_id, owner), key)


def _replayed(connection: sa.Connection, secret: bytes, post: Post, made: Made) -> NewKey:
    known = api_key(connection, made.made, None)
    if made.mark is None or not made.recent or not is_alive(connection, made.made):
        return NewKey(known, None, made.replayed)
    key = keys.key_of_post(secret, post.key, made.mark)
    kept = connection.scalar(sa.select(api_keys.c.digest).where(api_keys.c.id == made.made)) or ""
    same = hmac.compare_digest(kept, keys.digest(key, secret))
    return NewKey(known, key if same else None, made.replayed)
