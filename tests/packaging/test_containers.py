"""The Dockerfile, the compose file and the workflows, checked without an engine; `make check-images` runs them."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from service.settings import ENV_PREFIX, Settings, load_settings
from wikiclip.cli import load

ROOT = Path(__file__).resolve().parents[2]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass(frozen=True, kw_only=True)
class Instruction:
    stage: str
    name: str
    rest: str


def read_dockerfile(path: Path) -> list[Instruction]:
    """Return the instructions in order, continuation lines joined. Every stage of the file has a name."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    instructions: list[Instruction] = []
    stage = ""
    for line in filter(str.strip, re.sub(r"\\\n\s*", " ", text).splitlines()):
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            stage = rest.split(" AS ")[1]
        instructions.append(Instruction(stage=stage, name=name, rest=rest.strip()))
    return instructions


INSTRUCTIONS = read_dockerfile(ROOT / "Dockerfile")
TARGETS = ("cpu", "gpu", "milvus")


def of(stage: str, name: str) -> list[str]:
    return [each.rest for each in INSTRUCTIONS if (each.stage, each.name) == (stage, name)]


def lineage(target: str) -> list[str]:
    """Return the stages that a stage is built from, the first one first, and the stage itself."""
    base = of(target, "FROM")[0].partition(" AS ")[0]
    return [*(lineage(base) if of(base, "FROM") else []), target]


def effective(target: str, name: str) -> str:
    """Return the last instruction of a name among a stage and those that it is built from."""
    return [rest for stage in lineage(target) for rest in of(stage, name)][-1]


def compose() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def environment_of(target: str) -> dict[str, str]:
    """Return what ENV sets in an image, references to other variables unresolved."""
    lines = [line for stage in lineage(target) for line in of(stage, "ENV")]
    return dict(pair.split("=", 1) for line in lines for pair in shlex.split(line))


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
            assert source == "." or f"!{source}" in reaching, f"{source} is ignored by the build"


@pytest.mark.parametrize("stage", ["cpu-build", "gpu-build"])
def test_image_is_built_from_every_package_of_the_wheel(stage: str) -> None:
    assert ". ." in of(stage, "COPY")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    reaching = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert [package for package in packages if f"!{package}" not in reaching] == []


def test_gpu_image_installs_no_torch() -> None:
    assert re.findall(r"\[(.+?)\]", " ".join(of("gpu-build", "RUN"))) == ["gpu,live,otel,s3"]


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
    wanted = project["dependencies"] + extras["cpu"] + extras["live"] + extras["otel"] + extras["s3"]
    assert {canonical(re.split(r"[\[<>=]", each)[0]) for each in wanted} <= set(pins)
    assert "torch" not in pins
    tested = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE))
    assert pins.items() <= {canonical(name): version for name, version in tested.items()}.items()


@pytest.mark.parametrize("target", TARGETS)
def test_image_runs_as_nobody_in_particular(target: str) -> None:
    assert effective(target, "USER") == "10001"


@pytest.mark.parametrize("target", TARGETS)
def test_health_is_readiness(target: str) -> None:
    health = effective(target, "HEALTHCHECK")
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
    assert json.loads(effective(target, "ENTRYPOINT")) == ["wikiclip"]
    words: list[str] = json.loads(effective(target, "CMD"))
    name, arguments = words[0], words[1:]
    command = load(name)
    command.make_context(name, arguments)  # raises click.UsageError on anything it does not take
    assert set(settings_in(environment)) <= set(Settings.model_fields)
    load_settings()  # raises UserError on a value that does not fit
    assert effective(target, "EXPOSE") == environment["WIKICLIP_PORT"]


PROFILES = {
    "service": None,
    "redis": None,
    "service-gpu": "gpu",
    "locust": "load",
    "prometheus": "observe",
    "grafana": "observe",
    "replica-a": "scale",
    "replica-b": "scale",
    "proxy": "scale",
    "service-milvus": "milvus",
    "milvus": "milvus",
    "etcd": "milvus",
    "minio": "milvus",
}
SERVING = ("service", "service-gpu", "replica-a", "replica-b", "service-milvus")
AS_THEIR_MAKERS_RUN_THEM = {"milvus", "etcd", "minio"}


def environment_in(service: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in service.get("environment", {}).items()}


def schema_validator(name: str) -> Any:
    """Return a validator for one of the schemas that check-jsonschema brings."""
    schema = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / f"{name}.json"
    content = json.loads(schema.read_text(encoding="utf-8"))
    return jsonschema.validators.validator_for(content)(content)


