"""Putting and deleting entities while serving: checked, embedded and written by one worker, beside the recognition."""

from __future__ import annotations

import logging
import sqlite3
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.errors import BadParameter, LiveDirError, NoEntitySide, Unavailable
from imaging import Preprocessing, load_pixels, make_thumbnail
from index.bundle import Bundle
from index.store import StoredEntity, first_sentence
from index.view import LiveChanges, LiveState
from service.entity_encoder import EntityEmbedder, PatchEncoder
from service.schemas import EntityRequest

log = logging.getLogger("wikiclip.editing")


@dataclass(frozen=True, kw_only=True)
class Edited:
    """An entity as it was put, and the generation of that change; `created` if it is new."""

    entity: StoredEntity
    created: bool
    generation: int


class Editor:
    """The live changes to one bundle, and the threads that make them and look for those of others.

    Raises as `EntityEmbedder` does, and `BundleError` where the entity side is not whole.
    """

    def __init__(self, bundle: Bundle, live: LiveChanges, encoder: PatchEncoder, *, max_pixels: int) -> None:
        self.live = live
        self.trouble: str | None = None  # why the changes cannot be followed, None while they can
        self._max_pixels = max_pixels
        self._dim = bundle.manifest.embedding_dim
        self._preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
        self._thumbnail_px = int(bundle.manifest.export.get("thumbnail_px", 0))
        self._store_text = bool(bundle.manifest.export.get("store_text", False))
        side = bundle.entity_encoder()
        self._embedder = None if side is None else EntityEmbedder(bundle, side, encoder)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="edit")
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="live", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Finish the changes that were begun and stop."""
        self._worker.shutdown()
        self._closing.set()
        self._watcher.join()
        self.live.close()

    def put(self, entity_id: str, wanted: EntityRequest, image: bytes | None) -> Future[Edited]:
        """Add an entity or replace it.

        The future raises `BadParameter`, `UndecodableImage`, `TooLarge`, `NoEntitySide`, or as `LiveChanges.put` does.
        """
        return self._worker.submit(self._put, entity_id, wanted, image)

    def delete(self, entity_id: str) -> Future[LiveState]:
        """Take an entity out. The future raises as `LiveChanges.delete` does."""
        return self._worker.submit(self.live.delete, entity_id)

    def _put(self, entity_id: str, wanted: EntityRequest, image: bytes | None) -> Edited:
        embedding_D = self._embedding(wanted, image)
        thumbnail: bytes | None = None
        if image is not None and self._thumbnail_px:
            thumbnail = make_thumbnail(image, self._thumbnail_px, max_pixels=self._max_pixels)
        entity = StoredEntity(
            row=-1,
            entity_id=entity_id,
            title=wanted.title,
            titles=wanted.titles,
            description=wanted.description or first_sentence(wanted.text),
            url=wanted.url,
            types=tuple(wanted.types),
            symbol=wanted.symbol,
            image_count=int(image is not None),
            has_text=bool(wanted.text.strip()),
            text=wanted.text if self._store_text else None,
            has_thumbnail=thumbnail is not None,
        )
        put = self.live.put(entity, embedding_D, thumbnail)
        return Edited(
            entity=entity,
            created=put.created,
            generation=put.delta.generation,
        )

    def _embedding(self, wanted: EntityRequest, image: bytes | None) -> npt.NDArray[np.float32]:
        if wanted.embedding is not None:
            if image is not None:
                raise BadParameter("both image and embedding are given; send one of them")
            with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite, and is refused
                embedding_D = np.array(wanted.embedding, np.float32)
                length = float(np.linalg.norm(embedding_D))
            if embedding_D.shape != (self._dim,) or not np.isfinite(length) or length < 1e-12:
                raise BadParameter(f"embedding: {self._dim} finite numbers are wanted, not all of them 0")
            return embedding_D
        if image is None and not wanted.text.strip():
            raise BadParameter("there is nothing to embed; send an image, a text or an embedding")
        if self._embedder is None:
            raise NoEntitySide(
                f"this bundle has no entity side to embed with; send embedding ({self._dim} numbers), or serve "
                "a bundle made with `wikiclip export --live`"
            )
        pixels_HW3 = None
        if image is not None:
            pixels_HW3 = load_pixels(image, self._preprocessing, max_pixels=self._max_pixels)
        return self._embedder.embed(pixels_HW3, wanted.text)

    def _watch(self) -> None:
        while not self._closing.wait(self.live.look_every_s):
            try:
                self.live.refresh()
            except (LiveDirError, Unavailable, sqlite3.Error) as error:
                if self.trouble is None:
                    log.error("the live changes cannot be followed: %s", error)
                self.trouble = f"the live changes cannot be followed ({error})"
            else:
                self.trouble = None
