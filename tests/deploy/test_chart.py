"""The Helm chart, rendered by Helm itself: valid for Kubernetes, restricted, and refusing values that cannot work."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from services.worker.tasks import SOFT_SHUTDOWN_SECONDS
from tests.deploy import tools

EVERYTHING: dict[str, Any] = {
    "ownerRunningUnits": 3,
    "extraSettings": {"CFFA_LEASE_SECONDS": 90},
    "imagePullSecrets": [{"name": "registry"}],
    "api": {
        "ingress": {
            "enabled": True,
            "className": "nginx",
            "tlsSecret": "cffa-tls",
            "annotations": {"nginx.ingress.kubernetes.io/proxy-body-size": "8g"},
        },
        "nodeSelector": {"disk": "ssd"},
    },
    "workers": {
        "cpu": {"keda": {"enabled": True}, "kinds": "generation,captioned_training"},
        "gpu": {
            "enabled": True,
            "modelsClaim": "models",
            "runtimeClassName": "nvidia",
            "image": {"digest": f"sha256:{'a' * 64}"},
            "keda": {"enabled": True, "minReplicas": 1},
        },
    },
    "metrics": {"serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}},
    "networkPolicy": {
        "apiFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}],
        "metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        "serversTo": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
    },
}
NOTHING: dict[str, Any] = {
    "setup": {"enabled": False},
    "workers": {"cpu": {"enabled": False}},
    "podDisruptionBudget": {"enabled": False},
    "networkPolicy": {"enabled": False},
}
VARIANTS = {"defaults": {}, "everything": EVERYTHING, "nothing": NOTHING}
# Kinds that Kubernetes does not bring: the fields their operators require, and all that they know.
STRING = {"type": "string", "minLength": 1}
CUSTOM: dict[str, Any] = {
    "ScaledObject": {
        "required": ["scaleTargetRef", "triggers"],
        "additionalProperties": False,
        "properties": {
            "scaleTargetRef": {"type": "object", "required": ["name"]},
            "minReplicaCount": {"type": "integer", "minimum": 0},
            "maxReplicaCount": {"type": "integer", "minimum": 1},
            "idleReplicaCount": {"type": "integer"},
            "pollingInterval": {"type": "integer", "minimum": 1},
            "cooldownPeriod": {"type": "integer", "minimum": 0},
            "initialCooldownPeriod": {"type": "integer", "minimum": 0},
            "fallback": {
                "type": "object",
                "required": ["failureThreshold", "replicas"],
                "properties": {"behavior": {"enum": ["static", "currentReplicas", "currentReplicasIfHigher"]}},
            },
            "advanced": {"type": "object"},
            "triggers": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["type", "metadata"],
                    "properties": {
                        "type": {"const": "prometheus"},
                        "metricType": {"enum": ["AverageValue", "Value", "Utilization"]},
                        "metadata": {
                            "type": "object",
                            "required": ["serverAddress", "query", "threshold"],
                            "additionalProperties": STRING,
                        },
                    },
                },
            },
        },
    },
    "ServiceMonitor": {"required": ["selector", "endpoints"], "properties": {"endpoints": {"minItems": 1}}},
    "PodMonitor": {"required": ["selector", "podMetricsEndpoints"]},
}


def pods(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Pod templates of Deployments and Jobs by component."""
    templates = [found["spec"]["template"] for found in objects if found["kind"] in ("Deployment", "Job")]
    return {found["metadata"]["labels"]["app.kubernetes.io/component"]: found["spec"] for found in templates}


def of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [found for found in objects if found["kind"] == kind]


