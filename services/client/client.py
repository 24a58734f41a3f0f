"""Typed synchronous client of the CFFA HTTP API.

Requests that may safely be repeated are repeated when the connection breaks or the service says "later"; posts carry
an ``Idempotency-Key`` minted once per call, so a repeated post makes no second job. Nothing here prints.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from cffa_core.errors import CorruptArtifact, NotFound
from cffa_core.jobs.records import ANY_JOB, USUAL_TERMS, JobFilter, Terms
from cffa_core.jobs.spec import (
    AttentionSettings,
    CaptionedSettings,
    CaptionedTrainSettings,
    EditSpec,
    EvaluateSettings,
    ExportSettings,
    GenerateSettings,
    Kind,
    Spec,
    TrainSettings,
)
from cffa_core.jobs.state import JobState
from services.client import download, upload
from services.client.datasets import DatasetCalls
from services.client.exports import fetch_export
from services.client.inspection import Inspection
from services.client.people import People
from services.client.problems import ServiceUnreachable
from services.client.resources import (
    Archive,
    Archives,
    Dataset,
    EmptySlot,
    Job,
    Model,
    Page,
    Pair,
    Preview,
    Previews,
    Queue,
    Reject,
    Report,
    ReportFile,
    Resource,
)
from services.client.transport import Transport
from services.client.webhooks import WebhookCalls

DEFAULT_URL = "http://127.0.0.1:8008"
LONGEST_POLL = 30.0
DAY_SECONDS = 86_400.0
R = TypeVar("R", bound=Resource)
OnBytes = Callable[[int, int], None]


class CffaClient:
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
        self._transport = Transport(base_url, api_key=api_key, timeout=timeout, retries=retries, transport=transport)
        self._http = self._transport.http
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
        key = _new_key()
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
        report: dict[str, Any] = response.json()
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

    # Jobs

    def submit_training(
        self, dataset_id: str, settings: TrainSettings, *, priority: int = 0, asked: Terms = USUAL_TERMS
    ) -> Job:
        """Post a training job; raises ``InvalidSpec`` naming every bad field.

        ``asked`` (here and for the other kinds) are its deadline and how long its products are to be kept.
        """
        return self._submit("/v1/training-jobs", {"dataset_id": dataset_id}, settings, priority, asked)

    def submit_generation(
        self,
        model_id: str,
        settings: GenerateSettings,
        *,
        structure_dataset_id: str | None = None,
        priority: int = 0,
        asked: Terms = USUAL_TERMS,
    ) -> Job:
        """Post a generation job for ``settings.count`` pairs; raises ``InvalidSpec`` naming every bad field.

        ``structure_dataset_id`` names the data set that ``structures = "dataset"`` stands for.
        """
        names = {"model_id": model_id}
        if structure_dataset_id is not None:
            names["structure_dataset_id"] = structure_dataset_id
        return self._submit("/v1/generation-jobs", names, settings, priority, asked)

    def submit_evaluation(
        self,
        settings: EvaluateSettings,
        *,
        reference_dataset_id: str,
        generation_job_id: str | None = None,
        pairs_dataset_id: str | None = None,
        train_dataset_id: str | None = None,
        priority: int = 0,
        asked: Terms = USUAL_TERMS,
    ) -> Job:
        """Post an evaluation of the pairs of a generation or edit job or of a data set (name one of the two).

        Without ``train_dataset_id`` the pairs of a generation job are compared with the data set of its model's
        training, if the service still knows it. Raises ``InvalidSpec`` naming every bad field.
        """
        references = {
            "generation_job_id": generation_job_id,
            "pairs_dataset_id": pairs_dataset_id,
            "reference_dataset_id": reference_dataset_id,
            "train_dataset_id": train_dataset_id,
        }
        named = {name: id_ for name, id_ in references.items() if id_ is not None}
        return self._submit("/v1/evaluation-jobs", named, settings, priority, asked)

    def submit_attention(
        self, model_id: str, settings: AttentionSettings, *, priority: int = 0, asked: Terms = USUAL_TERMS
    ) -> Job:
        """Post a look into the attention of a pair model; see :meth:`report`. Raises ``InvalidSpec``."""
        return self._submit("/v1/attention-jobs", {"model_id": model_id}, settings, priority, asked)

    def submit_captioned_training(
        self, dataset_id: str, settings: CaptionedTrainSettings, *, priority: int = 0, asked: Terms = USUAL_TERMS
    ) -> Job:
        """Post a training of the captioned model on a data set that has captions; raises ``InvalidSpec``."""
        return self._submit("/v1/captioned-training-jobs", {"dataset_id": dataset_id}, settings, priority, asked)

    def submit_captioned(
        self,
        model_id: str,
        settings: CaptionedSettings,
        *,
        dataset_id: str | None = None,
        priority: int = 0,
        asked: Terms = USUAL_TERMS,
    ) -> Job:
        """Post the drawing of texts, or with ``dataset_id`` the captioning of its images; see :meth:`report`.

        Raises ``InvalidSpec`` naming every bad field, also for a model that is not a captioned one.
        """
        named = {"model_id": model_id} if dataset_id is None else {"model_id": model_id, "dataset_id": dataset_id}
        return self._submit("/v1/captioned-jobs", named, settings, priority, asked)

    def submit_edit(self, spec: EditSpec, *, priority: int = 0, asked: Terms = USUAL_TERMS) -> Job:
        """Post an edit of pairs of a data set (one pair is enough) or of a succeeded job that made pairs.

        ``spec`` says which pairs, with which model, and what changes; its ``count`` is filled in by the service. Raises
        ``InvalidSpec`` naming every bad field.
        """
        return self._submit("/v1/edit-jobs", {}, spec, priority, asked)

    def submit_export(
        self, generation_job_id: str, settings: ExportSettings, *, priority: int = 0, asked: Terms = USUAL_TERMS
    ) -> Job:
        """Post the export of pairs of a generation or edit job, of the parts that are finished now.

        Raises ``Conflict`` while it has none, ``InvalidSpec`` for a selection that no finished pair can meet.
        """
        return self._submit(f"/v1/jobs/{generation_job_id}/exports", {}, settings, priority, asked)

    def job(self, job_id: str) -> Job:
        """One job as it is now."""
        return self._get(f"/v1/jobs/{job_id}", Job)

    def jobs(
        self, *, kind: Kind | None = None, state: JobState | None = None, within: JobFilter = ANY_JOB
    ) -> Iterator[Job]:
        """Jobs, newest first, of those that every filter keeps."""
        query = {
            "kind": kind,
            "state": state,
            "created_after": within.created_after and within.created_after.isoformat(),
            "created_before": within.created_before and within.created_before.isoformat(),
            "model_id": within.model_id,
            "dataset_id": within.dataset_id,
        }
        return self._pages("/v1/jobs", Job, query)

    def watch(self, job_id: str, *, timeout: float | None = None, patience: float = 60.0) -> Iterator[Job]:
        """Yield the job now and after every change, by long polling, until it is terminal.

        A service that went away is waited for, ``patience`` seconds since its last answer. Raises ``TimeoutError``
        after ``timeout`` seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        etag: str | None = None
        answered = -math.inf
        while True:
            left = LONGEST_POLL if end is None else min(LONGEST_POLL, end - time.monotonic())
            if left <= 0:
                raise TimeoutError(f"job {job_id} was not finished after {timeout:g} s")
            try:
                response = self._poll(job_id, etag, left)
            except ServiceUnreachable:
                if time.monotonic() - answered > patience:
                    raise
                continue
            answered = time.monotonic()
            if response.status_code == httpx.codes.NOT_MODIFIED:
                continue
            etag = response.headers.get("etag")
            job = Job.model_validate_json(response.content)
            yield job
            if job.terminal:
                return

    def wait(self, job_id: str, *, timeout: float | None = None) -> Job:
        """Return the job once it is terminal, whatever its state; raises ``TimeoutError``."""
        return list(self.watch(job_id, timeout=timeout))[-1]

    def cancel(self, job_id: str) -> Job:
        """Ask a job to stop; it is ``canceling`` until its workers have stopped."""
        return self._act(job_id, "cancel")

    def pause(self, job_id: str) -> Job:
        """Ask a job to stop for now; what it has done is kept."""
        return self._act(job_id, "pause")

    def resume(self, job_id: str) -> Job:
        """Put a paused job back into the queue."""
        return self._act(job_id, "resume")

    def retry(self, job_id: str) -> Job:
        """Put a failed or cancelled job back into the queue; what it has done is kept."""
        return self._act(job_id, "retry", repeatable=False)

    def checkpoint_now(self, job_id: str) -> Job:
        """Ask a running training for a checkpoint of its next step; raises ``Conflict`` for any other job."""
        return self._act(job_id, "checkpoint")

    def sample_now(self, job_id: str) -> Job:
        """Ask a running training to draw its preview pairs after its next step; see :meth:`previews`."""
        return self._act(job_id, "sample")

    def delete(self, job_id: str) -> None:
        """Remove a finished job and its products; raises ``Conflict`` while it is not terminal."""
        self._transport.sent(lambda: self._http.delete(f"/v1/jobs/{job_id}"), repeatable=False)

    def queue(self) -> Queue:
        """What waits and runs in the whole service, and how many workers live."""
        return self._get("/v1/queue", Queue)

    # Products

    def pairs(self, job_id: str) -> Iterator[Pair]:
        """Finished pairs of a generation or edit job, in index order."""
        return self._pages(f"/v1/jobs/{job_id}/pairs", Pair)

    def rejects(self, job_id: str) -> Iterator[Reject]:
        """Pairs that the gate of a generation job refused, by index and try, with the reasons."""
        return self._pages(f"/v1/jobs/{job_id}/rejects", Reject)

    def exhausted(self, job_id: str) -> Iterator[EmptySlot]:
        """Slots of a generation job that stayed empty because no try passed its gate."""
        return self._pages(f"/v1/jobs/{job_id}/exhausted", EmptySlot)

    def regenerate(self, job_id: str, index: int) -> Job:
        """Post a job that makes one pair of a generation job once more, on a worker with the same numerics.

        Once it has succeeded, ``result["regenerated"]["same"]`` says whether both files are the same to the last bit.
        Raises ``NotFound`` for a pair that was not made, ``Conflict`` while it is not made yet.
        """
        headers = {"Idempotency-Key": _new_key()}
        path = f"/v1/jobs/{job_id}/pairs/{index}:regenerate"
        response = self._transport.sent(lambda: self._http.post(path, headers=headers), repeatable=True)
        return Job.model_validate_json(response.content)

    def archives(self, job_id: str) -> Archives:
        """Archives that can be downloaded now: of all finished parts, and of the whole job once it has succeeded."""
        parts: list[Archive] = []
        token: str | None = None
        while True:
            page = self._get(f"/v1/jobs/{job_id}/archives", Archives, {"page_token": token})
            parts += page.parts
            token = (page.model_extra or {}).get("next_page_token")
            if token is None:
                return page.model_copy(update={"parts": parts})

    def download_archive(
        self, job_id: str, target: Path, *, part: int | None = None, on_bytes: OnBytes | None = None
    ) -> Archive:
        """Download the whole archive (or that of one part) to ``target``: a file, or a folder to put it into.

        A broken download goes on where it stopped, in this call or the next. The file appears only when size and
        SHA-256 are right. Raises ``Conflict`` while the archive is not made yet, ``NotFound`` if it never will be,
        ``CorruptArtifact``.
        """
        return self._download(lambda: self._archive(job_id, part), target, on_bytes)

    def download_rejects(self, job_id: str, target: Path, part: int, *, on_bytes: OnBytes | None = None) -> Archive:
        """Download the pairs that the gate refused in one part, as :meth:`download_archive` does those of the part.

        Raises ``NotFound`` if none was refused.
        """
        path = f"/v1/jobs/{job_id}/archives/{part}/rejects"
        return self._download(lambda: self._get(path, Archive), target, on_bytes)

    def _download(self, find: Callable[[], Archive], target: Path, on_bytes: OnBytes | None) -> Archive:
        archive = find()
        if target.is_dir():
            target = target / archive.filename
        addresses = iter([archive.url])
        download.fetch(
            self._transport.signed,
            lambda: next(addresses, None) or find().url,
            target,
            sha256=archive.sha256,
            size=archive.bytes,
            on_bytes=on_bytes,
        )
        return archive

    def download_export(self, job_id: str, folder: Path, *, on_bytes: OnBytes | None = None) -> Archives:
        """Download all archives of an export, and its manifest, into ``folder``; goes on where it broke off.

        Raises ``Conflict`` for an export that has not succeeded, ``CorruptArtifact``.
        """
        return fetch_export(
            self._transport.signed,
            lambda: self.archives(job_id),
            lambda number: self._archive(job_id, number),
            folder,
            on_bytes,
        )

    def _archive(self, job_id: str, part: int | None) -> Archive:
        return self._get(f"/v1/jobs/{job_id}/archives/{'all' if part is None else part}", Archive)

    def report(self, job_id: str) -> Report:
        """The report of a job; raises ``Conflict`` while it is not made, ``NotFound`` if it never will be."""
        return self._get(f"/v1/jobs/{job_id}/report", Report)

    def download_report(self, job_id: str, folder: Path, *, on_bytes: OnBytes | None = None) -> Report:
        """Download all files of a report into ``folder``, each checked by size and SHA-256; goes on where it broke off.

        Raises as :meth:`report` does, and ``CorruptArtifact``.
        """
        report = self.report(job_id)
        for file in report.files:
            if not _is_inside(file.name):
                raise CorruptArtifact(f"{file.name!r} is no name for a file; nothing was written to it")
            self._fetch_report_file(job_id, file.name, report, folder, on_bytes)
        return report

    def _fetch_report_file(
        self, job_id: str, name: str, report: Report, folder: Path, on_bytes: OnBytes | None
    ) -> None:
        known = iter([report])

        def url() -> str:
            """The link that is known, later fresh ones: they expire."""
            current = next(known, None) or self.report(job_id)
            return next(file.url for file in current.files if file.name == name)

        (file,) = (file for file in report.files if file.name == name)
        download.fetch(
            self._transport.signed, url, folder / name, sha256=file.sha256, size=file.bytes, on_bytes=on_bytes
        )

    def previews(self, job_id: str) -> list[Preview]:
        """Pictures that a training drew, by step: regular ones, and those that were asked for (``asked``)."""
        return self._get(f"/v1/jobs/{job_id}/previews", Previews).items

    def download_previews(self, job_id: str, folder: Path) -> list[Path]:
        """Download the sheet of pictures of each step as ``FOLDER/step_000123.png`` (``..._asked.png`` for those that
        were asked for), each checked by size and SHA-256; returns the paths."""
        written = []
        for preview in self.previews(job_id):
            for file in preview.files:
                if file.name == "sheet.png":
                    target = folder / f"step_{preview.step:06d}{'_asked' if preview.asked else ''}.png"
                    self._fetch_file(file, target)
                    written.append(target)
        return written

    def _fetch_file(self, file: ReportFile, target: Path) -> None:
        download.fetch(
            self._transport.signed, lambda: file.url, target, sha256=file.sha256, size=file.bytes, on_bytes=None
        )

    # Transport

    def _submit(
        self,
        path: str,
        reference: Mapping[str, str],
        settings: Spec,
        priority: int,
        asked: Terms,
    ) -> Job:
        body = settings.model_dump(mode="json", exclude_unset=True) | dict(reference)
        if priority:
            body["priority"] = priority
        if asked.deadline_seconds is not None:
            body["deadline_seconds"] = asked.deadline_seconds
        if asked.deadline_at is not None:
            body["deadline_at"] = asked.deadline_at.isoformat()
        if asked.retention_seconds is not None:
            body["retention_days"] = asked.retention_seconds / DAY_SECONDS
        headers = {"Idempotency-Key": _new_key()}
        response = self._transport.sent(lambda: self._http.post(path, json=body, headers=headers), repeatable=True)
        return Job.model_validate_json(response.content)

    def _act(self, job_id: str, action: str, *, repeatable: bool = True) -> Job:
        response = self._transport.sent(lambda: self._http.post(f"/v1/jobs/{job_id}:{action}"), repeatable=repeatable)
        return Job.model_validate_json(response.content)

    def _poll(self, job_id: str, etag: str | None, seconds: float) -> httpx.Response:
        headers = {"If-None-Match": etag} if etag else {}
        query = {"wait": max(1, int(seconds))} if etag else {}
        timeout = httpx.Timeout(10.0, read=seconds + 30.0)
        path = f"/v1/jobs/{job_id}"
        return self._transport.sent(
            lambda: self._http.get(path, params=query, headers=headers, timeout=timeout), repeatable=True
        )

    def _get(self, path: str, kind: type[R], query: Mapping[str, Any] | None = None) -> R:
        params = {name: value for name, value in (query or {}).items() if value is not None}
        response = self._transport.sent(lambda: self._http.get(path, params=params), repeatable=True)
        return kind.model_validate_json(response.content)

    def _pages(self, path: str, kind: type[R], query: Mapping[str, Any] | None = None) -> Iterator[R]:
        token: str | None = None
        while True:
            page = self._get(path, Page[Any], {**(query or {}), "page_token": token})
            yield from (kind.model_validate(item) for item in page.items)
            token = page.next_page_token
            if token is None:
                return


def _is_inside(name: str) -> bool:
    """Whether a name, with or without folders, stays inside the folder that it is put into."""
    path = PurePosixPath(name)
    return (
        bool(path.parts)
        and path.as_posix() == name
        and not path.is_absolute()
        and ".." not in path.parts
        and "\\" not in name
    )


def _new_key() -> str:
    return uuid.uuid4().hex
