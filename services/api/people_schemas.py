"""What the API says of people: accounts, keys, limits and their use, audit entries. The rest is in ``schemas``."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from cffa_core.people.audit import AuditEntry
from cffa_core.people.keys import Scope
from cffa_core.people.quotas import Limits, Usage
from cffa_core.people.rows import Account, ApiKey
from services.api.moments import Moment
from services.api.schemas import NOON, example

KEY = "key_0123456789abcdefghij"
Amount = Annotated[int, Field(ge=0, lt=2**63)]


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a name has printable characters only")
    return text


class OwnLimits(BaseModel):
    """Limits of one account; 0 means no limit, what is left out is the service's."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"pairs": 100_000, "active_jobs": 0}]})
    active_jobs: Amount | None = Field(default=None, description="Jobs that are not over.")
    pairs: Amount | None = Field(default=None, description="Pairs asked for in generation and edit jobs that are kept.")
    bytes: Amount | None = Field(default=None, description="Stored bytes of data sets, models and products of jobs.")

    def given(self) -> dict[str, int]:
        """Those that were named."""
        return self.model_dump(exclude_none=True)


class AccountRequest(BaseModel):
    """An account to be made."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"owner": "anna"}]})
    owner: str = Field(
        min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9._@-]*$", description="Name; it cannot be changed."
    )
    limits: OwnLimits = Field(default_factory=OwnLimits)


class KeyRequest(BaseModel):
    """A key to be made. Only an admin may name another ``owner``, and nobody a scope above their own."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"name": "laptop", "scope": "viewer"}]})
    name: Annotated[str, AfterValidator(_printable)] = Field(
        min_length=1, max_length=100, description="What the key is for."
    )
    scope: Scope = Scope.RESEARCHER
    owner: str | None = Field(default=None, max_length=64, description="Account; empty: the one of this key.")
    expires_at: Moment | None = Field(default=None, description="Empty: never. At most a hundred years away.")


class LimitsView(BaseModel):
    """The limits that hold, the service's and the account's own together; 0 means no limit."""

    active_jobs: int
    pairs: int
    bytes: int

    @classmethod
    def of(cls, limits: Limits) -> Self:
        return cls(active_jobs=limits.active_jobs, pairs=limits.pairs, bytes=limits.bytes)


class UsageView(BaseModel):
    """What an account has of what is limited."""

    active_jobs: int
    pairs: int
    bytes: int

    @classmethod
    def of(cls, usage: Usage) -> Self:
        return cls(active_jobs=usage.active_jobs, pairs=usage.pairs, bytes=usage.bytes)


class MeView(BaseModel):
    """Whom this key speaks for, and what is left. ``key_id`` is null where no key is asked for."""

    model_config = example(
        {
            "owner": "anna",
            "scope": "researcher",
            "key_id": KEY,
            "limits": {"active_jobs": 10, "pairs": 100_000, "bytes": 0},
            "usage": {"active_jobs": 1, "pairs": 1000, "bytes": 734_003_200},
            "requests_per_minute": 15_000,
            "posts_per_minute": 3_000,
        }
    )
    owner: str
    scope: Scope
    key_id: str | None
    limits: LimitsView
    usage: UsageView
    requests_per_minute: int
    posts_per_minute: int


class AccountView(BaseModel):
    """An account and the limits of its own; what they do not name is the service's."""

    model_config = example({"owner": "anna", "limits": {"pairs": 100_000}, "created_at": NOON, "disabled_at": None})
    owner: str
    limits: dict[str, int]
    created_at: datetime
    disabled_at: datetime | None

    @classmethod
    def of(cls, account: Account) -> Self:
        return cls(
            owner=account.owner,
            limits=account.limits,
            created_at=account.created_at,
            disabled_at=account.disabled_at,
        )


class AccountDetail(AccountView):
    """An account, the limits that hold for it, and what it has."""

    model_config = example(
        {
            "owner": "anna",
            "limits": {"pairs": 100_000},
            "created_at": NOON,
            "disabled_at": None,
            "effective_limits": {"active_jobs": 10, "pairs": 100_000, "bytes": 0},
            "usage": {"active_jobs": 1, "pairs": 1000, "bytes": 734_003_200},
        }
    )
    effective_limits: LimitsView
    usage: UsageView


class AccountList(BaseModel):
    """One page of accounts, by name."""

    items: list[AccountView]
    next_page_token: str | None


class KeyView(BaseModel):
    """What is known of a key; ``shown`` is its beginning. ``last_used_at`` is right to the minute."""

    id: str
    owner: str
    name: str
    scope: Scope
    shown: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None

    @classmethod
    def of(cls, key: ApiKey) -> Self:
        return cls(
            id=key.id,
            owner=key.owner,
            name=key.name,
            scope=key.scope,
            shown=key.shown,
            created_at=key.created_at,
            expires_at=key.expires_at,
            revoked_at=key.revoked_at,
            last_used_at=key.last_used_at,
        )


class NewKeyView(KeyView):
    """A key that was just made. ``key`` is shown this once and kept nowhere; a repetition of the same post computes it
    again."""

    key: str | None = Field(
        description="Null in a repetition by Idempotency-Key that comes more than a day later, or once it was revoked."
    )


class KeyList(BaseModel):
    """One page of keys, newest first."""

    items: list[KeyView]
    next_page_token: str | None


class AuditEntryView(BaseModel):
    """One change: who, with which key, did which operation to what. ``number`` only rises."""

    model_config = example(
        {
            "number": 7,
            "at": NOON,
            "owner": "anna",
            "key_id": KEY,
            "action": "postTrainingJob",
            "target": "job_0123456789abcdefghij",
            "request_id": "0f8fad5bd9cb469fa16570867728950e",
            "data": {"status": 202, "path": "/v1/training-jobs"},
        }
    )
    number: int
    at: datetime
    owner: str
    key_id: str | None
    action: str
    target: str | None
    request_id: str | None
    data: dict[str, Any]

    @classmethod
    def of(cls, entry: AuditEntry) -> Self:
        return cls(
            number=entry.number,
            at=entry.at,
            owner=entry.owner,
            key_id=entry.key_id,
            action=entry.action,
            target=entry.target,
            request_id=entry.request_id,
            data=entry.data,
        )


class AuditList(BaseModel):
    """One page of the audit log, newest first."""

    items: list[AuditEntryView]
    next_page_token: str | None
