"""What all calls of the client are made of: one resource, listings page by page, keys for posts.

A subject's calls are a class on top of :class:`Calls`. Knows no route; how requests are repeated is in ``transport``.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from services.client.resources import Page, Resource
from services.client.transport import Transport

R = TypeVar("R", bound=Resource)


class Calls:
    """Calls that go through ``transport``."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._http = transport.http

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


def new_key() -> str:
    """An ``Idempotency-Key``: minted once per call, so a repeated post makes no second job."""
    return uuid.uuid4().hex
