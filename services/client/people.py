"""The client's part for people: who am I, accounts and their limits, keys, the audit log.

Reached as ``client.people``. Accounts and the audit log need a key of scope admin; an account's own keys one of scope
researcher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Literal

import httpx
from pydantic import Field

from cffa_core.errors import Conflict
from services.client.calls import Calls, R, new_key
from services.client.resources import Resource

Scope = Literal["viewer", "researcher", "admin"]


class Limits(Resource):
    """Limits, or what is there of what they limit; a limit of 0 is none."""

    active_jobs: int
    pairs: int
    bytes: int


class Me(Resource):
    """Whom a key speaks for; ``key_id`` is None where no key is asked for."""

    owner: str
    scope: Scope
    key_id: str | None = None
    limits: Limits
    usage: Limits
    requests_per_minute: int = 0
    posts_per_minute: int = 0


class Account(Resource):
    """An account and the limits of its own; what they do not name is the service's."""

    owner: str
    limits: dict[str, int]
    created_at: datetime
    disabled_at: datetime | None = None


class AccountDetail(Account):
    """An account, the limits that hold for it, and what it has."""

    effective_limits: Limits
    usage: Limits


class ApiKey(Resource):
    """What is known of a key; ``shown`` is its beginning."""

    id: str
    owner: str
    name: str
    scope: Scope
    shown: str
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None


class NewApiKey(ApiKey):
    """A key that was just made; ``key`` cannot be looked up again."""

    key: str


class _MadeKey(ApiKey):
    """The answer to a post that may have been repeated."""

    key: str | None


class AuditEntry(Resource):
    """One change: ``owner`` did ``action`` to ``target``."""

    number: int
    at: datetime
    owner: str
    key_id: str | None = None
    action: str
    target: str | None = None
    request_id: str | None = None
    data: dict[str, Any] = Field(default_factory=dict)


class People(Calls):
    """What :class:`services.client.client.CffaClient` can ask of the service's people; raises as its methods do."""

    def me(self) -> Me:
        """Whom the client's key speaks for, and what is left of its account's limits."""
        return self._get("/v1/me", Me)

    def accounts(self) -> Iterator[Account]:
        """All accounts, by name."""
        return self._pages("/v1/accounts", Account)

    def account(self, owner: str) -> AccountDetail:
        """One account with its limits and what it has."""
        return self._get(f"/v1/accounts/{owner}", AccountDetail)

    def create_account(self, owner: str, limits: Mapping[str, int] | None = None) -> Account:
        """Make an account; raises ``Conflict`` if there is one. A post that got no answer is repeated under one key."""
        return self._send(
            "POST", "/v1/accounts", Account, {"owner": owner, "limits": dict(limits or {})}, once=new_key()
        )

    def set_limits(self, owner: str, limits: Mapping[str, int]) -> Account:
        """Replace an account's own limits; what is left out is the service's again."""
        return self._send("PUT", f"/v1/accounts/{owner}/limits", Account, dict(limits), repeatable=True)

    def disable_account(self, owner: str) -> Account:
        """Make an account's keys worthless until it is enabled again."""
        return self._send("POST", f"/v1/accounts/{owner}:disable", Account, repeatable=True)

    def enable_account(self, owner: str) -> Account:
        """Let an account's keys count again."""
        return self._send("POST", f"/v1/accounts/{owner}:enable", Account, repeatable=True)

    def keys(self, owner: str | None = None, *, spent: bool = False) -> Iterator[ApiKey]:
        """Keys of an account (the client's own), newest first; ``spent`` adds those that are worthless."""
        return self._pages("/v1/api-keys", ApiKey, {"owner": owner, "spent": spent or None})

    def create_key(
        self,
        name: str,
        *,
        scope: Scope = "researcher",
        owner: str | None = None,
        expires_at: datetime | None = None,
    ) -> NewApiKey:
        """Make a key for an account (the client's own); its scope is at most that of the client's key.

        A post that got no answer is repeated under one idempotency key, and makes one key. Raises ``Conflict`` if the
        key was made and revoked in between.
        """
        body: dict[str, Any] = {"name": name, "scope": scope}
        if owner is not None:
            body["owner"] = owner
        if expires_at is not None:
            body["expires_at"] = expires_at.isoformat()
        made = self._send("POST", "/v1/api-keys", _MadeKey, body, once=new_key())
        if made.key is None:
            raise Conflict(f"the key {made.id} was made, and is shown no more; revoke it and make another")
        return NewApiKey.model_validate(made.model_dump())

    def revoke_key(self, key_id: str) -> None:
        """Make a key worthless for good."""
        self._transport.sent(lambda: self._http.delete(f"/v1/api-keys/{key_id}"), repeatable=True)

    def audit(
        self,
        *,
        owner: str | None = None,
        action: str | None = None,
        target: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Iterator[AuditEntry]:
        """Who changed what, newest first."""
        query = {
            "owner": owner,
            "action": action,
            "target": target,
            "since": None if since is None else since.isoformat(),
            "until": None if until is None else until.isoformat(),
        }
        return self._pages("/v1/audit", AuditEntry, query)

    def _send(
        self,
        method: str,
        path: str,
        kind: type[R],
        body: Mapping[str, Any] | None = None,
        *,
        repeatable: bool = False,
        once: str | None = None,
    ) -> R:
        """``once`` is the idempotency key that makes a request repeatable which is not so by itself."""
        headers = {} if once is None else {"Idempotency-Key": once}

        def send() -> httpx.Response:
            return self._http.request(method, path, json=body, headers=headers)

        return kind.model_validate_json(self._transport.sent(send, repeatable=repeatable or once is not None).content)
