"""``/metrics``: valid Prometheus text, the load by kind and state, answers by route, and nothing that names anybody."""

from __future__ import annotations

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from cffa_core.jobs.spec import Kind
from tests.api.driving import Worker


def samples(client: TestClient) -> dict[str, dict[tuple[str, ...], float]]:
    """Metric name -> label values in order of label names -> value."""
    answer = client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), f"{sample.name}{labels} twice"
            found[sample.name][labels] = sample.value
    return found


def test_an_idle_service_has_zeros(client: TestClient) -> None:
    found = samples(client)
    assert found["cffa_jobs"]["generation", "queued"] == 0
    nothing = {(kind.value,): 0 for kind in Kind}
    assert found["cffa_queue_load"] == nothing
    assert found["cffa_queue_age_seconds"] == nothing
    assert found["cffa_workers"] == {(): 0}


def test_the_load_is_that_of_the_record(client: TestClient, worker: Worker, generation: str) -> None:
    worker.store.register_worker("worker-1", {"device": "cpu"})
    worker.claim()
    found = samples(client)
    assert found["cffa_jobs"]["generation", "running"] == 1
    assert found["cffa_jobs"]["training", "succeeded"] == 1
    assert found["cffa_units"]["generation", "queued"] == 2
    assert found["cffa_units"]["generation", "running"] == 1
    assert found["cffa_queue_load"]["generation",] == 3
    assert 0 < found["cffa_queue_age_seconds"]["generation",] < 60
    assert found["cffa_workers"][()] == 1


def test_answers_are_counted_by_route_and_not_by_path(client: TestClient, generation: str) -> None:
    for path in (generation, generation, "job_00000000000000000000"):
        client.get(f"/v1/jobs/{path}")
    client.get("/v1/no/such/route")
    client.request("BREW", "/livez")
    found = samples(client)
    counted = found["cffa_api_requests_total"]
    assert counted["GET", "/v1/jobs/{job_id}", "200"] == 2
    assert counted["GET", "/v1/jobs/{job_id}", "404"] == 1
    assert counted["GET", "none", "404"] == 1
    assert counted["other", "/livez", "405"] == 1
    assert found["cffa_api_request_seconds_count"]["/v1/jobs/{job_id}",] == 3
    assert generation not in client.get("/metrics").text and "worker-1" not in client.get("/metrics").text
