"""docs/service.md lists every route and parameter, docs/settings.md every setting, its default and every metric."""

from __future__ import annotations

import importlib
import re
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from service.app import create_app
from service.settings import ENV_PREFIX, Settings
from service.telemetry import Metrics

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "service.md").read_text(encoding="utf-8")
SETTINGS_PAGE = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")


def test_tables_of_settings_and_metrics_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / ".ci")
    updated = importlib.import_module("settings_tables").updated
    assert updated(SETTINGS_PAGE) == SETTINGS_PAGE, "settings or metrics changed: run `make settings-docs`"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented_with_its_default(name: str) -> None:
    (default,) = re.findall(rf"^\| `{ENV_PREFIX}{name.upper()}` \| .+ \| (.+) \|$", SETTINGS_PAGE, flags=re.MULTILINE)
    real = Settings.model_fields[name].default
    assert default == ("none" if real in (None, ()) else f"`{real}`")


def test_every_route_is_documented() -> None:
    document = create_app(Settings(bundle=Path("bundle"))).openapi()
    missing = [
        f"{method.upper()} {path}"
        for path, methods in document["paths"].items()
        for method in methods
        if not re.search(rf"`{method.upper()} {re.escape(path.replace(':path', ''))}[`?]", PAGE)
    ]
    assert not missing


def test_every_parameter_of_recognize_is_documented() -> None:
    document = create_app(Settings(bundle=Path("bundle"))).openapi()
    parameters = [parameter["name"] for parameter in document["paths"]["/recognize"]["post"]["parameters"]]
    assert parameters
    assert [name for name in parameters if f"| `{name}` |" not in PAGE] == []


def test_every_metric_is_documented() -> None:
    families = [family.name for family in Metrics().registry.collect() if family.name.startswith("wikiclip_")]
    assert families
    assert [name for name in families if not re.search(rf"`{name}(_total)?`", SETTINGS_PAGE)] == []


def test_the_tests_that_the_threat_model_names_exist() -> None:
    page = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)*test_\w+\.py)`", page)
    assert named
    folders = (ROOT / "tests", ROOT / "tests" / "service")
    assert [name for name in named if not any((folder / name).is_file() for folder in folders)] == []


def test_readme_names_every_make_target_of_a_fresh_machine() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [target for target in ("demo", "test") if f"make {target}" not in readme] == []


def test_makefile_has_the_documented_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE))
    assert {"demo", "test", "setup", "check", "bench", "tiny", "symbols", "demo-bundle", "lock"} <= targets


def test_lock_pins_every_dependency_and_names_no_index() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins)
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in pins}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = set(re.findall(r'"([a-zA-Z][\w-]*)(?:\[[\w,-]+\])?[<>=]=', project)) - {
        "hatchling",  # builds the package, in an environment of its own
        "onnxruntime-gpu",
        "faiss-gpu",
        "nvidia-ml-py",
    }
    missing = {name.lower().replace("_", "-") for name in wanted} - pinned
    assert not missing


def test_locked_packages_install_on_debian_12() -> None:
    """Debian 12 has Python 3.11.2. A package that requires 3.11.5 cannot be installed there."""
    required = {each.metadata["Name"]: each.metadata.get("Requires-Python") for each in distributions()}
    assert [name for name, wanted in required.items() if wanted and not SpecifierSet(wanted).contains("3.11.2")] == []
