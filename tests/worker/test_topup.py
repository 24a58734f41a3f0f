"""The top-up on a real Redis: never more than twice the live workers, whoever asks however often."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cffa_core.jobs.spec import Kind
from services.worker.outbox import BROKER_ERRORS, Outbox
from services.worker.tasks import make_app
from services.worker.topup import top_up
from tests.servers import Server, running
from tests.worker.cluster_world import ClusterWorld
from tests.worker.scripted_child import Act

pytestmark = pytest.mark.xdist_group("redis")


@pytest.fixture
def world(tmp_path: Path, redis_server: Server) -> Iterator[ClusterWorld]:
    world = ClusterWorld(tmp_path / "home", tmp_path, redis_server.port)
    world.redis.flushdb()
    yield world
    world.close()


def test_queues_are_filled_to_twice_the_live_workers_of_their_kind(world: ClusterWorld) -> None:
    for number in range(3):
        world.store.register_worker(f"w{number}", {"kinds": ["training"] if number else ["training", "generation"]})
    for _ in range(9):
        world.act(Act.FINISH)
    outbox = Outbox(make_app(world.settings), "none")

    def fill(every: float = 0.0) -> int:
        return top_up(world.store, outbox, every=every)

    assert fill() == 6
    assert (outbox.queued(Kind.TRAINING), outbox.queued(Kind.GENERATION)) == (6, 0)
    assert fill() == 0, "full"
    world.redis.flushdb()
    world.store.remove_worker("w1")
    assert fill() == 4
    world.redis.flushdb()
    assert fill(every=600.0) == 0, "the turn was taken a moment ago"
    outbox.close()


def test_a_turn_is_not_taken_by_who_cannot_reach_the_broker(tmp_path: Path) -> None:
    with running("redis") as server:
        world = ClusterWorld(tmp_path / "home", tmp_path, server.port)
        outbox = Outbox(make_app(world.settings), "none")
        world.store.register_worker("w", {"kinds": ["training"]})
        world.act(Act.FINISH)
        server.kill()
        with pytest.raises(BROKER_ERRORS):
            top_up(world.store, outbox, every=600.0)
        server.start()
        assert top_up(world.store, outbox, every=600.0) == 1
        outbox.close()
        world.close()
