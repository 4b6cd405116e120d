"""The Dockerfile and the compose file, as far as they can be judged without an engine."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from core.cli import LazyGroup
from service.settings import ENV_PREFIX, Settings, load_settings
from wikiclip import cli

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Instruction:
    stage: str
    name: str
    rest: str


def read_dockerfile() -> list[Instruction]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    instructions: list[Instruction] = []
    stage = ""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if not line.strip():
            continue
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            stage = rest.split(" AS ")[1]
        instructions.append(Instruction(stage=stage, name=name, rest=rest.strip()))
    return instructions


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


INSTRUCTIONS = read_dockerfile()
TARGETS = ("cpu", "gpu")


def of(stage: str, name: str) -> list[str]:
    return [each.rest for each in INSTRUCTIONS if (each.stage, each.name) == (stage, name)]


def compose() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def environment_of(stage: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for line in of(stage, "ENV") for pair in shlex.split(line))


def settings_in(environment: dict[str, str]) -> dict[str, str]:
    return {
        key.removeprefix(ENV_PREFIX).lower(): value for key, value in environment.items() if key.startswith(ENV_PREFIX)
    }


def test_known_instructions_only() -> None:
    known = {"FROM", "RUN", "COPY", "WORKDIR", "USER", "ENV", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert {each.name for each in INSTRUCTIONS} <= known


def test_cpu_is_the_default_target() -> None:
    assert INSTRUCTIONS[-1].stage == "cpu"


def test_every_copied_path_exists_and_reaches_the_build() -> None:
    reaching = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    stages = {each.stage for each in INSTRUCTIONS}
    for each in INSTRUCTIONS:
        if each.name != "COPY":
            continue
        if source_stage := re.match(r"--from=(\S+)", each.rest):
            assert source_stage[1] in stages
            continue
        *sources, _ = each.rest.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in reaching, f"{source} is ignored by the build"


def test_image_holds_every_module_that_serving_imports() -> None:
    copied = {source for each in INSTRUCTIONS if each.name == "COPY" for source in each.rest.split()[:-1]}
    assert {"core", "imaging", "index", "service", "wikiclip.py"} <= copied


def test_gpu_image_installs_no_torch() -> None:
    assert re.findall(r"\[(.+?)\]", " ".join(of("gpu-build", "RUN"))) == ["gpu,live,s3"]


def test_cpu_image_installs_what_is_locked_by_hash_and_nothing_else() -> None:
    installs = [part.strip() for line in of("cpu-build", "RUN") for part in line.split("&&") if "pip install" in part]
    locked, own = installs
    assert "--require-hashes --requirement requirements-serving.lock" in locked
    assert own.endswith("--no-deps .")


def test_serving_lock_pins_what_serving_needs_as_it_was_tested() -> None:
    text = (ROOT / "requirements-serving.lock").read_text(encoding="utf-8").replace("\\\n", "")
    pins = {}
    for line in text.splitlines():
        # A pin and its hashes: no index, no link, no path.
        found = re.fullmatch(r"([\w.-]+)==([\w.]+)((?:\s+--hash=sha256:[0-9a-f]{64})+)\s*", line)
        assert found, line
        pins[canonical(found[1])] = found[2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["cpu"] + extras["live"] + extras["s3"]
    assert {canonical(re.split(r"[\[<>=]", each)[0]) for each in wanted} <= set(pins)
    assert "torch" not in pins
    tested = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE))
    assert pins.items() <= {canonical(name): version for name, version in tested.items()}.items()


@pytest.mark.parametrize("target", TARGETS)
def test_image_runs_as_nobody_in_particular(target: str) -> None:
    assert of(target, "USER") == ["10001"]


@pytest.mark.parametrize("target", TARGETS)
def test_health_is_readiness(target: str) -> None:
    (health,) = of(target, "HEALTHCHECK")
    python, flag, probe = json.loads(health.partition("CMD ")[2])
    assert (python, flag) == ("python", "-c")
    compile(probe, "healthcheck", "exec")
    assert "/readyz" in probe


@pytest.mark.parametrize("target", TARGETS)
def test_image_command_is_one_the_console_knows(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = environment_of(target)
    for key, value in environment.items():
        if key.startswith(ENV_PREFIX):
            monkeypatch.setenv(key, value)
    (entrypoint,), (rest,) = of(target, "ENTRYPOINT"), of(target, "CMD")
    assert json.loads(entrypoint) == ["wikiclip"]
    words: list[str] = json.loads(rest)
    name, arguments = words[0], words[1:]
    assert isinstance(cli, LazyGroup)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    command.make_context(name, arguments)  # raises click.UsageError on anything it does not take
    assert set(settings_in(environment)) <= set(Settings.model_fields)
    load_settings()  # raises UserError on a value that does not fit
    assert of(target, "EXPOSE") == [environment["WIKICLIP_PORT"]]


def test_compose_services() -> None:
    services = compose()["services"]
    assert set(services) == {"service", "service-gpu", "redis"}
    assert services["service-gpu"]["profiles"] == ["gpu"]
    assert "profiles" not in services["service"]
    assert "profiles" not in services["redis"]
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["tmpfs"], name
        assert service["cap_drop"] == ["ALL"], name


@pytest.mark.parametrize(("name", "target"), [("service", "cpu"), ("service-gpu", "gpu")])
def test_compose_builds_and_publishes_what_the_image_exposes(name: str, target: str) -> None:
    service = compose()["services"][name]
    assert service["build"] == {"context": ".", "target": target}
    (port,) = service["ports"]
    assert re.fullmatch(r"127\.0\.0\.1:\$\{\w+:-\d+\}:(\d+)", port)
    assert port.endswith(f":{environment_of(target)['WIKICLIP_PORT']}")
    (volume,) = service["volumes"]
    assert volume.endswith(f":{environment_of(target)['WIKICLIP_BUNDLE']}:ro")


def test_compose_settings_exist_and_reach_redis() -> None:
    services = compose()["services"]
    assert services["redis"]["healthcheck"]["test"] == ["CMD", "redis-cli", "ping"]
    for name in ("service", "service-gpu"):
        settings = settings_in(services[name]["environment"])
        assert set(settings) <= set(Settings.model_fields)
        assert settings["redis_url"].startswith("redis://redis:")
        assert services[name]["depends_on"] == {"redis": {"condition": "service_healthy"}}


def test_redis_takes_its_options_as_words() -> None:
    command = compose()["services"]["redis"]["command"]
    assert all(isinstance(word, str) for word in command), "YAML reads a bare no as false"
