"""What the console script is made of: commands that are imported only when they are named, and one way to fail."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping

import click

from core.errors import WikiclipError


class LazyGroup(click.Group):
    """A group whose commands live elsewhere: `{name: ("module:attribute", one line of help)}`.

    Listing the commands imports none of them, so `--help` answers at once however heavy they are.
    """

    def __init__(self, *, lazy: Mapping[str, tuple[str, str]], **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return None
        module, _, attribute = self._lazy[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._lazy.items()])


def run(command: click.Command) -> None:
    """Run a command line: exit 0, 2 on bad usage or input (one line on stderr), 130 on Ctrl-C, 1 on our own fault."""
    try:
        command.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        where = f" (see `{error.ctx.command_path} --help`)" if isinstance(error, click.UsageError) and error.ctx else ""
        click.echo(f"error: {error.format_message()}{where}", err=True)
        sys.exit(2)
    except WikiclipError as error:
        click.echo(f"error: {error.detail}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(130)
