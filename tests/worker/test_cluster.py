"""Delivery through a real Redis: waking, sharing, stopping, and everything that can happen to the broker.

Workers are processes with a scripted child. Unless a test says otherwise they poll so rarely that only a message can
have woken them.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cffa_core.jobs.records import Job
from cffa_core.jobs.spec import EvaluationSpec, Kind
from cffa_core.jobs.state import JobState, UnitKind
from services.worker.cluster import EXIT_DEAF
from services.worker.topup import TURN
from services.worker.watch import Patience
from tests.servers import POSTGRES_PASSWORD, Server, running
from tests.worker.cluster_world import RUN_WATCHED, ClusterWorld
from tests.worker.frozen_proxy import FrozenProxy
from tests.worker.scripted_child import Act
from tests.worker.world import OWNER

GRACE_SECONDS = 30.0
Make = Callable[..., ClusterWorld]

pytestmark = pytest.mark.xdist_group("redis")


@pytest.fixture
def make(tmp_path: Path, redis_server: Server) -> Iterator[Make]:
    """Makes one cluster on the shared Redis, or on the port given."""
    made: list[ClusterWorld] = []

    def make(port: int = redis_server.port, **changes: Any) -> ClusterWorld:
        world = ClusterWorld(tmp_path / f"home{len(made)}", tmp_path / "no-models", port, **changes)
        made.append(world)
        return world

    yield make
    for world in made:
        print(world.logs())  # noqa: T201  shown where the test failed
        world.close()


def runs(world: ClusterWorld, job: Job) -> None:
    """Wait until a child works on a job."""
    world.wait(lambda: world.job(job.id).progress.current > 0, 30, f"work on {job.id}")


def test_a_busy_worker_answers_and_gives_its_unit_back_at_sigterm(make: Make) -> None:
    world = make()
    assert world.store.take_turn(TURN, 600.0), "or the worker's first top-up might tell it"
    worker = world.start_cluster_worker()
    world.wait_listening(1)
    job = world.act(Act.WAIT_FOR_STOP)
    time.sleep(0.5)
    assert world.attempts(job.id) == [], "nobody was told"
    world.announce(Kind.TRAINING)
    runs(world, job)

    (record,) = world.store.list_workers()
    name = record.info["celery"]
    (task,) = world.inspect("active", name)[name]
    assert (task["name"], task["args"]) == ("cffa.work", ["training"])
    assert record.info["numerics"] is None, "no child of it has finished anything"
    assert "cffa.work" in world.ask("registered", name)
    stats = world.ask("stats", name)
    assert (stats["pool"]["max-concurrency"], stats["prefetch_count"]) == (1, 1)

    worker.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(GRACE_SECONDS) == 0
    assert world.job(job.id).state is JobState.QUEUED
    assert len(world.events(job.id, "released")) == 1
    assert world.events(job.id, "crashed") + world.events(job.id, "worker_lost") == []
    assert world.store.list_workers() == []


def test_two_workers_share_the_parts_of_a_job_and_ten_messages_each_make_one_attempt(make: Make) -> None:
    world = make()
    world.start_cluster_worker()
    world.start_cluster_worker()
    world.wait_listening(2)
    world.train_model()
    job = world.parts(20)
    world.announce(Kind.GENERATION, times=10 * 20)
    assert world.wait_terminal(job.id).state is JobState.SUCCEEDED
    claims = world.events(job.id, "claimed")
    assert {claim["attempt"] for claim in claims} == {1}
    assert len(claims) == 21
    assert len({claim["worker"] for claim in claims}) == 2
    world.wait(lambda: world.queued(Kind.GENERATION) == 0, 30, "the queue to drain")


def test_an_idle_worker_survives_flushall_and_killed_connections(make: Make) -> None:
    world = make()
    world.start_cluster_worker(sweep_seconds=1.0)
    world.wait_listening(1)
    world.redis.flushall()
    begun = time.monotonic()
    # Nobody publishes: the worker's own top-up has to notice.
    assert world.wait_terminal(world.act(Act.FINISH).id, 30).state is JobState.SUCCEEDED
    for kind in ("normal", "pubsub"):
        world.redis.client_kill_filter(_type=kind, skipme=True)
    assert world.wait_terminal(world.act(Act.FINISH).id, 30).state is JobState.SUCCEEDED
    world.wait_listening(1, 30)
    assert time.monotonic() - begun < 60


def test_a_worker_outlives_its_broker_and_listens_again(make: Make) -> None:
    with running("redis") as server:
        world = make(server.port)
        worker = world.start_cluster_worker()
        world.wait_listening(1)
        job = world.act(Act.WAIT_FOR_STOP)
        world.announce(Kind.TRAINING)
        runs(world, job)
        server.kill()
        seen = world.job(job.id).progress.current
        world.wait(lambda: world.job(job.id).progress.current > seen + 5, 30, "work without a broker")
        server.start()
        world.wait_listening(1, 30)
        assert world.attempts(job.id) == [1]
        world.store.cancel_job(OWNER, job.id)
        world.wait_state(job.id, JobState.CANCELED)
        # Once more, now that it is idle.
        server.kill()
        server.start()
        world.wait_listening(1, 30)
        job = world.act(Act.FINISH)
        world.announce(Kind.TRAINING)
        assert world.wait_terminal(job.id, 30).state is JobState.SUCCEEDED
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(GRACE_SECONDS) == 0


def test_a_worker_started_without_its_broker_works_from_the_record_and_attaches_later(make: Make) -> None:
    with running("redis") as server:
        server.kill()
        world = make(server.port, poll_seconds=0.5)
        worker = world.start_cluster_worker()
        job = world.act(Act.FINISH)
        assert world.wait_terminal(job.id, 60).state is JobState.SUCCEEDED
        server.start()
        world.wait_listening(1, 30)
        server.kill()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(GRACE_SECONDS) == 0


def test_a_consumer_whose_connections_fell_silent_is_revived(make: Make, redis_server: Server) -> None:
    with FrozenProxy(redis_server.port) as proxy:
        world = make(proxy.port)
        world.start_cluster_worker(script=RUN_WATCHED.format(patience=Patience(seconds=1.0, revive=2, give_up=50)))
        world.wait_listening(1)
        assert proxy.freeze() >= 2
        frozen = time.monotonic()
        world.wait(lambda: "messages arrive again" in world.logs(), 60, "a new connection")
        assert time.monotonic() - frozen < 60
        assert "connecting anew" in world.logs()
        job = world.act(Act.FINISH)
        # The publisher of this test was silenced too.
        world.wait(lambda: _announced(world), 30)
        assert world.wait_terminal(job.id, 30).state is JobState.SUCCEEDED


def _announced(world: ClusterWorld) -> bool:
    try:
        world.announce(Kind.TRAINING)
    except OSError:
        return False
    return True


def test_a_worker_that_stays_deaf_ends_with_a_code_of_its_own(make: Make) -> None:
    world = make()
    worker = world.start_cluster_worker(script=RUN_WATCHED.format(patience=Patience(seconds=0.7, revive=2, give_up=7)))
    world.wait_listening(1)
    (record,) = world.wait(world.store.list_workers)
    world.control("cancel_consumer", arguments={"queue": f"worker.{record.id}"})
    assert worker.wait(60) == EXIT_DEAF
    assert world.store.list_workers() == []


def test_a_message_that_meets_a_busy_worker_is_left_for_another(make: Make) -> None:
    world = make()
    assert world.store.take_turn(TURN, 600.0), "or the first top-up might send a message of its own"
    job = world.act(Act.WAIT_FOR_STOP)
    world.start_cluster_worker()  # finds the job by itself as it starts, so that Celery takes it for a free one
    runs(world, job)
    world.wait_listening(1)
    world.announce(Kind.TRAINING)

    (record,) = world.store.list_workers()
    name = record.info["celery"]

    def active() -> list[str]:
        return [task["name"] for task in world.ask("active", name)]

    world.wait(lambda: active() == ["cffa.work"] and world.queued(Kind.TRAINING) == 1, 30, "the message passed on")
    time.sleep(0.5)
    assert world.queued(Kind.TRAINING) == 1, "once"


def test_celerys_remote_shutdown_gives_the_unit_back_too(make: Make) -> None:
    world = make()
    worker = world.start_cluster_worker()
    world.wait_listening(1)
    job = world.act(Act.WAIT_FOR_STOP)
    world.announce(Kind.TRAINING)
    runs(world, job)
    world.control("shutdown")
    assert worker.wait(GRACE_SECONDS) == 0
    assert len(world.events(job.id, "released")) == 1


def test_a_worker_takes_only_its_kinds(make: Make) -> None:
    world = make(worker_kinds="generation")
    world.start_cluster_worker()
    world.wait_listening(1)
    job = world.act(Act.FINISH)
    world.announce(Kind.TRAINING)
    time.sleep(1.0)
    assert world.queued(Kind.TRAINING) == 1
    assert world.attempts(job.id) == []
    world.start_cluster_worker(worker_kinds="training")
    assert world.wait_terminal(job.id).state is JobState.SUCCEEDED


def test_evaluations_are_woken_by_a_queue_of_their_own(make: Make) -> None:
    world = make()
    assert world.store.take_turn(TURN, 600.0), "or the worker's first top-up might tell it"
    world.start_cluster_worker(worker_kinds="evaluation")
    world.wait_listening(1)
    sets = {name: world.add_unread_dataset().id for name in ("pairs_dataset_id", "reference_dataset_id")}
    job = world.post(EvaluationSpec(**sets, seed=int(Act.FINISH)))
    world.announce(Kind.GENERATION)
    time.sleep(0.5)
    assert (world.attempts(job.id), world.queued(Kind.GENERATION)) == ([], 1), "nobody was told of it"
    world.announce(Kind.EVALUATION)
    assert world.wait_terminal(job.id).state is JobState.SUCCEEDED
    assert [claim["unit"] for claim in world.events(job.id, "claimed")] == ["evaluate", "finalize"]


def test_the_same_on_postgresql(make: Make, postgres_server: Server) -> None:
    address = postgres_server.url.replace("postgresql+psycopg://", "postgresql://")
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("CREATE DATABASE cluster_delivery")
    url = f"postgresql+psycopg://cffa@127.0.0.1:{postgres_server.port}/cluster_delivery"
    world = make(database_url=url, database_password=POSTGRES_PASSWORD, sweep_seconds=1.0)
    for _ in range(2):
        world.start_cluster_worker()
    world.wait_listening(2)
    world.train_model()
    job = world.parts(8)
    assert world.wait_terminal(job.id).state is JobState.SUCCEEDED, "woken by the top-up alone"
    assert world.attempts(job.id) == [1] * 9
    (final,) = world.store.parts(OWNER, job.id, kind=UnitKind.FINALIZE)
    assert final.attempt == 1
