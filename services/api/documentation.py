"""The OpenAPI document: what FastAPI derives from the routes, with every error described as the problem it is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from services.api.problems import ProblemDocument, documented

REF = "#/components/schemas/{model}"
_FRAMEWORK_ERRORS = ("HTTPValidationError", "ValidationError")


def install(app: FastAPI, *, open_paths: Collection[str] | None) -> None:
    """Make ``app`` describe itself with :func:`describe`; the document is built once, when first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = describe(app, open_paths=open_paths)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def describe(app: FastAPI, *, open_paths: Collection[str] | None) -> dict[str, Any]:
    """Build the document: FastAPI's own validation errors become problems, whose schema is added.

    ``open_paths`` are those that need no key; None where no path needs one.
    """
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        description=app.description,
        routes=app.routes,
        tags=app.openapi_tags,
    )
    schemas: dict[str, Any] = document["components"]["schemas"]
    for name in _FRAMEWORK_ERRORS:
        schemas.pop(name, None)
    problem = ProblemDocument.model_json_schema(ref_template=REF)
    schemas.update(problem.pop("$defs"), ProblemDocument=problem)
    for item in document["paths"].values():
        for operation in item.values():
            if "422" in operation["responses"]:
                operation["responses"]["422"] = documented(422)[422]
    if open_paths is not None:
        _require_key(document, open_paths)
    return document


def _require_key(document: dict[str, Any], open_paths: Collection[str]) -> None:
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, item in document["paths"].items():
        if path not in open_paths:
            for operation in item.values():
                operation["security"] = [{"key": []}]
                operation["responses"]["401"] = documented(401)[401]
