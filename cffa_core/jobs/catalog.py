"""Statements on data sets, models, stored keys, workers and turns; each function takes the caller's open connection."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from cffa_core.errors import Conflict, NotFound
from cffa_core.jobs import dataset_rows
from cffa_core.jobs.paging import newest_first
from cffa_core.jobs.records import Dataset, Model, NewModel, Page, StoredFiles, WorkerRecord
from cffa_core.jobs.rows import dataset_of, model_of, moment, new_id
from cffa_core.jobs.schema import checkpoints, clock, datasets, models, turns, units, workers
from cffa_core.storage.manifest import stored_to_json
from cffa_core.webhooks import outbox


def add_dataset(
    connection: sa.Connection,
    owner: str,
    *,
    dataset_id: str,
    name: str,
    digest: str,
    pairs: int,
    report: dict[str, Any],
    stored: StoredFiles,
    parent_id: str | None = None,
    split: dict[str, list[str]] | None = None,
) -> Dataset:
    """See :meth:`JobStore.add_dataset`."""
    # The parent's row is held, so that its files are not removed before this one names them too.
    version = 1 if parent_id is None else dataset_rows.lock(connection, owner, parent_id).version + 1
    row = datasets.insert().values(
        id=dataset_id,
        owner=owner,
        name=name,
        digest=digest,
        pairs=pairs,
        report=report,
        stored=stored_to_json(stored),
        created_at=clock(),
        version=version,
        parent_id=parent_id,
        split=split,
    )
    try:
        connection.execute(row)
    except sa.exc.IntegrityError as error:
        raise Conflict(f"data set {dataset_id} exists") from error
    outbox.announce_dataset(connection, owner, dataset_id, pairs)
    return get_dataset(connection, owner, dataset_id)


def get_dataset(connection: sa.Connection, owner: str, dataset_id: str) -> Dataset:
    """See :meth:`JobStore.get_dataset`."""
    row = connection.execute(
        sa.select(datasets).where(datasets.c.id == dataset_id, datasets.c.owner == owner)
    ).one_or_none()
    if row is None:
        raise NotFound(f"no data set {dataset_id}")
    return dataset_of(row)


def holds_dataset(connection: sa.Connection, dataset: Dataset) -> bool:
    """Whether this very data set was added."""
    try:
        return get_dataset(connection, dataset.owner, dataset.id) == dataset
    except NotFound:
        return False


def list_datasets(connection: sa.Connection, owner: str, page_size: int, page_token: str | None) -> Page[Dataset]:
    """See :meth:`JobStore.list_datasets`."""
    query = sa.select(datasets).where(datasets.c.owner == owner)
    page = newest_first(connection, query, datasets.c.number, page_size, page_token)
    return Page(tuple(dataset_of(row) for row in page.items), page.next_token)


def add_model(connection: sa.Connection, owner: str, job_id: str, model: NewModel) -> str:
    """Make the product of a training job visible; returns its new id."""
    model_id = new_id("mdl")
    connection.execute(
        models.insert().values(
            id=model_id,
            owner=owner,
            job_id=job_id,
            digest=model.digest,
            card=model.card,
            stored=stored_to_json(model.stored),
            created_at=clock(),
        )
    )
    return model_id


def get_model(connection: sa.Connection, owner: str, model_id: str) -> Model:
    """See :meth:`JobStore.get_model`."""
    row = connection.execute(sa.select(models).where(models.c.id == model_id, models.c.owner == owner)).one_or_none()
    if row is None:
        raise NotFound(f"no model {model_id}")
    return model_of(row)


def list_models(
    connection: sa.Connection, owner: str, job_id: str | None, page_size: int, page_token: str | None
) -> Page[Model]:
    """See :meth:`JobStore.list_models`."""
    query = sa.select(models).where(models.c.owner == owner)
    if job_id is not None:
        query = query.where(models.c.job_id == job_id)
    page = newest_first(connection, query, models.c.number, page_size, page_token)
    return Page(tuple(model_of(row) for row in page.items), page.next_token)


def pointed_keys(connection: sa.Connection, job_id: str) -> set[str]:
    """Storage keys that rows of a job point to: units, checkpoints and the model it made."""
    lists = [
        *connection.scalars(sa.select(units.c.stored).where(units.c.job_id == job_id, units.c.stored.is_not(None))),
        *connection.scalars(
            sa.select(checkpoints.c.stored)
            .join(units, units.c.id == checkpoints.c.unit_id)
            .where(units.c.job_id == job_id)
        ),
    ]
    return {item["key"] for files in lists for item in files.values()} | model_keys(connection, job_id)


def model_keys(connection: sa.Connection, job_id: str) -> set[str]:
    """Storage keys of the model that a training job made; they outlive the job."""
    files = connection.scalar(sa.select(models.c.stored).where(models.c.job_id == job_id))
    return {item["key"] for item in (files or {}).values()}


def register_worker(connection: sa.Connection, worker_id: str, info: dict[str, Any]) -> None:
    """See :meth:`JobStore.register_worker`."""
    remove_worker(connection, worker_id)
    connection.execute(workers.insert().values(id=worker_id, info=info, started_at=clock(), seen_at=clock()))


def remove_worker(connection: sa.Connection, worker_id: str) -> None:
    """See :meth:`JobStore.remove_worker`."""
    connection.execute(workers.delete().where(workers.c.id == worker_id))


def heartbeat(connection: sa.Connection, worker_id: str) -> None:
    """See :meth:`JobStore.heartbeat`."""
    if connection.execute(workers.update().where(workers.c.id == worker_id).values(seen_at=clock())).rowcount != 1:
        raise NotFound(f"no worker {worker_id}: it must register again")


def list_workers(connection: sa.Connection, seen_within: float | None) -> list[WorkerRecord]:
    """See :meth:`JobStore.list_workers`."""
    idle = (clock() - workers.c.seen_at).label("idle")
    query = sa.select(workers, idle).order_by(workers.c.started_at, workers.c.id)
    if seen_within is not None:
        query = query.where(workers.c.seen_at >= clock() - seen_within)
    return [
        WorkerRecord(row.id, row.info, moment(row.started_at), moment(row.seen_at), max(0.0, row.idle))
        for row in connection.execute(query)
    ]


def take_turn(connection: sa.Connection, name: str, every: float) -> float | None:
    """See :meth:`JobStore.take_turn`; the time of the turn if it was taken."""
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    now = clock()
    due = sa.or_(turns.c.taken_at <= now - every, turns.c.taken_at > now + 1.0)  # the latter after the clock was set
    taken: float | None = connection.scalar(
        insert(turns)
        .values(name=name, taken_at=now)
        .on_conflict_do_update(index_elements=[turns.c.name], set_={"taken_at": now}, where=due)
        .returning(turns.c.taken_at)
    )
    return taken


def turn_taken_at(connection: sa.Connection, name: str) -> float | None:
    """When a turn was last taken; waits for one that is being taken."""
    return connection.scalar(sa.select(turns.c.taken_at).where(turns.c.name == name).with_for_update())
