"""The command-line page of the site has the help of every command, with every option."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from wikiclip.cli import COMMANDS, load

ROOT = Path(__file__).resolve().parents[2]


def written(columns: str) -> str:
    """Return the page. It is written in a process of its own: click keeps help options that other tests have made."""
    command = [sys.executable, ".ci/cli_reference.py"]
    environment = {**os.environ, "COLUMNS": columns, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout


@pytest.fixture(scope="module")
def sections() -> dict[str, str]:
    """Return the text below each heading."""
    parts = re.split(r"^## (.+)$", written("80"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield each command and subcommand with its name."""
    pending = [(f"wikiclip {name}", load(name)) for name in COMMANDS]
    for name, command in pending:
        yield name, command
        if isinstance(command, click.Group):
            pending += [(f"{name} {each}", subcommand) for each, subcommand in command.commands.items()]


def test_every_command_has_a_section(sections: dict[str, str]) -> None:
    assert set(sections) == {name for name, _ in commands()}


def test_every_option_and_argument_is_in_the_section_of_its_command(sections: dict[str, str]) -> None:
    for name, command in commands():
        context = click.Context(command, info_name=name)
        for parameter in command.params:
            names = parameter.opts if isinstance(parameter, click.Option) else [parameter.make_metavar(context)]
            for each in names:
                assert re.search(rf"(?<![\w-]){re.escape(each)}(?![\w-])", sections[name]), f"{name}: {each} is missing"


def test_the_page_does_not_depend_on_the_terminal() -> None:
    assert written("50") == written("200")
