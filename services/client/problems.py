"""Problem documents (RFC 9457) of the API as typed exceptions.

Each code the service documents has a class that is also the library's own error of that name, so a caller may catch
``cffa_core.errors.NotFound`` whether the work ran here or behind HTTP. Nothing here sends requests.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import httpx

from cffa_core.errors import (
    CffaError,
    Conflict,
    Expired,
    Gone,
    InvalidDataset,
    InvalidSpec,
    ModelUnavailable,
    NotFound,
    Problem,
    QuotaExceeded,
    StorageUnavailable,
)


class ApiError(CffaError):
    """The service refused or failed a request.

    ``api_code`` is the stable code of the answer, ``status`` its HTTP status, ``problems`` every finding,
    ``request_id`` what to quote to whoever runs the service, ``retry_after`` seconds the service asked to wait.
    """

    code = "api_error"

    def __init__(
        self,
        message: str,
        *,
        status: int,
        api_code: str,
        problems: tuple[Problem, ...] = (),
        request_id: str | None = None,
        may_retry: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, problems=problems)
        self.status = status
        self.api_code = api_code
        self.request_id = request_id
        self.may_retry = may_retry
        self.retry_after = retry_after


class ServiceUnreachable(CffaError):
    """No answer from the address: nothing listens there, or the connection broke more often than was retried."""

    code = "service_unreachable"
    retryable = True


class UnexpectedAnswer(CffaError):
    """What answers at the address is no CFFA, or one of a version that this client does not understand."""

    code = "unexpected_answer"

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is no answer of CFFA that this client understands; check the address and the version")


class ApiUnauthorized(ApiError):
    """401: the service wants a key, or another one."""

    code = "unauthorized"


class ApiScopeTooSmall(ApiError):
    """403: the key is right, and of a scope that may not do this."""

    code = "scope_too_small"


class ApiQuotaExceeded(ApiError, QuotaExceeded):
    """403 or 429: the account has as much as it may have."""

    code = QuotaExceeded.code


class ApiRateLimited(ApiError):
    """429: one request too many of this key within a minute; ``retry_after`` says when the next may come."""

    code = "rate_limited"


class ApiNotFound(ApiError, NotFound):
    """404."""

    code = NotFound.code


class ApiConflict(ApiError, Conflict):
    """409."""

    code = Conflict.code


class ApiGone(ApiError, Gone):
    """410."""

    code = Gone.code


class ApiExpired(ApiError, Expired):
    """410: the job's products were removed by retention."""

    code = Expired.code


class ApiInvalidSpec(ApiError, InvalidSpec):
    """422: a specification that can never run."""

    code = InvalidSpec.code


class ApiInvalidDataset(ApiError, InvalidDataset):
    """422: an upload that was refused as a whole."""

    code = InvalidDataset.code


class ApiModelUnavailable(ApiError, ModelUnavailable):
    """422: a model the service cannot load."""

    code = ModelUnavailable.code


class ApiStorageUnavailable(ApiError, StorageUnavailable):
    """503."""

    code = StorageUnavailable.code


_BY_CODE: dict[str, type[ApiError]] = {
    kind.code: kind
    for kind in (
        ApiUnauthorized,
        ApiScopeTooSmall,
        ApiQuotaExceeded,
        ApiRateLimited,
        ApiNotFound,
        ApiConflict,
        ApiGone,
        ApiExpired,
        ApiInvalidSpec,
        ApiInvalidDataset,
        ApiModelUnavailable,
        ApiStorageUnavailable,
    )
}


def from_response(response: httpx.Response) -> ApiError:
    """The typed error of a response with an error status, whose body was read; other bodies than problems serve too."""
    document: object = None
    if response.headers.get("content-type", "").startswith(("application/problem+json", "application/json")):
        with suppress(ValueError):
            document = response.json()
    if not isinstance(document, dict):
        document = {}
    code = str(document.get("code", f"http_{response.status_code}"))
    message = str(document.get("detail") or document.get("title") or f"HTTP {response.status_code}")
    if response.status_code == httpx.codes.UNAUTHORIZED:
        message += "; give it with CFFA_API_KEY_FILE, CFFA_API_KEY or --api-key"
    problems = tuple(
        Problem(str(item.get("pointer", "")), str(item.get("code", "")), str(item.get("message", "")))
        for item in document.get("errors", [])
    )
    return _BY_CODE.get(code, ApiError)(
        message,
        status=response.status_code,
        api_code=code,
        problems=problems,
        request_id=document.get("request_id") or response.headers.get("x-request-id"),
        may_retry=bool(document.get("retryable", response.status_code in (429, 502, 503, 504))),
        retry_after=_seconds(response.headers.get("retry-after")),
    )


def document_of(response: httpx.Response) -> Any:
    """The JSON of an answer; raises :class:`UnexpectedAnswer` for one that is none, e.g. a proxy's page."""
    try:
        return response.json()
    except ValueError as error:
        raise UnexpectedAnswer(str(response.url.copy_with(query=None))) from error


def _seconds(header: str | None) -> float | None:
    return float(header) if header is not None and header.isdecimal() else None
