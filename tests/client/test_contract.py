"""Client against contract: every operation of the OpenAPI document has a method, and what both say agrees.

Each method is called against a stand-in for the network that answers with what the document promises: a path, parameter
or body field that the document does not know fails, and so does a promised answer that the client cannot read.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cffa_core.errors import CffaError
from cffa_core.jobs.spec import (
    AttentionSettings,
    CaptionedSettings,
    CaptionedTrainSettings,
    EditSpec,
    EvaluateSettings,
    ExportSettings,
    GenerateSettings,
    TrainSettings,
)
from cffa_core.settings import Settings
from services.api.app import create_app
from services.client.client import CffaClient
from services.client.resources import Resource

JOB, DATASET, MODEL = "job_0123456789abcdefghij", "ds_0123456789abcdefghij", "mdl_0123456789abcdefghij"
# For programs that speak HTTP only: probes, Prometheus, caches. The links of blobs are followed by download and upload.
NOT_FOR_CLIENTS = {"livez", "getMetrics", "headBlob", "headPairImage", "headReportFile", "getBlob", "putBlob"}
OPTIONAL = ("model_id", "dataset_id", "part", "key", "owner", "train_dataset_id")
GIVEN: dict[str, Any] = {
    "train_dataset_id": DATASET,
    "job_id": JOB,
    "dataset_id": DATASET,
    "model_id": MODEL,
    "reference_dataset_id": DATASET,
    "generation_job_id": JOB,
    "upload_id": "up_0123456789abcdefghij",
    "webhook_id": "wh_0123456789abcdefghij",
    "delivery_id": "msg_0123456789abcdefghij",
    "key_id": "key_0123456789abcdefghij",
    "owner": "clinic-a",
    "index": 0,
    "number": 0,
    "part": 0,
    "modality": "cf",
    "name": "report.md",
    "key": "loss_cf",
    "prefix": "incoming/a",
    "url": "https://example.org/hook",
    "scope": "viewer",
    "label": "laptop",
    "limits": {"active_jobs": 1},
    "sizes": {"cf/a.png": 10, "fa/a.png": 10},
    "events": ["job.succeeded"],
    "accept": ["a"],
    "reject": ["b"],
}


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    settings = Settings(home=tmp_path_factory.mktemp("contract"), require_keys=True, bootstrap_key="k" * 40)
    return create_app(settings).openapi()


def resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def instance(document: dict[str, Any], schema: dict[str, Any], depth: int = 0) -> Any:
    """A value that ``schema`` describes, with all its properties; the last page of listings."""
    schema = resolved(document, schema)
    for known in ("const", "default"):
        if known in schema:
            return schema[known]
    examples = schema.get("examples")
    if examples and not isinstance(examples[0], dict):
        return examples[0]
    if "enum" in schema:
        return schema["enum"][0]
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return instance(document, schema[choice][0], depth)
    kind = schema.get("type", "object")
    if kind == "object":
        found = {name: instance(document, inner, depth + 1) for name, inner in schema.get("properties", {}).items()}
        found |= examples[0] if examples else {}
        return found | ({"next_page_token": None} if "next_page_token" in found else {})
    if kind == "array":
        return [instance(document, item, depth + 1) for item in schema.get("prefixItems", [schema.get("items", {})])]
    if kind == "string":
        return "2026-11-21T12:00:00Z" if schema.get("format") == "date-time" else "x" * schema.get("minLength", 1)
    return {"integer": 1, "number": 1.0, "boolean": True, "null": None}[kind]


class Contract(httpx.BaseTransport):
    """The network: finds the operation that was meant, checks the request, answers as promised."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.used: set[str] = set()
        self.routes: list[tuple[re.Pattern[str], str, str]] = []
        for path in sorted(document["paths"], key=lambda path: path.count("{")):
            pattern = re.compile(re.sub(r"\\\{[^}]*\\\}", "([^/:]+)", re.escape(path)))
            self.routes += [(pattern, method, path) for method in document["paths"][path]]

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        where = request.url.path
        assert request.url.host == "contract", f"a signed link was followed: {request.url}"
        found = [
            path
            for pattern, method, path in self.routes
            if method == request.method.lower() and pattern.fullmatch(where)
        ]
        assert found, f"the document has no {request.method} {where}"
        operation = self.document["paths"][found[0]][request.method.lower()]
        self.used.add(operation["operationId"])
        known = {item["name"] for item in operation.get("parameters", []) if item["in"] == "query"}
        assert set(request.url.params) <= known, (found[0], dict(request.url.params))
        self.check_body(operation, request)
        status, answer = next((s, a) for s, a in operation["responses"].items() if s.startswith("2"))
        content = answer.get("content", {})
        accepted = request.headers.get("accept", "")
        if "text/event-stream" in accepted and "text/event-stream" in content:
            return httpx.Response(204, request=request)
        if "application/json" in content:
            made = instance(self.document, content["application/json"].get("schema", {}))
            if isinstance(made, dict) and found[0].endswith("/events"):
                made["next_after"] = None
            if isinstance(made, dict) and "terminal" in made:
                made |= {"terminal": True, "state": "succeeded"}
            return httpx.Response(int(status), json=made, headers={"ETag": '"1"'}, request=request)
        return httpx.Response(int(status), content=b"bytes", request=request)

    def check_body(self, operation: dict[str, Any], request: httpx.Request) -> None:
        content = operation.get("requestBody", {}).get("content", {})
        given = request.headers.get("content-type", "").partition(";")[0]
        body = request.read()
        if not body:
            return
        assert given in content, (operation["operationId"], given)
        if given == "application/json":
            schema = resolved(self.document, content[given]["schema"])
            choices = [schema, *(resolved(self.document, one) for one in schema.get("anyOf", ()))]
            fields = {name for choice in choices for name in choice.get("properties", {})}
            assert json.loads(body).keys() <= fields, (operation["operationId"], json.loads(body).keys() - fields)


