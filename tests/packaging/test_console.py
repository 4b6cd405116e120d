"""Every command answers --help, and says what each of its options is for."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest

from wikiclip.cli import COMMANDS, load


def wikiclip(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("wikiclip")
    return subprocess.run([script, *arguments], capture_output=True, text=True, check=False)


def options_of(name: str) -> list[click.Option]:
    command = load(name)
    commands = list(command.commands.values()) if isinstance(command, click.Group) else [command]
    params = [param for each in commands for param in each.get_params(click.Context(each, info_name=name))]
    return [param for param in params if isinstance(param, click.Option) and param.name != "help"]


def test_help_lists_every_command() -> None:
    done = wikiclip("--help")
    assert done.returncode == 0, done.stderr
    for name, (_, summary) in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert summary in done.stdout


def test_version() -> None:
    assert wikiclip("--version").stdout == f"wikiclip, version {version('wikiclip-serve')}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_command_answers_help(name: str) -> None:
    done = wikiclip(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: wikiclip {name} ")
    assert done.stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name: str) -> None:
    options = options_of(name)
    assert options
    assert [option.name for option in options if not option.help] == []


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["inspect"], ["serve", "--no-such-option"]])
def test_bad_usage_is_one_line_and_exit_2(arguments: list[str]) -> None:
    done = wikiclip(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")


def test_python_m_runs_commands_in_the_folder_of_an_application(small_bundle: Path, tmp_path: Path) -> None:
    for package in ("core", "index", "service"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    command = [sys.executable, "-m", "wikiclip", "inspect", str(small_bundle)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("bundle ")
