"""Listings of the record, a page at a time: the newest rows of any query over a table that numbers its rows.

What a page token says, and what is wrong with one, is in ``rows``.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from cffa_core.jobs.records import Page
from cffa_core.jobs.rows import as_page, page_limits


def newest_first(
    connection: sa.Connection, query: sa.Select[Any], number: sa.Column[Any], page_size: int, page_token: str | None
) -> Page[sa.Row[Any]]:
    """One page of the rows of ``query``, by falling ``number``; raises as :func:`page_limits` does."""
    size, below = page_limits(page_size, page_token)
    if below is not None:
        query = query.where(number < below)
    found = connection.execute(query.order_by(number.desc()).limit(size + 1)).all()
    return as_page(found, [row.number for row in found], size)
