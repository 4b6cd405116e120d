"""Alert rules and dashboard: they ask Prometheus for what the service tells, and each alert comes when it should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.telemetry import Metrics

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "wikiclip.json"
ALERTS = [
    "WikiclipDown", "WikiclipNotReady", "WikiclipHighLatency", "WikiclipRejecting",
    "WikiclipErrors", "WikiclipEngineDeaths", "WikiclipRedisFailing", "WikiclipQueueFull",
]  # fmt: skip
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
FROM_PROMETHEUS = {"up": set[str]()}  # its own metric, for every target
FROM_SCRAPING = {"instance", "job"}
SELECTOR = re.compile(r"\b((?:wikiclip|process)_\w+|up\b)(?:\{([^}]*)\})?")


def exposed_labels() -> dict[str, set[str]]:
    """Every series name that the service tells, with its labels."""
    metrics = Metrics()
    labels = {}
    for collector in vars(metrics).values():
        if hasattr(collector, "_labelnames"):
            labels[collector._name] = set(collector._labelnames)
    names = {}
    for family in metrics.registry.collect():
        for suffix in SUFFIXES[family.type]:
            extra = {"le"} if suffix == "_bucket" else set()
            names[family.name + suffix] = labels.get(family.name, set()) | extra
    return names


LABELS = {**exposed_labels(), **FROM_PROMETHEUS}


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return list(group["rules"])


def queries() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


EXPRESSIONS = [rule["expr"] for rule in rules()] + queries()


def test_the_alerts_are_those_of_the_runbook() -> None:
    assert [rule["alert"] for rule in rules()] == ALERTS
    assert all(rule["annotations"]["summary"] and rule["labels"]["severity"] for rule in rules())


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_what_is_asked_for_is_told(expression: str) -> None:
    found = SELECTOR.findall(expression)
    assert found
    for name, selector in found:
        assert name in LABELS
        assert set(re.findall(r"(\w+)(?:=|!=|=~|!~)\"", selector)) <= LABELS[name] | FROM_SCRAPING
    for grouped in re.findall(r"\bby \(([^)]*)\)", expression):
        labels = set().union(*(LABELS[name] for name, _ in found))
        assert {label.strip() for label in grouped.split(",")} <= labels | FROM_SCRAPING


def test_a_wrong_name_would_be_found() -> None:
    with pytest.raises(AssertionError):
        test_what_is_asked_for_is_told('rate(wikiclip_requests_count{route="/recognize"}[5m])')
    with pytest.raises(AssertionError):
        test_what_is_asked_for_is_told('rate(wikiclip_requests_total{code="500"}[5m])')


def test_every_metric_of_the_service_is_on_the_dashboard() -> None:
    shown = {name for query in queries() for name, _ in SELECTOR.findall(query)}
    families = [family for family in Metrics().registry.collect() if family.name.startswith("wikiclip_")]
    missing = [
        family.name for family in families if not any(family.name + suffix in shown for suffix in SUFFIXES[family.type])
    ]
    assert missing == []


def test_the_dashboard_is_provisioned_where_compose_mounts_it() -> None:
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "wikiclip.yml").read_text())["providers"]
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in compose["grafana"]["volumes"]
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    sources = {target["datasource"]["uid"] for panel in dashboard["panels"] for target in panel["targets"]}
    assert sources == {source["uid"]}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose


def promtool(*arguments: str) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_configuration_and_the_rules() -> None:
    promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))
    promtool("check", "rules", str(PROMETHEUS / "alerts.yml"))


def test_each_alert_comes_when_it_should_and_none_when_all_is_well() -> None:
    promtool("test", "rules", str(PROMETHEUS / "alerts_test.yml"))
    tests = (PROMETHEUS / "alerts_test.yml").read_text(encoding="utf-8")
    assert [name for name in ALERTS if f'alertname="{name}"' not in tests or f"alertname: {name}," not in tests] == []


def test_prometheus_takes_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    records = [
        {"record": f"query_{number}", "expr": query.replace("$instance", ".*")}
        for number, query in enumerate(queries())
    ]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": records}]}))
    promtool("check", "rules", str(tmp_path / "queries.yml"))
