"""Query parameters of every listing, and page tokens of listings that are not the record's own."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

from cffa_core.errors import InvalidSpec, Problem

PageSize = Annotated[int, Query(ge=1, le=200)]
PageToken = Annotated[str | None, Query(max_length=400, description="`next_page_token` of the page before.")]


def offset_of(token: str | None) -> int:
    """Where a page begins whose token is a position; raises ``InvalidSpec`` for any other token."""
    if token is None:
        return 0
    if not (token.isascii() and token.isdecimal() and len(token) < 10):
        problem = Problem("?page_token", "bad_page_token", "use next_page_token of the page before, unchanged")
        raise InvalidSpec("the page token is not one of ours", problems=(problem,))
    return int(token)
