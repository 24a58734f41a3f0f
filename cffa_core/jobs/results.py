"""What a worker writes with its claim: metrics, checkpoints, and the commit that finishes a unit.

Every write is fenced: it must find its unit running under its own ``attempt``, a number that rises at each claim and
never falls. The bytes are in object storage already; these rows make them visible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from cffa_core.errors import LeaseLost
from cffa_core.jobs import wishes
from cffa_core.jobs.catalog import add_model
from cffa_core.jobs.lifecycle import new_unit
from cffa_core.jobs.locked import take_claimed
from cffa_core.jobs.records import Claim, NewModel, StoredFiles
from cffa_core.jobs.schema import checkpoints, clock, jobs, metrics, units
from cffa_core.jobs.state import UnitKind, UnitState
from cffa_core.storage.manifest import stored_to_json

KEPT_CHECKPOINTS = 3


def add_metrics(connection: sa.Connection, held: Claim, step: int, values: Mapping[str, float]) -> None:
    """See :meth:`JobStore.add_metrics`."""
    take_claimed(connection, held)
    if not values:
        return
    connection.execute(
        metrics.delete().where(
            metrics.c.job_id == held.job_id, metrics.c.step == step, metrics.c.key.in_(sorted(values))
        )
    )
    connection.execute(
        metrics.insert(),
        [
            {"job_id": held.job_id, "step": step, "key": key, "value": None if math.isnan(value) else float(value)}
            for key, value in values.items()
        ],
    )


def add_checkpoint(connection: sa.Connection, held: Claim, step: int, stored: StoredFiles) -> tuple[str, ...]:
    """See :meth:`JobStore.add_checkpoint`."""
    job, unit = take_claimed(connection, held)
    own = checkpoints.c.unit_id == unit.id
    older = connection.execute(sa.select(checkpoints).where(own).order_by(checkpoints.c.step.desc())).all()
    kept = sorted({row.step for row in older} | {step}, reverse=True)[:KEPT_CHECKPOINTS]
    superseded = [row for row in older if row.step == step or row.step not in kept]
    connection.execute(
        checkpoints.delete().where(own, checkpoints.c.step.in_([row.step for row in superseded] or [step]))
    )
    connection.execute(
        checkpoints.insert().values(
            unit_id=unit.id, step=step, attempt=held.attempt, stored=stored_to_json(stored), created_at=job.now
        )
    )
    connection.execute(
        units.update().where(units.c.id == unit.id).values(crashes=0, crashes_since_result=0, expiries=0)
    )
    fulfilled = wishes.fulfil(job, stored)
    job.note("checkpoint", step=step, attempt=held.attempt, **({"fulfilled": fulfilled} if fulfilled else {}))
    job.save()
    new_keys = {info.key for info in stored.files.values()}
    return tuple(sorted({item["key"] for row in superseded for item in row.stored.values()} - new_keys))


def commit(
    connection: sa.Connection,
    held: Claim,
    stored: StoredFiles,
    info: dict[str, Any],
    job_result: dict[str, Any] | None,
    model: NewModel | None,
) -> bool:
    """See :meth:`JobStore.commit`; False means the job takes no results and the unit was freed instead."""
    try:
        job, unit = take_claimed(connection, held)
    except LeaseLost:
        if _committed(connection, held, stored):
            return True
        raise
    if job.over:
        job.free(unit.id)
        job.note("refused", unit=unit.kind, index=unit.idx, attempt=held.attempt)
        job.settle()
        job.save()
        return False
    connection.execute(
        units.update()
        .where(units.c.id == unit.id)
        .values(
            state=UnitState.DONE.value,
            stored=stored_to_json(stored),
            info=info,
            worker_id=None,
            lease_expires_at=None,
            finished_at=clock(),
        )
    )
    job.note("committed", unit=unit.kind, index=unit.idx, attempt=held.attempt)
    job.set(reason=None)
    if held.kind is not UnitKind.FINALIZE:
        job.worked(unit)
    if held.kind is UnitKind.PART:
        job.set(**_counted(info))
    if held.kind is UnitKind.FINALIZE:
        result = dict(job_result or {})
        if model is not None:
            result["model_id"] = add_model(connection, held.owner, held.job_id, model)
        job.set(result=result)
    else:
        unfinished = sa.select(units.c.id).where(units.c.job_id == held.job_id, units.c.state != UnitState.DONE.value)
        if connection.scalar(unfinished.limit(1)) is None:
            connection.execute(units.insert(), [new_unit(held.job_id, UnitKind.FINALIZE, 0, job.now)])
    job.settle()
    job.save()
    return True


def _counted(info: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of a job with those of a part that reports ``info``; see `records.Counts`."""
    pairs, gate = len(info.get("pairs", ())), info.get("gate")
    if gate is None:
        return {"generated": jobs.c.generated + pairs}
    return {
        "generated": jobs.c.generated + pairs + gate["rejected"],
        "accepted": jobs.c.accepted + pairs,
        "rejected": jobs.c.rejected + gate["rejected"],
        "exhausted": jobs.c.exhausted + gate["exhausted"],
    }


def _committed(connection: sa.Connection, held: Claim, stored: StoredFiles) -> bool:
    """Whether this very attempt has committed these very files: the answer was lost, and the commit is repeated."""
    done = connection.scalar(
        sa.select(units.c.stored).where(
            units.c.id == held.unit_id, units.c.attempt == held.attempt, units.c.state == UnitState.DONE.value
        )
    )
    return done is not None and done == stored_to_json(stored)
