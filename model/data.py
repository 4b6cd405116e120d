"""What training reads: pairs of query image and entity, and the entities of the catalog."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from catalog import is_url, read_catalog
from core.errors import CatalogError
from core.jsonl import Rejected, RejectLog, read_jsonl
from model.oven import OvenImages, find_table


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """An image file, and the record that named it."""

    path: Path
    line: int  # 1-based, in the file that named it; 0 for a catalog, whose readers keep no lines
    record: str


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A query image and the entity in it."""

    data_id: str
    entity_id: str
    data_split: str
    image: ImageSource

    @property
    def seen(self) -> bool | None:
        """Whether the entity was trained on, as the split's name ends in; None where the name does not say."""
        if self.data_split.endswith("unseen"):
            return False
        return True if self.data_split.endswith("seen") else None


@dataclass(frozen=True, kw_only=True)
class Entity:
    """What the entity side needs of a record."""

    entity_id: str
    text: str
    images: tuple[ImageSource, ...]


def read_pairs(
    path: Path, image_root: Path | None = None, ovenid2impath: Path | None = None, *, missing_ok: bool = False
) -> Iterator[Pair | Rejected]:
    """The pairs of a JSONL file, and a `Rejected` for each line that is none or, unless `missing_ok`, lacks its image.

    Image paths are relative to `image_root`, or else to the file's folder. A row of OVEN's own files names an
    `image_id` instead, whose path stands in `ovenid2impath`; without that argument, in the file of that name beside the
    pairs or in the image root. Raises `CatalogError` if a file cannot be read at all.
    """
    folder = image_root or path.parent
    oven = OvenImages(folder, ovenid2impath or find_table(path.parent, folder))
    for item in read_jsonl(path):
        if isinstance(item, Rejected):
            yield item
            continue
        line, row = item
        record = json.dumps(row, ensure_ascii=False)[:500]
        named = "image_id" if "image_id" in row and "image" not in row else "image"
        fields = [row.get(name) for name in ("data_id", named, "entity_id", "data_split")]
        if not all(isinstance(value, str) and value for value in fields):
            reason = f"data_id, {named}, entity_id and data_split must be strings, none empty"
            yield Rejected(line=line, reason=reason, record=record)
            continue
        data_id, image, entity_id, data_split = (str(value) for value in fields)
        file = (oven.find(image) if named == "image_id" else None) or folder / image
        if not missing_ok and not file.is_file():
            yield Rejected(line=line, reason=f"image {image} does not exist in {folder}", record=record)
            continue
        source = ImageSource(path=file, line=line, record=record)
        yield Pair(data_id=data_id, entity_id=entity_id, data_split=data_split, image=source)


def load_pairs(
    path: Path,
    image_root: Path | None,
    rejects: RejectLog,
    *,
    ovenid2impath: Path | None = None,
    limit: int | None = None,
) -> list[Pair]:
    """All pairs of a file, or its first `limit` with two of an entity at most; rejects logged.

    Raises `CatalogError` if not one is left.
    """
    pairs: list[Pair] = []
    of_entity: Counter[str] = Counter()
    for item in read_pairs(path, image_root, ovenid2impath):
        if isinstance(item, Rejected):
            rejects.add(item)
        elif limit is None or of_entity[item.entity_id] < 2:
            pairs.append(item)
            of_entity[item.entity_id] += 1
            if len(pairs) == limit:
                break
    if not pairs:
        raise CatalogError(
            f"{path} holds no usable pair ({rejects.count} rejected, see {rejects.path}); check its images"
        )
    return pairs


def load_entities(
    path: Path, image_root: Path | None, rejects: RejectLog, only: Collection[str] | None = None
) -> list[Entity]:
    """The entities of a catalog in its order, or those named in `only`; bad records and missing images logged.

    An image that is missing, or is named by URL, is rejected alone: its entity stays. Raises `CatalogError` if the
    catalog cannot be read, or holds none of them.
    """
    entities = []
    for item in read_catalog(path, image_root):
        if isinstance(item, Rejected):
            rejects.add(item)
        elif only is None or item.entity_id in only:
            images = []
            for image in item.images:
                record = json.dumps({"entity_id": item.entity_id, "image": image}, ensure_ascii=False)[:500]
                reason = "an image named by URL is not fetched" if is_url(image) else "the image does not exist"
                if is_url(image) or not Path(image).is_file():
                    rejects.add(Rejected(line=0, reason=reason, record=record))
                else:
                    images.append(ImageSource(path=Path(image), line=0, record=record))
            entities.append(Entity(entity_id=item.entity_id, text=item.text, images=tuple(images)))
    if not entities:
        rejected = f" ({rejects.count} rejected, see {rejects.path})" if rejects.count else ""
        if only is None:
            raise CatalogError(f"{path} holds no usable entity{rejected}; check that it is a catalog")
        raise CatalogError(
            f"{path} holds none of the entities that are asked for{rejected}; check that it belongs to the pairs"
        )
    return entities


def known_pairs(pairs: list[Pair], entities: list[Entity], catalog: Path, rejects: RejectLog) -> list[Pair]:
    """The pairs whose entity is in the catalog, the others logged. Raises `CatalogError` if none is left."""
    known = {entity.entity_id for entity in entities}
    kept = []
    for pair in pairs:
        if pair.entity_id in known:
            kept.append(pair)
        else:
            reason = f"entity_id {pair.entity_id} is not in the catalog"
            rejects.add(Rejected(line=pair.image.line, reason=reason, record=pair.image.record))
    if not kept:
        raise CatalogError(f"no pair names an entity of {catalog}; check that the catalog belongs to the pairs")
    return kept
