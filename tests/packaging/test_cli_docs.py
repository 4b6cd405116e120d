"""docs/cli.md is what the commands say; every command line that the documents show is one that the parser takes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import click
import pytest

import wikiclip
from service.app import create_app
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "demo" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def shown_commands(program: str) -> Iterator[list[str]]:
    for document in DOCUMENTS:
        if document.name == "cli.md":
            continue
        for block in FENCE.findall(document.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(rf"{program}\s+[^\s(]", line):
                    yield shlex.split(line, comments=True)


def check(words: list[str]) -> None:
    """Raises click.UsageError where the command or an option is not there; values are not looked at."""
    context = click.Context(wikiclip.cli, info_name="wikiclip")
    command = wikiclip.cli.get_command(context, words[1])
    if command is None:
        raise click.UsageError(f"no command {words[1]!r}")
    own = click.Context(command, parent=context, info_name=words[1])
    _, _, order = command.make_parser(own).parse_args(list(words[2:]))
    given = {parameter.name for parameter in order}
    missing = [parameter.name for parameter in command.get_params(own) if parameter.required]
    missing = [name for name in missing if name not in given]
    if missing:
        raise click.UsageError(f"{words}: without {missing}")


@pytest.mark.parametrize("columns", ["50", "200"])
def test_the_page_is_what_the_commands_say(columns: str) -> None:
    # In a process of its own: click keeps help options that another test, which calls a command alone, has made.
    command = [sys.executable, "-m", "core.cli_reference", "wikiclip:cli"]
    written = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "COLUMNS": columns}
    )
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == written.stdout, "the commands changed: run `make cli-docs`"


def test_shown_wikiclip_commands_are_taken_by_the_parser() -> None:
    commands = list(shown_commands("wikiclip"))
    assert commands
    for words in commands:
        check(words)


@pytest.mark.parametrize("line", ["wikiclip no-such", "wikiclip serve --no-such", "wikiclip export --out x"])
def test_a_wrong_command_would_be_found(line: str) -> None:
    with pytest.raises(click.UsageError):
        check(line.split())


def test_shown_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    shown = {words[1] for words in shown_commands("make")}
    assert shown
    assert shown <= targets


def test_shown_curl_routes_exist() -> None:
    paths = create_app(Settings(bundle=Path("bundle"))).openapi()["paths"]
    routes = [re.compile(re.sub(r"\\{[^}]*\\}", "[^/]+", re.escape(path))) for path in paths]
    shown = [urlsplit(word).path for words in shown_commands("curl") for word in words if word.startswith("http")]
    assert shown
    assert [path for path in shown if not any(route.fullmatch(path) for route in routes)] == []
