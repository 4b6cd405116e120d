"""The files that training reads: pairs of query image and entity, OVEN's own annotations, and catalog entities."""

import csv
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np

from catalog import EntityRecord, read_catalog
from core.errors import BadParameter, CatalogError
from core.lines import Rejected, RejectLog, excerpt, read_jsonl
from core.statistics import Reservoir

OVEN_TABLE = "ovenid2impath.csv"
_QUESTION_ID = "oven_query_"  # how the ids of OVEN's query split start
_STREAM = 2  # of random numbers; streams 0 and 1 are those of `model.train` and `model.trainer`


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """An image, a path or a URL, and the record that names it."""

    image: str
    line: int  # 1-based
    record: str

    @property
    def path(self) -> Path:
        return Path(self.image)


@dataclass(frozen=True, kw_only=True)
class QueryEmbedding:
    """The embedding of a query image that was not kept, and the content hash of its encoder, if it is known."""

    values: tuple[float, ...]
    encoder: str | None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """Read it from a row of a JSONL file. Raises `BadParameter`, whose message is a reason to reject the row."""
        values, encoder = row.get("embedding"), row.get("encoder")
        if encoder is not None and not isinstance(encoder, str):
            raise BadParameter("encoder must be a string")
        if not isinstance(values, list) or not all(type(each) in (int, float) for each in values):
            raise BadParameter("embedding must be a list of numbers")
        try:
            return cls(values=tuple(map(float, values)), encoder=encoder)
        except OverflowError as error:
            raise BadParameter("embedding must have finite numbers") from error


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A query image and the entity in it. If there is only its embedding, `image` has no path."""

    data_id: str
    entity_id: str
    data_split: str
    image: ImageSource
    embedding: QueryEmbedding | None = None

    @property
    def seen(self) -> bool | None:
        """Whether the split's name ends in seen or unseen; None if in neither."""
        if self.data_split.endswith("unseen"):
            return False
        return True if self.data_split.endswith("seen") else None


