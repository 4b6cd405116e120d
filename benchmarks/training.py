"""`wikiclip bench train`: what the feature cache saves in an epoch of the adaptor.

The cache is filled from synthetic photographs and texts with the built-in image encoder and `minilm`. Each image and
text occurs once, so an epoch without a cache would take the time of filling it in addition to that of the steps.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.export import WORDS
from benchmarks.synthetic import write_photographs
from catalog import EntityRecord
from core.lines import Rejected
from model.adaptor import AdaptorConfig
from model.data import ImageSource
from model.distributed import Group
from model.encoders import open_image_encoder, open_text_encoder
from model.features import FeatureStore, KeyedPair
from model.trainer import Batch, Trainer, TrainSettings

_BATCH = 64
_WIDTH = 64


def measure(bundle_path: Path, *, smoke: bool) -> dict[str, object]:
    """Return the seconds of filling the cache and of an epoch from it. No bundle is read.

    Each entity has an image, a text of 60 words and a query image.
    """
    count = 32 if smoke else 512
    random = np.random.default_rng(0)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        store = FeatureStore(root / "cache", open_image_encoder("tiny"), open_text_encoder("minilm"))
        paths = write_photographs(root, 2 * count, 640, 480)
        sources = [ImageSource(image=str(path), line=0, record="") for path in paths[count:]]
        records = [
            EntityRecord(entity_id=f"Q{number}", title="", text=" ".join(random.choice(WORDS, 60)), images=(path,))
            for number, path in enumerate(paths[:count])
        ]
        started = time.perf_counter()
        entities = store.entity_keys(records, _unexpected)
        queries = store.image_keys(sources, _unexpected, "query images")
        filled_s = time.perf_counter() - started
        pairs = [KeyedPair(query=key, entity=row) for row, key in enumerate(queries) if key is not None]
        config = AdaptorConfig(
            patch_dim=store.image_encoder.patch_dim, text_dim=store.text_encoder.dim,
            embedding_dim=store.image_encoder.embedding_dim, width=_WIDTH,
        )  # fmt: skip
        parts = [pairs[start : start + _BATCH] for start in range(0, len(pairs), _BATCH)]
        batches = [Batch(part, np.zeros(len(part), np.int64)) for part in parts]
        trainer = Trainer(
            config=config, settings=TrainSettings(batch_size=_BATCH), store=store, entities=entities,
            steps=len(batches) + 1, device=torch.device("cpu"), group=Group(),
        )  # fmt: skip
        trainer.step([batches[0]], synthesise=False)  # warm up
        started = time.perf_counter()
        for batch in batches:
            trainer.step([batch], synthesise=False)
        epoch_s = time.perf_counter() - started
    return {
        "pairs": len(pairs),
        "image": "JPEG 640x480",
        "width": _WIDTH,
        "threads": torch.get_num_threads(),
        "cache_filled_s": round(filled_s, 3),
        "cached_epoch_s": round(epoch_s, 3),
        "ratio": round((filled_s + epoch_s) / epoch_s, 1),
    }


def _unexpected(rejected: Rejected) -> None:
    raise AssertionError(rejected.reason)
