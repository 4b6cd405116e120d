"""`wikiclip bench train`: an epoch of the adaptor on cached features, and one that recomputes them for every batch.

Both take the same steps on the same synthetic photographs and texts, with the built-in image encoder and `minilm`.
Recomputed features are rounded to float16 like cached ones, so the losses differ only by the order of sums.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.synthetic import photograph
from core.jsonl import Rejected
from imaging import load_pixels
from model.adaptor import AdaptorConfig
from model.data import Entity, ImageSource
from model.distributed import Group
from model.encoders import ImageFeatures, open_image_encoder, open_text_encoder
from model.feature_cache import content_key, to_float16
from model.features import MAX_PIXELS, EntityBatch, EntityKeys, FeatureStore, TrainingPair
from model.trainer import Trainer, TrainSettings

_BATCH = 64
_WIDTH = 64
_WORDS = ("river", "stone", "tower", "bird", "market", "north", "island", "castle", "music", "harbour", "forest")


class _Recomputing(FeatureStore):
    """A store that runs the encoders for every batch."""

    def __init__(self, cached: FeatureStore, root: Path, images: dict[bytes, bytes], texts: dict[bytes, str]) -> None:
        super().__init__(root, cached.image_encoder, cached.text_encoder)
        self._inputs = images, texts

    def query_embeddings(self, keys: Sequence[bytes]) -> npt.NDArray[np.float32]:
        result_BD: npt.NDArray[np.float32] = self._encode(keys).image_embedding_BD.cpu().numpy()
        return result_BD

    def batch(self, rows: Sequence[tuple[bytes | None, bytes | None]], device: torch.device) -> EntityBatch:
        images = [image for image, _ in rows if image is not None]  # training leaves some images and texts out
        text = self.text_encoder.encode([self._inputs[1][key] if key else "" for _, key in rows])
        mask_B = torch.tensor([image is not None for image, _ in rows])
        patch_tokens_BPC = torch.zeros(len(rows), self.image_encoder.patches, self.image_encoder.patch_dim)
        patch_tokens_BPC[mask_B] = _rounded(self._encode(images).patch_tokens_BPC)
        return EntityBatch(
            patch_tokens_BPC=patch_tokens_BPC,
            image_mask_B=mask_B,
            text_tokens_BTL=_rounded(text.text_tokens_BTC),
            text_mask_BT=text.mask_BT,
        )

    def _encode(self, keys: Sequence[bytes]) -> ImageFeatures:
        preprocessing = self.image_encoder.preprocessing
        pixels = [load_pixels(self._inputs[0][key], preprocessing, max_pixels=MAX_PIXELS) for key in keys]
        return self.image_encoder.encode(np.stack(pixels))


def _rounded(values: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(to_float16(values.cpu().numpy())).float()


def measure(bundle_path: Path, *, smoke: bool) -> dict[str, object]:
    """Return seconds per epoch and mean loss of both, and their ratio. No bundle is read.

    Each entity has an image, a text of 60 words and a query image.
    """
    count = 96 if smoke else 512
    random = np.random.default_rng(0)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        store = FeatureStore(root / "cache", open_image_encoder("tiny"), open_text_encoder("minilm"))
        photographs = [photograph(number) for number in range(2 * count)]
        sources = [ImageSource(path=root / f"{number}.jpg", line=0, record="") for number in range(2 * count)]
        for source, data in zip(sources, photographs, strict=True):
            source.path.write_bytes(data)
        texts = [" ".join(random.choice(_WORDS, 60)) for _ in range(count)]
        records = [
            Entity(entity_id=f"Q{number}", text=text, images=(sources[number],)) for number, text in enumerate(texts)
        ]
        started = time.perf_counter()
        entities = store.entity_keys(records, _unexpected)
        queries = store.image_keys(sources[count:], _unexpected, "query images")
        filled_s = time.perf_counter() - started
        pairs = [TrainingPair(query=key, entity=row) for row, key in enumerate(queries) if key is not None]
        images = {content_key(data): data for data in photographs}
        uncached = _Recomputing(store, root / "none", images, {content_key(text.encode()): text for text in texts})
        cached_s, cached_loss = _epoch(store, entities, pairs)
        recomputed_s, recomputed_loss = _epoch(uncached, entities, pairs)
    return {
        "pairs": len(pairs),
        "image": "JPEG 640x480",
        "width": _WIDTH,
        "threads": torch.get_num_threads(),
        "cache_filled_s": round(filled_s, 3),
        "cached_epoch_s": round(cached_s, 3),
        "recomputed_epoch_s": round(recomputed_s, 3),
        "ratio": round(recomputed_s / cached_s, 1),
        "cached_loss": round(cached_loss, 6),
        "recomputed_loss": round(recomputed_loss, 6),
    }


def _unexpected(rejected: Rejected) -> None:
    raise AssertionError(rejected.reason)


def _epoch(store: FeatureStore, entities: Sequence[EntityKeys], pairs: Sequence[TrainingPair]) -> tuple[float, float]:
    """Return seconds and mean loss of one epoch after a warm-up step, always from the same weights."""
    config = AdaptorConfig(
        patch_dim=store.image_encoder.patch_dim,
        text_dim=store.text_encoder.dim,
        embedding_dim=store.image_encoder.embedding_dim,
        width=_WIDTH,
    )
    batches = [pairs[start : start + _BATCH] for start in range(0, len(pairs), _BATCH)]
    trainer = Trainer(
        config=config, settings=TrainSettings(batch_size=_BATCH), store=store, entities=entities,
        steps=len(batches) + 1, device=torch.device("cpu"), group=Group(),
    )  # fmt: skip
    trainer.step([batches[0]], synthesise=False)
    started = time.perf_counter()
    losses = [trainer.step([batch], synthesise=False) for batch in batches]
    return time.perf_counter() - started, float(np.mean(losses))
