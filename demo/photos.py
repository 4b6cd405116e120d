"""Builds the photo demo under `build/photos/`: `python -m demo.photos`, or `make demo-photos`.

- `packages/`: Debian's `tuxpaint-stamps-default` (pictures and sentences) and `wordnet-base`, unpacked
- `pictures/`, `catalog.jsonl`: the pictures as squares, since the encoder sees the centre only, and the entities
- `made_up/`, `queries_made_up.jsonl`: the cut-out pictures on other backgrounds, to fit confidence on
- `bundle/`: the bundle, with the image encoder `photo` and without training

A second run makes what is missing. With `--queries`, natural photographs of the same things become queries
for `wikiclip evaluate`. They are recognised by ImageNet's ids in their paths, such as `n02129165_0.jpg` or
`n02129165/7.JPEG`: the id is the offset of a noun in WordNet 3.0.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import click
from PIL import Image, ImageOps
from tqdm import tqdm

from catalog.formats import read_catalog, write_catalog
from catalog.records import EntityRecord
from core.errors import UserError
from core.files import atomic_write_bytes
from core.lines import Rejected, to_jsonl
from demo.sources import WordNet, fetch_debian_package
from demo.stamps import build_entities, find_sense, read_stamps
from index.manifest import MANIFEST_FILE
from wikiclip.cli import run

BUILD = Path("build/photos")
_STAMPS, _WORDNET = "tuxpaint-stamps-default", "wordnet-base"
_PICTURE_PX, _THUMBNAIL_PX, _PHOTO_PX = 320, 256, 260
_BATCH, _JPEG_QUALITY = 32, 85
_IMAGENET_ID = re.compile(r"(?<!\w)n(\d{8})(?!\d)")

# Things whose title, or its last words, means something else to WordNet.
_OFFSETS = {
    "bradley": 4389033,  # tank
    "cep": 13054560,  # bolete
    "colorful-rooster": 1514668,
    "f-22-raptor": 4552348,  # warplane
    "fireman": 7846,  # person
    "green-pepper": 7720875,
    "hammer": 3481172,
    "paratrooper": 7846,
    "peacock": 1806143,
    "red-headed-cep": 13054560,
    "ww2-german-gun": 4389033,
    "yellow-pepper": 7720875,
}


@click.command()
@click.option(
    "--queries", "pictures", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="FOLDER",
    help="Write build/photos/queries.jsonl for the photographs in this folder, with ImageNet's ids in their paths.",
)  # fmt: skip
def main(pictures: Path | None) -> None:
    """Build the bundle of the photo demo. With --queries, also write queries to evaluate it with."""
    bundle, catalog, made_up = BUILD / "bundle", BUILD / "catalog.jsonl", BUILD / "queries_made_up.jsonl"
    if not catalog.exists():
        build_catalog(catalog)
    if not made_up.exists():
        photograph(_read(catalog), made_up)
    if not (bundle / MANIFEST_FILE).exists():
        _export(catalog, made_up, bundle)
    if pictures is not None:
        wordnet = _wordnet()
        rows = list(find_queries(pictures, find_offsets(_read(catalog), wordnet), wordnet))
        write_queries(rows, BUILD / "queries.jsonl")


def build_catalog(path: Path) -> None:
    """Fetch the packages and write the catalog. Raises `UserError`."""
    click.echo(f"fetching {_STAMPS} (161 MB) and {_WORDNET} from Debian, without installing them")
    try:
        stamps = fetch_debian_package(_STAMPS, BUILD / "packages") / "usr/share/tuxpaint/stamps"
        fetch_debian_package(_WORDNET, BUILD / "packages")
    except UserError as error:
        raise UserError(f"{error.detail}; give a folder of your own pictures: make demo-photos PHOTOS=FOLDER") from None
    records = build_entities(read_stamps(stamps), _wordnet())
    shown = tqdm(records, desc="pictures", unit="thing")
    write_catalog(path, (_with_squares(record, path.parent / "pictures") for record in shown))
    click.echo(f"{path}: {len(records)} things with {sum(len(record.images) for record in records)} photographs")


def photograph(records: Sequence[EntityRecord], queries: Path) -> None:
    """Write each entity's first picture as a photograph on a made-up background, and the queries that name them.

    On white, where they are cut out, they would be much easier to recognise than natural photographs, and confidence
    far too high.
    """
    from demo.photograph import take_photographs

    (queries.parent / "made_up").mkdir(exist_ok=True)
    rows = []
    for start in tqdm(range(0, len(records), _BATCH), desc="photographs", unit="batch"):
        batch = records[start : start + _BATCH]
        cut_outs = (fit_square(Path(record.images[0]), _PHOTO_PX) for record in batch)
        files = take_photographs(cut_outs, _PHOTO_PX, start, quality=_JPEG_QUALITY)
        for record, file in zip(batch, files, strict=True):
            image = f"made_up/{record.entity_id}.jpg"
            (queries.parent / image).write_bytes(file)
            rows.append({"image": image, "entity_id": record.entity_id})
    atomic_write_bytes(queries, to_jsonl(rows))


def fit_square(path: Path, size_px: int) -> Image.Image:
    """Return a cut-out picture in the middle of a transparent square."""
    with Image.open(path) as image:
        cut_out = image.convert("RGBA")
    cut_out = cut_out.crop(cut_out.getchannel("A").getbbox())
    return ImageOps.pad(cut_out, (size_px, size_px), color=(0, 0, 0, 0))


def _read(catalog: Path) -> list[EntityRecord]:
    return [item for item in read_catalog(catalog) if not isinstance(item, Rejected)]


def _wordnet() -> WordNet:
    return WordNet(BUILD / "packages" / _WORDNET / "usr/share/wordnet")


def _with_squares(record: EntityRecord, folder: Path) -> EntityRecord:
    """Return the record with copies of its pictures in `folder`, by paths relative to the catalog next to it."""
    folder.mkdir(exist_ok=True)
    images = []
    for number, image in enumerate(record.images):
        square = folder / f"{record.entity_id}_{number}.png"
        fit_square(Path(image), _PICTURE_PX).save(square, compress_level=1)
        images.append(f"{folder.name}/{square.name}")
    return replace(record, images=tuple(images))


def _export(catalog: Path, made_up: Path, bundle: Path) -> None:
    from core.runtime import keep_freed_memory
    from export.config import ExportConfig
    from export.pipeline import export_bundle

    keep_freed_memory()
    export_bundle(
        ExportConfig(
            catalog=catalog,
            image_encoder="photo",
            validation=made_up,
            validation_made_up=True,
            out=bundle,
            resume=True,
            shard_size=_BATCH,
            thumbnail_px=_THUMBNAIL_PX,
            store_text=True,
            name="photos",
            progress=True,
        )
    )


def find_offsets(records: Iterable[EntityRecord], wordnet: WordNet) -> dict[str, tuple[int, bool]]:
    """Map entity ids to the offset of WordNet's sense, and whether it is of the whole title: "Brown hen" is a hen."""
    offsets = {}
    for record in records:
        words = record.title.split()
        for start in range(len(words)):
            sense = find_sense(" ".join(words[start:]), record.types[-1], wordnet)
            if offset := _OFFSETS.get(record.entity_id, sense and sense.offset):
                offsets[record.entity_id] = offset, start == 0
                break
    return offsets


