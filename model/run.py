"""One training run, from files to a checkpoint: what `wikiclip train` does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import CatalogError, CheckpointError
from core.jsonl import RejectLog
from model.adaptor import AdaptorConfig
from model.checkpoint import save_checkpoint
from model.data import Entity, Pair, known_pairs, load_entities, load_pairs
from model.encoders import load_image_encoder, load_text_encoder, resolve_device
from model.features import EntityKeys, FeatureStore
from model.train import TrainingPair, TrainSettings, half_cosine, halving_is_free, train_adaptor
from model.validation import Accuracy, ValidationSet


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What to train on, with what, and where to. `adaptor` holds the fields of `AdaptorConfig` but for the widths."""

    catalog: Path
    pairs: Path
    out: Path
    image_encoder: str
    text_encoder: str
    settings: TrainSettings
    adaptor: dict[str, Any]
    cache_dir: Path
    image_root: Path | None = None
    validation: Path | None = None
    text_layer: int | None = None
    max_tokens: int = 256
    half: bool = True
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """The figures of a run. Shares are from 0 to 1; `half_cosine` is the lowest between float16 and float32 weights."""

    checkpoint: str
    entities: int
    pairs: int
    rejected: int
    features_computed: int
    parameters: int
    steps: int
    best_epoch: int
    loss: float
    validation: Accuracy | None
    half_cosine: float
    weights: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_training(request: TrainRequest) -> TrainReport:
    """Train an adaptor and write its checkpoint; `rejected.jsonl` and the log of the run lie beside it.

    The checkpoint is written last and only if training went well: an earlier one in its place stays until then. Raises
    `CatalogError`, `EncoderSpecError`, `CheckpointError` or `UserError`, each saying what to do.
    """
    started = time.perf_counter()
    out = request.out
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; name a folder for the checkpoint")
    device = resolve_device(request.device)
    image_encoder = load_image_encoder(
        request.image_encoder, device=device, trust_remote_code=request.trust_remote_code
    )
    text_encoder = load_text_encoder(
        request.text_encoder,
        device=device,
        max_tokens=request.max_tokens,
        layer=request.text_layer,
        trust_remote_code=request.trust_remote_code,
    )
    config = AdaptorConfig(
        patch_dim=image_encoder.patch_dim,
        text_dim=text_encoder.dim,
        embedding_dim=image_encoder.embedding_dim,
        **request.adaptor,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    rejects = RejectLog(out.parent / "rejected.jsonl")
    pairs = load_pairs(request.pairs, request.image_root, rejects)
    queries = load_pairs(request.validation, request.image_root, rejects) if request.validation else []
    # Validation searches the whole catalog; training needs no more than the entities of its pairs.
    wanted = None if queries else {pair.entity_id for pair in pairs}
    entities = load_entities(request.catalog, request.image_root, rejects, only=wanted)
    pairs = known_pairs(pairs, entities, request.catalog, rejects)
    queries = known_pairs(queries, entities, request.catalog, rejects) if queries else []

    store = FeatureStore(request.cache_dir, image_encoder, text_encoder)
    entity_keys = store.entity_keys(entities, rejects.add)
    training = _training_pairs(pairs, entities, store, rejects)
    validation = _validation_set(queries, entities, store, rejects) if queries else None
    with (out.parent / f"{out.name}.train.jsonl").open("w", encoding="utf-8") as log:
        result = train_adaptor(
            config, request.settings, store, entity_keys, training, validation=validation, device=device, log=log
        )
    cosine = half_cosine(result.adaptor, store, _trained_on(entity_keys, training), device)
    half = request.half and halving_is_free(cosine)
    save_checkpoint(
        out,
        adaptor=result.adaptor,
        logit_scale=result.logit_scale,
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        training={
            **request.settings.to_dict(),
            "pairs": len(training),
            "entities": len(entities),
            "steps": result.steps,
            "best_epoch": result.best_epoch,
            "loss": result.loss,
            "validation": result.accuracy.to_dict() if result.accuracy else None,
        },
        half=half,
    )
    return TrainReport(
        checkpoint=str(out),
        entities=len(entities),
        pairs=len(training),
        rejected=rejects.count,
        features_computed=store.computed,
        parameters=result.adaptor.parameter_count(),
        steps=result.steps,
        best_epoch=result.best_epoch,
        loss=result.loss,
        validation=result.accuracy,
        half_cosine=cosine,
        weights="float16" if half else "float32",
        seconds=time.perf_counter() - started,
    )


def _training_pairs(
    pairs: Sequence[Pair], entities: Sequence[Entity], store: FeatureStore, rejects: RejectLog
) -> list[TrainingPair]:
    rows = {entity.entity_id: row for row, entity in enumerate(entities)}
    keys = store.image_keys([pair.image for pair in pairs], rejects.add, "query images")
    found = zip(pairs, keys, strict=True)
    training = [TrainingPair(query=key, entity=rows[pair.entity_id]) for pair, key in found if key is not None]
    if not training:
        raise CatalogError(f"not one query image of the pairs can be read; see {rejects.path}")
    return training


def _validation_set(
    pairs: Sequence[Pair], entities: Sequence[Entity], store: FeatureStore, rejects: RejectLog
) -> ValidationSet:
    rows = {entity.entity_id: row for row, entity in enumerate(entities)}
    keys = store.image_keys([pair.image for pair in pairs], rejects.add, "validation images")
    found = [(pair, key) for pair, key in zip(pairs, keys, strict=True) if key is not None]
    if not found:
        raise CatalogError(f"not one image of the validation pairs can be read; see {rejects.path}")
    return ValidationSet(
        query_embeddings_QD=store.query_embeddings([key for _, key in found]),
        entity_Q=np.array([rows[pair.entity_id] for pair, _ in found], np.int64),
        seen_Q=[pair.seen for pair, _ in found],
    )


def _trained_on(entities: Sequence[EntityKeys], pairs: Sequence[TrainingPair]) -> list[EntityKeys]:
    return [entities[row] for row in sorted({pair.entity for pair in pairs})]
