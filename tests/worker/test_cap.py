"""A worker claims under the limit that the settings put on each owner."""

from __future__ import annotations

from pathlib import Path

from cffa_core.settings import Settings
from services.worker.loop import Worker
from tests.record_cases import ALL_KINDS, LEASE, OTHER, claimed, training_job


def test_a_worker_leaves_owners_alone_who_run_as_much_as_they_may(tmp_path: Path) -> None:
    worker = Worker(Settings(home=tmp_path, owner_running_units=1))
    worker.store.migrate()
    for _ in range(2):
        training_job(worker.store)
    claimed(worker.store)
    assert worker.store.claim(worker.id, ALL_KINDS, lease_seconds=LEASE) is None
    training_job(worker.store, OTHER)
    assert claimed(worker.store).owner == OTHER
    worker.stop()
    worker.run()  # ends at once and gives its scratch folder back
