"""People: who am I, accounts and their limits, keys, the audit log. Who may ask for what decided the gate (``keys``).

A researcher looks after the keys of their own account; other accounts' are not found, as everywhere. An admin looks
after all accounts and keys, and still sees no data but their own.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel

from cffa_core.errors import Conflict, NotFound
from cffa_core.jobs.post_keys import Makes, Post
from cffa_core.people.accounts import OWNER
from cffa_core.people.keys import Caller, Scope
from services.api.access import Backend, IdempotencyKey, KeyId, TheBackend, TheCaller
from services.api.moments import Moment
from services.api.paging import PageSize, PageToken
from services.api.people_schemas import (
    AccountDetail,
    AccountList,
    AccountRequest,
    AccountView,
    AuditEntryView,
    AuditList,
    KeyList,
    KeyRequest,
    KeyView,
    LimitsView,
    MeView,
    NewKeyView,
    OwnLimits,
    UsageView,
)
from services.api.problems import ScopeTooSmall, documented

router = APIRouter(tags=["people"])


def _account_name(value: str) -> str:
    """Only what could be an account reaches the record; anything else names none."""
    if OWNER.fullmatch(value) is None:
        raise NotFound("no account has this name")
    return value


AccountName = Annotated[str, AfterValidator(_account_name)]


@router.get("/v1/me", operation_id="getMe", summary="Whom this key speaks for", responses=documented(503))
def get_me(backend: TheBackend, caller: TheCaller) -> MeView:
    """Account, scope, limits, and what of them is used."""
    return MeView(
        owner=caller.owner,
        scope=caller.scope,
        key_id=caller.key_id,
        limits=LimitsView.of(backend.accounts.limits(caller.owner)),
        usage=UsageView.of(backend.accounts.usage(caller.owner)),
        requests_per_minute=backend.settings.rate_limit_per_minute,
        posts_per_minute=backend.settings.posts_per_minute,
    )


@router.get("/v1/accounts", operation_id="listAccounts", summary="List accounts", responses=documented(422, 503))
def list_accounts(backend: TheBackend, page_size: PageSize = 50, page_token: PageToken = None) -> AccountList:
    """One page of accounts, by name."""
    page = backend.accounts.list_accounts(page_size, page_token)
    return AccountList(items=[AccountView.of(item) for item in page.items], next_page_token=page.next_token)


@router.post(
    "/v1/accounts",
    status_code=201,
    response_model=AccountView,
    operation_id="createAccount",
    summary="Make an account",
    responses=documented(400, 403, 409, 413, 422, 503),
)
def create_account(
    request: AccountRequest, backend: TheBackend, caller: TheCaller, idempotency_key: IdempotencyKey = None
) -> Response:
    """It has no key yet. A repetition with the same Idempotency-Key shows the account as it is now."""
    limits = request.limits.given()
    post = Post.of(caller.owner, Makes.ACCOUNT, idempotency_key, [request.owner, limits])
    made = backend.accounts.post_account(post, request.owner, limits)
    return _made(AccountView.of(made.account), f"/v1/accounts/{made.account.owner}", replayed=made.replayed)


@router.get("/v1/accounts/{owner}", operation_id="getAccount", summary="Get an account", responses=documented(404, 503))
def get_account(owner: AccountName, backend: TheBackend) -> AccountDetail:
    """An account, the limits that hold for it, and what it has."""
    return AccountDetail(
        **AccountView.of(backend.accounts.get_account(owner)).model_dump(),
        effective_limits=LimitsView.of(backend.accounts.limits(owner)),
        usage=UsageView.of(backend.accounts.usage(owner)),
    )


@router.put(
    "/v1/accounts/{owner}/limits",
    operation_id="setAccountLimits",
    summary="Set an account's own limits",
    responses=documented(400, 403, 404, 413, 422, 503),
)
def set_limits(owner: AccountName, limits: OwnLimits, backend: TheBackend) -> AccountView:
    """All of them: what is left out is the service's again."""
    return AccountView.of(backend.accounts.set_limits(owner, limits.given()))


@router.post(
    "/v1/accounts/{owner}:disable",
    operation_id="disableAccount",
    summary="Disable an account",
    responses=documented(403, 404, 409, 503),
)
def disable_account(owner: AccountName, backend: TheBackend, caller: TheCaller) -> AccountView:
    """None of its keys is good from then on; its jobs go on and its data stay."""
    if owner == caller.owner:
        raise Conflict("this is your own account: you would lock yourself out")
    return AccountView.of(backend.accounts.disable(owner))


