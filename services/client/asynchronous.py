"""The client for programs that run on an event loop: waiting is asynchronous, everything else is the client's own.

There is one set of methods. :meth:`AsyncClient.call` runs any of :class:`CffaClient` in a thread; what takes long
without doing anything, which is to wait for jobs, costs neither a thread nor more than one connection per job.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Concatenate, ParamSpec, Self, TypeVar

import httpx

from services.client.client import DEFAULT_URL, CffaClient
from services.client.event_stream import Event, EventLines, is_over, stream_headers
from services.client.inspection import RECONNECT_SECONDS, SILENCE_SECONDS
from services.client.problems import ServiceUnreachable, from_response
from services.client.resources import Job

P = ParamSpec("P")
T = TypeVar("T")


class AsyncClient:
    """Client of one service; use as an asynchronous context manager.

    ``job = await client.call(CffaClient.submit_generation, model_id, settings)`` is what
    ``job = CffaClient(...).submit_generation(model_id, settings)`` would be, typed the same and with its errors. Calls
    may run at the same time. Give it listings whole: ``await client.call(lambda sync: list(sync.jobs()))``.
    """

    def __init__(self, base_url: str = DEFAULT_URL, *, api_key: str | None = None, retries: int = 4) -> None:
        self._client = CffaClient(base_url, api_key=api_key, retries=retries)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(10.0, read=SILENCE_SECONDS)
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(base_url=base_url, headers=headers, timeout=timeout, limits=limits)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()
        self._client.close()

    async def call(self, method: Callable[Concatenate[CffaClient, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a method of the client in a thread."""
        return await asyncio.to_thread(method, self._client, *args, **kwargs)

    async def follow(self, job_id: str, *, after: int = 0, patience: float = 60.0) -> AsyncIterator[Event]:
        """The history of a job and then each event as it happens, until the job is finished.

        A stream that breaks off, or that a stopping server ends, goes on after the last event. Raises
        ``ServiceUnreachable`` after ``patience`` seconds without an answer, ``NotFound`` if the job is deleted.
        """
        path = f"/v1/jobs/{job_id}/events"
        broken: float | None = None
        while True:
            idle = True
            try:
                async with self._http.stream("GET", path, headers=stream_headers(after)) as response:
                    if is_over(response):
                        return
                    if response.is_error:
                        await response.aread()
                        raise from_response(response)
                    broken, lines = None, EventLines()
                    async for line in response.aiter_lines():
                        if (event := lines.feed(line)) is not None:
                            after, idle = event.seq, False
                            yield event
            except httpx.TransportError as error:
                broken = broken or time.monotonic()
                if time.monotonic() - broken > patience:
                    raise ServiceUnreachable(f"the events of {job_id} broke off: {error}") from error
            if idle:
                await asyncio.sleep(RECONNECT_SECONDS)

    async def wait(self, job_id: str) -> Job:
        """The job once it is finished, whatever its state. For a time limit: ``async with asyncio.timeout(60)``."""
        async for _ in self.follow(job_id):
            pass
        return await self.call(CffaClient.job, job_id)
