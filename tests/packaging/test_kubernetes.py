"""The manifests of deploy/kubernetes follow Kubernetes' own schema, and together fit the image and the service."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

from service.app import create_app
from service.settings import ENV_PREFIX, Settings, load_settings
from service.telemetry import Metrics
from tests.packaging.test_shown_commands import check
from wikiclip.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("1.30", "1.37")

Manifest = dict[str, Any]


def manifests() -> list[Manifest]:
    return [
        document
        for path in sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    ]


ALL = {manifest["kind"]: manifest for manifest in manifests()}
POD = ALL["Deployment"]["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]


def test_there_is_one_of_each_kind() -> None:
    kinds = {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "PersistentVolumeClaim", "Job"}
    assert len(manifests()) == len(ALL)
    assert set(ALL) == {*kinds, "Ingress"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ALL)
def test_it_follows_the_schema(kind: str, version: str) -> None:
    kubernetes_validate.validate(ALL[kind], version, strict=True)


def test_what_no_schema_knows_would_be_found() -> None:
    wrong = copy.deepcopy(ALL["Deployment"])
    wrong["spec"]["template"]["spec"]["containers"][0]["readyProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_everything_selects_the_pods_of_the_deployment() -> None:
    labels = POD["metadata"]["labels"]
    assert ALL["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert ALL["Service"]["spec"]["selector"] == labels
    assert ALL["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert ALL["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == ALL["Deployment"]["metadata"]["name"]
    assert ALL["Job"]["spec"]["template"]["metadata"]["labels"] != labels


@pytest.mark.parametrize("kind", ["Deployment", "Job"])
def test_pods_have_no_rights(kind: str) -> None:
    pod = ALL[kind]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001  # the image's
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes


@pytest.mark.parametrize("kind", ["Deployment", "Job"])
def test_no_variable_of_a_service_is_taken_for_a_setting(kind: str) -> None:
    """Kubernetes sets NAME_PORT for a service NAME, and NAME_SERVICE_HOST: here these would be settings."""
    assert ALL["Service"]["metadata"]["name"].upper() + "_" == ENV_PREFIX
    assert ALL[kind]["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_settings_exist_and_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in CONTAINER["env"]:
        assert variable["name"].removeprefix(ENV_PREFIX).lower() in Settings.model_fields
        monkeypatch.setenv(variable["name"], variable["value"])
    settings = load_settings()
    assert str(settings.thread_count) == CONTAINER["resources"]["requests"]["cpu"]
    grace_s, (_, pause_s) = POD["spec"]["terminationGracePeriodSeconds"], preStop()
    assert grace_s * 1000 > float(pause_s) * 1000 + settings.deadline_ms + settings.url_timeout_ms


def preStop() -> list[str]:  # noqa: N802 - its name in the manifest
    command: list[str] = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    return command


def test_the_bundle_is_where_the_job_brings_it() -> None:
    words = ["wikiclip", *ALL["Job"]["spec"]["template"]["spec"]["containers"][0]["args"]]
    check(words)
    with pytest.raises(click.UsageError):
        check([*words, "--no-such"])
    settings = {variable["name"]: variable["value"] for variable in CONTAINER["env"]}
    assert words[-1] == settings["WIKICLIP_BUNDLE"]
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for kind in ("Deployment", "Job")
        for volume in ALL[kind]["spec"]["template"]["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    assert claims == [ALL["PersistentVolumeClaim"]["metadata"]["name"]] * 2
    assert "bundle" in COMMANDS


def test_probes_and_ports_are_the_services() -> None:
    paths = create_app(Settings(bundle=Path("bundle"))).openapi()["paths"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = CONTAINER[probe]["httpGet"]
        assert asked["path"] in paths
        assert asked["port"] == "http"
    assert [CONTAINER[f"{name}Probe"]["httpGet"]["path"] for name in ("readiness", "liveness")] == ["/readyz", "/livez"]
    (port,) = CONTAINER["ports"]
    assert port == {"name": "http", "containerPort": Settings().port}
    assert [each["targetPort"] for each in ALL["Service"]["spec"]["ports"]] == ["http"]
    assert POD["metadata"]["annotations"]["prometheus.io/port"] == str(Settings().port)


def test_a_body_that_the_service_takes_passes_the_ingress() -> None:
    ingress = ALL["Ingress"]
    limit = ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-body-size"]
    assert int(limit.removesuffix("m")) * 1024**2 > Settings().max_body_bytes
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    (port,) = ALL["Service"]["spec"]["ports"]
    assert path["backend"]["service"] == {"name": ALL["Service"]["metadata"]["name"], "port": {"name": port["name"]}}


def test_replicas_follow_a_metric_that_there_is() -> None:
    families = {family.name for family in Metrics().registry.collect()}
    (metric,) = ALL["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in families
    assert int(metric["pods"]["target"]["averageValue"]) < Settings().queue_limit
    assert ALL["HorizontalPodAutoscaler"]["spec"]["minReplicas"] > ALL["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    assert "replicas" not in ALL["Deployment"]["spec"], "an apply would undo what the autoscaler did"
