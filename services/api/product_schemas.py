"""What the API says about products of jobs: archives, checkpoints, metrics, models. See ``schemas``."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Self

from pydantic import BaseModel

from cffa_core.jobs.records import Checkpoint, Model
from services.api.schemas import JOB, NOON, SHA, example


class ArchiveView(BaseModel):
    """An archive to download. ``number`` is the part it holds, or null for the archive of the whole job."""

    model_config = example(
        {
            "number": 0,
            "pairs": 32,
            "filename": f"{JOB}-part-00000.zip",
            "bytes": 12345678,
            "sha256": SHA,
            "url": "http://127.0.0.1:8008/v1/blobs/TOKEN",
            "expires_at": NOON,
        }
    )
    number: int | None
    pairs: int
    filename: str
    bytes: int
    sha256: str
    url: str
    expires_at: datetime


class StoredFileView(BaseModel):
    """One published file of a model or a report; the URL is signed and expires."""

    name: str
    bytes: int
    sha256: str
    url: str


class ArchiveList(BaseModel):
    """Part archives that are done, and the whole one once the job has succeeded.

    Of an export: its archives, and ``manifest``, which says what they hold and from what, once it has succeeded.
    """

    parts: list[ArchiveView]
    whole: ArchiveView | None
    manifest: StoredFileView | None = None
    next_page_token: str | None


class CheckpointView(BaseModel):
    """A checkpoint that can be resumed from."""

    step: int
    bytes: int
    files: int
    created_at: datetime

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        stored = checkpoint.stored.files
        return cls(
            step=checkpoint.step,
            bytes=sum(info.size for info in stored.values()),
            files=len(stored),
            created_at=checkpoint.created_at,
        )


class CheckpointList(BaseModel):
    """Checkpoints of a training job, oldest first."""

    items: list[CheckpointView]


class MetricPoint(BaseModel):
    """Scalars of one step."""

    step: int
    values: dict[str, float]


class MetricList(BaseModel):
    """Metrics in step order; ask again with ``since_step`` = ``next_since_step`` for newer ones."""

    items: list[MetricPoint]
    next_since_step: int | None


class ReportView(BaseModel):
    """What a job found (``report``), and its files: the same as JSON and Markdown, the pictures, what else it made."""

    model_config = example(
        {
            "report": {"format": "cffa-evaluation/1"},
            "files": [{"name": "report.md", "bytes": 4321, "sha256": SHA, "url": "http://127.0.0.1:8008/v1/blobs/T"}],
            "expires_at": NOON,
        }
    )
    report: dict[str, Any]
    files: list[StoredFileView]
    expires_at: datetime


class ModelView(BaseModel):
    """A trained model, product of a training job. ``family``: ``pairs`` (of a pair method), or ``captioned``."""

    id: str
    job_id: str
    digest: str
    family: str
    method: str | None
    base: str | None
    step: int | None
    created_at: datetime
    links: dict[str, str]

    @classmethod
    def of(cls, model: Model) -> Self:
        here = f"/v1/models/{model.id}"
        base = model.card.get("base")
        return cls(
            id=model.id,
            job_id=model.job_id,
            digest=model.digest,
            family=model.card.get("family", "pairs"),
            method=model.card.get("method"),
            base=base.get("name") if isinstance(base, dict) else base,
            step=model.card.get("step"),
            created_at=model.created_at,
            links={"self": here, "card": f"{here}/card", "job": f"/v1/jobs/{model.job_id}"},
        )


class ModelDetail(ModelView):
    """A trained model with its files; URLs are signed and expire."""

    files: list[StoredFileView]


class ModelList(BaseModel):
    """One page of models, newest first."""

    items: list[ModelView]
    next_page_token: str | None
