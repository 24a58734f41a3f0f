"""Typed synchronous client of the CFFA HTTP API.

Requests that may safely be repeated are repeated when the connection breaks or the service says "later"; posts carry
an ``Idempotency-Key`` minted once per call, so a repeated post makes no second job. Nothing here prints. Here are the
client itself and its calls on data sets and models; the others come from ``submissions``, ``jobs`` and ``products``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from cffa_core.errors import NotFound
from services.client import upload
from services.client.calls import new_key
from services.client.datasets import DatasetCalls
from services.client.inspection import Inspection
from services.client.jobs import JobCalls
from services.client.people import People
from services.client.problems import document_of
from services.client.products import ProductCalls
from services.client.resources import Dataset, Model
from services.client.submissions import Submissions
from services.client.transport import Transport
from services.client.upload import OnBytes
from services.client.webhooks import WebhookCalls

DEFAULT_URL = "http://127.0.0.1:8008"


class CffaClient(Submissions, JobCalls, ProductCalls):
    """Client of one service; use as a context manager or call :meth:`close`.

    All methods raise :class:`services.client.problems.ApiError` (or its subclass by code) when the service refuses, and
    :class:`services.client.problems.ServiceUnreachable` when it does not answer after ``retries`` repeats.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        retries: int = 4,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(Transport(base_url, api_key=api_key, timeout=timeout, retries=retries, transport=transport))
        self.webhooks = WebhookCalls(self._transport)
        self.people = People(self._transport)
        self.sets = DatasetCalls(self._transport)
        self.inspect = Inspection(self._transport)

    @property
    def base_url(self) -> str:
        """Address of the service."""
        return self._transport.base_url

    def close(self) -> None:
        """Close all connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Data sets and models

    def upload_dataset(
        self,
        path: Path,
        name: str | None = None,
        on_bytes: OnBytes | None = None,
        *,
        eye_pattern: str | None = None,
        patient_pattern: str | None = None,
        auto_register: bool = False,
    ) -> Dataset:
        """Send a folder (zipped while it is sent) or zip of pairs; ``on_bytes(sent, total)`` counts.

        ``eye_pattern`` is a regular expression: pairs whose names give the same match are one eye; by
        ``patient_pattern`` eyes are of one patient, which no split divides. Raises ``InvalidDataset`` with every
        problem of every file, ``NotFound`` if ``path`` does not exist.
        """
        key = new_key()
        fields = {"name": name or path.resolve().stem}
        if eye_pattern is not None:
            fields["eye_pattern"] = eye_pattern
        if patient_pattern is not None:
            fields["patient_pattern"] = patient_pattern
        if auto_register:
            fields["auto_register"] = "true"

        def send() -> httpx.Response:
            files = {"file": (f"{path.resolve().stem}.zip", upload.Body(path, on_bytes), "application/zip")}
            return self._http.post(
                "/v1/datasets",
                files=files,  # type: ignore[arg-type]  # httpx only ever calls read()
                data=fields,
                headers={"Idempotency-Key": key},
                timeout=httpx.Timeout(30.0, read=3600.0),
            )

        return Dataset.model_validate_json(self._transport.sent(send, repeatable=True).content)

    def datasets(self) -> Iterator[Dataset]:
        """All data sets, newest first."""
        return self._pages("/v1/datasets", Dataset)

    def dataset(self, dataset_id: str) -> Dataset:
        """One data set."""
        return self._get(f"/v1/datasets/{dataset_id}", Dataset)

    def dataset_report(self, dataset_id: str) -> dict[str, Any]:
        """What the check of a data set found: layout, each pair with its registration, warnings."""
        response = self._transport.sent(lambda: self._http.get(f"/v1/datasets/{dataset_id}/report"), repeatable=True)
        report: dict[str, Any] = document_of(response)
        return report

    def models(self) -> Iterator[Model]:
        """All models, newest first."""
        return self._pages("/v1/models", Model)

    def model(self, model_id: str) -> Model:
        """One model."""
        return self._get(f"/v1/models/{model_id}", Model)

    def model_of(self, job_id: str) -> Model:
        """The model that a succeeded training job left; raises ``NotFound`` if there is none."""
        result = self.job(job_id).result or {}
        if isinstance(model_id := result.get("model_id"), str):
            return self.model(model_id)
        for model in self._pages("/v1/models", Model, {"job_id": job_id}):
            return model
        raise NotFound(f"job {job_id} has left no model")
