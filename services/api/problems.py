"""Errors as RFC 9457 problem documents; the one place where typed errors become HTTP status codes.

Routers raise typed errors (``cffa_core.errors`` or the few below that only HTTP can cause) and never build an error
response themselves. Nothing an unexpected error says leaves the process: it goes to the log, under the request id.
"""

from __future__ import annotations

import http
import logging
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from cffa_core.errors import (
    Cancelled,
    CffaError,
    Conflict,
    CorruptArtifact,
    Gone,
    InvalidDataset,
    InvalidSpec,
    LeaseLost,
    ModelUnavailable,
    NotEnoughData,
    NotFound,
    NumericsMismatch,
    Problem,
    QuotaExceeded,
    RecordOutdated,
    StorageUnavailable,
    TooManyActiveJobs,
    VersionTooOld,
)

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 5
Answers = dict[int | str, dict[str, Any]]
_OWN_WORDS = "Value error, "  # pydantic's, in front of a validator's message
_PARAMETER = re.compile(r"\{[^}]*\}")
_log = logging.getLogger("cffa.api")


class BadRequest(CffaError):
    """The request itself is malformed: no JSON, no multipart, a token that is none."""

    code = "bad_request"


class UnsupportedMediaType(CffaError):
    """The body is of another media type than the operation takes."""

    code = "unsupported_media_type"


class Unauthorized(CffaError):
    """The request carries no key of this service."""

    code = "unauthorized"


class Forbidden(CffaError):
    """The request came from somewhere that may not speak to this API."""

    code = "forbidden"


class ScopeTooSmall(CffaError):
    """The key is right, and of a scope that may not do this."""

    code = "scope_too_small"


class RateLimited(CffaError):
    """One request too many of this key; ``headers`` say when the next may come (draft-ietf-httpapi-ratelimit-headers).

    ``policy`` names the limit: ``requests``, or ``posts`` for requests that change something.
    """

    code = "rate_limited"
    retryable = True

    def __init__(self, policy: str, amount: int, window_seconds: int, retry_after: int) -> None:
        super().__init__(f"this key may send {amount} {policy} in {window_seconds} s; come back in {retry_after} s")
        self.headers = {
            "Retry-After": str(retry_after),
            "RateLimit-Policy": f'"{policy}";q={amount};w={window_seconds}',
            "RateLimit": f'"{policy}";r=0;t={retry_after}',
        }


class PayloadTooLarge(CffaError):
    """The body is larger than this route takes."""

    code = "payload_too_large"


class RangeNotSatisfiable(CffaError):
    """The byte range begins after the end of the object; ``size`` is its size in bytes."""

    code = "range_not_satisfiable"

    def __init__(self, size: int) -> None:
        super().__init__(f"the object has {size} bytes; ask for a range inside it")
        self.size = size


_STATUS: dict[type[CffaError], int] = {
    BadRequest: 400,
    UnsupportedMediaType: 415,
    Unauthorized: 401,
    Forbidden: 403,
    ScopeTooSmall: 403,
    QuotaExceeded: 403,
    NotFound: 404,
    Conflict: 409,
    LeaseLost: 409,
    Cancelled: 409,
    NumericsMismatch: 409,
    Gone: 410,
    PayloadTooLarge: 413,
    RangeNotSatisfiable: 416,
    InvalidSpec: 422,
    InvalidDataset: 422,
    ModelUnavailable: 422,
    NotEnoughData: 422,
    CorruptArtifact: 500,
    TooManyActiveJobs: 429,
    RateLimited: 429,
    StorageUnavailable: 503,
}
UNEXPECTED = "an unexpected error; the server's log has it under this request_id"
_QUIET: dict[type[CffaError], str] = {
    StorageUnavailable: "the record or the object store refused a read or a write; the server's log says why",
    RecordOutdated: "the record is not set up for this version of the service yet",
    VersionTooOld: "a newer version of the service wrote this, which this process does not know; ask again, later",
    CorruptArtifact: "stored bytes are not what the record says; nothing was sent, the server's log says which",
}
_HTTP_CODES = {400: "bad_request", 404: "no_such_route", 405: "method_not_allowed", 413: PayloadTooLarge.code}


class ProblemItem(BaseModel):
    """One finding: where (a JSON pointer into the body, a parameter, or a file of an upload) and what to do."""

    pointer: str = Field(examples=["/count"])
    code: str = Field(examples=["greater_than_equal"])
    message: str = Field(examples=["Input should be greater than or equal to 1"])


