"""The OpenAPI document: what FastAPI derives from the routes, with every error described as the problem it is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from services.api.problems import ProblemDocument, documented

REF = "#/components/schemas/{model}"
_FRAMEWORK_ERRORS = ("HTTPValidationError", "ValidationError")


def install(app: FastAPI, *, open_paths: Collection[str], keyed: bool) -> None:
    """Make ``app`` describe itself with :func:`describe`; the document is built once, when first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = describe(app, open_paths=open_paths, keyed=keyed)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def describe(app: FastAPI, *, open_paths: Collection[str], keyed: bool) -> dict[str, Any]:
    """Build the document: FastAPI's own validation errors become problems, whose schema is added.

    ``open_paths`` are those that are nobody's affair; the others may be asked too often and, where the service is
    ``keyed``, need a key of the right scope.
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
    if keyed:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, item in document["paths"].items():
        if path not in open_paths:
            for operation in item.values():
                operation["responses"] |= documented(*((401, 403, 429) if keyed else (429,)))
                if keyed:
                    operation["security"] = [{"key": []}]
    return document