@router.post(
    "/v1/accounts/{owner}:enable",
    operation_id="enableAccount",
    summary="Enable an account again",
    responses=documented(403, 404, 503),
)
def enable_account(owner: AccountName, backend: TheBackend) -> AccountView:
    """Its keys are good again, unless they were revoked or have expired."""
    return AccountView.of(backend.accounts.enable(owner))


@router.get(
    "/v1/api-keys", operation_id="listApiKeys", summary="List keys, newest first", responses=documented(404, 422, 503)
)
def list_api_keys(
    backend: TheBackend,
    caller: TheCaller,
    owner: Annotated[str | None, Query(max_length=64, description="Account; empty: the one of this key.")] = None,
    spent: Annotated[bool, Query(description="Also those that were revoked or have expired.")] = False,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> KeyList:
    """One page of an account's keys; the keys themselves nobody can look up."""
    page = backend.accounts.list_keys(_whose(backend, caller, owner), page_size, page_token, spent=spent)
    return KeyList(items=[KeyView.of(item) for item in page.items], next_page_token=page.next_token)


@router.post(
    "/v1/api-keys",
    status_code=201,
    response_model=NewKeyView,
    operation_id="createApiKey",
    summary="Make a key",
    responses=documented(400, 403, 404, 413, 422, 503),
)
def create_api_key(
    request: KeyRequest, backend: TheBackend, caller: TheCaller, idempotency_key: IdempotencyKey = None
) -> Response:
    """The answer shows the key, this once. Only a repetition with the same Idempotency-Key shows it again, for a day
    and as long as it is good (then it is null)."""
    if not caller.scope.covers(request.scope):
        raise ScopeTooSmall(f"your key is of scope {caller.scope.value}: it cannot make one of {request.scope.value}")
    owner = _whose(backend, caller, request.owner)
    until = None if request.expires_at is None else request.expires_at.timestamp()
    body = [owner, request.name, request.scope.value, until]
    post = Post.of(caller.owner, Makes.API_KEY, idempotency_key, body)
    made = backend.accounts.post_key(post, owner, name=request.name, scope=request.scope, expires_at=request.expires_at)
    view = NewKeyView(**KeyView.of(made.known).model_dump(), key=made.key)
    return _made(view, f"/v1/api-keys/{made.known.id}", replayed=made.replayed, secret=True)


@router.delete(
    "/v1/api-keys/{key_id}",
    status_code=204,
    operation_id="revokeApiKey",
    summary="Revoke a key",
    responses=documented(403, 404, 503),
)
def revoke_api_key(key_id: KeyId, backend: TheBackend, caller: TheCaller) -> Response:
    """For good, within seconds in all processes. A key may revoke itself."""
    backend.accounts.revoke_key(key_id, None if caller.scope is Scope.ADMIN else caller.owner)
    return Response(status_code=204)


@router.get(
    "/v1/audit", operation_id="listAudit", summary="The audit log, newest first", responses=documented(422, 503)
)
def list_audit(
    backend: TheBackend,
    owner: Annotated[str | None, Query(max_length=200, description="Who did it.")] = None,
    action: Annotated[str | None, Query(max_length=80, description="Operation id, e.g. `postTrainingJob`.")] = None,
    target: Annotated[str | None, Query(max_length=200, description="Id of what it was done to.")] = None,
    since: Annotated[Moment | None, Query(description="From then on.")] = None,
    until: Annotated[Moment | None, Query(description="Before then.")] = None,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> AuditList:
    """One page of what was changed. Entries are kept for `CFFA_AUDIT_DAYS`."""
    page = backend.audit.entries(
        owner=owner,
        action=action,
        target=target,
        since=since,
        until=until,
        page_size=page_size,
        page_token=page_token,
    )
    return AuditList(items=[AuditEntryView.of(item) for item in page.items], next_page_token=page.next_token)


def _made(view: BaseModel, location: str, *, replayed: bool, secret: bool = False) -> Response:
    """201 with what was made; one with a secret in it is kept by no cache."""
    headers = {"Location": location}
    if replayed:
        headers["Idempotency-Replayed"] = "true"
    if secret:
        headers["Cache-Control"] = "no-store"
    return JSONResponse(view.model_dump(mode="json"), status_code=201, headers=headers)


def _whose(backend: Backend, caller: Caller, owner: str | None) -> str:
    """The account that is meant: the caller's, or, for admins, another that exists."""
    if owner is None or owner == caller.owner:
        return caller.owner
    if caller.scope is not Scope.ADMIN:
        raise NotFound("no account has this name")
    return backend.accounts.get_account(_account_name(owner)).owner
