"""What the sweep asks every few seconds is a step into an index, however many jobs there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from cffa_core.jobs.terms import EXPIRABLE, OVERDUE
from tests.record_cases import sqlite_store


@pytest.mark.parametrize(("query", "index"), [(OVERDUE, "ix_jobs_deadline_at"), (EXPIRABLE, "ix_jobs_expires_at")])
def test_the_sweep_asks_an_index(tmp_path: Path, query: sa.Select[str], index: str) -> None:
    store = sqlite_store(tmp_path)

    def plan(connection: sa.Connection) -> list[str]:
        text = str(query.compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True}))
        return [str(row[3]) for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}")]

    steps = store._db.read(plan)
    store.close()
    assert f"USING INDEX {index} ({index.removeprefix('ix_jobs_')}<?)" in steps[0], steps
