"""The console script `wikiclip`. It imports a command, and click, only when that command runs."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import click

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 120, "show_default": True}
COMMANDS = {
    "up": ("wikiclip.commands:up", "Go from a folder of pictures to a service, in one command."),
    "catalog": ("catalog.cli:catalog", "Build a catalog from a folder of pictures or from Wikimedia's dumps."),
    "fetch-images": ("fetch.cli:fetch_images", "Download a catalog's images into tar shards, politely."),
    "credits": ("fetch.cli:add_credits", "Add authors and licences of Wikimedia's images to a catalog."),
    "train": ("model.cli:train", "Train the adaptor on pairs of query image and entity."),
    "export": ("export.cli:export", "Write a servable bundle from a catalog and a checkpoint."),
    "index": ("index.cli:index", "Rebuild the search index of a bundle."),
    "serve": ("service.cli:serve", "Serve a bundle over HTTP."),
    "recognize": ("service.cli:recognize", "Name the entities in images, without or through a service."),
    "embed": ("service.cli:embed", "Write the query embeddings of images, without or through a service."),
    "mcp": ("service.cli:mcp", "Let agents recognise images and look up entities, over stdio or HTTP."),
    "evaluate": ("evaluation.cli:evaluate", "Measure accuracy on labelled queries: seen, unseen, HM, recall@k."),
    "inspect": ("wikiclip.commands:inspect", "Check and describe a bundle, or an ONNX file as an image encoder."),
    "bundle": ("index.cli:bundle", "Copy a bundle to or from a folder or an S3-compatible store."),
    "bench": ("benchmarks.cli:bench", "Run one benchmark."),
}


def main() -> None:
    """Run `sys.argv`. Exits with 0, 2 on bad usage or input, 130 on Ctrl-C, 1 on a fault of the program."""
    name, *arguments = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        sys.stdout.write(help_text())
    elif name == "--version":
        sys.stdout.write(f"wikiclip, version {version('wikiclip-serve')}\n")
    elif name not in COMMANDS:
        problem = f"no command {name!r}" if name else "a command is missing"
        sys.stderr.write(f"error: {problem} (see `wikiclip --help`)\n")
        sys.exit(2)
    else:
        run(load(name), arguments, name=f"wikiclip {name}")


def run(command: click.Command, arguments: Sequence[str] | None = None, *, name: str | None = None) -> None:
    """Run a command, by default with the arguments of this process.

    Exits with 0, 2 on bad usage or input (one line on stderr), 130 on Ctrl-C, 1 on a fault of the program. Messages
    call the command `name`.
    """
    import click

    from core.errors import WikiclipError, needed_by

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


def load(name: str) -> click.Command:
    """Import a command by its name."""
    module, _, attribute = COMMANDS[name][0].partition(":")
    command: click.Command = getattr(importlib.import_module(module), attribute)
    return command


def help_text() -> str:
    """Return what `wikiclip --help` prints."""
    commands = "\n".join(f"{name:<13} {summary}" for name, (_, summary) in COMMANDS.items())
    options = "--version      Show the version and exit.\n-h, --help     Show this message and exit."
    return (
        "Usage: wikiclip [OPTIONS] COMMAND [ARGS]...\n\n"
        "  WikiCLIP Serve: which entity of Wikipedia is in this picture.\n\n"
        f"Options:\n{textwrap.indent(options, '  ')}\n\n"
        f"Commands:\n{textwrap.indent(commands, '  ')}\n"
    )
