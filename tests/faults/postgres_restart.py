"""PostgreSQL is killed or restarted right before the n-th COMMIT of a job's life, or right after it, for every n.

No accepted job is lost, no acknowledged commit undone, and the job ends as if nothing had happened.
"""

from __future__ import annotations

import sqlalchemy as sa

from cffa_core.jobs.store import JobStore
from tests.faults.campaign import Facts, Fault
from tests.faults.place import Place
from tests.faults.record_flow import Flow, assert_counted_once
from tests.record_cases import trained_model
from tests.servers import Server


class Commits:
    """Counts the transactions of an engine and interrupts the n-th (from 1)."""

    def __init__(self, store: JobStore, server: Server, *, before: bool, kill: bool) -> None:
        self.count = 0
        self.at = 0
        self._server = server
        self._before = before
        self._kill = kill
        self._struck = False
        engine = store._db.engine
        sa.event.listen(engine, "commit", self._on_commit)
        sa.event.listen(engine.pool, "checkin", self._on_checkin)

    def _on_commit(self, connection: sa.Connection) -> None:
        self.count += 1
        if self._before and self.count == self.at:
            self._strike()

    def _on_checkin(self, *_: object) -> None:
        """The connection goes back to its pool: the commit has been answered."""
        if not self._before and not self._struck and self.count == self.at:
            self._struck = True
            self._strike()

    def _strike(self) -> None:
        self._server.kill() if self._kill else self._server.stop()
        self._server.start()


def scenario(seed: int, place: Place) -> Facts:
    """Kill or stop, before or after: four ways at each commit point."""
    server = place.server("postgres")
    url = place.new_database()
    direct = JobStore(url)
    direct.migrate()
    model_id = trained_model(direct)
    direct.close()
    store = JobStore(url)
    commits = Commits(store, server, before=seed % 2 == 0, kill=seed // 2 % 2 == 0)
    if "commits" not in place.kept:
        Flow(store, model_id).run("undisturbed")
        place.kept["commits"] = commits.count
    commits.count, commits.at = 0, 1 + (seed // 4) % int(place.kept["commits"])
    flow = Flow(store, model_id)
    job = flow.run("disturbed")
    store.close()
    assert_counted_once(direct, flow, job)
    direct.close()
    assert commits.count >= commits.at
    return {"commit_points": int(place.kept["commits"]), "errors": flow.errors, "leases_lost": flow.lost}


FAULT = Fault(
    "postgres_restart", "PostgreSQL restart at every commit point", 136, scenario, quick=(20, 41), servers=True
)
