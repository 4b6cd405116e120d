"""Every command that README and docs show, in a block or within a sentence, is one that its own parser takes.

What can be run cheaply is run elsewhere (test_tutorial.py, test_operations.py). Here are the others, which need what no
test machine has: a GPU, Wikipedia, Docker.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import pytest
import yaml

from service.app import create_app
from service.settings import Settings
from wikiclip.cli import COMMANDS, load

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "demo" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
PROGRAM = r"(?:\w+=\S+ )*{}\s+[^\s(]"
# A name that stands for a value: N, SHARE, BUNDLE, "...".
STAND_IN = re.compile(r"[A-Z][A-Z_]*|\.\.\.")


def texts() -> Iterator[str]:
    for document in DOCUMENTS:
        yield document.read_text(encoding="utf-8")


def shown_commands(program: str) -> Iterator[list[str]]:
    """The words of each command in a fenced block."""
    for text in texts():
        for block in FENCE.findall(text):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(PROGRAM.format(program), line):
                    words = shlex.split(line, comments=True)
                    yield words[next(at for at, word in enumerate(words) if "=" not in word) :]


def mentioned_commands(program: str) -> Iterator[list[str]]:
    """Those in a sentence, where only what matters is said."""
    for text in texts():
        for span in SPAN.findall(FENCE.sub("", text)):
            if re.match(PROGRAM.format(program), span):
                yield shlex.split(span)


def check(words: list[str], *, whole: bool = True) -> None:
    """Raises click.UsageError where the command, an option or a value is none, or, if `whole`, one is missing.

    Paths are not looked for, and values that stand for others are not looked at.
    """
    if not whole and STAND_IN.fullmatch(words[1]):  # `wikiclip COMMAND --help`
        return
    if words[1] not in COMMANDS:
        raise click.UsageError(f"no command {words[1]!r}")
    command: click.Command | None = load(words[1])
    assert command is not None
    context = click.Context(command, info_name=words[1])
    arguments = words[2:]
    if isinstance(command, click.Group) and (whole or arguments):
        if arguments and STAND_IN.fullmatch(arguments[0]):
            return
        command = command.get_command(context, arguments.pop(0) if arguments else "")
        if command is None:
            raise click.UsageError(f"no command {' '.join(words[1:3])!r}")
    own = click.Context(command, parent=context, info_name=words[1])
    options = {name: each for each in command.get_params(own) for name in each.opts}
    if not whole and arguments and (last := options.get(arguments[-1])) is not None:
        # An option named without its value.
        arguments = arguments if getattr(last, "is_flag", False) else [*arguments, "..."]
    given, _, order = command.make_parser(own).parse_args(list(arguments))
    parameters = {parameter.name: parameter for parameter in command.get_params(own)}
    for name, value in given.items():
        parameter = parameters[name]
        values = value if isinstance(value, (list, tuple)) else [value]
        literal = all(isinstance(each, str) and not STAND_IN.fullmatch(each) for each in values)  # a flag is no str
        if isinstance(parameter.type, (click.Path, click.File)) or not literal:
            continue
        parameter.type_cast_value(own, value)
    missing = {parameter.name for parameter in parameters.values() if parameter.required}
    missing -= {parameter.name for parameter in order}
    if whole and missing:
        raise click.UsageError(f"{words}: without {sorted(map(str, missing))}")


def test_shown_wikiclip_commands_are_taken_by_the_parser() -> None:
    commands = list(shown_commands("wikiclip"))
    assert len(commands) > 20
    for words in commands:
        check(words)


def test_mentioned_wikiclip_commands_are_taken_by_the_parser() -> None:
    commands = list(mentioned_commands("wikiclip"))
    assert len(commands) > 20
    for words in commands:
        check(words, whole=False)


def test_torchrun_runs_a_command_that_the_parser_takes() -> None:
    commands = [*shown_commands("torchrun"), *mentioned_commands("torchrun")]
    assert commands
    for words in commands:
        module = words.index("-m")
        assert words[module + 1] == "wikiclip"
        assert words[1] == "--nproc-per-node"
        check([word for word in words[module + 1 :] if word != "..."], whole="..." not in words)


@pytest.mark.parametrize(
    "line",
    [
        "wikiclip no-such",
        "wikiclip serve --no-such",
        "wikiclip export --out x",
        "wikiclip recognize --top-k 1000 --bundle x",
        "wikiclip index --bundle x --device tpu",
    ],
)
def test_a_wrong_command_would_be_found(line: str) -> None:
    with pytest.raises(click.UsageError):
        check(line.split())


def test_shown_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    commands = [*shown_commands("make"), *mentioned_commands("make")]
    shown = {word for words in commands for word in words[1:] if "=" not in word}
    assert shown
    assert shown <= targets


@cache
def help_of(*program: str) -> str:
    return subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    ).stdout


def test_shown_python_programs_know_their_options() -> None:
    commands = [*shown_commands("python"), *mentioned_commands("python -m")]
    programs = 0
    for words in commands:
        if words[1] == "-c":
            compile(words[2], "shown", "exec")
            continue
        program = words[1:3] if words[1] == "-m" else words[1:2]
        assert (ROOT / program[-1]).is_file() or (ROOT / f"{program[-1].replace('.', '/')}.py").is_file(), words
        flags = [word for word in words if word.startswith("--")]
        after = words[len(program) + 1 :][:1]
        if (
            after
            and re.search(rf"^  {re.escape(after[0])} ", help_of(*program), re.MULTILINE)
            and after[0] not in flags
        ):
            program = [*program, *after]  # a subcommand, which has a help of its own
        unknown = [flag for flag in flags if not re.search(rf"{flag}\b", help_of(*program))]
        assert not unknown, words
        programs += 1
    assert programs > 3


def test_shown_compose_commands_name_profiles_and_services_that_exist() -> None:
    compose: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    services = compose["services"]
    profiles = {profile for service in services.values() for profile in service.get("profiles", [])}
    verbs = {"up", "down", "build", "config", "ps", "logs", "pull", "stop", "restart", "exec", "run"}
    commands = [*shown_commands("docker compose"), *mentioned_commands("docker compose")]
    assert commands
    for words in commands:
        rest = iter(words[2:])
        verb = None
        for word in rest:
            if word == "--profile":
                assert next(rest) in profiles, words
            elif word.startswith("-"):
                assert word in {"-d", "--detach", "--build", "-f", "--follow", "--wait", "-v", "--volumes"}, words
            elif verb is None:
                verb = word
                assert verb in verbs, words
            else:
                assert word in services, words
                if verb in {"exec", "run"}:
                    break


def test_shown_docker_builds_name_targets_that_exist() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, flags=re.MULTILINE))
    for words in shown_commands("docker build"):
        if "--target" in words:
            assert words[words.index("--target") + 1] in stages, words


def test_shown_curl_routes_exist() -> None:
    paths = create_app(Settings(bundle=Path("bundle"))).openapi()["paths"]
    routes = [re.compile(re.sub(r"\\{[^}]*\\}", "[^/]+", re.escape(path))) for path in paths]
    shown = [urlsplit(word).path for words in shown_commands("curl") for word in words if word.startswith("http")]
    assert shown
    assert [path for path in shown if not any(route.fullmatch(path) for route in routes)] == []


def test_shown_locust_commands_are_taken_by_locust_itself() -> None:
    commands = list(shown_commands("locust"))
    assert commands
    for words in commands:
        # `--list` reads all there is to read, and then asks nobody anything.
        listed = subprocess.run(
            [sys.executable, "-m", *words, "--list"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
        )
        assert listed.returncode == 0, listed.stderr
        users = {line.strip() for line in listed.stdout.splitlines()}
        assert {word for word in words if re.fullmatch(r"[A-Z][a-z]+", word)} <= users
