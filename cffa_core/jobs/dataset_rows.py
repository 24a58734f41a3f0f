"""Statements on data sets beyond making and reading one: versions, what was found in them, and their removal.

Versions share stored files, so that a file goes only with the last data set that names it. Each function takes the
caller's open connection; the bytes are the caller's business.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from cffa_core.errors import Conflict, NotFound, Problem
from cffa_core.jobs.records import Dataset
from cffa_core.jobs.rows import dataset_of
from cffa_core.jobs.schema import datasets, jobs
from cffa_core.jobs.state import TERMINAL
from cffa_core.storage.base import DATASETS_PREFIX

NAMES = ("dataset_id", "structure_dataset_id", "pairs_dataset_id", "reference_dataset_id", "train_dataset_id")
"""Fields of job specifications that name a data set."""
SURVEY, WAITING = "survey", "waiting"


def lock(connection: sa.Connection, owner: str, dataset_id: str) -> sa.Row[Any]:
    """The row of a data set, held until the transaction ends; raises :class:`NotFound`."""
    row = connection.execute(
        sa.select(datasets).where(datasets.c.id == dataset_id, datasets.c.owner == owner).with_for_update()
    ).one_or_none()
    if row is None:
        raise NotFound(f"no data set {dataset_id}")
    return row


def delete(connection: sa.Connection, owner: str, dataset_id: str) -> tuple[str, ...]:
    """See :meth:`JobStore.delete_dataset`."""
    row = lock(connection, owner, dataset_id)
    used = connection.scalar(
        sa.select(jobs.c.id)
        .where(
            jobs.c.owner == owner,
            jobs.c.state.not_in([state.value for state in TERMINAL]),
            sa.or_(*(jobs.c.spec[name].as_string() == dataset_id for name in NAMES)),
        )
        .limit(1)
    )
    if used is not None:
        problem = Problem("dataset_id", "in_use", f"job {used} is not over; cancel it, or wait for its end")
        raise Conflict(f"data set {dataset_id} is in use by job {used}", problems=(problem,))
    connection.execute(datasets.delete().where(datasets.c.id == dataset_id))
    keys = _keys(row)
    for folder in {key[: key.rindex("/", 0, len(DATASETS_PREFIX) + 24) + 1] for key in keys}:
        # "_" in an id stands for any character: then a row too many is looked at.
        sharing = sa.cast(datasets.c.stored, sa.Text).like(f"%{folder}%")
        for other in connection.execute(sa.select(datasets).where(datasets.c.owner == owner, sharing)):
            keys -= _keys(other)
    return tuple(sorted(keys))


def _keys(row: sa.Row[Any]) -> set[str]:
    """Storage keys of a data set: its files, and the pictures of its report."""
    pictures = (row.report or {}).get("pictures", {})
    return {item["key"] for item in (*(row.stored or {}).values(), *pictures.values())}


def deleted(connection: sa.Connection, dataset_id: str) -> bool:
    """Whether a data set is gone; waits for a deletion that is under way."""
    return connection.scalar(sa.select(datasets.c.id).where(datasets.c.id == dataset_id).with_for_update()) is None


def unsurveyed(connection: sa.Connection) -> list[Dataset]:
    """The oldest data sets, of any owner, whose pairs were not looked at yet."""
    rows = connection.execute(
        sa.select(datasets)
        .where(datasets.c.report[SURVEY]["state"].as_string() == WAITING)
        .order_by(datasets.c.number)
        .limit(8)
    )
    return [dataset_of(row) for row in rows]


def add_to_report(
    connection: sa.Connection, owner: str, dataset_id: str, survey: dict[str, Any], pictures: dict[str, Any]
) -> bool:
    """See :meth:`JobStore.add_survey`."""
    row = lock(connection, owner, dataset_id)
    if row.report.get(SURVEY, {}).get("state") != WAITING:
        return bool(row.report.get("pictures", {}).items() >= pictures.items() and row.report[SURVEY] == survey)
    report = {**row.report, SURVEY: survey, "pictures": {**row.report.get("pictures", {}), **pictures}}
    connection.execute(datasets.update().where(datasets.c.id == dataset_id).values(report=report))
    return True
