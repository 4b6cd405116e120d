"""The console script: names the commands, imports them only when used, holds no logic."""

from __future__ import annotations

import click

from core.cli import LazyGroup, run

COMMANDS = {
    "catalog": ("catalog.cli:catalog", "Build a catalog from Wikimedia's dumps, or bring one up to date."),
    "fetch-images": ("fetch.cli:fetch_images", "Download a catalog's images into tar shards, politely."),
    "train": ("model.cli:train", "Train the adaptor on pairs of query image and entity."),
    "export": ("export.cli:export", "Write a servable bundle from a catalog and a checkpoint."),
    "index": ("index.cli:index", "Rebuild the search index of a bundle."),
    "serve": ("service.cli:serve", "Serve a bundle over HTTP."),
    "recognize": ("service.cli:recognize", "Name the entities in images, without or through a service."),
    "evaluate": ("benchmarks.cli:evaluate", "Measure accuracy on labelled queries: seen, unseen, HM, recall@k."),
    "inspect": ("index.cli:inspect", "Say what a bundle holds, and whether it is whole."),
    "bundle": ("index.cli:bundle", "Bring a bundle to a folder or an S3-compatible store, and from there."),
    "bench": ("benchmarks.cli:bench", "Run one benchmark."),
}


@click.command(
    cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}
)
@click.version_option(package_name="wikiclip-serve", prog_name="wikiclip")
def cli() -> None:
    """WikiCLIP Serve: which entity of Wikipedia is in this picture."""


def main() -> None:
    run(cli)


if __name__ == "__main__":
    main()
