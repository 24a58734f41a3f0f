"""What the service says, as frozen values: jobs, data sets, models, archives, pairs, reports.

Fields this version does not know are kept (``model_extra``), so an older client shows what a newer service says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cffa_core.jobs.spec import Kind
from cffa_core.jobs.state import JobState
from services.client.problems import UnexpectedAnswer

T = TypeVar("T")


class Resource(BaseModel):
    """Base of everything the service returns."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """As pydantic's, but raises ``UnexpectedAnswer`` for what is not this."""
        with _understood(cls):
            return super().model_validate(obj, **options)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """As pydantic's, but raises ``UnexpectedAnswer`` for what is not this."""
        with _understood(cls):
            return super().model_validate_json(json_data, **options)


@contextmanager
def _understood(kind: type[BaseModel]) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise UnexpectedAnswer(f"what came in place of a {kind.__name__.partition('[')[0]}") from error


class Counts(Resource):
    """Pairs of a generation or edit job by outcome."""

    requested: int = 0
    generated: int = 0
    accepted: int = 0
    rejected: int = 0
    failed: int = 0


class Progress(Resource):
    """How far a job is; ``eta_seconds`` is None until a rate was measured."""

    stage: str
    current: int
    total: int
    eta_seconds: float | None = None


class Job(Resource):
    """A job. ``terminal`` says that its state will not change by itself any more."""

    id: str
    kind: Kind
    state: JobState
    terminal: bool
    version: int
    priority: int = 0
    spec: dict[str, Any]
    created_at: datetime
    entered: dict[str, datetime] = {}
    counts: Counts = Counts()
    progress: Progress
    queue_position: int | None = None
    reason: str | None = None
    error: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    deadline_at: datetime | None = None
    expires_at: datetime | None = None
    wishes: list[str] = []


class Dataset(Resource):
    """A data set that was taken in; ``pairs`` counts its pairs, ``split`` those for train, validation and test.

    A ``version`` above 1 was made from the data set ``parent_id``.
    """

    id: str
    name: str
    digest: str
    pairs: int
    version: int = 1
    parent_id: str | None = None
    split: dict[str, int] | None = None
    created_at: datetime


class Model(Resource):
    """A trained model, product of the training job ``job_id``; ``family``: pairs (of a pair method) or captioned."""

    id: str
    job_id: str
    digest: str
    family: str = "pairs"
    method: str | None = None
    base: str | None = None
    step: int | None = None
    created_at: datetime


class Queue(Resource):
    """Load of the whole service: jobs that wait and run, live workers."""

    waiting: int
    running: int
    workers: int


class Archive(Resource):
    """An archive to download; ``number`` is the part it holds, None for the archive of the whole job."""

    number: int | None
    pairs: int
    filename: str
    bytes: int
    sha256: str
    url: str
    expires_at: datetime


class ReportFile(Resource):
    """One file of a report, or the manifest of an export."""

    name: str
    bytes: int
    sha256: str
    url: str


class Archives(Resource):
    """Archives of the parts that are done, and of the whole job once it has succeeded; those of an export."""

    parts: list[Archive]
    whole: Archive | None = None
    manifest: ReportFile | None = None


class Image(Resource):
    """One PNG of a made pair."""

    name: str
    size: int
    sha256: str
    url: str


class Novelty(Resource):
    """The training pair that a made pair is most like; a copy has similarity 1."""

    similarity: float
    nearest: str


class ScoredPair(Resource):
    """What is known of a drawn pair: ``attempt`` counts the tries at its slot, 0 without a gate.

    ``alignment`` are scores of CF against FA by name, None if they show too little in common; ``novelty`` is None where
    the training pairs are not known.
    """

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)

    index: int
    part: int
    seed: int
    attempt: int = Field(default=0, alias="try")
    alignment: dict[str, float] | None = None
    novelty: Novelty | None = None


class Pair(ScoredPair):
    """One made pair.

    An edited one has the ``source`` it was made from, its scores before the edit, the ``mask`` with its share of the
    image, and a ``sheet`` of before and after.
    """

    cf: Image
    fa: Image
    source: dict[str, Any] | None = None
    alignment_before: dict[str, float] | None = None
    mask_share: float | None = None
    mask: Image | None = None
    sheet: Image | None = None


class Reject(ScoredPair):
    """One pair that a gate refused, and why."""

    reasons: list[str]


class EmptySlot(Resource):
    """A slot of which no try passed the gate, with the best that any of them reached."""

    index: int
    part: int
    tries: int
    best_alignment: float | None
    least_similarity: float | None


class Report(Resource):
    """What a job found, and the files that show it: report.json, report.md, pictures, and what else it made."""

    report: dict[str, Any]
    files: list[ReportFile]
    expires_at: datetime


class Preview(Resource):
    """Pictures of one step of a training; ``sheet.png`` shows all of them."""

    step: int
    asked: bool
    files: list[ReportFile]


class Previews(Resource):
    """Pictures that a training drew, by step."""

    items: list[Preview]


class Page(Resource, Generic[T]):
    """One page of a listing."""

    items: list[T]
    next_page_token: str | None = None
