"""Dashboard, alerts and scrape configuration: every metric and label they name is one that the services export."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import yaml

from tests.deploy import tools

SERIES = re.compile(r"cffa_[a-z_]+")
SUFFIXES = re.compile(r"_(total|bucket|sum|count|created)$")
# Labels that Prometheus adds when it scrapes, or that belong to a histogram.
ADDED = {"job", "instance", "le", "namespace", "service", "pod"}
# Part of the interface: dashboards of others name them too.
PROMISED = {
    "cffa_jobs": {"kind", "state"},
    "cffa_units": {"kind", "state"},
    "cffa_queue_age_seconds": {"kind"},
    "cffa_queue_load": {"kind"},
    "cffa_workers": set(),
    "cffa_worker_units": {"kind", "outcome"},
    "cffa_worker_parts": set(),
    "cffa_worker_step_seconds": {"kind"},
    "cffa_worker_lease_losses": set(),
    "cffa_worker_gpu_memory_bytes": set(),
    "cffa_worker_busy": set(),
}


@cache
def exported() -> dict[str, set[str]]:
    """Metrics that the services make, with their labels: found where they are constructed, not where they are named."""
    makers = {"Counter", "Gauge", "Histogram", "GaugeMetricFamily", "CounterMetricFamily"}
    found: dict[str, set[str]] = {}
    for path in sorted((tools.ROOT / "services").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in makers:
                continue
            values = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "labels")]
            name = values[0].value if values and isinstance(values[0], ast.Constant) else None
            if not isinstance(name, str) or not name.startswith("cffa_"):
                continue  # collections.Counter
            lists = [ast.literal_eval(value) for value in values[1:] if isinstance(value, ast.List)]
            found[SUFFIXES.sub("", name)] = {label for labels in lists for label in labels}
    return found


def dashboard() -> Any:
    return json.loads((tools.DEPLOY / "grafana/dashboards/cffa.json").read_text())


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((tools.DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Where each PromQL expression comes from, and the expression."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield f"panel: {panel['title']}", target["expr"].replace("$__rate_interval", "1m")
    for rule in rules():
        yield f"alert: {rule['alert']}", rule["expr"]


EXPRESSIONS = {f"{where} {number}": text for number, (where, text) in enumerate(expressions())}


def test_promised_metrics_are_exported() -> None:
    made = exported()
    assert {name: made.get(name) for name in PROMISED} == PROMISED


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_expression(where: str) -> None:
    """It is PromQL, and names series and labels that exist."""
    text = EXPRESSIONS[where]
    tools.module("promql_parser").parse(text)
    made = exported()
    named = set(SERIES.findall(text))
    assert named or "up{" in text
    labels: set[str] = set()
    for series in named:
        metric = SUFFIXES.sub("", series)
        assert metric in made, f"{metric} is exported by no service"
        labels |= made[metric]
    used = {label.strip() for group in re.findall(r"(?:by|on) ?\(([^)]*)\)", text) for label in group.split(",")} - {""}
    used |= set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)", text))
    assert used <= labels | ADDED


def test_outcomes_and_states_are_real() -> None:
    from typing import get_args, get_type_hints

    from cffa_core.jobs.state import UnitState
    from services.worker.live_unit import Outcome

    text = " ".join(EXPRESSIONS.values())
    outcomes = {word for group in re.findall(r'outcome=~?"([^"]+)"', text) for word in group.split("|")}
    states = {word for group in re.findall(r'state=~?"([^"]+)"', text) for word in group.split("|")}
    assert outcomes and outcomes <= set(get_args(get_type_hints(Outcome)["kind"]))
    assert states and states <= {state.value for state in UnitState}


def test_load_of_replicas_is_never_added_up() -> None:
    """Each replica of the API reports the whole record: a sum over them would count everything twice."""
    for where, text in EXPRESSIONS.items():
        for aggregation in re.findall(r"(\w+) ?(?:by ?\([^)]*\))? ?\(cffa_(?:jobs|units|queue|workers)", text):
            assert aggregation == "max", where


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: str(rule["alert"]))
def test_alert_says_what_is_wrong_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description"}
    assert re.fullmatch(r"Cffa[A-Za-z]+", rule["alert"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: apt-get install -y prometheus")
def test_alerts_fire_when_they_should() -> None:
    for arguments in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(
            ["promtool", *arguments], cwd=tools.DEPLOY / "prometheus", capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested() -> None:
    cases = yaml.safe_load((tools.DEPLOY / "prometheus/alerts_test.yml").read_text())["tests"]
    fired = {test["alertname"] for case in cases for test in case["alert_rule_test"] if test["exp_alerts"]}
    assert fired == {rule["alert"] for rule in rules()}


def test_dashboard_is_whole() -> None:
    board = dashboard()
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    source = yaml.safe_load((tools.DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())
    uid = source["datasources"][0]["uid"]
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == uid
    taken = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(taken) == len(set(taken)), "panels overlap"


def test_every_promised_metric_is_on_the_dashboard() -> None:
    text = " ".join(text for where, text in EXPRESSIONS.items() if where.startswith("panel"))
    shown = {SUFFIXES.sub("", series) for series in SERIES.findall(text)}
    assert set(PROMISED) <= shown


def test_prometheus_looks_where_the_services_are() -> None:
    config = yaml.safe_load((tools.DEPLOY / "prometheus/prometheus.yml").read_text())
    services = tools.services()
    asked = {
        name: found["port"]
        for job in config["scrape_configs"]
        for found in job["dns_sd_configs"]
        for name in found["names"]
    }
    workers = {"worker-cpu", "worker-gpu"}
    assert set(asked) == workers | {"api"}
    assert asked["api"] == int(services["api"]["environment"]["CFFA_PORT"])
    for name in workers:
        assert asked[name] == int(services[name]["environment"]["CFFA_METRICS_PORT"])
    assert config["rule_files"] == ["/etc/prometheus/alerts.yml"]


def test_grafana_finds_its_files() -> None:
    provider = yaml.safe_load((tools.DEPLOY / "grafana/provisioning/dashboards/cffa.yml").read_text())["providers"][0]
    mounts = {volume["target"]: volume["source"] for volume in tools.services()["grafana"]["volumes"]}
    assert mounts[provider["options"]["path"]] == str(tools.DEPLOY / "grafana/dashboards")
    assert mounts["/etc/grafana/provisioning"] == str(tools.DEPLOY / "grafana/provisioning")
