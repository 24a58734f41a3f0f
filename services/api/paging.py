"""Query parameters of every listing; tokens are numbers, of rows of the record or of positions in a list."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

PageSize = Annotated[int, Query(ge=1, le=200)]
PageToken = Annotated[
    str | None, Query(pattern=r"^[0-9]{1,18}$", description="`next_page_token` of the page before, unchanged.")
]


def offset_of(token: str | None) -> int:
    """Where a page begins whose token, a number, is a position."""
    return 0 if token is None else int(token)
