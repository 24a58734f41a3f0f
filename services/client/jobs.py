"""Jobs that were posted: finding them, watching them, and what can be done to one.

What they leave is fetched by ``products``; their history and metrics are in ``inspection``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import httpx

from cffa_core.jobs.records import ANY_JOB, JobFilter
from cffa_core.jobs.spec import Kind
from cffa_core.jobs.state import JobState
from services.client.calls import Calls
from services.client.problems import ServiceUnreachable
from services.client.resources import Job, Queue

LONGEST_POLL = 30.0


class JobCalls(Calls):
    """Calls on jobs, a part of :class:`services.client.client.CffaClient`; raises as its methods do."""

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
        """Ask a running training to draw its preview pairs after its next step; see ``previews``."""
        return self._act(job_id, "sample")

    def delete(self, job_id: str) -> None:
        """Remove a finished job and its products; raises ``Conflict`` while it is not terminal."""
        self._transport.sent(lambda: self._http.delete(f"/v1/jobs/{job_id}"), repeatable=False)

    def queue(self) -> Queue:
        """What waits and runs in the whole service, and how many workers live."""
        return self._get("/v1/queue", Queue)

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
