"""One shard of the catalog: images decoded, both encoders and the adaptor run, in batches.

Shapes: B batch (one sample an image, or one for an entity without), P patches, C patch channels, T text tokens,
D embedding width, H = W = size_px.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from catalog import EntityRecord, is_url
from core.errors import TooLarge, UndecodableImage
from core.jsonl import Rejected
from imaging import decode, load_pixels
from index.store import StoredEntity
from model.checkpoint import Checkpoint

# A catalog is its operator's own: this only keeps one absurd file from taking all memory.
MAX_PIXELS = 200_000_000
_MAX_DESCRIPTION_CHARACTERS = 200
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n")

Pixels = npt.NDArray[np.uint8]


@dataclass(kw_only=True)
class EmbeddedShard:
    """`embeddings_nD` float32 with the entity row of each in `rows_n`; the entities with their thumbnails."""

    rows_n: npt.NDArray[np.int64]
    embeddings_nD: npt.NDArray[np.float32]
    entities: list[tuple[StoredEntity, bytes | None]] = field(default_factory=list)
    images_failed: list[Rejected] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Sample:
    row: int
    text: str
    pixels_HW3: Pixels | None


class ShardEmbedder:
    """Embeds the entities of a shard; no batch holds samples of two shards."""

    def __init__(
        self, checkpoint: Checkpoint, *, batch_size: int, thumbnail_px: int = 0, store_text: bool = False
    ) -> None:
        self._checkpoint = checkpoint
        self._batch_size = batch_size
        self._thumbnail_px = thumbnail_px
        self._store_text = store_text
        self._device = next(checkpoint.adaptor.parameters()).device

    def embed(self, records: Sequence[EntityRecord], first_row: int) -> EmbeddedShard:
        """Embed entities, one embedding for each image that can be used, one for an entity without.

        An image that cannot be used is recorded in `images_failed`; its entity stays.
        """
        shard = EmbeddedShard(
            rows_n=np.empty(0, np.int64),
            embeddings_nD=np.empty((0, self._checkpoint.image_encoder.embedding_dim), np.float32),
        )
        rows: list[int] = []
        embeddings = [shard.embeddings_nD]
        samples = self._samples(records, first_row, shard)
        while batch := list(islice(samples, self._batch_size)):
            rows += [sample.row for sample in batch]
            embeddings.append(self._embed_batch(batch))
        shard.rows_n = np.array(rows, np.int64)
        shard.embeddings_nD = np.concatenate(embeddings)
        return shard

    def _samples(self, records: Iterable[EntityRecord], first_row: int, shard: EmbeddedShard) -> Iterator[_Sample]:
        for row, record in enumerate(records, start=first_row):
            used = 0
            webp: bytes | None = None
            for image in record.images:
                try:
                    data = read_image(image)
                    pixels_HW3 = load_pixels(data, self._checkpoint.image_encoder.preprocessing, max_pixels=MAX_PIXELS)
                    if webp is None and self._thumbnail_px:
                        webp = make_thumbnail(data, self._thumbnail_px)
                except (UnusableImage, UndecodableImage, TooLarge) as error:
                    reason = f"image {image}: {error}; the entity is kept without it"
                    shard.images_failed.append(Rejected(line=record.line, reason=reason, record=record.entity_id))
                    continue
                used += 1
                yield _Sample(row=row, text=record.text, pixels_HW3=pixels_HW3)
            if used == 0:
                yield _Sample(row=row, text=record.text, pixels_HW3=None)
            shard.entities.append((self._stored(record, row, used), webp))

    @torch.no_grad()
    def _embed_batch(self, batch: Sequence[_Sample]) -> npt.NDArray[np.float32]:
        encoder, device = self._checkpoint.image_encoder, self._device
        image_mask_B = torch.tensor([sample.pixels_HW3 is not None for sample in batch], device=device)
        patch_tokens_BPC = torch.zeros(len(batch), encoder.patches, encoder.patch_dim, device=device)
        images = [sample.pixels_HW3 for sample in batch if sample.pixels_HW3 is not None]
        if images:
            patch_tokens_BPC[image_mask_B] = encoder.encode(np.stack(images)).patch_tokens_BPC.to(device)
        texts = list(dict.fromkeys(sample.text for sample in batch))  # images of one entity share theirs
        text = self._checkpoint.text_encoder.encode(texts)
        text_of_B = torch.tensor([texts.index(sample.text) for sample in batch], device=device)
        embeddings_BD: torch.Tensor = self._checkpoint.adaptor(
            patch_tokens_BPC,
            image_mask_B,
            text.text_tokens_BTC.to(device)[text_of_B],
            text.mask_BT.to(device)[text_of_B],
        )
        result_BD: npt.NDArray[np.float32] = embeddings_BD.float().cpu().numpy()
        return result_BD

    def _stored(self, record: EntityRecord, row: int, image_count: int) -> StoredEntity:
        return StoredEntity(
            row=row,
            entity_id=record.entity_id,
            title=record.title,
            titles=record.titles,
            description=record.description or first_sentence(record.text),
            url=record.url,
            types=record.types,
            symbol=record.symbol,
            image_count=image_count,
            has_text=bool(record.text.strip()),
            text=record.text if self._store_text else None,
        )


class UnusableImage(Exception):
    """An image of a record that cannot even be read; its message says why."""


def read_image(image: str) -> bytes:
    """The bytes of a local image. Raises `UnusableImage`, also for a URL: nothing is ever fetched here."""
    if is_url(image):
        raise UnusableImage("images by URL are not fetched; download it and name the file")
    try:
        return Path(image).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UnusableImage(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def make_thumbnail(data: bytes, size_px: int) -> bytes:
    """The whole image as WebP, neither side above `size_px`. Raises `UndecodableImage`, `TooLarge`."""
    image = decode(data, max_pixels=MAX_PIXELS, target_px=size_px)
    image.thumbnail((size_px, size_px))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, method=4)
    return buffer.getvalue()


def first_sentence(text: str) -> str | None:
    """The first sentence of a text, cut at 200 characters; None of a blank one."""
    stripped = text.strip()
    if not stripped:
        return None
    sentence = _SENTENCE_END.split(stripped, maxsplit=1)[0].strip()
    if len(sentence) <= _MAX_DESCRIPTION_CHARACTERS:
        return sentence
    return sentence[: _MAX_DESCRIPTION_CHARACTERS - 1].rsplit(" ", 1)[0].rstrip(",;: ") + "…"