def test_helm_lint_has_nothing_to_say() -> None:
    report = tools.module("helm_python").lint(tools.CHART, strict=True)
    assert report["total_charts_linted"] == 1
    said = [message["error"] for message in report["messages"]]
    assert not report["errors"] and said == ["icon is recommended"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_is_valid_for_kubernetes(variant: str) -> None:
    validate = tools.module("kubernetes_validate").validate
    jsonschema = tools.module("jsonschema")
    objects = tools.render(**VARIANTS[variant])
    assert objects
    for found in objects:
        if found["kind"] in CUSTOM:
            jsonschema.validate(found["spec"], {"type": "object", **CUSTOM[found["kind"]]})
            assert found["apiVersion"] in ("keda.sh/v1alpha1", "monitoring.coreos.com/v1")
        else:
            for version in ("1.30", "1.37"):
                validate(found, version, strict=True)


def test_an_invalid_object_is_noticed() -> None:
    kubernetes = tools.module("kubernetes_validate")
    deployment = of_kind(tools.render(), "Deployment")[0]
    deployment["spec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate(deployment, "1.37", strict=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_are_unique_and_selectors_meet_their_pods(variant: str) -> None:
    objects = tools.render(**VARIANTS[variant])
    named = [(found["kind"], found["metadata"]["name"]) for found in objects]
    assert len(named) == len(set(named))
    labels = [found["spec"]["template"]["metadata"]["labels"] for found in objects if "template" in found["spec"]]
    selectors = [found["spec"]["selector"]["matchLabels"] for found in of_kind(objects, "Deployment")] + [
        found["spec"]["selector"] for found in of_kind(objects, "Service")
    ]
    selectors += [found["spec"]["selector"]["matchLabels"] for found in of_kind(objects, "PodDisruptionBudget")]
    selectors += [found["spec"]["podSelector"]["matchLabels"] for found in of_kind(objects, "NetworkPolicy")]
    for selector in selectors:
        assert len([pod for pod in labels if selector.items() <= pod.items()]) == 1, selector


@pytest.mark.parametrize("variant", VARIANTS)
def test_pods_are_restricted(variant: str) -> None:
    """What the Pod Security Standard `restricted` asks for, and a read-only root besides."""
    for component, pod in pods(tools.render(**VARIANTS[variant])).items():
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"], component


def test_runs_what_compose_runs() -> None:
    """The same commands, and the same settings but for addresses and what each platform is for."""
    found = pods(tools.render(workers={"gpu": {"enabled": True}}))
    for component, pod in found.items():
        compose = tools.services()[component]
        container = pod["containers"][0]
        assert container["command"] == compose["command"]
        differing = set(compose["environment"]) ^ {item["name"] for item in container["env"]}
        assert differing <= {"CFFA_MODELS_DIR", "CFFA_S3_REGION", "CFFA_HOST"}, component


def test_web_hooks_leave_for_public_addresses_alone() -> None:
    def ways(**values: Any) -> dict[str, list[Any]]:
        objects = of_kind(tools.render(**values), "NetworkPolicy")
        return {found["metadata"]["name"]: found["spec"]["egress"] for found in objects}

    closed = ways(networkPolicy={"webhookPorts": []})
    for name, egress in ways(networkPolicy={"webhookPorts": [443, 8443]}).items():
        added = [way for way in egress if way not in closed[name]]
        assert len(added) == (1 if name.endswith("-api") else 0)
        for way in added:
            assert [port["port"] for port in way["ports"]] == [443, 8443]
            assert "169.254.0.0/16" in way["to"][0]["ipBlock"]["except"]


def test_secrets_are_referred_to_and_mounted_as_files() -> None:
    objects = tools.render(**EVERYTHING)
    assert not of_kind(objects, "Secret")
    for component, pod in pods(objects).items():
        assert "secretKeyRef" not in json.dumps(pod["containers"])
        volume = next(volume["secret"] for volume in pod["volumes"] if volume["name"] == "secrets")
        keys = {item["key"] for item in volume["items"]}
        assert keys == {item["source"] for item in tools.services()[component]["secrets"]}
        mount = next(mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "secrets")
        environment = {item["name"]: item["value"] for item in pod["containers"][0]["env"]}
        assert environment["CFFA_SECRETS_DIR"] == mount["mountPath"]


def test_workers_get_time_to_give_their_unit_back() -> None:
    for component, pod in pods(tools.render(**EVERYTHING)).items():
        if component.startswith("worker"):
            assert pod["terminationGracePeriodSeconds"] >= 2 * SOFT_SHUTDOWN_SECONDS + 60


def test_keda_scales_the_workers_on_the_services_own_load() -> None:
    promql = tools.module("promql_parser")
    objects = tools.render(**EVERYTHING)
    workers = {found["metadata"]["name"]: found for found in of_kind(objects, "Deployment")}
    scaled = of_kind(objects, "ScaledObject")
    assert len(scaled) == 2
    for found in scaled:
        target = workers[found["spec"]["scaleTargetRef"]["name"]]
        assert "replicas" not in target["spec"], "two would decide how many workers there are"
        query = found["spec"]["triggers"][0]["metadata"]["query"]
        assert promql.parse(query).prettify()
        kinds = "generation|captioned_training" if "cpu" in target["metadata"]["name"] else ".+"
        assert f'cffa_queue_load{{namespace="eyes",service="demo-cffa-api",kind=~"{kinds}"}}' in query
    services = {found["metadata"]["name"] for found in of_kind(objects, "Service")}
    assert services == {"demo-cffa-api"}, "the query's service label is the Service's name"


def test_set_up_runs_before_each_version() -> None:
    job = of_kind(tools.render(), "Job")[0]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"


def test_probes_ask_the_right_question() -> None:
    container = pods(tools.render())["api"]["containers"][0]
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"


@pytest.mark.parametrize(
    "values",
    [
        {"existingSecret": ""},
        {"api": {"replica": 3}},
        {"api": {"replicas": 0}},
        {"database": {"url": "postgresql+psycopg://cffa:password@postgres:5432/cffa"}},
        {"database": {"url": "sqlite:///record.sqlite"}},
        {"broker": {"url": "redis://:password@redis:6379/0"}},
        {"s3": {"endpoint": "objects:9000"}},
        {"extraSettings": {"CFFA_S3_SECRET_KEY": "in the open"}},
        {"extraSettings": {"PATH": "/bin"}},
        {"workers": {"cpu": {"terminationGracePeriodSeconds": 30}}},
        {"workers": {"cpu": {"device": "tpu"}}},
        {"workers": {"cpu": {"keda": {"unitsPerWorker": 0}}}},
        {"workers": {"my_worker": {}}},
        {"api": {"image": {"digest": "sha256:short"}}},
        {"networkPolicy": {"serverPorts": []}},
        {"networkPolicy": {"webhookPorts": [0]}},
        {"webhooks": {"ports": "https"}},
    ],
    ids=str,
)
def test_refuses_values_that_cannot_work(values: dict[str, Any]) -> None:
    helm = tools.module("helm_python")
    with pytest.raises(helm.HelmError, match="don't meet the specifications of the schema"):
        tools.render(**values)


def test_schema_names_every_value() -> None:
    """The schema allows nothing else, so it must be as complete as the values, and be a schema itself."""
    jsonschema = tools.module("jsonschema")
    schema = json.loads((tools.CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.Draft7Validator(schema).validate(yaml.safe_load((tools.CHART / "values.yaml").read_text()))
