"""A record of the version before, with jobs in every state, is migrated on each database and goes on.

``specs_v2.json`` holds specifications as that version (schema 0002, spec version 2) stored them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command

from cffa_core.errors import RecordOutdated
from cffa_core.jobs.database import Database, migrations
from cffa_core.jobs.records import Claim
from cffa_core.jobs.schema import jobs
from cffa_core.jobs.spec import SPEC_VERSION, GenerationSpec
from cffa_core.jobs.state import JobState
from cffa_core.jobs.store import JobStore
from tests.record_cases import (
    LEASE,
    OWNER,
    add_dataset,
    claimed,
    commit_part,
    evaluation_job,
    files,
    generated_pairs,
    generation_job,
    trained_model,
    training_job,
)
from tests.record_servers import Records

SPECS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("specs_v2.json").read_text())
REFERENCES = ("dataset_id", "model_id", "generation_job_id", "reference_dataset_id", "train_dataset_id")
S = JobState


@dataclass
class OldRecord:
    """A record at schema 0002: the job that is in each state, and claims of workers that hold a unit."""

    url: str
    model_id: str
    jobs: dict[JobState, str] = field(default_factory=dict)
    held: dict[JobState, Claim] = field(default_factory=dict)


@pytest.fixture
def old(records: Records) -> Iterator[OldRecord]:
    url = records.bare()
    store = JobStore(url)
    store.migrate()
    made = OldRecord(url, trained_model(store))
    made.jobs[S.SUCCEEDED] = generated_pairs(store, made.model_id, parts=2)
    _post_one_in_each_state(store, made)
    assert {state: store.get_job(OWNER, job_id).state for state, job_id in made.jobs.items()} == {
        state: state for state in made.jobs
    }
    assert set(made.jobs) == set(S) - {S.EXPIRED}, "which that version could not reach"
    store.close()
    database = Database(url)
    database.write(_as_version_2_stored_them)
    database.write(lambda connection: command.downgrade(migrations(connection), "0002"))
    database.close()
    yield made


def _post_one_in_each_state(store: JobStore, made: OldRecord) -> None:
    def held(state: JobState) -> None:
        job = generation_job(store, made.model_id)
        made.jobs[state], made.held[state] = job.id, claimed(store)

    held(S.FAILED)
    store.fail(made.held.pop(S.FAILED), "model_unavailable", "no such base")
    held(S.CANCELED)
    commit_part(store, made.held.pop(S.CANCELED))
    store.cancel_job(OWNER, made.jobs[S.CANCELED])
    held(S.FINALIZING)
    commit_part(store, made.held[S.FINALIZING])
    commit_part(store, claimed(store))
    made.held[S.FINALIZING] = claimed(store)
    for state in (S.RUNNING, S.CANCELING, S.PAUSING):
        held(state)
        commit_part(store, made.held[state])
        made.held[state] = claimed(store)
    store.cancel_job(OWNER, made.jobs[S.CANCELING])
    store.pause_job(OWNER, made.jobs[S.PAUSING])
    made.jobs[S.PAUSED] = training_job(store).id
    claim = claimed(store)
    store.add_checkpoint(claim, 50, files(f"jobs/{claim.job_id}/checkpoints/00000050/a1/state.json"))
    store.pause_job(OWNER, claim.job_id)
    store.release(claim)
    reference = add_dataset(store)
    made.jobs[S.QUEUED] = evaluation_job(
        store, generation_job_id=made.jobs[S.SUCCEEDED], reference_dataset_id=reference
    ).id


def _as_version_2_stored_them(connection: sa.Connection) -> None:
    for row in connection.execute(sa.select(jobs.c.id, jobs.c.kind, jobs.c.spec)).all():
        named = {name: row.spec[name] for name in REFERENCES if name in row.spec}
        spec = {**SPECS[row.kind], **named}
        connection.execute(jobs.update().where(jobs.c.id == row.id).values(spec=spec, spec_version=2))


def test_the_record_of_the_version_before_is_migrated_and_goes_on(old: OldRecord) -> None:
    store = JobStore(old.url)
    with pytest.raises(RecordOutdated, match="0002"):
        store.require_schema()
    store.migrate()
    store.require_schema()
    found = {state: store.get_job(OWNER, job_id) for state, job_id in old.jobs.items()}
    for state, job in found.items():
        assert (job.state, job.spec_version, job.deadline_at, job.expires_at, job.wishes) == (state, 2, None, None, ())
        assert store.events(OWNER, job.id)[0].type == "created"
    assert store.list_jobs(OWNER).items and store.sweep() == 0 and store.expirable() == []
    assert {dataset.version for dataset in store.list_datasets(OWNER).items} == {1}

    # Workers of the version before, still at work while theirs are replaced: their claims hold.
    commit_part(store, old.held[S.RUNNING])
    archive = files(f"jobs/{old.jobs[S.FINALIZING]}/finalize/a1/archive.zip")
    assert store.commit(old.held[S.FINALIZING], archive, {}, job_result={}).state is S.SUCCEEDED
    assert store.renew(old.held[S.CANCELING], LEASE) == "cancel"
    store.release(old.held[S.CANCELING])
    assert store.get_job(OWNER, old.jobs[S.CANCELING]).state is S.CANCELED
    assert store.renew(old.held[S.PAUSING], LEASE) == "pause"
    store.release(old.held[S.PAUSING])

    # What waits is taken, what was held or failed goes on from where it was.
    for state in (S.PAUSED, S.PAUSING):
        store.resume_job(OWNER, old.jobs[state])
    for state in (S.FAILED, S.CANCELED):
        store.retry_job(OWNER, old.jobs[state])
    waiting = {old.jobs[state] for state in (S.RUNNING, S.QUEUED, S.PAUSED, S.PAUSING, S.FAILED, S.CANCELED)}
    claims = []
    while (claim := store.claim("new", [job.kind for job in found.values()], lease_seconds=LEASE)) is not None:
        claims.append(claim)
    assert {claim.job_id for claim in claims} == waiting
    (training,) = [claim for claim in claims if claim.job_id == old.jobs[S.PAUSED]]
    assert training.checkpoint is not None and training.checkpoint.step == 50
    (second,) = [claim for claim in claims if claim.job_id == old.jobs[S.CANCELED]]
    assert isinstance(second.spec, GenerationSpec) and second.index == 1
    commit_part(store, second)
    assert len(store.parts(OWNER, old.jobs[S.CANCELED])) == 2

    # New work on what the old version made.
    assert generation_job(store, old.model_id).spec_version == SPEC_VERSION
    store.delete_job(OWNER, old.jobs[S.FINALIZING])
    store.close()
