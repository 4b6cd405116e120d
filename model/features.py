"""Frozen features of images and texts: computed unless cached, and batched as the adaptor's input.

Shapes: B batch, P patches, C patch channels, T text tokens, L text channels, D embedding.
"""

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

from catalog import EntityRecord
from catalog.images import ImageReader, UnusableImage
from core.arrays import Float32Array, Pixels
from core.errors import CatalogError, TooLarge, UndecodableImage, UserError
from core.lines import Rejected, RejectLog, excerpt
from imaging import load_pixels
from imaging.preprocess import changed_view
from model.adaptor import EntityBatch
from model.data import ImageSource, Pair
from model.encoders import ImageEncoder, TextEncoder
from model.feature_cache import FeatureCache, content_key

Item = TypeVar("Item")

_BATCH = 64  # images or texts
_SAMPLED_TEXTS = 256  # whose tokens are counted
VIEWS = 4  # of an entity's only image, as query images
_VIEW_SIDES = (0.4, 1.0)  # of their crops, as a share of the image
_VIEW_RECIPE = 1  # in their keys: to be raised when views change


@dataclass(frozen=True, kw_only=True)
class EntityKeys:
    """The keys of an entity's cached features: one per usable image, and one for its text if it has any."""

    images: tuple[bytes, ...]
    text: bytes | None


@dataclass(frozen=True, kw_only=True)
class KeyedPair:
    """A pair for training or validation: the key of its query image, the row of its entity, and its split.

    `views` are the keys of changed copies of the entity's only image. Each step draws one of them as the query image.
    `query` is the first.
    """

    query: bytes
    entity: int
    seen: bool | None = None
    views: tuple[bytes, ...] = ()