def test_compose_follows_the_specification() -> None:
    validator = schema_validator("compose-spec")
    document = compose()
    assert [error.message for error in validator.iter_errors(document)] == []
    document["services"]["proxy"]["port"] = ["8080:8080"]
    assert [error.message for error in validator.iter_errors(document)]


def test_compose_services_and_their_profiles() -> None:
    services = compose()["services"]
    assert {name: service.get("profiles") for name, service in services.items()} == {
        name: None if profile is None else [profile] for name, profile in PROFILES.items()
    }
    for name in set(services) - AS_THEIR_MAKERS_RUN_THEM:
        service = services[name]
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_images_are_built_here_or_pinned_to_a_version() -> None:
    stages = {each.stage for each in INSTRUCTIONS}
    for name, service in compose()["services"].items():
        if "build" in service:
            assert service["build"]["target"] in stages, name
            assert service["image"] == f"wikiclip-serve:{service['build']['target']}", name
        else:
            tag = service["image"].rpartition(":")[2]
            assert re.match(r"v?\d+\.\d+\.\d+|RELEASE\.\d{4}-\d\d-\d\dT", tag), service["image"]


def test_compose_names_only_what_there_is() -> None:
    document = compose()
    services = document["services"]
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        for needed, how in dict.items(service["depends_on"]) if isinstance(service.get("depends_on"), dict) else ():
            if how["condition"] == "service_healthy":
                # Health comes from the image's own check for what is built here.
                assert "healthcheck" in services[needed] or "build" in services[needed], (name, needed)
        for volume in service.get("volumes", ()):
            source = re.sub(r"^\$\{\w+:-([^}]*)\}", r"\1", volume).partition(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in document["volumes"], volume


def test_only_this_machine_reaches_what_is_published() -> None:
    published = [port for service in compose()["services"].values() for port in service.get("ports", ())]
    assert len(published) == 6
    assert all(re.fullmatch(r"127\.0\.0\.1:\$\{\w+:-\d+\}:\d+", port) for port in published)
    defaults = re.findall(r":-(\d+)\}", " ".join(published))
    assert len(set(defaults)) == len(defaults)


@pytest.mark.parametrize("name", SERVING)
def test_compose_serves_as_the_image_expects(name: str) -> None:
    service = compose()["services"][name]
    environment = environment_of(service["build"]["target"])
    assert [port.rpartition(":")[2] for port in service.get("ports", ())] in ([environment["WIKICLIP_PORT"]], [])
    bundle, cache = service["volumes"]
    assert bundle.endswith(f":{environment['WIKICLIP_BUNDLE']}:ro")
    assert cache.endswith(f":{environment['WIKICLIP_BUNDLE_CACHE']}")
    settings = settings_in(environment_in(service))
    assert set(settings) <= set(Settings.model_fields)
    assert settings["redis_url"].startswith("redis://redis:")
    assert service["depends_on"]["redis"] == {"condition": "service_healthy"}
    # Prometheus finds each under the name they share.
    assert service["networks"]["default"]["aliases"] == ["wikiclip"]


def test_redis_is_healthy_when_it_answers() -> None:
    assert compose()["services"]["redis"]["healthcheck"]["test"] == ["CMD", "redis-cli", "ping"]


def test_the_proxy_knows_the_replicas() -> None:
    services = compose()["services"]
    environment = environment_in(services["proxy"])
    template = (ROOT / "deploy" / "nginx" / "wikiclip.conf.template").read_text(encoding="utf-8")
    assert set(re.findall(r"^[^#\n]*\$\{(\w+)\}", template, flags=re.MULTILINE)) == set(environment)
    replicas = [value for name, value in environment.items() if name.startswith("REPLICA_")]
    assert replicas == [f"{name}:8000" for name in services if name.startswith("replica-")]
    assert services["proxy"]["ports"][0].endswith(f":{environment['LISTEN']}")
    # A body that the service takes reaches it.
    (megabytes,) = re.findall(r"client_max_body_size (\d+)m;", template)
    assert int(megabytes) * 1024**2 > Settings().max_body_bytes


def test_locust_is_told_what_it_takes() -> None:
    (options,) = [json.loads(rest) for rest in of("load", "ENTRYPOINT")]
    assert options[0] == "locust"
    assert (ROOT / options[2]).is_file()
    command = compose()["services"]["locust"]["command"]
    words = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in command]
    done = subprocess.run(
        [sys.executable, "-m", "locust", "--locustfile", options[2], *words, "--list"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Cold" in done.stdout


def test_commands_take_their_options_as_words() -> None:
    for name, service in compose()["services"].items():
        assert all(isinstance(word, str) for word in service.get("command", ())), (
            f"{name}: YAML reads a bare no as false"
        )


def shown(program: str) -> list[list[str]]:
    """The command lines of a program in the documents and in compose's own comment, in fences or between backticks."""
    pages = [ROOT / "README.md", ROOT / "docs" / "deployment.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    comments = (ROOT / "docker-compose.yml").read_text(encoding="utf-8").replace("#   ", "")
    lines = re.findall(rf"^{program} .*$", f"{text}\n{comments}", flags=re.MULTILINE)
    quoted = re.findall(rf"`({program} [^`\n]+)`", text)
    return [shlex.split(re.sub(r"\s{2,}.*", "", line)) for line in lines + quoted]


def test_shown_compose_commands_name_profiles_and_services() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--profile", action="append", default=[])
    parser.add_argument("verb", choices=["up", "restart"], nargs="?")
    parser.add_argument("services", nargs="*")
    services = compose()["services"]
    commands = shown("docker compose")
    assert len(commands) > 10
    profiles_shown = set()
    for words in commands:
        given = parser.parse_args(words[2:])
        profiles_shown.update(given.profile)
        for name in given.services:
            assert name in services, words
            # What is named is in a profile that is named, but for a restart, which takes any.
            assert given.verb == "restart" or set(services[name].get("profiles", ())) <= set(given.profile), words
    assert profiles_shown == {profile for profile in PROFILES.values() if profile}


def test_shown_builds_name_stages() -> None:
    stages = {each.stage for each in INSTRUCTIONS}
    builds = shown("docker build")
    assert builds
    for words in builds:
        target = words[words.index("--target") + 1] if "--target" in words else INSTRUCTIONS[-1].stage
        assert target in stages
        assert words[words.index("-t") + 1] == f"wikiclip-serve:{target}"


def test_shown_manifests_exist() -> None:
    applied = [words[words.index("-f") + 1] for words in shown("kubectl") if "-f" in words]
    assert applied
    assert [path for path in applied if not (ROOT / path).exists()] == []


WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / ".github" / "workflows").iterdir()
}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_follows_its_schema(name: str) -> None:
    workflow = WORKFLOWS[name]
    # YAML 1.1 reads the key `on` as true.
    document = {"on" if key is True else key: value for key, value in workflow.items()}
    validator = schema_validator("github-workflows")
    assert [error.message for error in validator.iter_errors(document)] == []
    assert list(validator.iter_errors({**document, "jobs": {}}))


def test_workflows_run_what_there_is() -> None:
    runs = [
        step["run"]
        for flow in WORKFLOWS.values()
        for job in flow["jobs"].values()
        for step in job.get("steps", ())
        if "run" in step
    ]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    made = {words[1] for words in map(str.split, runs) if words[0] == "make"}
    assert made == {"check-images"}
    assert made <= targets
    scripts = [word for run in runs for word in run.split() if word.startswith(".ci/")]
    assert scripts
    assert [script for script in scripts if not os.access(ROOT / script, os.X_OK)] == []


def test_release_publishes_the_images_of_the_service() -> None:
    jobs = WORKFLOWS["release"]["jobs"]
    assert set(jobs["images"]["strategy"]["matrix"]["target"]) == set(TARGETS)
    assert jobs["pypi"]["permissions"] == {"id-token": "write"}


def run_images_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "deploy" / "images.sh", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_images_script_explains_its_steps() -> None:
    shown = run_images_script("--help")
    assert shown.returncode == 0
    assert "usage: deploy/images.sh [build] [run] [compose]" in shown.stdout


def test_images_script_refuses_an_unknown_step() -> None:
    done = run_images_script("biuld")
    assert done.returncode == 2
    assert "'biuld' is not one of build, run and compose" in done.stderr


def test_images_script_says_that_there_is_no_engine() -> None:
    done = run_images_script("build", ENGINE="no-such-engine")
    assert done.returncode == 1
    assert "neither docker nor podman works here" in done.stderr


def test_images_script_builds_every_image_that_is_run() -> None:
    script = (ROOT / "deploy" / "images.sh").read_text(encoding="utf-8")
    (targets,) = re.findall(r"^TARGETS=\((.*)\)$", script, flags=re.MULTILINE)
    built = {service["build"]["target"] for service in compose()["services"].values() if "build" in service}
    assert set(targets.split()) == built
