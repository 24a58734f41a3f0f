"""docker-compose.yml after compose itself has read it: nothing runs as root, with rights, or open to others."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cffa_core.jobs.spec import Kind
from services.worker.__main__ import parse_kinds
from services.worker.tasks import SOFT_SHUTDOWN_SECONDS
from tests.deploy import tools

ALL = (*tools.OWN_SERVICES, *tools.SERVERS, "objects-volume")
LONG_RUNNING = tuple(name for name in ALL if name not in ("setup", "objects-volume"))
PUBLISHED = {"api": 8008, "objects": 9000}
PINNED = re.compile(r".+:[^:@]*\d[^:@]*(@sha256:[0-9a-f]{64})?")
WITHOUT_DIGEST = {"redis", "objects-volume"}


def service(name: str) -> Any:
    return tools.services()[name]


def seconds(duration: str) -> float:
    parts = re.findall(r"([\d.]+)([hms])", duration)
    return sum(float(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in parts)


def test_has_these_services_and_no_other() -> None:
    assert set(tools.services()) == set(ALL)


@pytest.mark.parametrize(
    ("profiles", "expected"),
    [
        ((), {"api", "setup", "postgres", "redis", "objects", "objects-volume"}),
        (("cpu",), {"worker-cpu"}),
        (("gpu",), {"worker-gpu"}),
        (("ops",), {"flower", "prometheus", "grafana"}),
    ],
)
def test_profiles(profiles: tuple[str, ...], expected: set[str]) -> None:
    assert {
        name for name, found in tools.services().items() if tuple(found.get("profiles", ())) == profiles
    } == expected


@pytest.mark.parametrize("name", ["worker-cpu", "worker-gpu"])
def test_workers_take_every_kind_of_job(name: str) -> None:
    assert parse_kinds((service(name).get("environment") or {}).get("CFFA_WORKER_KINDS", "")) == tuple(Kind)


def test_only_the_gpu_worker_asks_for_a_driver() -> None:
    asking = {name for name in ALL if "devices" in service(name)["deploy"]["resources"].get("reservations", {})}
    assert asking == {"worker-gpu"}
    assert not [name for name in ALL if service(name).get("runtime") or service(name).get("gpus")]


@pytest.mark.parametrize("name", ALL)
def test_is_locked_down(name: str) -> None:
    found = service(name)
    assert found["read_only"] is True
    assert found["cap_drop"] == ["ALL"]
    assert found["security_opt"] == ["no-new-privileges:true"]
    assert not found.get("privileged") and not found.get("pid") and not found.get("ipc")
    if name == "objects-volume":  # hands the fresh volume over, offline, and ends
        assert (found["cap_add"], found["network_mode"], found["restart"]) == (["CHOWN"], "none", "no")
    else:
        assert int(found["user"].split(":")[0]) > 0
        assert "cap_add" not in found


@pytest.mark.parametrize("name", ALL)
def test_has_limits(name: str) -> None:
    limits = service(name)["deploy"]["resources"]["limits"]
    assert int(limits["memory"]) > 0
    assert limits["pids"] > 0
    assert set(service(name)["logging"]["options"]) == {"max-size", "max-file"}
    if name not in ("worker-cpu", "worker-gpu"):  # these may have the whole machine
        assert 0 < limits["cpus"] <= 2, "compose refuses a limit above the number of processors"


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_is_watched_and_restarted(name: str) -> None:
    found = service(name)
    assert found["restart"] == "unless-stopped"
    assert found["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert found["healthcheck"]["retries"] >= 2


@pytest.mark.parametrize("name", ["worker-cpu", "worker-gpu"])
def test_worker_may_finish_its_soft_shutdown(name: str) -> None:
    assert seconds(service(name)["stop_grace_period"]) >= 2 * SOFT_SHUTDOWN_SECONDS + 60


def test_api_may_finish_its_requests() -> None:
    from services.api.__main__ import GRACE_SECONDS

    assert seconds(service("api")["stop_grace_period"]) > GRACE_SECONDS


def test_publishes_the_api_and_the_object_store_on_loopback() -> None:
    published = {name: found["ports"] for name, found in tools.services().items() if found.get("ports")}
    assert {name: [port["target"] for port in ports] for name, ports in published.items()} == {
        name: [port] for name, port in PUBLISHED.items()
    }
    assert {port["host_ip"] for ports in published.values() for port in ports} == {"127.0.0.1"}


def test_servers_and_workers_have_no_way_out() -> None:
    assert tools.compose()["networks"]["backend"]["internal"] is True
    outside = {name for name, found in tools.services().items() if set(found.get("networks") or ()) - {"backend"}}
    assert outside == set(PUBLISHED)


def test_the_console_is_never_served() -> None:
    assert service("objects")["environment"]["MINIO_BROWSER"] == "off"


def test_operators_pages_open_on_loopback_only() -> None:
    opened = tools.compose("deploy/compose.ops.yml")["services"]
    ports = [port for name in ("flower", "prometheus", "grafana") for port in opened[name]["ports"]]
    assert [port["host_ip"] for port in ports] == ["127.0.0.1"] * 3


@pytest.mark.parametrize("name", [*tools.SERVERS, "objects-volume"])
def test_image_is_pinned(name: str) -> None:
    image = service(name)["image"]
    assert PINNED.fullmatch(image), image
    assert ("@sha256:" in image) == (name not in WITHOUT_DIGEST)


@pytest.mark.parametrize("name", ALL)
def test_gets_secrets_as_files_alone(name: str) -> None:
    found = service(name)
    for secret in found.get("secrets", []):
        assert secret["target"] == f"/run/secrets/{secret['source']}"
    shown = [*map(str, (found.get("environment") or {}).values()), *(found.get("command") or [])]
    assert not [text for text in shown if re.search(r"://[^/@]*:[^/@]+@", text)], "a password in an address"
    for variable in found.get("environment") or {}:
        if re.search(r"PASSWORD|SECRET|_KEY$", variable) and name != "flower":
            assert variable.endswith(("_FILE", "_DIR")), variable


def test_each_gets_the_secrets_it_needs() -> None:
    given = {name: {item["source"] for item in found.get("secrets", [])} for name, found in tools.services().items()}
    servers = {"cffa_database_password", "cffa_broker_password", "cffa_s3_access_key", "cffa_s3_secret_key"}
    assert given == {
        "api": servers | {"cffa_bootstrap_key", "cffa_key_secret"},
        "setup": servers,
        "worker-cpu": servers,
        "worker-gpu": servers,
        "flower": {"cffa_broker_password"},
        "postgres": {"cffa_database_password"},
        "redis": {"cffa_broker_password"},
        "objects": {"cffa_s3_access_key", "cffa_s3_secret_key"},
        "objects-volume": set(),
        "prometheus": set(),
        "grafana": {"cffa_grafana_password"},
    }


@pytest.mark.parametrize("name", ["api", "worker-cpu", "worker-gpu"])
def test_waits_for_the_set_up(name: str) -> None:
    waits = {other: how["condition"] for other, how in service(name)["depends_on"].items()}
    assert waits == {"setup": "service_completed_successfully", "redis": "service_healthy"}
    before = {other: how["condition"] for other, how in service("setup")["depends_on"].items()}
    assert before == {"postgres": "service_healthy", "objects": "service_healthy"}


@pytest.mark.parametrize("name", [name for name in ALL if name != "objects-volume"])
def test_writes_only_where_it_may(name: str) -> None:
    """A read-only root needs a place for temporary files, and whatever is kept lies in a named volume."""
    found = service(name)
    if name != "prometheus":
        assert any(mount.startswith("/tmp:") for mount in found["tmpfs"])
    for volume in found.get("volumes", []):
        assert volume["type"] == "volume" or volume["read_only"] is True, volume
