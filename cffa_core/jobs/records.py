"""Values that the record (job table) hands out: plain frozen dataclasses, no database objects.

Written by ``cffa_core.jobs.store``; read by the API and the workers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from cffa_core.jobs.spec import JobSpec, Kind
from cffa_core.jobs.state import JobState, UnitKind, UnitState
from cffa_core.storage.base import ObjectInfo

T = TypeVar("T")

NOVELTY_FILE = "novelty.safetensors"
"""Product of a training, beside its model: thumbnails of the pairs it has learnt from."""

Order = Literal["continue", "cancel", "pause", "wish"]
"""What a worker is told to do with the unit it holds; ``wish``: go on, and see what the job's owner asks for."""

Wish = Literal["checkpoint", "sample"]
"""What the owner of a running training may ask for at any time."""


@dataclass(frozen=True)
class Terms:
    """How long a job may take and how long its products are kept; not part of what it computes.

    The deadline is a time, or seconds after the job was posted; neither: none. ``retention_seconds`` count from the
    end of the job: 0 keeps the products for ever, None as long as the service keeps those of others.
    """

    deadline_seconds: float | None = None
    deadline_at: datetime | None = None
    retention_seconds: float | None = None


USUAL_TERMS = Terms()
"""No deadline, and kept as long as the service keeps products."""


@dataclass(frozen=True)
class Counts:
    """Pairs of a generation or edit job: asked for, made, and (with a gate) accepted or rejected.

    ``failed`` were given up. With a gate ``generated`` is ``accepted + rejected``, and after success ``requested`` is
    ``accepted + failed``.
    """

    requested: int = 0
    generated: int = 0
    accepted: int = 0
    rejected: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Progress:
    """How far a job is. ``eta_seconds`` is None until a rate was measured."""

    stage: str = "queued"
    current: int = 0
    total: int = 0
    eta_seconds: float | None = None


@dataclass(frozen=True)
class Job:
    """A job as its owner sees it. ``version`` rises with every change (it is the ETag).

    A job that is not over at ``deadline_at`` fails; ``expires_at`` is known once it is over. ``wishes`` are what a
    running training was asked for and has not done.
    """

    id: str
    owner: str
    kind: Kind
    spec: JobSpec
    spec_version: int
    state: JobState
    version: int
    priority: int
    created_at: datetime
    entered: dict[JobState, datetime]
    counts: Counts
    progress: Progress
    reason: str | None = None
    error: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    numerics_key: str | None = None
    queue_position: int | None = None
    deadline_at: datetime | None = None
    expires_at: datetime | None = None
    wishes: tuple[Wish, ...] = ()


@dataclass(frozen=True)
class JobFilter:
    """Which jobs a listing keeps: posted from ``created_after`` on and before ``created_before``, and those whose spec
    names a model or a data set, in whatever role."""

    created_after: datetime | None = None
    created_before: datetime | None = None
    model_id: str | None = None
    dataset_id: str | None = None


ANY_JOB = JobFilter()
"""A filter that keeps every job."""


@dataclass(frozen=True)
class StoredFiles:
    """Files published together: relative name -> stored object."""

    files: dict[str, ObjectInfo] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A training checkpoint that a commit made visible."""

    job_id: str
    step: int
    attempt: int
    stored: StoredFiles
    created_at: datetime


@dataclass(frozen=True)
class Part:
    """One finished unit: its published files and what its recipe reported (``info``)."""

    job_id: str
    unit_id: str
    kind: UnitKind
    index: int
    state: UnitState
    attempt: int
    stored: StoredFiles
    info: dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """The right to work on one unit until the lease ends; every write must carry it (fencing by ``attempt``)."""

    job_id: str
    unit_id: str
    kind: UnitKind
    index: int
    attempt: int
    worker_id: str
    owner: str
    spec: JobSpec
    numerics_key: str | None
    checkpoint: Checkpoint | None


@dataclass(frozen=True)
class Dataset:
    """A checked data set. ``report`` is the result of the check; ``stored`` are its files.

    A ``version`` above 1 was made from ``parent_id`` and shares its files. ``split`` says which pairs (by name) are for
    ``train``, ``validation`` and ``test``; no eye is in two of them.
    """

    id: str
    owner: str
    name: str
    digest: str
    pairs: int
    report: dict[str, Any]
    stored: StoredFiles
    created_at: datetime
    version: int = 1
    parent_id: str | None = None
    split: dict[str, list[str]] | None = None


@dataclass(frozen=True)
class Model:
    """The product of a training job: a model folder in object storage and its card."""

    id: str
    owner: str
    job_id: str
    digest: str
    card: dict[str, Any]
    stored: StoredFiles
    created_at: datetime


@dataclass(frozen=True)
class NewModel:
    """What the commit of a training job's finalize unit says of the model it makes; the record mints the id."""

    digest: str
    card: dict[str, Any]
    stored: StoredFiles


@dataclass(frozen=True)
class QueueCounts:
    """Load of one kind of job: jobs not yet started, jobs under way, units that wait, units that are worked on."""

    queued_jobs: int = 0
    active_jobs: int = 0
    waiting_units: int = 0
    running_units: int = 0


@dataclass(frozen=True)
class Load:
    """The whole service at a glance, for metrics.

    ``jobs``: number by kind and state, also where it is 0. ``units``: number by kind and state, only of those that may
    still be worked on: QUEUED (of jobs that are not held or being stopped) and RUNNING. ``oldest_seconds``: age of the
    unit that waits longest, 0 where none waits. ``workers`` were heard of within the last minute.
    """

    jobs: dict[tuple[Kind, JobState], int]
    units: dict[tuple[Kind, UnitState], int]
    oldest_seconds: dict[Kind, float]
    workers: int


LIVE_WORKER_SECONDS = 60.0
"""A worker that was not heard of for longer is not counted on."""


@dataclass(frozen=True)
class WorkerRecord:
    """A worker as it registered; ``idle_seconds`` since it was last heard of, by the database's clock."""

    id: str
    info: dict[str, Any]
    started_at: datetime
    seen_at: datetime
    idle_seconds: float


@dataclass(frozen=True)
class Footprint:
    """What the record knows of a job's objects: keys that rows point to, and the newest attempt of each unit.

    ``exists`` is False for a job that was deleted, and for one whose products expired.
    ``units``: (kind, index) -> (attempt, whether it is live); ``unit_names``: names that a unit goes by in keys (its
    id and, for the kinds that occur once, the kind) -> (kind, index). ``keys`` holds a model's files even then.
    """

    exists: bool
    keys: frozenset[str]
    units: dict[tuple[UnitKind, int], tuple[int, bool]]
    unit_names: dict[str, tuple[UnitKind, int]]


@dataclass(frozen=True)
class Event:
    """One line of a job's history; ``seq`` rises by one within a job."""

    job_id: str
    seq: int
    at: datetime
    type: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page of a listing; ``next_token`` is None on the last."""

    items: tuple[T, ...]
    next_token: str | None
