"""What an entity is found by while it changes: the embeddings of its images, some of which were added while serving.

Shapes: I images of an entity, R remembered vectors of it (0 or 1), V vectors that are searched, D embedding width.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.arrays import Float16Array, Float32Array, normalised
from core.errors import Conflict, NotFound
from index.embeddings import Pooling, means

# As a number, the id of an image that was added is in this range. Milvus uses it as the primary key.
FIRST_IMAGE_KEY, END_IMAGE_KEY = 2**61, 2**62


@dataclass(frozen=True, kw_only=True)
class References:
    """What an entity is found by: the embeddings of its images, and the remembered vector that it may have.

    `image_ids` are of the last images, those that were added while serving and can be removed.
    """

    images_ID: Float16Array
    image_ids: tuple[str, ...] = ()
    remembered_RD: Float32Array | None = None
    handicap: float = 0.0

    def searched(self, pooling: Pooling) -> tuple[Float32Array, Float32Array]:
        """Return the vectors that are searched, and what is subtracted from the cosine of each."""
        images_ID = pooled_images(normalised(self.images_ID), pooling)
        if self.remembered_RD is None:
            return images_ID, np.zeros(len(images_ID), np.float32)
        handicaps = [0.0] * len(images_ID) + [self.handicap] * len(self.remembered_RD)
        return np.concatenate([images_ID, self.remembered_RD]), np.array(handicaps, np.float32)


def rounded(embeddings_ID: Float32Array) -> Float16Array:
    """Return embeddings as they are stored: normalised, in float16."""
    return normalised(embeddings_ID).astype(np.float16)


def pooled_images(images_ID: Float32Array, pooling: Pooling) -> Float32Array:
    """Return the vectors [V, D] that are searched for normalised embeddings of images, as a bundle has them."""
    if pooling == "nearest" or not len(images_ID):
        return images_ID
    return normalised(means(images_ID, np.zeros(1, np.int64)))


def new_image_id() -> str:
    """Return an id that no other image has."""
    return f"{FIRST_IMAGE_KEY + secrets.randbelow(END_IMAGE_KEY - FIRST_IMAGE_KEY):x}"


def image_key(image_id: str) -> int:
    return int(image_id, 16)


def all_image_ids(image_count: int, added: Sequence[str]) -> tuple[str, ...]:
    """Return the ids of an entity's images: first those of the bundle, which are numbered, then those `added`."""
    return (*(f"base-{number}" for number in range(image_count - len(added))), *added)


def of_bundle(image_id: str) -> Conflict:
    return Conflict(f"{image_id} is an image of the bundle, which does not change; replace the entity instead")


def only_image(image_id: str) -> Conflict:
    return Conflict(f"{image_id} is the entity's only image; add another one first, or delete the entity")


def no_such_image(image_id: str) -> NotFound:
    return NotFound(f"the entity has no image {image_id[:100]!r}; GET /entities/{{entity_id}} lists those that it has")
