"""Change entities and their images while serving. One thread embeds and writes, separate from recognition.

Shapes: P patches, C patch channels, T text tokens, L text channels, D embedding width.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import numpy as np

from core.arrays import BoolArray, Float32Array, Pixels
from core.errors import BadParameter, LiveDirError, NoEntitySide, TooLarge, Unavailable, UndecodableImage, needed_by
from core.runtime import Pool
from imaging import Decoder, Preprocessing
from index.bundle import Bundle
from index.delta import new_image_id
from index.embeddings import read_embedding
from index.manifest import (
    ADAPTOR_FILE,
    ADAPTOR_INPUTS,
    ADAPTOR_OUTPUT,
    ENTITY_ENCODER_FOLDER,
    TEXT_ENCODER_FILE,
    TEXT_INPUTS,
    TEXT_OUTPUT,
    TOKENIZER_FILE,
    EntityEncoder,
)
from index.overlay import LiveChanges
from index.store import StoredEntity, describe
from service.encoder import open_session
from service.engine import Encoder
from wikiclip.answers import AddedImage, EditedEntity, EmbeddingQuery, Entity, EntityRequest

T = TypeVar("T")

NO_ENTITY_ENCODER = "this bundle has no entity encoder; serve one made with `wikiclip export --live`"
_THREADS = 1  # one thread leaves the cores to queries

log = logging.getLogger("wikiclip.updates")


class EntityEmbedder:
    """Embeds one entity at a time, as an export does. Raises `MissingExtra` if `tokenizers` is missing."""

    def __init__(self, bundle: Bundle, entity_encoder: EntityEncoder, image_encoder: Encoder) -> None:
        with needed_by("the bundle's entity encoder"):
            from tokenizers import Tokenizer
        folder = bundle.path / ENTITY_ENCODER_FOLDER
        self._entity_encoder = entity_encoder
        self._image_encoder = image_encoder
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        self._text_encoder = open_session(folder / TEXT_ENCODER_FILE, "cpu", _THREADS)
        self._adaptor = open_session(folder / ADAPTOR_FILE, "cpu", _THREADS)
        self._inputs = {each.name for each in self._adaptor.get_inputs()}
        self._embedding_dim = bundle.manifest.embedding_dim

    def embed(self, pixels_HW3: Pixels | None, text: str) -> Float32Array:
        """Return the L2-normalised embedding [D]. The image may be None and the text may be blank."""
        patch_tokens_1PC = np.zeros((1, self._entity_encoder.patches, self._entity_encoder.patch_dim), np.float32)
        image_embedding_1D = np.zeros((1, self._embedding_dim), np.float32)
        if pixels_HW3 is not None:
            patch_tokens_1PC = self._image_encoder.patch_tokens(pixels_HW3[None])
            image_embedding_1D = np.asarray(self._image_encoder.encode(pixels_HW3[None]))
        inputs = (
            patch_tokens_1PC, np.array([pixels_HW3 is not None]), *self._text_tokens(text), image_embedding_1D
        )  # fmt: skip
        named = {name: each for name, each in zip(ADAPTOR_INPUTS, inputs, strict=True) if name in self._inputs}
        (embedding_1D,) = self._adaptor.run([ADAPTOR_OUTPUT], named)
        return np.asarray(embedding_1D[0], np.float32)

    def _text_tokens(self, text: str) -> tuple[Float32Array, BoolArray]:
        text = text.strip()[: self._entity_encoder.max_characters]
        ids = self._tokenizer.encode(text).ids if text else []
        if not ids:  # one masked token: the adaptor replaces it with its learned placeholder
            return np.zeros((1, 1, self._entity_encoder.text_dim), np.float32), np.zeros((1, 1), np.bool_)
        ids_1T = np.array([ids], np.int64)
        (text_tokens_1TL,) = self._text_encoder.run(
            [TEXT_OUTPUT], dict(zip(TEXT_INPUTS, (ids_1T, np.ones_like(ids_1T)), strict=True))
        )
        return text_tokens_1TL, np.ones(ids_1T.shape, np.bool_)


class ImageEmbedder:
    """Embeds an entity by its image alone, as an export without a checkpoint does."""

    def __init__(self, image_encoder: Encoder) -> None:
        self._image_encoder = image_encoder

    def embed(self, pixels_HW3: Pixels | None, text: str) -> Float32Array:
        """Return the embedding [D]. Raises `NoEntitySide` without an image."""
        if pixels_HW3 is None:
            raise NoEntitySide("this bundle does not embed texts; send an image or an embedding")
        embedding_D: Float32Array = np.asarray(self._image_encoder.encode(pixels_HW3[None]))[0]
        return embedding_D


def open_embedder(bundle: Bundle, image_encoder: Encoder) -> EntityEmbedder | ImageEmbedder | None:
    """Return what embeds an entity, None if the bundle cannot. Raises as `Editor` does."""
    if bundle.manifest.images_only:
        return ImageEmbedder(image_encoder)
    entity_encoder = bundle.entity_encoder()
    return None if entity_encoder is None else EntityEmbedder(bundle, entity_encoder, image_encoder)


class Editor:
    """Makes live changes to one bundle and follows those of other processes, in two threads.

    Raises `BundleError` if the bundle's entity encoder is incomplete, `MissingExtra` as `EntityEmbedder` does.
    """

    def __init__(self, bundle: Bundle, live: LiveChanges, image_encoder: Encoder, decoder: Decoder) -> None:
        self.live = live
        self.sync_error: str | None = None  # why changes of other processes cannot be read at the moment
        self._bundle = f"{bundle.name}@{bundle.fingerprint}"
        self._decoder = decoder
        self._dim = bundle.manifest.embedding_dim
        self._preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
        self._thumbnail_px = int(bundle.manifest.export.get("thumbnail_px", 0))
        self._store_text = bool(bundle.manifest.export.get("store_text", False))
        self.embedder = open_embedder(bundle, image_encoder)
        # Without an entity encoder, one more image of an entity has the embedding of a query.
        self._image_embedder = self.embedder or ImageEmbedder(image_encoder)
        self._pool = Pool(1, "edit")
        self._closing = threading.Event()
        self._sync_thread = threading.Thread(target=self._sync, name="live", daemon=True)
        self._sync_thread.start()

    def close(self) -> None:
        """Finish the changes that have begun and stop both threads."""
        self._pool.close()
        self._closing.set()
        self._sync_thread.join()
        self.live.close()

    def submit(self, change: Callable[[], T]) -> Future[T]:
        """Run a change, `put` or another, in the thread that embeds and writes."""
        return self._pool.submit(change)

    def put(self, entity_id: str, record: EntityRequest, images: Sequence[bytes]) -> tuple[EditedEntity, bool]:
        """Add or replace an entity. Return it, and whether it is new.

        Raises `BadParameter`, `UndecodableImage`, `TooLarge`, `NoEntitySide`, and as `LiveChanges.put` does.
        """
        embeddings_ID = self._embeddings(record, images)
        thumbnail = None
        if images and self._thumbnail_px:
            thumbnail = self._decoder.make_thumbnail(images[0], self._thumbnail_px)
        entity = StoredEntity(
            row=-1,
            entity_id=entity_id,
            title=record.title,
            titles=record.titles,
            description=record.description or describe(record.title, record.text),
            url=record.url,
            types=tuple(record.types),
            symbol=record.symbol,
            image_count=len(images),
            has_text=bool(record.text.strip()),
            text=record.text if self._store_text else None,
            has_thumbnail=thumbnail is not None,
        )
        image_ids = tuple(new_image_id() for _ in images)
        created = self.live.put(entity, embeddings_ID, thumbnail, image_ids)
        stored = Entity.model_validate(entity, from_attributes=True)
        return EditedEntity(**dict(stored), image_ids=image_ids, bundle=self._label()), created

    def add_image(self, entity_id: str, image: bytes | EmbeddingQuery, text: str) -> AddedImage:
        """Add an image, or its embedding, to an entity with this text, which may be "".

        Raises as `put` does, and `UnknownEntity`.
        """
        if isinstance(image, EmbeddingQuery):
            embedding_D = read_embedding(image.embedding, self._dim)
        else:
            pixels_HW3 = self._decoder.load_pixels(image, self._preprocessing)
            embedding_D = self._image_embedder.embed(pixels_HW3, text)
        image_id = new_image_id()
        self.live.add_image(entity_id, image_id, embedding_D)
        return AddedImage(entity_id=entity_id, image_id=image_id, bundle=self._label())

    def _label(self) -> str:
        """Return the bundle that answers, with the change that was just made."""
        return f"{self._bundle}+{self.live.revision}"

    def _embeddings(self, record: EntityRequest, images: Sequence[bytes]) -> Float32Array:
        if record.embedding is not None:
            if images:
                raise BadParameter("the record has both image and embedding; send one of them")
            return read_embedding(record.embedding, self._dim)[None]
        if not images and not record.text.strip():
            raise BadParameter("there is nothing to embed; send an image, a text or an embedding")
        if self.embedder is None:
            raise NoEntitySide(f"{NO_ENTITY_ENCODER}, or send embedding ({self._dim} numbers)")
        if not images:
            return self.embedder.embed(None, record.text)[None]
        embeddings = []
        for number, image in enumerate(images):
            try:
                pixels_HW3 = self._decoder.load_pixels(image, self._preprocessing)
            except (UndecodableImage, TooLarge) as error:
                raise type(error)(f"image {number + 1} of {len(images)}: {error}") from error
            embeddings.append(self.embedder.embed(pixels_HW3, record.text))
        return np.stack(embeddings)

    def _sync(self) -> None:
        while not self._closing.wait(self.live.poll_interval_s):
            try:
                self.live.refresh()
            except (LiveDirError, Unavailable, sqlite3.Error) as error:
                if self.sync_error is None:
                    log.error("live changes cannot be read: %s", error)
                self.sync_error = f"live changes cannot be read ({error})"
            else:
                self.sync_error = None
