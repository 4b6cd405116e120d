"""How a command of the command line runs and fails."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from core.errors import WikiclipError, needed_by

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 120, "show_default": True}


def run(command: click.Command, arguments: Sequence[str] | None = None, *, name: str | None = None) -> None:
    """Run a command, by default with the arguments of this process.

    Exits with 0, 2 on bad usage or input (one line on stderr), 130 on Ctrl-C, 1 on a fault of the program. Messages
    call the command `name`.
    """
    try:
        with needed_by(f"'{name or command.name}'"):
            # Without standalone mode, click returns the code of an `Exit`, and None at a command's end.
            code = command.main(arguments, name, standalone_mode=False, **CONTEXT)
    except click.ClickException as error:
        where = f" (see `{error.ctx.command_path} --help`)" if isinstance(error, click.UsageError) and error.ctx else ""
        click.echo(f"error: {error.format_message()}{where}", err=True)
        sys.exit(2)
    except WikiclipError as error:
        click.echo(f"error: {error.detail}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(130)
    if code:
        sys.exit(code)
