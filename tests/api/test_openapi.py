"""The OpenAPI document: well formed, complete, and its examples are valid instances of what they exemplify."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.openapi.models import OpenAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel

from cffa_core.jobs.spec import parse_spec
from services.api import (
    attention_jobs,
    captioned_jobs,
    dataset_schemas,
    edit_jobs,
    job_requests,
    people_schemas,
    problems,
    product_schemas,
    schemas,
)

WITH_EXAMPLES = (
    job_requests,
    schemas,
    attention_jobs,
    captioned_jobs,
    edit_jobs,
    dataset_schemas,
    product_schemas,
    people_schemas,
    problems,
)

METHODS = {"get", "post", "put", "delete", "head", "patch"}
ROUTES = {
    ("post", "/v1/datasets"),
    ("get", "/v1/datasets"),
    ("get", "/v1/datasets/{dataset_id}"),
    ("get", "/v1/datasets/{dataset_id}/pairs"),
    ("get", "/v1/datasets/{dataset_id}/report"),
    ("delete", "/v1/datasets/{dataset_id}"),
    ("post", "/v1/datasets/{dataset_id}/versions"),
    ("post", "/v1/datasets:import"),
    ("post", "/v1/uploads"),
    ("get", "/v1/uploads"),
    ("get", "/v1/uploads/{upload_id}"),
    ("delete", "/v1/uploads/{upload_id}"),
    ("post", "/v1/uploads/{upload_id}:complete"),
    ("put", "/v1/blobs/{token}"),
    ("post", "/v1/training-jobs"),
    ("post", "/v1/generation-jobs"),
    ("post", "/v1/evaluation-jobs"),
    ("post", "/v1/attention-jobs"),
    ("post", "/v1/captioned-training-jobs"),
    ("post", "/v1/captioned-jobs"),
    ("post", "/v1/edit-jobs"),
    ("get", "/v1/jobs"),
    ("get", "/v1/jobs/{job_id}"),
    ("delete", "/v1/jobs/{job_id}"),
    ("post", "/v1/jobs/{job_id}:cancel"),
    ("post", "/v1/jobs/{job_id}:pause"),
    ("post", "/v1/jobs/{job_id}:resume"),
    ("post", "/v1/jobs/{job_id}:retry"),
    ("get", "/v1/jobs/{job_id}/events"),
    ("get", "/v1/jobs/{job_id}/metrics"),
    ("get", "/v1/jobs/{job_id}/checkpoints"),
    ("post", "/v1/jobs/{job_id}:checkpoint"),
    ("post", "/v1/jobs/{job_id}:sample"),
    ("get", "/v1/jobs/{job_id}/previews"),
    ("get", "/v1/jobs/{job_id}/pairs"),
    ("get", "/v1/jobs/{job_id}/pairs/{index}"),
    ("get", "/v1/jobs/{job_id}/pairs/{index}/{modality}.png"),
    ("head", "/v1/jobs/{job_id}/pairs/{index}/{modality}.png"),
    ("post", "/v1/jobs/{job_id}/pairs/{index}:regenerate"),
    ("get", "/v1/jobs/{job_id}/rejects"),
    ("get", "/v1/jobs/{job_id}/exhausted"),
    ("get", "/v1/jobs/{job_id}/archives/{number}/rejects"),
    ("get", "/v1/jobs/{job_id}/archives"),
    ("get", "/v1/jobs/{job_id}/archives/all"),
    ("post", "/v1/jobs/{job_id}/exports"),
    ("get", "/v1/jobs/{job_id}/archives/{number}"),
    ("get", "/v1/jobs/{job_id}/report"),
    ("get", "/v1/jobs/{job_id}/report/{name}"),
    ("head", "/v1/jobs/{job_id}/report/{name}"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{model_id}"),
    ("get", "/v1/models/{model_id}/card"),
    ("get", "/v1/blobs/{token}"),
    ("head", "/v1/blobs/{token}"),
    ("post", "/v1/webhooks"),
    ("get", "/v1/webhooks"),
    ("get", "/v1/webhooks/{webhook_id}"),
    ("patch", "/v1/webhooks/{webhook_id}"),
    ("delete", "/v1/webhooks/{webhook_id}"),
    ("post", "/v1/webhooks/{webhook_id}:rotate-secret"),
    ("post", "/v1/webhooks/{webhook_id}:test"),
    ("get", "/v1/webhooks/{webhook_id}/deliveries"),
    ("get", "/v1/webhooks/{webhook_id}/deliveries/{delivery_id}"),
    ("post", "/v1/webhooks/{webhook_id}/deliveries/{delivery_id}:redeliver"),
    ("get", "/v1/queue"),
    ("get", "/v1/workers"),
    ("get", "/v1/me"),
    ("get", "/v1/accounts"),
    ("post", "/v1/accounts"),
    ("get", "/v1/accounts/{owner}"),
    ("put", "/v1/accounts/{owner}/limits"),
    ("post", "/v1/accounts/{owner}:disable"),
    ("post", "/v1/accounts/{owner}:enable"),
    ("get", "/v1/api-keys"),
    ("post", "/v1/api-keys"),
    ("delete", "/v1/api-keys/{key_id}"),
    ("get", "/v1/audit"),
    ("get", "/livez"),
    ("get", "/readyz"),
    ("get", "/metrics"),
}


@pytest.fixture
def document(app: FastAPI) -> dict[str, Any]:
    return app.openapi()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method in METHODS & item.keys():
            yield method, path, item[method]


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from ([value["$ref"]] if isinstance(value.get("$ref"), str) else [])
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_the_document_is_openapi_and_is_served(document: dict[str, Any], client: TestClient) -> None:
    OpenAPI.model_validate(document)
    assert client.get("/openapi.json").json() == document


def test_every_route_is_there_and_no_other(document: dict[str, Any]) -> None:
    assert {(method, path) for method, path, _ in operations(document)} == ROUTES


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    for reference in references(document):
        found: Any = document
        for step in reference.removeprefix("#/").split("/"):
            found = found[step]


def test_every_operation_is_named_described_and_tagged(document: dict[str, Any]) -> None:
    names = []
    known = {tag["name"] for tag in document["tags"]}
    for method, path, operation in operations(document):
        names.append(operation["operationId"])
        assert operation["summary"] and operation["description"], (method, path)
        assert set(operation["tags"]) <= known and operation["tags"], (method, path)
    assert len(names) == len(set(names))


def test_problems_are_documented_as_problems(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        wrong = {status: answer for status, answer in operation["responses"].items() if int(status) >= 400}
        assert wrong or path == "/livez", (method, path)
        for answer in wrong.values():
            assert answer["content"].keys() == {problems.MEDIA_TYPE}, (method, path)
    assert "HTTPValidationError" not in document["components"]["schemas"]


def models_with_examples() -> list[tuple[type[BaseModel], dict[str, Any]]]:
    found = []
    for module in WITH_EXAMPLES:
        for _, model in inspect.getmembers(module, inspect.isclass):
            if issubclass(model, BaseModel) and model.__module__ == module.__name__:
                extra = model.model_config.get("json_schema_extra") or {}
                assert isinstance(extra, dict)
                found += [(model, example) for example in extra.get("examples", [])]  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize(("model", "example"), models_with_examples(), ids=lambda value: getattr(value, "__name__", ""))
def test_examples_are_valid(model: type[BaseModel], example: dict[str, Any]) -> None:
    assert model.model_fields.keys() >= example.keys()
    model.model_validate(example)


def test_enough_is_exemplified() -> None:
    shown = {model.__name__ for model, _ in models_with_examples()}
    posted = {"TrainingJobRequest", "GenerationJobRequest", "EvaluationJobRequest", "ExportRequest"}
    posted |= {"AttentionJobRequest", "CaptionedTrainingJobRequest", "CaptionedJobRequest", "EditJobRequest"}
    assert posted | {"JobView", "ProblemDocument", "ArchiveView", "ReportView"} <= shown


def test_posted_examples_are_specs_of_the_library() -> None:
    kinds = {
        job_requests.TrainingJobRequest: "training",
        job_requests.GenerationJobRequest: "generation",
        job_requests.EvaluationJobRequest: "evaluation",
        attention_jobs.AttentionJobRequest: "attention",
        captioned_jobs.CaptionedTrainingJobRequest: "captioned_training",
        captioned_jobs.CaptionedJobRequest: "captioned",
        edit_jobs.EditJobRequest: "edit",
    }
    for model, example in models_with_examples():
        if model in kinds:
            assert parse_spec(example | {"kind": kinds[model]}).kind == kinds[model]