def find_queries(pictures: Path, offsets: Mapping[str, tuple[int, bool]], wordnet: WordNet) -> Iterator[dict[str, str]]:
    """Yield a query for each photograph of a thing in the catalog, and of a thing unlike any in it.

    If several entities have a sense, the one with the whole title counts. Photographs of narrower or broader things,
    such as a poodle or a bird, are left out.
    """
    by_offset: dict[int, list[tuple[bool, str]]] = {}
    for entity_id, (offset, whole) in offsets.items():
        by_offset.setdefault(offset, []).append((whole, entity_id))
    broader = set().union(*map(wordnet.ancestors, by_offset))
    for path in sorted(pictures.rglob("*")):
        found = _IMAGENET_ID.search(path.relative_to(pictures).as_posix())
        if found is None or not path.is_file():
            continue
        offset = int(found[1])
        same = sorted(by_offset.get(offset, []), reverse=True)
        if same and (len(same) == 1 or same[0][0] > same[1][0]):
            entity_id = same[0][1]
        elif same or offset in broader or not by_offset.keys().isdisjoint(wordnet.ancestors(offset)):
            continue
        else:
            entity_id = f"n{found[1]}"
        yield {"data_id": path.stem, "image": str(path), "entity_id": entity_id, "data_split": "unseen"}


def write_queries(rows: list[dict[str, str]], path: Path) -> None:
    """Write queries with paths relative to their file, and say how to evaluate them."""
    if not rows:
        raise UserError("no picture has an ImageNet id in its path, such as n02129165_0.jpg; choose another folder")
    lines = (json.dumps({**row, "image": os.path.relpath(row["image"], path.parent)}) + "\n" for row in rows)
    atomic_write_bytes(path, "".join(lines).encode())
    click.echo(f"{path}: {len(rows)} queries; evaluate them with:")
    click.echo(f"wikiclip evaluate --bundle {BUILD / 'bundle'} --queries {path} --out {BUILD / 'predictions.jsonl'}")


if __name__ == "__main__":
    run(main)
