"""The way to PostgreSQL is slow, reset, or cut in the middle of a statement or of its answer, at the n-th exchange.

The worst is the answer to COMMIT that never arrives. Every call ends with success or a typed error, in bounded time;
what was acknowledged counts once, and the job is done in the end.
"""

from __future__ import annotations

import random

import sqlalchemy as sa

from cffa_core.jobs.store import JobStore
from tests.faults.campaign import Facts, Fault
from tests.faults.place import Place
from tests.faults.proxy import Proxy, Trouble, What
from tests.faults.record_flow import Flow, assert_counted_once
from tests.record_cases import trained_model

KINDS: tuple[What, ...] = ("reset", "cut_down", "cut_up", "latency")
SLOWEST_SECONDS = 20.0


def scenario(seed: int, place: Place) -> Facts:
    """One trouble, striking once or three times in a row, somewhere in a job's life."""
    dice = random.Random(seed)
    url = sa.make_url(place.new_database())
    direct = JobStore(url.render_as_string(hide_password=False))
    direct.migrate()
    model_id = trained_model(direct)
    with Proxy(url.port or 5432, http=False) as proxy:
        through = JobStore(url.set(port=proxy.port).render_as_string(hide_password=False))
        try:
            if "exchanges" not in place.kept:
                proxy.begin(None)
                Flow(through, model_id).run("untroubled")
                place.kept["exchanges"] = proxy.calls
            what = KINDS[seed % len(KINDS)]
            first = dice.randint(1, int(place.kept["exchanges"]))
            proxy.begin(Trouble(what, first, dice.choice([1, 3]), seconds=0.5, after=dice.choice([0, 1, 20])))
            flow = Flow(through, model_id)
            job = flow.run("troubled")
        finally:
            through.close()
    assert_counted_once(direct, flow, job)
    direct.close()
    assert flow.slowest < SLOWEST_SECONDS, f"a call took {flow.slowest:.1f} s"
    return {"errors": flow.errors, "leases_lost": flow.lost, "slowest_seconds": flow.slowest, "what": what}


FAULT = Fault(
    "database_trouble", "PostgreSQL slow, reset, cut at the n-th exchange", 200, scenario, quick=(1, 2, 4), servers=True
)
