"""`make cli-docs`: every command's `--help` as one page. `python -m core.cli_reference wikiclip:cli > docs/cli.md`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import click

WIDTH = 110  # columns, whatever the terminal has


def cli_reference(group: click.Group, name: str) -> str:
    """The Markdown page of `group` and each of its commands, called as `name`: their help, word for word."""
    settings = {**group.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    parent = click.Context(group, info_name=name, **settings)
    intro = f"# Command line\n\nWritten by `make cli-docs` from the commands themselves.\n\n{_block(group, parent)}"
    return "\n".join([intro, *_sections(group, parent)])


def _sections(group: click.Group, parent: click.Context) -> Iterator[str]:
    for command_name in group.list_commands(parent):
        command = group.get_command(parent, command_name)
        assert command is not None
        context = click.Context(command, parent=parent, info_name=command_name)
        yield f"## {context.command_path}\n\n{_block(command, context)}"
        if isinstance(command, click.Group):
            yield from _sections(command, context)


def _block(command: click.Command, context: click.Context) -> str:
    return f"```text\n{command.get_help(context)}\n```\n"


def main() -> None:
    module, _, attribute = sys.argv[1].partition(":")
    sys.stdout.write(cli_reference(getattr(importlib.import_module(module), attribute), module))


if __name__ == "__main__":
    main()
