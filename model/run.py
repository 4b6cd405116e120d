"""A whole training run, from files to a checkpoint (`wikiclip train`)."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from core.errors import CatalogError, CheckpointError, UserError
from core.jsonl import RejectLog
from model.adaptor import AdaptorConfig
from model.checkpoint import save_checkpoint
from model.data import balance_pairs, known_pairs, load_entities, load_pairs
from model.distributed import Group, open_group
from model.encoders import ImageEncoder, TextEncoder, open_image_encoder, open_text_encoder, resolve_device
from model.features import EntityKeys, FeatureStore, TrainingPair, catalog_pairs
from model.resume import Snapshots, fingerprint
from model.train import TrainResult, open_log, train_adaptor
from model.trainer import TrainSettings
from model.validation import Accuracy, ValidationSet, half_cosine

_SMOKE_STEPS, _SMOKE_BATCH = 3, 16
_MIN_HALF_COSINE = 0.9999  # between embeddings by float16 and float32 weights, to store float16


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """The inputs, encoders and options of a run. `adaptor` has the fields of `AdaptorConfig` except the widths."""

    catalog: Path
    pairs: Path | None  # None: only catalog pairs
    out: Path
    image_encoder: str
    text_encoder: str
    settings: TrainSettings
    adaptor: dict[str, Any]
    cache_dir: Path
    image_root: Path | None = None
    ovenid2impath: Path | None = None
    max_per_entity: int | None = None
    catalog_pairs: bool = False
    resume: bool = False
    snapshot_every: int = 500  # steps; 0: never
    validation: Path | None = None
    text_layer: int | None = None
    max_tokens: int = 256
    half: bool = True
    device: str = "auto"
    trust_remote_code: bool = False
    limit: int | None = None  # pairs to read per file, and only their entities

    def __post_init__(self) -> None:
        if self.pairs is None and not self.catalog_pairs:
            raise UserError("there are no pairs; give --pairs, or --catalog-pairs to make them from the catalog")
        if self.max_per_entity is not None and self.max_per_entity < 1:
            raise UserError(f"max per entity must be at least 1, not {self.max_per_entity}")
        if self.snapshot_every < 0:
            raise UserError(f"snapshot every must be at least 0 steps, not {self.snapshot_every}")

    def smoke(self) -> TrainRequest:
        """Return the same run with a few small batches, written to `NAME.smoke` so that no checkpoint is replaced."""
        batch_size = min(self.settings.batch_size, _SMOKE_BATCH)
        settings = replace(self.settings, epochs=1, batch_size=batch_size, cluster_size=None, hard_negatives_from=1)
        limit = _SMOKE_STEPS * settings.accumulate * batch_size
        return replace(self, settings=settings, limit=limit, out=_sibling(self.out, "smoke"), resume=False)


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """The figures of a run. Shares are from 0 to 1."""

    checkpoint: str
    entities: int
    pairs: int  # including the catalog's
    catalog_pairs: int
    rejected: int
    features_computed: int
    parameters: int
    steps: int
    best_epoch: int
    loss: float
    validation: Accuracy | None
    half_cosine: float  # the lowest between embeddings by float16 and float32 weights
    weights: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """The loaded inputs of training, the same in every process."""

    config: AdaptorConfig
    image_encoder: ImageEncoder
    text_encoder: TextEncoder
    store: FeatureStore
    entities: list[EntityKeys]
    pairs: list[TrainingPair]
    catalog_pairs: int
    validation: ValidationSet | None


def run_training(request: TrainRequest) -> TrainReport | None:
    """Train an adaptor and write its checkpoint, with `rejected.jsonl` and the log of the run next to it.

    The checkpoint is written last, so an earlier one is replaced only if training succeeds. Under `torchrun`, every
    process calls this. The first one computes features, writes and reports; the others return None. Raises
    `CatalogError`, `EncoderSpecError`, `CheckpointError` or `UserError`.
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
    trained_on = [inputs.entities[row] for row in sorted({pair.entity for pair in inputs.pairs})]
    cosine = half_cosine(result.adaptor, inputs.store, trained_on, device)
    half = request.half and cosine >= _MIN_HALF_COSINE
    save_checkpoint(
        out,
        adaptor=result.adaptor,
        logit_scale=result.logit_scale,
        image_encoder=inputs.image_encoder,
        text_encoder=inputs.text_encoder,
        training={
            **asdict(request.settings),
            "max_per_entity": request.max_per_entity,
            "processes": group.size,
            "pairs": len(inputs.pairs),
            "catalog_pairs": inputs.catalog_pairs,
            "entities": len(inputs.entities),
            "steps": result.steps,
            "best_epoch": result.best_epoch,
            "loss": result.loss,
            "validation": asdict(result.accuracy) if result.accuracy else None,
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
    """Open the encoders, read the files and compute the features that are not cached."""
    image_encoder = open_image_encoder(
        request.image_encoder, device=device, trust_remote_code=request.trust_remote_code
    )
    text_encoder = open_text_encoder(
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
    root, limit = request.image_root, request.limit
    pairs, queries = (
        load_pairs(path, root, rejects, ovenid2impath=request.ovenid2impath, limit=limit) if path else []
        for path in (request.pairs, request.validation)
    )
    # Validation searches the whole catalog. Training needs only the entities of its pairs.
    whole = not pairs or (limit is None and (queries or request.catalog_pairs))
    only = None if whole else {pair.entity_id for pair in (*pairs, *queries)}
    entities = load_entities(request.catalog, root, rejects, only=only)
    if not pairs and limit is not None:
        in_queries = {query.entity_id for query in queries}
        entities = [entity for row, entity in enumerate(entities) if row < limit or entity.entity_id in in_queries]
    pairs = known_pairs(pairs, entities, request.catalog, rejects)
    queries = known_pairs(queries, entities, request.catalog, rejects)
    if request.max_per_entity is not None:
        pairs = balance_pairs(pairs, request.max_per_entity, request.settings.seed)

    store = FeatureStore(request.cache_dir, image_encoder, text_encoder)
    entity_keys = store.entity_keys(entities, rejects.add)
    rows = {entity.entity_id: row for row, entity in enumerate(entities)}
    training = [
        TrainingPair(query=key, entity=rows[pair.entity_id])
        for pair, key in store.pair_keys(pairs, rejects, "query images")
    ]
    paired = Counter(pair.entity for pair in training)
    added = catalog_pairs(entity_keys, paired, request.max_per_entity) if request.catalog_pairs else []
    if not training and not added:
        raise CatalogError(
            f"no entity of {request.catalog} has two images, or an image and a text, to make a pair; give --pairs"
        )
    validated = store.pair_keys(queries, rejects, "validation images")
    return _Inputs(
        config=config,
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        store=store,
        entities=entity_keys,
        pairs=training + added,
        catalog_pairs=len(added),
        validation=ValidationSet.from_pairs(validated, rows, store) if validated else None,
    )


def _train(request: TrainRequest, inputs: _Inputs, group: Group, device: torch.device) -> TrainResult:
    snapshots = _snapshots(request, inputs, group)
    resume_from = snapshots.load() if request.resume else None
    with ExitStack() as stack:
        log = None
        if group.first:
            after_step = resume_from["trainer"]["steps_done"] if resume_from else 0
            paths = _sibling(request.out, "train.jsonl"), _sibling(request.out, "tensorboard")
            log = stack.enter_context(open_log(*paths, after_step=after_step))
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
    settings = {
        "settings": asdict(request.settings),
        "adaptor": inputs.config.to_dict(),
        "image_encoder": inputs.image_encoder.content_hash,
        "text_encoder": inputs.text_encoder.content_hash,
        "processes": group.size,
    }
    queries = [inputs.validation] if inputs.validation else []
    return Snapshots(
        path=_sibling(request.out, "snapshot.pt"),
        every_steps=request.snapshot_every,
        run=fingerprint(settings, inputs.entities, inputs.pairs, queries),
    )


def _sibling(out: Path, ending: str) -> Path:
    return out.parent / f"{out.name}.{ending}"
