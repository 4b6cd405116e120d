"""One training run, from files to a checkpoint: what `wikiclip train` does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from core.errors import CatalogError, CheckpointError, UserError
from core.jsonl import RejectLog
from model.adaptor import AdaptorConfig
from model.checkpoint import save_checkpoint
from model.data import Entity, Pair, known_pairs, load_entities, load_pairs
from model.distributed import Group, open_group
from model.encoders import ImageEncoder, TextEncoder, load_image_encoder, load_text_encoder, resolve_device
from model.features import EntityKeys, FeatureStore
from model.pairs import at_most, catalog_pairs
from model.precision import half_cosine, halving_is_free
from model.snapshot import Snapshots, fingerprint
from model.step import TrainingPair
from model.train import TrainResult, train_adaptor
from model.train_log import open_log
from model.train_settings import TrainSettings
from model.validation import Accuracy, ValidationSet

_SMOKE_STEPS, _SMOKE_BATCH = 3, 16


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What to train on, with what, and where to. `adaptor` holds the fields of `AdaptorConfig` but for the widths."""

    catalog: Path
    pairs: Path | None  # None: those of the catalog alone
    out: Path
    image_encoder: str
    text_encoder: str
    settings: TrainSettings
    adaptor: dict[str, Any]
    cache_dir: Path
    image_root: Path | None = None
    ovenid2impath: Path | None = None
    max_per_entity: int | None = None  # None: all pairs
    catalog_pairs: bool = False
    resume: bool = False
    snapshot_every: int = 500  # steps; 0: never
    validation: Path | None = None
    text_layer: int | None = None
    max_tokens: int = 256
    half: bool = True
    device: str = "auto"
    trust_remote_code: bool = False
    limit: int | None = None  # pairs to read of each file; of the catalog, only what they need

    def __post_init__(self) -> None:
        if self.pairs is None and not self.catalog_pairs:
            raise UserError(
                "there is nothing to train on; give --pairs, or --catalog-pairs to make them of the catalog"
            )
        if self.max_per_entity is not None and self.max_per_entity < 1:
            raise UserError(f"max per entity must be at least 1, it is {self.max_per_entity}")
        if self.snapshot_every < 0:
            raise UserError(f"snapshot every must be at least 0 steps, it is {self.snapshot_every}")

    def smoke(self) -> TrainRequest:
        """The same run with a few small batches of one epoch, into `NAME.smoke`, so that no real checkpoint is lost."""
        batch_size = min(self.settings.batch_size, _SMOKE_BATCH)
        settings = replace(self.settings, epochs=1, batch_size=batch_size, cluster_size=None, hard_negatives_from=1)
        limit = _SMOKE_STEPS * settings.accumulate * batch_size
        return replace(self, settings=settings, limit=limit, out=_beside(self.out, "smoke"), resume=False)


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """The figures of a run. Shares are from 0 to 1; `half_cosine` is the lowest between float16 and float32 weights."""

    checkpoint: str
    entities: int
    pairs: int  # those of the catalog among them
    catalog_pairs: int
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


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What training works on, the same in every process."""

    config: AdaptorConfig
    image_encoder: ImageEncoder
    text_encoder: TextEncoder
    store: FeatureStore
    entities: list[EntityKeys]
    pairs: list[TrainingPair]
    catalog_pairs: int
    validation: ValidationSet | None


def run_training(request: TrainRequest) -> TrainReport | None:
    """Train an adaptor and write its checkpoint; `rejected.jsonl` and the log of the run lie beside it.

    The checkpoint is written last and only if training went well: an earlier one in its place stays until then. Under
    `torchrun` every process calls this; the first one computes features, writes and reports, the others get None.
    Raises `CatalogError`, `EncoderSpecError`, `CheckpointError` or `UserError`, each saying what to do.
    """
    started = time.perf_counter()
    out = request.out
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; name a folder for the checkpoint")
    with open_group(resolve_device(request.device)) as (group, device), ExitStack() as stack:
        if not group.first:
            group.wait()  # for features
            scratch = Path(stack.enter_context(TemporaryDirectory()))
            _train(request, _prepare(request, device, RejectLog(scratch / "rejected.jsonl")), group, device)
            return None
        out.parent.mkdir(parents=True, exist_ok=True)
        rejects = RejectLog(out.parent / "rejected.jsonl")
        inputs = _prepare(request, device, rejects)
        group.wait()
        result = _train(request, inputs, group, device)
    cosine = half_cosine(result.adaptor, inputs.store, _trained_on(inputs.entities, inputs.pairs), device)
    half = request.half and halving_is_free(cosine)
    save_checkpoint(
        out,
        adaptor=result.adaptor,
        logit_scale=result.logit_scale,
        image_encoder=inputs.image_encoder,
        text_encoder=inputs.text_encoder,
        training={
            **request.settings.to_dict(),
            "max_per_entity": request.max_per_entity,
            "processes": group.size,
            "pairs": len(inputs.pairs),
            "catalog_pairs": inputs.catalog_pairs,
            "entities": len(inputs.entities),
            "steps": result.steps,
            "best_epoch": result.best_epoch,
            "loss": result.loss,
            "validation": result.accuracy.to_dict() if result.accuracy else None,
        },
        half=half,
    )
    _snapshots(request, inputs, group).remove()
    return TrainReport(
        checkpoint=str(out),
        entities=len(inputs.entities),
        pairs=len(inputs.pairs),
        catalog_pairs=inputs.catalog_pairs,
        rejected=rejects.count,
        features_computed=inputs.store.computed,
        parameters=result.adaptor.parameter_count(),
        steps=result.steps,
        best_epoch=result.best_epoch,
        loss=result.loss,
        validation=result.accuracy,
        half_cosine=cosine,
        weights="float16" if half else "float32",
        seconds=time.perf_counter() - started,
    )


def _prepare(request: TrainRequest, device: torch.device, rejects: RejectLog) -> _Inputs:
    """Load encoders, read files, compute the features that the cache lacks."""
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
    root, paths, limit = request.image_root, request.ovenid2impath, request.limit
    pairs: list[Pair] = []
    if request.pairs:
        pairs = load_pairs(request.pairs, root, rejects, ovenid2impath=paths, limit=limit)
    queries: list[Pair] = []
    if request.validation:
        queries = load_pairs(request.validation, root, rejects, ovenid2impath=paths, limit=limit)
    # Validation searches the whole catalog; training needs no more than the entities of its pairs.
    whole = not pairs or (limit is None and (queries or request.catalog_pairs))
    wanted = None if whole else {pair.entity_id for pair in (*pairs, *queries)}
    entities = load_entities(request.catalog, root, rejects, only=wanted)
    if not pairs and limit is not None:
        asked = {query.entity_id for query in queries}
        entities = [entity for row, entity in enumerate(entities) if row < limit or entity.entity_id in asked]
    pairs = known_pairs(pairs, entities, request.catalog, rejects) if pairs else []
    queries = known_pairs(queries, entities, request.catalog, rejects) if queries else []
    if pairs and request.max_per_entity is not None:
        pairs = at_most(pairs, request.max_per_entity, request.settings.seed)

    store = FeatureStore(request.cache_dir, image_encoder, text_encoder)
    entity_keys = store.entity_keys(entities, rejects.add)
    training = _training_pairs(pairs, entities, store, rejects) if pairs else []
    added: list[TrainingPair] = []
    if request.catalog_pairs:
        added = catalog_pairs(entity_keys, Counter(pair.entity for pair in training), request.max_per_entity)
    if not training and not added:
        raise CatalogError(
            f"no entity of {request.catalog} has two images, or an image and a text, to make a pair of; give --pairs"
        )
    return _Inputs(
        config=config,
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        store=store,
        entities=entity_keys,
        pairs=training + added,
        catalog_pairs=len(added),
        validation=_validation_set(queries, entities, store, rejects) if queries else None,
    )


def _train(request: TrainRequest, inputs: _Inputs, group: Group, device: torch.device) -> TrainResult:
    snapshots = _snapshots(request, inputs, group)
    resume_from = snapshots.load() if request.resume else None
    with ExitStack() as stack:
        log: Callable[[dict[str, Any]], None] = _unlogged
        if group.first:
            after_step = resume_from["trainer"]["steps_done"] if resume_from else 0
            paths = _beside(request.out, "train.jsonl"), _beside(request.out, "tensorboard")
            log = stack.enter_context(open_log(*paths, after_step=after_step)).write
        return train_adaptor(
            inputs.config,
            request.settings,
            inputs.store,
            inputs.entities,
            inputs.pairs,
            validation=inputs.validation,
            device=device,
            log=log,
            group=group,
            snapshots=snapshots,
            resume_from=resume_from,
        )


def _snapshots(request: TrainRequest, inputs: _Inputs, group: Group) -> Snapshots:
    """Keyed by all that the result depends on."""

    def rows() -> Iterator[bytes]:
        for entity in inputs.entities:
            yield b"".join((*entity.images, b"|", entity.text or b""))
        for pair in inputs.pairs:
            yield pair.query + pair.entity.to_bytes(8, "big")
        if inputs.validation is not None:
            yield inputs.validation.query_embeddings_QD.tobytes()
            yield inputs.validation.entity_Q.tobytes()

    settings = {
        "settings": request.settings.to_dict(),
        "adaptor": inputs.config.to_dict(),
        "image_encoder": inputs.image_encoder.content_hash,
        "text_encoder": inputs.text_encoder.content_hash,
        "processes": group.size,
    }
    path = _beside(request.out, "snapshot.pt")
    return Snapshots(path=path, every_steps=request.snapshot_every, run=fingerprint(settings, rows()))


def _beside(out: Path, ending: str) -> Path:
    return out.parent / f"{out.name}.{ending}"


def _unlogged(row: dict[str, Any]) -> None:
    """The first process speaks for all."""


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
