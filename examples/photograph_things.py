"""Sample photographs for docs/tutorial.md: four each of 12 things.

    python examples/photograph_things.py pictures

The things are cut-out photographs from the drawing program Tux Paint, which apt downloads from Debian. Each is placed
on made-up backgrounds, turned, in changing light and partly covered. The photographs are the same each time.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from demo.photograph import Photographer, premultiply, to_jpeg, to_tensor
from demo.photos import BUILD, fit_square
from demo.sources import fetch_debian_package
from wikiclip.cli import run

PHOTOS_EACH = 4
SIZE_PX = 320
STRENGTH = 0.7  # of the changes, from 0 to 1
THINGS = {
    "Camel": "animals/mammals/camel/camel",
    "Cello": "hobbies/music/string/cello",
    "Dromedary": "animals/mammals/camel/dromedary",
    "Electric guitar": "hobbies/music/string/guitar_electric",
    "Fire truck": "vehicles/emergency/firetruck",
    "Giraffe": "animals/mammals/giraffe",
    "Koala": "animals/marsupials/koala",
    "Lion": "animals/mammals/cats/lion",
    "Owl": "animals/birds/owl",
    "Pineapple": "food/fruit/pineapple",
    "Violin": "hobbies/music/string/violin",
    "Zebra": "animals/mammals/equines/zebra",
}


def photographs(cut_out: Path, seed: int) -> list[bytes]:
    """Return photographs of a cut-out picture, as JPEG."""
    picture_14HW = premultiply(to_tensor(fit_square(cut_out, SIZE_PX))[None])
    copies = picture_14HW.expand(PHOTOS_EACH, -1, -1, -1)
    photos = Photographer(seed).photograph(copies, SIZE_PX, torch.full((PHOTOS_EACH,), STRENGTH))
    return [to_jpeg(photo, 85) for photo in photos]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(folder: Path) -> None:
    """Write the photographs and texts of each thing to a folder of its name in FOLDER."""
    click.echo("fetching tuxpaint-stamps-default (161 MB) from Debian, without installing it")
    stamps = fetch_debian_package("tuxpaint-stamps-default", BUILD / "packages") / "usr/share/tuxpaint/stamps"
    for seed, (title, name) in enumerate(THINGS.items()):
        thing = folder / title
        thing.mkdir(parents=True, exist_ok=True)
        sentence = (stamps / f"{name}.txt").read_text(encoding="utf-8").splitlines()[0]
        (thing / "text.txt").write_text(sentence, encoding="utf-8")
        for number, photo in enumerate(photographs(stamps / f"{name}.png", seed), start=1):
            (thing / f"{number}.jpg").write_bytes(photo)
    click.echo(f"{folder}: {PHOTOS_EACH} photographs each of {len(THINGS)} things")


if __name__ == "__main__":
    run(main)