def methods(client: CffaClient) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public method of the client and of the parts it is made of."""
    for name, value in inspect.getmembers(client):
        if not name.startswith("_") and name not in ("close", "base_url"):
            if inspect.ismethod(value):
                yield name, value
            else:
                yield from (
                    (f"{name}.{inner}", method)
                    for inner, method in inspect.getmembers(value, inspect.ismethod)
                    if not inner.startswith("_")
                )


def arguments(method: Callable[..., Any], place: Path, *, every: bool) -> dict[str, Any]:
    """A value for each parameter that needs one, by its name or type; with ``every`` for the others known by name."""
    settings = {
        "GenerateSettings": GenerateSettings(count=2),
        "CaptionedSettings": CaptionedSettings(task="text_to_image", texts=("a healthy eye",)),
        "EditSpec": EditSpec(dataset_id=DATASET),
    }
    for known in (TrainSettings, EvaluateSettings, ExportSettings, AttentionSettings, CaptionedTrainSettings):
        settings[known.__name__] = known()
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(method).parameters.items():
        kind = str(parameter.annotation).rpartition(".")[2]
        if kind in settings:
            given[name] = settings[kind]
        elif "Path" in kind and parameter.default is parameter.empty:
            given[name] = place
        elif parameter.default is parameter.empty or name == "generation_job_id" or (every and name in OPTIONAL):
            given[name] = GIVEN[name]
    return given


@pytest.fixture(scope="module")
def contract(document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Contract:
    """The contract after every method was called once, with what needs one and with everything."""
    made = Contract(document)
    place = tmp_path_factory.mktemp("files")
    for modality in ("cf", "fa"):
        (place / "pairs" / modality).mkdir(parents=True)
        (place / "pairs" / modality / "a.png").write_bytes(b"x" * 10)
    with CffaClient("http://contract", transport=made, retries=0) as client:
        for (name, method), every in itertools.product(methods(client), (False, True)):
            folder = place / ("pairs" if "upload" in name else "out")
            folder.mkdir(exist_ok=True)
            try:
                answer = method(**arguments(method, folder, every=every))
                if isinstance(answer, Iterator):
                    list(answer)
            except AssertionError as error:
                if "signed link was followed" not in str(error):
                    raise AssertionError(f"{name}: {error}") from error
            except CffaError as error:
                # What the stand-in's answers cannot be: files with the digests they promise.
                assert "signed" in str(error) or error.code in ("corrupt_artifact", "not_found"), (name, error)
    return made


def test_every_operation_has_a_method(document: dict[str, Any], contract: Contract) -> None:
    operations = {operation["operationId"] for item in document["paths"].values() for operation in item.values()}
    assert operations - contract.used - NOT_FOR_CLIENTS == set()
    assert operations >= NOT_FOR_CLIENTS


def test_fields_of_resources_are_fields_of_the_document(document: dict[str, Any]) -> None:
    """A field that the service never sends would look like one that is always absent."""
    named = {
        "Job": "JobView",
        "Dataset": "DatasetView",
        "Model": "ModelView",
        "Archive": "ArchiveView",
        "Archives": "ArchiveList",
        "Pair": "PairView",
        "Report": "ReportView",
        "ReportFile": "StoredFileView",
        "Queue": "QueueView",
        "Counts": "CountsView",
        "Progress": "ProgressView",
        "Event": "EventView",
        "Metric": "MetricPoint",
        "Checkpoint": "CheckpointView",
        "DatasetPair": "DatasetPair",
        "Worker": "WorkerView",
        "Webhook": "WebhookWithSecret",
        "Delivery": "DeliveryDetail",
        "Me": "MeView",
        "Account": "AccountView",
        "ApiKey": "KeyView",
        "NewApiKey": "NewKeyView",
        "AuditEntry": "AuditEntryView",
        "Upload": "UploadView",
    }
    known = {kind.__name__: kind for kind in subclasses(Resource) if kind.__module__.startswith("services.client")}
    for name, schema in named.items():
        documented = document["components"]["schemas"][schema]["properties"]
        ours = {field.alias or spelled for spelled, field in known[name].model_fields.items()}
        assert ours - set(documented) == set(), name


def subclasses(kind: type[Resource]) -> Iterator[type[Resource]]:
    for inner in kind.__subclasses__():
        yield inner
        yield from subclasses(inner)


def test_the_command_line_speaks_to_the_service_through_the_client_only() -> None:
    """Nothing below cli/ opens connections of its own or knows a route."""
    folder = Path(inspect.getfile(CffaClient)).parent / "cli"
    for path in folder.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) (httpx|requests|urllib\.request|http\.client)", text, re.MULTILINE), (
            path
        )
        assert '"/v1/' not in text, path
