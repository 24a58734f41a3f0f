"""A worker's numbers as Prometheus sees them."""

from __future__ import annotations

import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cffa_core.errors import InvalidSettings
from services.worker.loop import Worker
from services.worker.metrics import WorkerMetrics
from tests.worker.scripted_child import Act
from tests.worker.world import World, running_worker, scripted


def scrape(port: int) -> dict[str, float]:
    """All samples, as ``name{label=value}``."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_units_parts_steps_and_what_is_in_hand(world: World) -> None:
    metrics, port = WorkerMetrics(), free_port()
    worker = Worker(world.settings, child_command=scripted(), metrics=metrics)
    with metrics.served("127.0.0.1", port), running_worker(worker):
        trained = world.wait_terminal(world.training(world.add_unread_dataset(), seed=int(Act.FINISH)).id)
        assert trained.result is not None
        world.wait_terminal(world.generation(trained.result["model_id"], seed=int(Act.FINISH)).id)
        world.wait(lambda: scrape(port)["cffa_worker_busy"] == 0.0, 5)
        found = scrape(port)
        assert found["cffa_worker_units_total{kind=training,outcome=done}"] == 2.0
        assert found["cffa_worker_units_total{kind=generation,outcome=done}"] == 4.0
        assert found["cffa_worker_parts_total"] == 3.0
        assert found["cffa_worker_lease_losses_total"] == 0.0
        assert found["cffa_worker_gpu_memory_bytes"] == 0.0

        world.training(world.add_unread_dataset(), seed=int(Act.WAIT_FOR_STOP))
        count = "cffa_worker_step_seconds_count{kind=training}"
        world.wait(lambda: scrape(port).get(count, 0.0) > 5.0, 20)
        found = scrape(port)
        assert found["cffa_worker_busy"] == 1.0
        # The child waits 50 ms between two reports of one step each.
        assert found["cffa_worker_step_seconds_sum{kind=training}"] / found[count] >= 0.04


def test_a_port_that_is_taken_is_a_typed_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        with (
            pytest.raises(InvalidSettings, match=f"{port}.*CFFA_METRICS_PORT"),
            WorkerMetrics().served("127.0.0.1", port),
        ):
            raise AssertionError("served")