class FeatureStore:
    """The image and text caches, and the encoders that fill them. `computed` counts the inputs that were encoded.

    `images` is the folder of `wikiclip fetch-images`, for images by URL.
    """

    def __init__(
        self, root: Path, image_encoder: ImageEncoder, text_encoder: TextEncoder, images: Path | None = None
    ) -> None:
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.computed = 0
        self._root = root
        self._reader = ImageReader(images)
        self._images = FeatureCache(root, image_encoder.content_hash)
        self._texts = FeatureCache(root, text_encoder.content_hash)

    def expected_bytes(self, images: int, texts: Sequence[str], views: int = 0) -> int:
        """Return about how much the features of so many images, of the texts and of so many views take, if all differ.

        A view takes as long to encode as an image, but adds only its embedding: 4 bytes per channel. Raises
        `UserError` if that is more than there is room for, less what is already cached.
        """
        encoder = self.image_encoder
        drawn = random.Random(0).sample(texts, min(len(texts), _SAMPLED_TEXTS))
        tokens = sum(map(len, self.text_encoder.tokenize([text for text in drawn if text.strip()])))
        text_bytes = len(texts) / max(len(drawn), 1) * tokens * 2 * self.text_encoder.dim
        image_bytes = images * (2 * encoder.patches * encoder.patch_dim + 4 * encoder.embedding_dim)
        view_bytes = views * 4 * encoder.embedding_dim
        expected = round(image_bytes + text_bytes + view_bytes)
        room = shutil.disk_usage(self._root).free + self._images.size_bytes + self._texts.size_bytes
        if expected > room:
            wanted, there = (tqdm.format_sizeof(each, "B") for each in (expected, room))
            raise UserError(
                f"the features of {images} images and {len(texts)} texts take about {wanted}, and "
                f"{self._root} has room for {there}; limit them with --max-entities or --max-per-entity, or "
                "name another --cache-dir"
            )
        return expected

    def image_keys(
        self, sources: Sequence[ImageSource], reject: Callable[[Rejected], None], description: str
    ) -> list[bytes | None]:
        """Encode the images that are not cached. Return the key of each, None for a rejected one."""
        keys: list[bytes | None] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for chunk in _batches(sources, _BATCH, description, "image"):
                new: dict[bytes, Pixels] = {}
                for source, (key, result) in zip(chunk, pool.map(self._read, chunk), strict=True):
                    keys.append(key)
                    if isinstance(result, str):
                        reject(Rejected(line=source.line, reason=result, record=source.record))
                    elif key is not None and result is not None:
                        new[key] = result
                self._encode(new)
        self._images.flush()
        return keys

    def _encode(self, new: Mapping[bytes, Pixels], *, with_tokens: bool = True) -> None:
        """Encode images and add their features to the cache."""
        if not new:
            return
        features = self.image_encoder.encode(np.stack(list(new.values())))
        tokens_BPC = features.patch_tokens_BPC if with_tokens else features.patch_tokens_BPC[:, :0]
        self._images.add(list(new), tokens_BPC.cpu().numpy(), features.image_embedding_BD.cpu().numpy())
        self.computed += len(new)

    def _read(self, source: ImageSource) -> tuple[bytes | None, Pixels | str | None]:
        """Return the image's key, and its pixels unless it is cached; or None and why it cannot be read."""
        try:
            data = self._reader.read(source.image)
            key = content_key(data)
            if key in self._images:
                return key, None
            return key, load_pixels(data, self.image_encoder.preprocessing)
        except (UnusableImage, UndecodableImage, TooLarge) as error:
            return None, f"image {source.path.name}: {error}"

    def text_keys(self, texts: Sequence[str], description: str) -> list[bytes | None]:
        """Encode the texts that are not cached. Return the key of each, None for a blank one."""
        keys = [content_key(text.encode()) if text.strip() else None for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key and key not in self._texts}
        for chunk in _batches(list(new.items()), _BATCH, description, "text"):
            features = self.text_encoder.encode([text for _, text in chunk])
            lengths = features.mask_BT.sum(dim=1).tolist()
            rows = features.text_tokens_BTC.cpu().numpy()
            self._texts.add([key for key, _ in chunk], (row[:n] for row, n in zip(rows, lengths, strict=True)))
            self.computed += len(chunk)
        self._texts.flush()
        return keys

    def entity_keys(self, entities: Sequence[EntityRecord], reject: Callable[[Rejected], None]) -> list[EntityKeys]:
        """Encode the entities' images and texts that are not cached. Return their keys in the same order."""
        sources = [
            ImageSource(image=image, line=each.line, record=excerpt({"entity_id": each.entity_id, "image": image}))
            for each in entities
            for image in each.images
        ]
        image_keys = iter(self.image_keys(sources, reject, "entity images"))
        text_keys = self.text_keys([entity.text for entity in entities], "entity texts")
        return [
            EntityKeys(images=tuple(key for key in islice(image_keys, len(entity.images)) if key), text=text)
            for entity, text in zip(entities, text_keys, strict=True)
        ]

    def pair_keys(
        self, pairs: Sequence[Pair], rows: Mapping[str, int], rejects: RejectLog, description: str
    ) -> list[KeyedPair]:
        """Encode the query images that are not cached. Return the pairs whose image can be read.

        `rows` maps entity ids to rows of the catalog. Raises `CatalogError` if no image can be read.
        """
        keys = self.image_keys([pair.image for pair in pairs], rejects.add, description)
        readable = [
            KeyedPair(query=key, entity=rows[pair.entity_id], seen=pair.seen)
            for pair, key in zip(pairs, keys, strict=True)
            if key is not None
        ]
        if pairs and not readable:
            raise CatalogError(f"none of the {description} can be read; see {rejects.path}")
        return readable

    def with_views(
        self, pairs: Sequence[KeyedPair], entities: Sequence[EntityKeys], records: Sequence[EntityRecord]
    ) -> list[KeyedPair]:
        """Return the pairs, with views for a query image that is the only image of its entity.

        Encode the views that are not cached, without their tokens: a query has no use for them.
        """
        only = {pair.entity: pair.query for pair in pairs if set(entities[pair.entity].images) == {pair.query}}
        new = {image: records[row] for row, image in only.items() if _view_keys(image)[-1] not in self._images}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for chunk in _batches(list(new.items()), _BATCH // VIEWS, "views of only images", "image"):
                self._encode(dict(chain.from_iterable(pool.map(self._views, chunk))), with_tokens=False)
        self._images.flush()
        viewed = []
        for pair in pairs:
            views = _view_keys(pair.query) if only.get(pair.entity) == pair.query else ()
            viewed.append(replace(pair, query=views[0], views=views) if views else pair)
        return viewed

    def _views(self, image: tuple[bytes, EntityRecord]) -> list[tuple[bytes, Pixels]]:
        """Return the keys and pixels of the views of an image, given by its key and its entity."""
        key, record = image
        for path in record.images:  # the others cannot be read
            with suppress(UnusableImage):
                if content_key(data := self._reader.read(path)) == key:
                    pixels_HW3 = load_pixels(data, self.image_encoder.preprocessing)
                    seeds = [(int.from_bytes(key), number) for number in range(VIEWS)]
                    views = [changed_view(pixels_HW3, seed, _VIEW_SIDES) for seed in seeds]
                    return list(zip(_view_keys(key), views, strict=True))
        raise UserError(f"the image of {record.entity_id} changed while it was read; start again")

    def mean_text_tokens(self, texts: Sequence[bytes]) -> Float32Array:
        """Return the mean text token of texts: float32 `[B, L]`."""
        means = [self._texts.tokens(text).mean(axis=0, dtype=np.float32) for text in texts]
        return np.array(means, np.float32).reshape(-1, self.text_encoder.dim)

    def query_embeddings(self, keys: Sequence[bytes]) -> Float32Array:
        """Return the image embeddings of query images: float32 `[B, D]`, L2-normalised."""
        embeddings = [self._images.embedding(key) for key in keys]
        return np.array(embeddings, np.float32).reshape(-1, self.image_encoder.embedding_dim)

    def batch(self, rows: Sequence[tuple[bytes | None, bytes | None]], device: torch.device) -> EntityBatch:
        """Return the adaptor's input for rows of (image key, text key), None for a missing one."""
        size = len(rows)
        tokens = np.zeros((size, self.image_encoder.patches, self.image_encoder.patch_dim), np.float16)
        embeddings = np.zeros((size, self.image_encoder.embedding_dim), np.float32)
        texts = [self._texts.tokens(text) if text is not None else None for _, text in rows]
        longest = max((len(text) for text in texts if text is not None), default=0)
        text_tokens = np.zeros((size, longest, self.text_encoder.dim), np.float16)
        text_mask = np.zeros((size, longest), np.bool_)
        for row, ((image, _), text) in enumerate(zip(rows, texts, strict=True)):
            if image is not None:
                tokens[row] = self._images.tokens(image)
                embeddings[row] = self._images.embedding(image)
            if text is not None:
                text_tokens[row, : len(text)] = text
                text_mask[row, : len(text)] = True
        return EntityBatch(
            patch_tokens_BPC=torch.from_numpy(tokens).to(device).float(),
            image_mask_B=torch.tensor([image is not None for image, _ in rows], dtype=torch.bool, device=device),
            text_tokens_BTL=torch.from_numpy(text_tokens).to(device).float(),
            text_mask_BT=torch.from_numpy(text_mask).to(device),
            image_embedding_BD=torch.from_numpy(embeddings).to(device),
        )


def _batches(items: Sequence[Item], size: int, description: str, unit: str) -> Iterator[Sequence[Item]]:
    """Yield items in batches, and show the progress."""
    with tqdm(total=len(items), desc=description, unit=unit, leave=False) as progress:
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            yield batch
            progress.update(len(batch))


def _view_keys(image: bytes) -> tuple[bytes, ...]:
    return tuple(content_key(image + f" view {_VIEW_RECIPE}.{number}".encode()) for number in range(VIEWS))


def catalog_pairs(entities: Sequence[EntityKeys], paired: Counter[int], max_per_entity: int | None) -> list[KeyedPair]:
    """Return pairs from the catalog alone: each image of an entity as a query for it (the paper's document pairs).

    An entity with one image and no text gives no pair, since nothing could be learned but the image itself. `paired`
    counts the pairs that each entity (by row) already has. Catalog pairs fill up to `max_per_entity`.
    """
    pairs = []
    for row, entity in enumerate(entities):
        images = list(dict.fromkeys(entity.images))
        if entity.text is None and len(images) < 2:
            continue
        room = None if max_per_entity is None else max(0, max_per_entity - paired[row])
        pairs += [KeyedPair(query=image, entity=row) for image in images[:room]]
    return pairs
