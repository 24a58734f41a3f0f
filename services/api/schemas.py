"""What the API says, as pydantic models with examples: the source of the OpenAPI document.

Each model builds itself from a value of the record (``cffa_core.jobs.records``); products of jobs are in
``product_schemas``, what may be posted in ``job_requests``.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from cffa_core.jobs.records import Counts, Dataset, Event, Job, Progress, Wish
from cffa_core.jobs.spec import JobSpec, Kind
from cffa_core.jobs.state import TERMINAL, JobState

JOB = "job_0123456789abcdefghij"
DATASET = "ds_0123456789abcdefghij"
MODEL = "mdl_0123456789abcdefghij"
NOON = "2026-11-21T12:00:00Z"
SHA = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

PRODUCTS = {
    Kind.TRAINING: ["checkpoints", "previews"],
    Kind.GENERATION: ["pairs", "archives"],
    Kind.EVALUATION: ["report"],
    Kind.EXPORT: ["archives"],
    Kind.ATTENTION: ["report"],
    Kind.EDIT: ["pairs", "archives"],
    Kind.CAPTIONED_TRAINING: ["checkpoints"],
    Kind.CAPTIONED: ["report"],
}


def example(value: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [value]})


class CountsView(BaseModel):
    """Pairs of a generation or edit job by outcome; all zero for other kinds."""

    requested: int
    generated: int
    accepted: int
    rejected: int
    failed: int

    @classmethod
    def of(cls, counts: Counts) -> Self:
        return cls(
            requested=counts.requested,
            generated=counts.generated,
            accepted=counts.accepted,
            rejected=counts.rejected,
            failed=counts.failed,
        )


class ProgressView(BaseModel):
    """How far a job is; ``eta_seconds`` is null until a rate was measured."""

    stage: str
    current: int
    total: int
    eta_seconds: float | None

    @classmethod
    def of(cls, progress: Progress) -> Self:
        return cls(
            stage=progress.stage, current=progress.current, total=progress.total, eta_seconds=progress.eta_seconds
        )


class JobView(BaseModel):
    """A job. ``version`` rises with every change and is its ETag; ``entered`` says when it reached each state.

    A job that is not over at ``deadline_at`` fails. ``expires_at``, known once it is over, is when its products are
    removed (null: never). ``wishes`` are what a running training was asked for and has not done yet.
    """

    model_config = example(
        {
            "id": JOB,
            "kind": "generation",
            "state": "running",
            "terminal": False,
            "version": 12,
            "priority": 0,
            "spec": {"kind": "generation", "model_id": MODEL, "count": 1000, "seed": 7},
            "spec_version": 1,
            "created_at": NOON,
            "entered": {"queued": NOON, "running": NOON},
            "counts": {"requested": 1000, "generated": 96, "accepted": 0, "rejected": 0, "failed": 0},
            "progress": {"stage": "generating", "current": 96, "total": 1000, "eta_seconds": 5400.0},
            "queue_position": None,
            "reason": None,
            "error": None,
            "result": None,
            "numerics_key": None,
            "deadline_at": None,
            "expires_at": None,
            "wishes": [],
            "links": {"self": f"/v1/jobs/{JOB}", "pairs": f"/v1/jobs/{JOB}/pairs"},
        }
    )
    id: str
    kind: Kind
    state: JobState
    terminal: bool
    version: int
    priority: int
    spec: JobSpec
    spec_version: int
    created_at: datetime
    entered: dict[JobState, datetime]
    counts: CountsView
    progress: ProgressView
    queue_position: int | None
    reason: str | None
    error: dict[str, Any] | None
    result: dict[str, Any] | None
    numerics_key: str | None
    deadline_at: datetime | None
    expires_at: datetime | None
    wishes: list[Wish]
    links: dict[str, str]

    @classmethod
    def of(cls, job: Job) -> Self:
        names = ["events", "metrics"]
        names += PRODUCTS[job.kind]
        here = f"/v1/jobs/{job.id}"
        return cls(
            id=job.id,
            kind=job.kind,
            state=job.state,
            terminal=job.state in TERMINAL,
            version=job.version,
            priority=job.priority,
            spec=job.spec,
            spec_version=job.spec_version,
            created_at=job.created_at,
            entered=job.entered,
            counts=CountsView.of(job.counts),
            progress=ProgressView.of(job.progress),
            queue_position=job.queue_position,
            reason=job.reason,
            error=job.error,
            result=job.result,
            numerics_key=job.numerics_key,
            deadline_at=job.deadline_at,
            expires_at=job.expires_at,
            wishes=list(job.wishes),
            links={"self": here} | {name: f"{here}/{name}" for name in names},
        )


class JobList(BaseModel):
    """One page of jobs, newest first; ``next_page_token`` is null on the last page."""

    items: list[JobView]
    next_page_token: str | None


class DatasetView(BaseModel):
    """A checked data set that was taken in."""

    model_config = example(
        {
            "id": DATASET,
            "name": "clinic A",
            "digest": SHA,
            "pairs": 118,
            "version": 1,
            "parent_id": None,
            "split": None,
            "created_at": NOON,
            "links": {},
        }
    )
    id: str
    name: str
    digest: str
    pairs: int
    version: int
    parent_id: str | None
    split: dict[str, int] | None = Field(description="Pairs for train, validation and test; by eye.")
    created_at: datetime
    links: dict[str, str]

    @classmethod
    def of(cls, dataset: Dataset) -> Self:
        here = f"/v1/datasets/{dataset.id}"
        return cls(
            id=dataset.id,
            name=dataset.name,
            digest=dataset.digest,
            pairs=dataset.pairs,
            version=dataset.version,
            parent_id=dataset.parent_id,
            split=None if dataset.split is None else {part: len(names) for part, names in dataset.split.items()},
            created_at=dataset.created_at,
            links={"self": here, "pairs": f"{here}/pairs", "report": f"{here}/report"},
        )


class DatasetList(BaseModel):
    """One page of data sets, newest first."""

    items: list[DatasetView]
    next_page_token: str | None


class DatasetPair(BaseModel):
    """One pair of a data set. ``registration`` says how FA came onto CF; URLs are signed and expire."""

    name: str
    original_name: str | None = Field(description="What it was called where that is no safe name, else null.")
    eye: str
    patient: str | None = Field(description="By eyes.csv, the pair list or `patient_pattern`; null if it is not known.")
    part: str | None = Field(description="train, validation or test; null without a split, or if it is in none.")
    width: int
    height: int
    registration: str
    residual_px: float | None
    cf_url: str
    fa_url: str


class DatasetPairList(BaseModel):
    """One page of a data set's pairs, in its own order."""

    items: list[DatasetPair]
    next_page_token: str | None


class EventView(BaseModel):
    """One line of a job's history."""

    model_config = example({"seq": 3, "at": NOON, "type": "state", "data": {"state": "running"}})
    seq: int
    at: datetime
    type: str
    data: dict[str, Any]

    @classmethod
    def of(cls, event: Event) -> Self:
        return cls(seq=event.seq, at=event.at, type=event.type, data=event.data)


class EventList(BaseModel):
    """One page of events in order; ``next_after`` continues it and is null when there are no more yet."""

    items: list[EventView]
    next_after: int | None


class Live(BaseModel):
    """The process answers."""

    status: str = "ok"


class Ready(BaseModel):
    """Every dependency by name, and whether it works."""

    status: str
    checks: dict[str, str]
