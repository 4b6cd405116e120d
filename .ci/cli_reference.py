"""Write the command-line page of the site: the help of every command. `make docs` calls it through `site_pages.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from wikiclip.cli import COMMANDS, CONTEXT, help_text, load

WIDTH = 76  # columns, whatever the width of the terminal


def cli_reference() -> str:
    """Return a Markdown page with the help of `wikiclip` and of each command."""
    intro = f"# Command line\n\n`wikiclip COMMAND --help` prints the same in a terminal.\n\n{_block(help_text())}"
    return "\n".join([intro, *(section for name in COMMANDS for section in _sections(load(name), f"wikiclip {name}"))])


def _sections(command: click.Command, name: str) -> Iterator[str]:
    context = click.Context(command, info_name=name, **{**CONTEXT, "max_content_width": WIDTH}, terminal_width=WIDTH)
    yield f"## {name}\n\n{_block(command.get_help(context))}"
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            subcommand = command.get_command(context, each)
            assert subcommand is not None
            yield from _sections(subcommand, f"{name} {each}")


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"


if __name__ == "__main__":
    sys.stdout.write(cli_reference())
