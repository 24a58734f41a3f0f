"""The OpenAPI document: what FastAPI derives from the routes, with every error described as the problem it is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from services.api.problems import ProblemDocument, documented

REF = "#/components/schemas/{model}"
# An answer that holds a thing (or a page of them) -> the path parameter that its `id` can be.
LINKED = {
    **dict.fromkeys(("JobView", "JobList"), "job_id"),
    **dict.fromkeys(("DatasetView", "DatasetList"), "dataset_id"),
    **dict.fromkeys(("ModelView", "ModelDetail", "ModelList"), "model_id"),
    **dict.fromkeys(("WebhookView", "WebhookWithSecret", "WebhookList"), "webhook_id"),
    **dict.fromkeys(("NewKeyView", "KeyList"), "key_id"),
    **dict.fromkeys(("UploadView", "UploadList"), "upload_id"),
}
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
            if "application/json" in operation.get("requestBody", {}).get("content", {}):
                operation["responses"] |= documented(400, 413, 415)
    if keyed:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, item in document["paths"].items():
        if path not in open_paths:
            for operation in item.values():
                operation["responses"] |= documented(*((401, 403, 429) if keyed else (429,)))
                if keyed:
                    operation["security"] = [{"key": []}]
    for item in document["paths"].values():
        for operation in item.values():
            operation["responses"] = {str(status): answer for status, answer in operation["responses"].items()}
    _link(document)
    return document


def _link(document: dict[str, Any]) -> None:
    """Say of every answer with things in it which operations take their ids, so that tools can follow them through."""
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    taken = {
        operation["operationId"]: [item["name"] for item in operation.get("parameters", []) if item["in"] == "path"]
        for operation in operations
    }
    for operation in operations:
        for status, answer in operation["responses"].items():
            schema = answer.get("content", {}).get("application/json", {}).get("schema", {})
            kind = schema.get("$ref", "").rpartition("/")[2]
            if not status.startswith("2") or kind not in LINKED:
                continue
            where = "/items/0/id" if kind.endswith("List") else "/id"
            answer["links"] = {
                follower: {"operationId": follower, "parameters": {LINKED[kind]: f"$response.body#{where}"}}
                for follower, names in taken.items()
                if names == [LINKED[kind]]
            }