def _read_oven_table(table: Path | None) -> dict[str, str]:
    """Return OVEN's table of image ids and paths, two columns without a header. Raises `CatalogError`."""
    if table is None:
        raise CatalogError(
            f"the pairs name images by OVEN's ids, which needs {OVEN_TABLE} in their folder or in the image root; "
            "name it with --ovenid2impath"
        )
    try:
        with table.open(encoding="utf-8", newline="") as file:
            return dict(csv.reader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise CatalogError(
            f"{table} cannot be read as lines of image id and path: {error}; name OVEN's own table with --ovenid2impath"
        ) from error


def _find_oven_image(image_root: Path, image_id: str, listed: str) -> Path | None:
    """Return the file of an image of OVEN inside `image_root`, None if there is none.

    It is either at the path in the table, which is the source data set's, or, in the released snapshot, at
    `oven_images/<dd>/<image_id><suffix>`. `dd` is the first two digits of the id.
    """
    path = PurePosixPath(listed.lstrip("/"))
    in_shard = PurePosixPath(image_id.rpartition("_")[2][:2]) / (image_id + path.suffix)
    for candidate in (path, "oven_images" / in_shard, in_shard):
        file = image_root / candidate
        if ".." not in candidate.parts and os.path.isfile(file):
            return file
    return None


def read_pairs(
    path: Path,
    image_root: Path | None = None,
    ovenid2impath: Path | None = None,
    *,
    missing_ok: bool = False,
    embeddings: bool = False,
) -> Iterator[Pair | Rejected]:
    """Yield the pairs of a JSONL file, and a `Rejected` for each bad line and, unless `missing_ok`, missing image.

    Image paths are relative to `image_root`, by default the file's folder. Rows of OVEN's own files have an `image_id`
    instead, which the table `ovenid2impath` maps to a path. By default the table is searched in the file's folder and
    in the image root. With `embeddings`, a row may have an `embedding` instead of an image, as the service's feedback.
    Raises `CatalogError` if a file cannot be read at all.
    """
    folder = image_root or path.parent
    tables = (parent / OVEN_TABLE for parent in (path.parent, folder))
    table = ovenid2impath or next((table for table in tables if table.is_file()), None)
    oven_paths: dict[str, str] | None = None

    def find_image(field: str, image: str) -> Path:
        nonlocal oven_paths
        file = folder / image
        if field == "image_id":
            oven_paths = _read_oven_table(table) if oven_paths is None else oven_paths
            file = (_find_oven_image(folder, image, oven_paths[image]) if image in oven_paths else None) or file
        if not missing_ok and not os.path.isfile(file):  # unlike is_file, without an error for a long name
            raise BadParameter(f"image {image} does not exist in {folder}")
        return file

    for item in read_jsonl(path):
        if isinstance(item, Rejected):
            yield item
            continue
        line, row = item
        record = excerpt(row)
        try:
            if not has_embedding(row):
                field = "image_id" if "image_id" in row and "image" not in row else "image"
                texts = _texts(row, "data_id", field, "entity_id", "data_split")
                image, embedding = str(find_image(field, texts.pop(field))), None
            elif not embeddings:
                raise BadParameter("it has an embedding instead of an image, and training needs images")
            else:
                texts, image = _texts(row, "data_id", "entity_id", "data_split"), ""
                embedding = QueryEmbedding.of(row)
        except BadParameter as error:
            yield Rejected(line=line, reason=error.detail, record=record)
        else:
            yield Pair(**texts, image=ImageSource(image=image, line=line, record=record), embedding=embedding)


def has_embedding(row: Mapping[str, Any]) -> bool:
    """Return whether a row has an embedding instead of an image."""
    return "embedding" in row and not {"image", "image_id"} & row.keys()


def _texts(row: Mapping[str, Any], *names: str) -> dict[str, str]:
    """Return some fields. Raises `BadParameter` unless all are non-empty strings that UTF-8 can encode."""
    for name in names:
        value = row.get(name)
        if not isinstance(value, str) or value == "" or value.encode(errors="ignore").decode() != value:
            raise BadParameter(f"{', '.join(names[:-1])} and {names[-1]} must be non-empty strings")
    return {name: row[name] for name in names}


def load_pairs(
    path: Path,
    image_root: Path | None,
    rejects: RejectLog,
    *,
    ovenid2impath: Path | None = None,
    limit: int | None = None,
    missing_ok: bool = False,
    embeddings: bool = False,
) -> list[Pair]:
    """Return all pairs of a file and log its rejects. With `limit`, stop at that number, with two per entity at most.

    Raises `CatalogError` if there is no usable pair.
    """
    pairs: list[Pair] = []
    of_entity: Counter[str] = Counter()
    for item in read_pairs(path, image_root, ovenid2impath, missing_ok=missing_ok, embeddings=embeddings):
        if isinstance(item, Rejected):
            rejects.add(item)
        elif limit is None or of_entity[item.entity_id] < 2:
            pairs.append(item)
            of_entity[item.entity_id] += 1
            if len(pairs) == limit:
                break
    if not pairs:
        raise CatalogError(
            f"{path} has no usable pair ({rejects.count} rejected, see {rejects.path}); check its images"
        )
    return pairs


def question_warning(path: Path, pairs: Sequence[Pair]) -> str | None:
    """Return a warning about rows of OVEN's query split, such as "what brand is it?", or None if there are none."""
    count = sum(pair.data_id.startswith(_QUESTION_ID) for pair in pairs)
    if not count:
        return None
    return (
        f"{count} of {len(pairs)} rows of {path} are of OVEN's query split: their answer depends on a question, which "
        "is not read, so many cannot be right; use the entity split (oven_entity_*.jsonl)"
    )


def balance_pairs(pairs: Sequence[Pair], limit: int, seed: int) -> list[Pair]:
    """Return at most `limit` random pairs of each entity, in their order. The paper balances to 200 per entity."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, pair in enumerate(pairs):
        rows[pair.entity_id].append(row)
    rng = np.random.default_rng((seed, _STREAM))
    chosen = [rng.choice(of_entity, min(limit, len(of_entity)), replace=False) for of_entity in rows.values()]
    return [pairs[row] for row in sorted(row for rows_of_entity in chosen for row in rows_of_entity)]


def load_entities(
    path: Path, image_root: Path | None, rejects: RejectLog, only: Collection[str] | None = None
) -> list[EntityRecord]:
    """Return the entities of a catalog in its order, or those in `only`, and log bad records.

    Raises `CatalogError` if the catalog cannot be read or has no usable entity.
    """
    entities = []
    for item in read_catalog(path, image_root):
        if isinstance(item, Rejected):
            rejects.add(item)
        elif only is None or item.entity_id in only:
            entities.append(item)
    if not entities:
        what = "no usable entity" if only is None else "none of the entities in the pairs"
        rejected = f" ({rejects.count} rejected, see {rejects.path})" if rejects.count else ""
        raise CatalogError(f"{path} has {what}{rejected}; check that it is the right catalog")
    return entities


def draw_entities(
    path: Path, image_root: Path | None, rejects: RejectLog, *, count: int, always: Collection[str]
) -> tuple[list[EntityRecord], int]:
    """Return the entities in `always` and `count` others with an image, drawn at random, in the catalog's order.

    Also return how many there were to draw from. Only the drawn ones are kept in memory. Raises what `load_entities`
    does.
    """
    named: list[EntityRecord] = []
    drawn: Reservoir[EntityRecord] = Reservoir(count)
    for item in read_catalog(path, image_root):
        if isinstance(item, Rejected):
            rejects.add(item)
        elif item.entity_id in always:
            named.append(item)
        elif item.images:
            drawn.add(item)
    if not named and not drawn.seen:
        raise CatalogError(f"{path} has no entity with an image; check that it is the right catalog")
    return sorted([*named, *drawn.items], key=lambda entity: entity.line), drawn.seen


def known_pairs(pairs: list[Pair], entity_ids: Container[str], catalog: Path, rejects: RejectLog) -> list[Pair]:
    """Return the pairs whose entity is in the catalog, and log the others.

    Raises `CatalogError` if none is left.
    """
    known = []
    for pair in pairs:
        if pair.entity_id in entity_ids:
            known.append(pair)
        else:
            reason = f"entity_id {pair.entity_id} is not in the catalog"
            rejects.add(Rejected(line=pair.image.line, reason=reason, record=pair.image.record))
    if pairs and not known:
        raise CatalogError(f"no pair names an entity of {catalog}; check that the catalog belongs to the pairs")
    return known
