"""The audit log on each database: filters, pages, and that old entries go."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from cffa_core.jobs.database import Database
from cffa_core.jobs.service_tables import audit as table
from cffa_core.people.audit import AuditLog


@pytest.fixture
def database(record_url: str) -> Iterator[Database]:
    opened = Database(record_url)
    yield opened
    opened.close()


@pytest.fixture
def log(database: Database) -> AuditLog:
    made = AuditLog(database)
    made.append("anna", "postTrainingJob", key_id="key_1", target="job_1", request_id="r1", data={"status": 202})
    made.append("bert", "postTrainingJob", target="job_2")
    made.append("anna", "deleteJob", target="job_1")
    return made


def test_an_entry_says_who_did_what(log: AuditLog) -> None:
    entry = log.entries(action="postTrainingJob", owner="anna").items[0]
    assert (entry.owner, entry.key_id, entry.action, entry.target) == ("anna", "key_1", "postTrainingJob", "job_1")
    assert (entry.request_id, entry.data) == ("r1", {"status": 202})
    assert abs(entry.at - datetime.now(UTC)) < timedelta(minutes=5)


def test_filters_narrow_and_the_newest_comes_first(log: AuditLog) -> None:
    assert [entry.action for entry in log.entries(owner="anna").items] == ["deleteJob", "postTrainingJob"]
    assert [entry.owner for entry in log.entries(action="postTrainingJob").items] == ["bert", "anna"]
    assert len(log.entries(target="job_1").items) == 2


def test_times_narrow_too(log: AuditLog, database: Database) -> None:
    for owner, at in (("bert", 1000.0), ("anna", 2000.0)):
        moved = table.update().where(table.c.owner == owner).values(at=sa.literal(at))
        database.write(lambda connection, moved=moved: connection.execute(moved))
    middle = datetime.fromtimestamp(2000.0, UTC)
    assert [entry.owner for entry in log.entries(since=middle).items] == ["anna", "anna"]
    assert [entry.owner for entry in log.entries(until=middle).items] == ["bert"]
    assert log.entries(since=middle + timedelta(seconds=1)).items == ()


def test_pages(log: AuditLog) -> None:
    first = log.entries(page_size=2)
    second = log.entries(page_size=2, page_token=first.next_token)
    numbers = [entry.number for entry in (*first.items, *second.items)]
    assert len(numbers) == 3 and numbers == sorted(numbers, reverse=True) and second.next_token is None


def test_old_entries_go_and_young_ones_stay(log: AuditLog, database: Database) -> None:
    old = table.update().where(table.c.owner == "bert").values(at=sa.literal(1000.0))
    database.write(lambda connection: connection.execute(old))
    assert log.forget(365) == 1
    assert [entry.owner for entry in log.entries().items] == ["anna", "anna"]
    assert log.forget(365) == 0


def test_long_values_fit(log: AuditLog) -> None:
    log.append("anna", "a" * 300, target="t" * 900)
    assert len(log.entries().items[0].target or "") == 200