class ProblemDocument(BaseModel):
    """An error (RFC 9457). ``code`` is stable; ``errors`` lists every finding at once."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:cffa:problem:invalid_spec",
                    "title": "Unprocessable Content",
                    "status": 422,
                    "detail": "the request is not valid",
                    "instance": "/v1/generation-jobs",
                    "code": "invalid_spec",
                    "retryable": False,
                    "request_id": "0f8fad5bd9cb469fa16570867728950e",
                    "errors": [
                        {
                            "pointer": "/count",
                            "code": "greater_than_equal",
                            "message": "Input should be greater than or equal to 1",
                        }
                    ],
                }
            ]
        }
    )

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    retryable: bool
    request_id: str
    errors: list[ProblemItem] = []


def documented(*statuses: int) -> Answers:
    """OpenAPI ``responses`` of a route for the problems it may answer with."""
    schema = {"$ref": "#/components/schemas/ProblemDocument"}
    return {status: {"description": _title(status), "content": {MEDIA_TYPE: {"schema": schema}}} for status in statuses}


def request_id_of(request: Request) -> str:
    """The id that the request-log middleware gave this request."""
    return str(request.scope.get("state", {}).get("request_id", ""))


def response(
    request: Request,
    *,
    status: int,
    code: str,
    detail: str,
    retryable: bool = False,
    errors: tuple[Problem, ...] = (),
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """Build one problem response."""
    document = ProblemDocument(
        type=f"urn:cffa:problem:{code}",
        title=_title(status),
        status=status,
        detail=_text(detail),
        instance=request.url.path,
        code=code,
        retryable=retryable,
        request_id=request_id_of(request),
        errors=[
            ProblemItem(pointer=_text(item.pointer), code=item.code, message=_text(item.message)) for item in errors
        ],
    )
    return JSONResponse(document.model_dump(), status_code=status, headers=headers, media_type=MEDIA_TYPE)


def _text(value: str) -> str:
    """What a client sent may hold half a surrogate pair, which no UTF-8 answer can repeat."""
    return value.encode("utf-8", "replace").decode()


def from_typed(request: Request, error: CffaError) -> JSONResponse:
    """Map a typed error; an unmapped one is a fault of this service and says nothing outside."""
    status = next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), 500)
    code, detail = error.code, error.message
    if any(item.code == "idempotency_key_reused" for item in error.problems):
        status, code = 422, "idempotency_key_reused"
    if status >= 500:
        _log.error("request %s failed", request_id_of(request), exc_info=error)
        detail = _QUIET.get(type(error), UNEXPECTED)  # its own words may name paths and hosts
    headers: dict[str, str] = {}
    if error.retryable:
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="cffa"'
    if isinstance(error, RateLimited):
        headers |= error.headers
    if isinstance(error, RangeNotSatisfiable):
        headers["Content-Range"] = f"bytes */{error.size}"
    return response(
        request,
        status=status,
        code=code,
        detail=detail,
        retryable=error.retryable,
        errors=error.problems,
        headers=headers,
    )


def from_validation(request: Request, error: RequestValidationError) -> JSONResponse:
    """Map FastAPI's own validation: bad JSON is 400, anything else 422 with a pointer per finding."""
    found = error.errors()
    if _is_other_media(request) and any(tuple(item["loc"]) == ("body",) for item in found):
        detail = "the body must be JSON: send it with Content-Type: application/json"
        return response(request, status=415, code="unsupported_media_type", detail=detail)
    if any(item["type"] == "json_invalid" for item in found):
        reason = str(found[0].get("ctx", {}).get("error", "not JSON"))
        return response(request, status=400, code="malformed_json", detail=f"the body is not JSON: {reason}")
    problems = tuple(
        Problem(_pointer(_of_body(item, error.body)), str(item["type"]), str(item["msg"]).removeprefix(_OWN_WORDS))
        for item in found
    )
    return response(
        request, status=422, code=InvalidSpec.code, detail="the request is not valid; see errors", errors=problems
    )


def _is_other_media(request: Request) -> bool:
    """Does the body say of itself that it is something else than JSON?"""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return bool(kind) and kind != "application/json" and not kind.endswith("+json")


def _of_body(item: dict[str, Any], body: Any) -> tuple[int | str, ...]:
    """The place of a finding without what pydantic puts into it of its own: which type of a union was tried."""
    where, *rest = item["loc"]
    if where != "body":
        return (where, *rest)
    place: list[int | str] = []
    for number, part in enumerate(rest, 1):
        lacking = item["type"] == "missing" and number == len(rest)
        if isinstance(body, dict) and (part in body or lacking):
            body = body.get(str(part))
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            body = body[part]
        else:
            continue
        place.append(part)
    return (where, *place)


def _title(status: int) -> str:
    """The status's phrase of RFC 9110, which Python's own table has only from 3.13 on."""
    return {413: "Content Too Large", 422: "Unprocessable Content"}.get(status) or http.HTTPStatus(status).phrase


def _pointer(loc: tuple[int | str, ...]) -> str:
    """``("body", "sampler", "steps")`` -> ``/sampler/steps``; ``("query", "wait")`` -> ``?wait`` (not in the body)."""
    where, *rest = loc
    path = "/".join(str(part).replace("~", "~0").replace("/", "~1") for part in rest)
    marks = {"body": "/", "query": "?", "path": "path:", "header": "header:"}
    return f"{marks.get(str(where), f'{where}:')}{path}" if rest else ""


def from_http(request: Request, error: HTTPException) -> JSONResponse:
    """Map what the framework raises itself: unknown routes, wrong methods, bodies that could not be read."""
    status = error.status_code
    code = _HTTP_CODES.get(status, http.HTTPStatus(status).phrase.lower().replace(" ", "_"))
    headers = dict(error.headers or {})
    if status == 405 and (allowed := _allowed(request)):
        headers["Allow"] = allowed
    return response(request, status=status, code=code, detail=str(error.detail), headers=headers)


def _allowed(request: Request) -> str | None:
    """Methods of the path that was meant (``/v1/jobs/{job_id}:cancel`` looks like a job's own path too), if known."""
    paths: dict[str, Any] = request.app.openapi()["paths"]
    fitting = [path for path in paths if compile_path(path)[0].match(request.url.path)]
    if not fitting:
        return None
    most_literal = max(fitting, key=lambda path: len(_PARAMETER.sub("", path)))
    return ", ".join(sorted(method.upper() for method in paths[most_literal]))


def unexpected(request: Request) -> JSONResponse:
    """Answer for an error nobody foresaw; its traceback is in the log under the request id."""
    return response(
        request,
        status=500,
        code="internal",
        detail=UNEXPECTED,
    )


def install(app: FastAPI) -> None:
    """Register the mapping on ``app``."""
    app.add_exception_handler(CffaError, from_typed)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, from_validation)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, from_http)  # type: ignore[arg-type]
