"""Posts with an ``Idempotency-Key`` that make no job: what each has made, so that a repetition makes nothing more.

For accounts, API keys and new secrets of web hooks; jobs and web hooks themselves keep such keys beside their own rows.
A post is noted in the transaction that does what it asks for. Of the key only the SHA-256 is kept.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from cffa_core.errors import Conflict, Problem
from cffa_core.jobs.schema import clock
from cffa_core.jobs.service_tables import post_keys

REPEATED_SECONDS = 86_400.0
"""How long a repeated post is told the secret that the first one was answered with."""


class Makes(StrEnum):
    """What a post makes; each kind has keys of its own."""

    ACCOUNT = "account"
    API_KEY = "api_key"
    WEBHOOK_SECRET = "webhook_secret"


@dataclass(frozen=True)
class Post:
    """One call: ``owner`` posts, under ``key``, something whose body has the digest ``body_sha256``.

    ``mark`` is random and of this call alone: a transaction that runs again because its COMMIT got no answer knows by
    it what it has written itself. An API key is derived from it, so it is as secret as one.
    """

    owner: str
    makes: Makes
    key: str = field(repr=False)
    body_sha256: str
    mark: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)

    @classmethod
    def of(cls, owner: str, makes: Makes, key: str | None, body: Any) -> Self | None:
        """The post of ``body`` (of what JSON has, after defaults), or None without a key."""
        if key is None:
            return None
        return cls(owner, makes, key, _sha256(json.dumps(body, sort_keys=True)))


@dataclass(frozen=True)
class Made:
    """What a post made ``age`` seconds ago: the name or id ``made``. ``mark`` is that of the call, until it is erased;
    ``replayed`` says that it was another call than this one."""

    made: str
    mark: str | None
    age: float
    replayed: bool

    @property
    def recent(self) -> bool:
        """Whether a secret that it was answered with may still be told."""
        return self.age < REPEATED_SECONDS


def note(connection: sa.Connection, post: Post, made: str) -> Made | None:
    """Note that ``post`` makes ``made`` and return None; or return what it made before, and then nothing is to be done.

    Waits for another transaction that is noting the same key. Raises :class:`Conflict` with the code
    ``idempotency_key_reused`` for a key that came with another body.
    """
    known = {"owner": post.owner, "makes": post.makes.value, "key_sha256": _sha256(post.key)}
    values = {**known, "body_sha256": post.body_sha256, "made": made, "mark": post.mark, "at": clock()}
    insert = (sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert)(post_keys)
    if connection.scalar(insert.values(values).on_conflict_do_nothing().returning(post_keys.c.made)) is not None:
        return None
    row = connection.execute(
        sa.select(post_keys, (clock() - post_keys.c.at).label("age")).where(
            *(post_keys.c[name] == value for name, value in known.items())
        )
    ).one()
    if row.body_sha256 != post.body_sha256:
        message = "this idempotency key was used with another request; use a new one"  # a log must not hold it
        raise Conflict(message, problems=(Problem("Idempotency-Key", "idempotency_key_reused", message),))
    return Made(row.made, row.mark, row.age, replayed=row.mark != post.mark)


def erase_marks(connection: sa.Connection) -> int:
    """Erase the marks of API keys that are told no more, so that nothing can derive them again; returns how many."""
    old = (post_keys.c.mark.is_not(None), post_keys.c.at < clock() - REPEATED_SECONDS)
    spent = post_keys.update().where(post_keys.c.makes == Makes.API_KEY.value, *old).values(mark=None)
    return connection.execute(spent).rowcount


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
