"""Server-sent events, line by line: what a job's live stream says. Reads no connection itself."""

from __future__ import annotations

from datetime import datetime
from http import HTTPStatus
from typing import Any

import httpx

from services.client.resources import Resource

MEDIA_TYPE = "text/event-stream"


class Event(Resource):
    """One line of a job's history; ``seq`` counts from 1 within the job."""

    seq: int
    at: datetime
    type: str
    data: dict[str, Any]


class EventLines:
    """Takes a stream's lines and gives an event for each blank line that ends one (HTML standard, section 9.2.6)."""

    def __init__(self) -> None:
        self._data: list[str] = []

    def feed(self, line: str) -> Event | None:
        """The event that ``line`` completes, if it completes one; comments only keep the connection alive."""
        if line:
            field, _, value = line.partition(":")
            if field == "data":
                self._data.append(value.removeprefix(" "))
            return None
        data, self._data = "\n".join(self._data), []
        return Event.model_validate_json(data) if data else None


def stream_headers(after: int) -> dict[str, str]:
    """Headers that ask for the live stream of a job after event number ``after``."""
    return {"Accept": MEDIA_TYPE, "Last-Event-ID": str(after)}


def is_over(response: httpx.Response) -> bool:
    """Whether the job is finished and its events are all known; a stream that ends otherwise is to be opened again."""
    return response.status_code == HTTPStatus.NO_CONTENT
