"""A whole training run, from files to a checkpoint (`wikiclip train`)."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from core.errors import CatalogError, CheckpointError, UserError
from core.lines import RejectLog
from model.adaptor import AdaptorConfig
from model.checkpoint import save_checkpoint
from model.data import balance_pairs, draw_entities, known_pairs, load_entities, load_pairs, question_warning
from model.distributed import Group, open_group
from model.encoders import open_image_encoder, open_text_encoder, resolve_device
from model.encoders.base import widths
from model.features import VIEWS, FeatureStore, catalog_pairs
from model.resume import Snapshots, fingerprint
from model.train import TrainingData, open_log, train_adaptor
from model.trainer import TrainSettings
from model.validation import half_cosine, hold_out

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
    images: Path | None = None  # folder of tar shards, for images by URL
    max_entities: int | None = None  # to draw from the catalog, besides those of the pairs; None: all of it
    max_per_entity: int | None = None
    catalog_pairs: bool = False
    resume: bool = False
    snapshot_every: int = 500  # steps; 0: never
    validation: Path | None = None
    hold_out: float = 0.2  # share of the entities with pairs, unless there is `validation`
    text_layer: int | None = None
    max_tokens: int = 256
    half: bool = True
    device: str = "auto"
    trust_remote_code: bool = False
    limit: int | None = None  # pairs to read per file, and only their entities

    def __post_init__(self) -> None:
        if self.pairs is None and not self.catalog_pairs:
            raise UserError("there are no pairs; give --pairs, or --catalog-pairs to make them from the catalog")

    def smoke(self) -> TrainRequest:
        """Return the same run with a few small batches, written to `NAME.smoke` so that no checkpoint is replaced."""
        batch_size = min(self.settings.batch_size, _SMOKE_BATCH)
        settings = replace(self.settings, epochs=1, batch_size=batch_size, cluster_size=None, hard_negatives_from=1)
        limit = _SMOKE_STEPS * settings.accumulate * batch_size
        out = _sibling(self.out, "smoke")
        return replace(self, settings=settings, limit=limit, max_entities=limit, out=out, resume=False)


def run_training(request: TrainRequest) -> dict[str, Any] | None:
    """Train an adaptor and write its checkpoint, with `rejected.jsonl` and the log of the run next to it.

    Return the figures of the run, which `wikiclip train --json` prints. The checkpoint is written last, so an earlier
    one is replaced only if training succeeds. Under `torchrun`, every process calls this. The first one computes
    features, writes and reports; the others return None. Raises `CatalogError`, `EncoderSpecError`, `CheckpointError`
    or `UserError`.
    """
    started = time.perf_counter()
    out = request.out
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; name a folder for the checkpoint")
    with open_group(resolve_device(request.device)) as (group, device), ExitStack() as stack:
        folder = out.parent
        if group.first:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            group.wait()  # for features
        rejects = RejectLog(folder / "rejected.jsonl")
        inputs = _prepare(request, device, rejects, announce=_announce if group.first else lambda line: None)
        if group.first:
            group.wait()
        snapshots = _snapshots(request, inputs, group)
        resume_from = snapshots.load() if request.resume else None
        log = None
        if group.first:
            after_step = resume_from["trainer"]["steps_done"] if resume_from else 0
            paths = _sibling(out, "train.jsonl"), _sibling(out, "tensorboard")
            log = stack.enter_context(open_log(*paths, after_step=after_step))
        result = train_adaptor(
            inputs,
            request.settings,
            device=device,
            log=log,
            group=group,
            snapshots=snapshots,
            resume_from=resume_from,
        )
        if not group.first:
            return None
    trained_on = [inputs.entities[row] for row in sorted({pair.entity for pair in inputs.pairs})]
    cosine = half_cosine(result.adaptor, inputs.store, trained_on, device)
    half = request.half and cosine >= _MIN_HALF_COSINE
    figures = {
        "pairs": len(inputs.pairs),  # including the catalog's
        "catalog_pairs": inputs.catalog_pairs,
        "entities": len(inputs.entities),
        "steps": result.steps,
        "held_out": len(inputs.held_out),
        "best_epoch": result.best_epoch,
        "strength": result.strength,
        "ridge": result.ridge.describe() if result.ridge else None,
        "curve": result.curve,
        "loss": result.loss,
        "validation": asdict(result.accuracy) if result.accuracy else None,
    }
    limits = {
        "max_per_entity": request.max_per_entity,
        "max_entities": request.max_entities,
        "processes": group.size,
    }
    save_checkpoint(
        out,
        adaptor=result.adaptor,
        logit_scale=result.logit_scale,
        image_encoder=inputs.store.image_encoder,
        text_encoder=inputs.store.text_encoder,
        training={**asdict(request.settings), **limits, **figures},
        half=half,
    )
    snapshots.remove()
    return {
        "checkpoint": str(out),
        **figures,
        "rejected": rejects.count,
        "features_computed": inputs.store.computed,
        "parameters": result.adaptor.parameter_count(),
        "half_cosine": cosine,
        "weights": "float16" if half else "float32",
        "seconds": time.perf_counter() - started,
    }


def _announce(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _prepare(
    request: TrainRequest, device: torch.device, rejects: RejectLog, announce: Callable[[str], None]
) -> TrainingData:
    """Open the encoders, read the files and compute the features that are not cached."""
    trust = request.trust_remote_code
    tokens, layer = request.max_tokens, request.text_layer
    image_encoder = open_image_encoder(request.image_encoder, device=device, trust_remote_code=trust)
    text_encoder = open_text_encoder(
        request.text_encoder, device=device, max_tokens=tokens, layer=layer, trust_remote_code=trust
    )
    store = FeatureStore(request.cache_dir, image_encoder, text_encoder, request.images)
    config = AdaptorConfig(**widths(image_encoder, text_encoder), **request.adaptor)
    root, limit = request.image_root, request.limit
    pairs, queries = (
        load_pairs(path, root, rejects, ovenid2impath=request.ovenid2impath, limit=limit) if path else []
        for path in (request.pairs, request.validation)
    )
    for path, loaded in ((request.pairs, pairs), (request.validation, queries)):
        if path and (warning := question_warning(path, loaded)):
            announce(warning)
    # Validation searches the whole catalog. Training needs only the entities of its pairs.
    whole = not pairs or (limit is None and (queries or request.catalog_pairs))
    of_pairs = {pair.entity_id for pair in (*pairs, *queries)}
    if whole and request.max_entities is not None:
        entities, candidates = draw_entities(
            request.catalog, root, rejects, count=request.max_entities, always=of_pairs
        )
        drawn = min(request.max_entities, candidates)
        announce(f"drew {drawn} of {candidates} entities with an image; {len(entities) - drawn} more are in the pairs")
    else:
        entities = load_entities(request.catalog, root, rejects, only=None if whole else of_pairs)
    rows = {entity.entity_id: row for row, entity in enumerate(entities)}
    pairs, queries = (known_pairs(each, rows, request.catalog, rejects) for each in (pairs, queries))
    if request.max_per_entity is not None:
        pairs = balance_pairs(pairs, request.max_per_entity, request.settings.seed)

    images = len(pairs) + len(queries) + sum(len(entity.images) for entity in entities)
    queried = {pair.entity_id for pair in pairs}
    with_pairs = (entity for entity in entities if request.catalog_pairs or entity.entity_id in queried)
    views = VIEWS * sum(len(set(entity.images)) == 1 for entity in with_pairs)
    expected = store.expected_bytes(images, [entity.text for entity in entities], views)
    announce(f"features take up to {tqdm.format_sizeof(expected, 'B')} in {request.cache_dir}")
    if views:
        announce(f"up to {views} views of entities' only images are encoded, and {images} images")
    entity_keys = store.entity_keys(entities, rejects.add)
    training = store.pair_keys(pairs, rows, rejects, "query images")
    paired = Counter(pair.entity for pair in training)
    added = catalog_pairs(entity_keys, paired, request.max_per_entity) if request.catalog_pairs else []
    if not training and not added:
        raise CatalogError(
            f"no entity of {request.catalog} has two images, or an image and a text, to make a pair; give --pairs"
        )
    all_pairs = store.with_views(training + added, entity_keys, entities)
    data = TrainingData(
        config=config, store=store, entities=entity_keys, pairs=all_pairs, catalog_pairs=len(added)
    )  # fmt: skip
    if queries:
        return replace(data, validation=store.pair_keys(queries, rows, rejects, "validation images"))
    labelled = len(training)
    split = hold_out(
        all_pairs[:labelled], all_pairs[labelled:], entity_keys, share=request.hold_out, seed=request.settings.seed
    )
    return data if split is None else replace(data, **vars(split))


def _snapshots(request: TrainRequest, inputs: TrainingData, group: Group) -> Snapshots:
    settings = {
        "settings": asdict(request.settings),
        "adaptor": inputs.config.to_dict(),
        "image_encoder": inputs.store.image_encoder.content_hash,
        "text_encoder": inputs.store.text_encoder.content_hash,
        "processes": group.size,
    }
    return Snapshots(
        path=_sibling(request.out, "snapshot.pt"),
        every_steps=request.snapshot_every,
        run=fingerprint(settings, inputs.entities, inputs.pairs, inputs.validation),
    )


def _sibling(out: Path, ending: str) -> Path:
    return out.parent / f"{out.name}.{ending}"
