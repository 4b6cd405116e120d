"""Answer labelled queries with the recogniser that serves the bundle. Entities can be held out of the search."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from core.arrays import Float32Array, Int64Array, Queries
from core.errors import BadParameter, CatalogError, Conflict, UnknownEntity
from core.files import atomic_write
from core.lines import Rejected, RejectLog
from evaluation.levels import level_steps
from evaluation.metrics import RECALL_AT, AnsweredQuery, rank_of
from index.bundle import Bundle
from index.embeddings import read_embedding
from index.manifest import INDEX_FILE
from index.search import EntityIndex
from index.store import Selection
from model.data import Pair, load_pairs, question_warning
from service.loaded_bundle import BundleView
from service.recognizer import Recognizer
from wikiclip.answers import EmbeddingQuery, Recognition, RecognizeOptions


def answer_queries(
    recognizer: Recognizer,
    query_files: Sequence[Path],
    predictions_path: Path,
    *,
    image_root: Path | None,
    batch_size: int,
    ovenid2impath: Path | None = None,
    held_out: frozenset[int] = frozenset(),
) -> tuple[list[AnsweredQuery], int]:
    """Recognise every query and write one `{"data_id", "pred_entity_id"}` per query, in order.

    A query with a missing or unreadable image gets the prediction "" and counts as wrong. A malformed line and an
    embedding of another encoder go to `rejected.jsonl` next to the predictions. `held_out` are the rows that cannot be
    found. Return the answers and the number of rejected lines and images. Raise `CatalogError` if a file has no usable
    query.
    """
    rejects = RejectLog(predictions_path.with_name("rejected.jsonl"))
    answered: list[AnsweredQuery] = []
    with (
        atomic_write(predictions_path) as temporary,
        temporary.open("w", encoding="utf-8") as out,
        recognizer.acquire() as loaded,
    ):
        calibration = loaded.loaded.bundle.calibration
        level_model = None if calibration is None else calibration.of_views(1).level
        for path in query_files:
            pairs = load_pairs(path, image_root, rejects, ovenid2impath=ovenid2impath, missing_ok=True, embeddings=True)
            pairs = _usable(pairs, path, loaded, rejects)
            if warning := question_warning(path, pairs):
                tqdm.write(warning, file=sys.stderr)
            queries = iter(tqdm(pairs, desc=path.name, unit="query"))
            while batch := list(islice(queries, batch_size)):
                for pair, answer in zip(batch, _recognize(recognizer, batch, rejects), strict=True):
                    try:
                        entity = loaded.entities.get(pair.entity_id)
                    except UnknownEntity:
                        entity = None
                    predictions = answer.predictions if answer else ()
                    predicted_ids = [prediction.entity_id for prediction in predictions]
                    levels = None
                    if level_model is not None and entity is not None:
                        levels = level_steps(level_model, loaded.entities.store.type_levels, predictions, entity)
                    row = {"data_id": pair.data_id, "pred_entity_id": predicted_ids[0] if predicted_ids else ""}
                    out.write(json.dumps(row) + "\n")
                    answered.append(
                        AnsweredQuery(
                            data_split=pair.data_split,
                            seen=pair.seen,
                            rank=rank_of(pair.entity_id, predicted_ids),
                            in_catalog=entity is not None and entity.row not in held_out,
                            image=pair.image.path if pair.embedding is None else None,
                            embedding=None if pair.embedding is None else pair.embedding.values,
                            entity=entity,
                            best=predictions[0] if predictions else None,
                            in_catalog_probability=answer.in_catalog_probability if answer else None,
                            abstained=answer.abstained if answer else None,
                            levels=levels,
                        )
                    )
    return answered, rejects.count


def _usable(pairs: Sequence[Pair], path: Path, view: BundleView, rejects: RejectLog) -> list[Pair]:
    """Return the pairs except embeddings of another encoder. Raise `CatalogError` if none is left."""
    usable = []
    for pair in pairs:
        try:
            if pair.embedding is not None:
                view.loaded.check_encoder(pair.embedding.encoder)
                read_embedding(pair.embedding.values, view.loaded.bundle.manifest.embedding_dim)
            usable.append(pair)
        except (Conflict, BadParameter) as error:
            rejects.add(Rejected(line=pair.image.line, reason=error.detail, record=pair.image.record))
    if not usable:
        raise CatalogError(
            f"{path} has no usable query ({rejects.count} rejected, see {rejects.path}); embed its images again"
        )
    return usable


def _recognize(recognizer: Recognizer, pairs: Sequence[Pair], rejects: RejectLog) -> Iterator[Recognition | None]:
    images: list[bytes | EmbeddingQuery | str] = []
    for pair in pairs:
        if pair.embedding is not None:
            images.append(EmbeddingQuery(embedding=list(pair.embedding.values), encoder=pair.embedding.encoder))
            continue
        try:
            images.append(pair.image.path.read_bytes())
        except OSError as error:
            images.append(f"image {pair.image.path} cannot be read ({error.strerror}); it counts as wrong")
    readable = [image for image in images if not isinstance(image, str)]
    answers = iter(recognizer.recognize_many(readable, RecognizeOptions(top_k=max(RECALL_AT))))
    for pair, image in zip(pairs, images, strict=True):
        answer = image if isinstance(image, str) else next(answers)
        if isinstance(answer, Recognition):
            yield answer
        else:
            reason = answer if isinstance(answer, str) else answer.detail
            rejects.add(Rejected(line=pair.image.line, reason=reason, record=pair.image.record))
            yield None


class HoldoutIndex(EntityIndex):
    """An index that finds only the rows in `searched`, unless a search has a selection."""

    searched: Selection

    def search(
        self,
        query_embeddings_BD: Queries,
        top_k: int,
        parameters: Mapping[str, Any] | None = None,
        selection: Selection | None = None,
    ) -> tuple[Int64Array, Float32Array]:
        return super().search(query_embeddings_BD, top_k, parameters, selection or self.searched)


@dataclass(frozen=True, kw_only=True)
class HoldoutBundle(Bundle):
    """A bundle whose index cannot find the entity rows in `held_out`. Its store still has their records."""

    held_out: frozenset[int] = field(default=frozenset())

    def index(self, device: str = "cpu") -> HoldoutIndex:
        parameters = self.index_manifest.parameters
        index = HoldoutIndex.read(self.path / INDEX_FILE, self.searched(), parameters, device, self.remembered())
        with self.store() as store:
            allowed_E = np.ones(len(store), bool)
        allowed_E[list(self.held_out)] = False
        index.searched = Selection((), allowed_E)
        return index


def hold_out(bundle: Bundle, share: float) -> HoldoutBundle:
    """Hold out about `share` (0 to 1) of the entities, chosen by a hash of their id: the same ones in every catalog.

    The answers equal those of an export without these entities and the same kind of index.
    """
    with bundle.store() as store:
        held_out = frozenset(each.row for each in store.by_rows(range(len(store))) if _hash(each.entity_id) < share)
    return without(bundle, held_out)


def without(bundle: Bundle, held_out: frozenset[int]) -> HoldoutBundle:
    """Return the bundle without these entity rows."""
    return HoldoutBundle(**{each.name: getattr(bundle, each.name) for each in fields(bundle)}, held_out=held_out)


def _hash(entity_id: str) -> float:
    """Return a number from 0 to 1 that depends only on the id."""
    digest = hashlib.sha256(b"left out " + entity_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
