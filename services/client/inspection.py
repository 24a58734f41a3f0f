"""Looking closely: a job's history, metrics and checkpoints, single pairs and images, cards, workers. Read-only."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Literal

import httpx

from services.client.calls import Calls, R
from services.client.event_stream import Event, EventLines, is_over, stream_headers
from services.client.problems import ServiceUnreachable, document_of, from_response
from services.client.resources import Pair, Resource

# Longer than the silence that the service allows itself: it sends a comment every 15 s.
SILENCE_SECONDS = 60.0
RECONNECT_SECONDS = 0.5


class Metric(Resource):
    """Scalars of one training step."""

    step: int
    values: dict[str, float]


class Checkpoint(Resource):
    """A checkpoint that a restarted worker resumes from."""

    step: int
    bytes: int
    files: int
    created_at: datetime


class DatasetPair(Resource):
    """One pair of a data set, with signed links to its images."""

    name: str
    original_name: str | None = None
    eye: str
    patient: str | None = None
    part: str | None = None
    width: int
    height: int
    registration: str
    residual_px: float | None = None
    cf_url: str
    fa_url: str


class Worker(Resource):
    """A worker that was heard of within the last minute; ``info`` says host, device and kinds."""

    id: str
    info: dict[str, Any]
    started_at: datetime
    seen_at: datetime


class Inspection(Calls):
    """What can be looked at; ``CffaClient.inspect``. Raises as the client does."""

    def events(self, job_id: str, *, after: int = 0) -> Iterator[Event]:
        """The history of a job so far, oldest first, from event number ``after`` (exclusive) on."""
        position: int | None = after
        while position is not None:
            answer = document_of(self._answer(f"/v1/jobs/{job_id}/events", {"after": position}))
            yield from (Event.model_validate(item) for item in answer["items"])
            position = answer["next_after"]

    def follow(self, job_id: str, *, after: int = 0, patience: float = 60.0) -> Iterator[Event]:
        """Its history and then each event as it happens, until the job is finished.

        A stream that breaks off, or that a stopping server ends, goes on after the last event, for ``patience`` seconds
        without an answer. Raises ``NotFound`` if the job is deleted meanwhile.
        """
        timeout = httpx.Timeout(10.0, read=SILENCE_SECONDS)
        path = f"/v1/jobs/{job_id}/events"
        broken: float | None = None
        while True:
            idle = True
            try:
                with self._http.stream("GET", path, headers=stream_headers(after), timeout=timeout) as response:
                    if is_over(response):
                        return
                    if response.is_error:
                        response.read()
                        raise from_response(response)
                    broken, lines = None, EventLines()
                    for line in response.iter_lines():
                        if (event := lines.feed(line)) is not None:
                            after, idle = event.seq, False
                            yield event
            except httpx.TransportError as error:
                broken = broken or time.monotonic()
                if time.monotonic() - broken > patience:
                    raise ServiceUnreachable(f"the events of {job_id} broke off: {error}") from error
            if idle:
                time.sleep(RECONNECT_SECONDS)

    def metrics(self, job_id: str, *, key: str | None = None, since_step: int = 0) -> list[Metric]:
        """Training metrics in step order; ``key`` keeps one, e.g. ``eps_cf``."""
        query = {"since_step": since_step} | ({} if key is None else {"key": key})
        return self._items(f"/v1/jobs/{job_id}/metrics", Metric, query)

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """Checkpoints of a training job, oldest first."""
        return self._items(f"/v1/jobs/{job_id}/checkpoints", Checkpoint)

    def pair(self, job_id: str, index: int) -> Pair:
        """One made pair; raises ``Conflict`` while it is not made, ``NotFound`` if it never will be."""
        return self._get(f"/v1/jobs/{job_id}/pairs/{index}", Pair)

    def pair_image(self, job_id: str, index: int, modality: Literal["cf", "fa", "mask", "sheet"]) -> bytes:
        """The PNG of one modality of a made pair; of an edited one also its mask, and its sheet of before and after."""
        return self._answer(f"/v1/jobs/{job_id}/pairs/{index}/{modality}.png").content

    def report_file(self, job_id: str, name: str) -> bytes:
        """One file of an evaluation's report."""
        return self._answer(f"/v1/jobs/{job_id}/report/{name}").content

    def dataset_pairs(self, dataset_id: str) -> Iterator[DatasetPair]:
        """Pairs of a data set, in its own order."""
        return self._pages(f"/v1/datasets/{dataset_id}/pairs", DatasetPair)

    def model_card(self, model_id: str) -> dict[str, Any]:
        """A model's card and, where it has them, signed links to its files."""
        card: dict[str, Any] = document_of(self._answer(f"/v1/models/{model_id}/card"))
        return card

    def workers(self) -> list[Worker]:
        """Workers that live."""
        return self._items("/v1/workers", Worker)

    def ready(self) -> dict[str, str]:
        """Every server that the service depends on, and ``ok``; raises ``StorageUnavailable`` if one fails."""
        checks: dict[str, str] = document_of(self._answer("/readyz"))["checks"]
        return checks

    def _items(self, path: str, kind: type[R], query: Mapping[str, Any] | None = None) -> list[R]:
        return [kind.model_validate(item) for item in document_of(self._answer(path, query))["items"]]

    def _answer(self, path: str, query: Mapping[str, Any] | None = None) -> httpx.Response:
        return self._transport.sent(lambda: self._http.get(path, params=dict(query or {})), repeatable=True)
