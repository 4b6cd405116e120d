"""Training the adaptor: frozen features from the cache, InfoNCE, nothing else moves.

Shapes: N pairs, D embedding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from core.errors import UserError
from model.adaptor import Adaptor, AdaptorConfig
from model.distributed import Group
from model.features import EntityKeys, FeatureStore
from model.negatives import Ints, cluster_batches
from model.snapshot import Snapshots
from model.step import Trainer, TrainingPair
from model.train_settings import TrainSettings
from model.validation import Accuracy, ValidationSet, validate

_LOG_EVERY_STEPS = 10
_STREAM = 0  # of random numbers; the steps have stream 1


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The adaptor of the best epoch (of the last one without validation), and how it came to be."""

    adaptor: Adaptor
    logit_scale: float
    best_epoch: int
    steps: int
    loss: float  # mean over the last epoch
    accuracy: Accuracy | None


@dataclass(kw_only=True)
class _Progress:
    """Where a run stands, in plain values and tensors."""

    epoch: int = 1
    steps_of_epoch: int = 0
    losses: list[float] = field(default_factory=list)  # of the steps of this epoch
    best: dict[str, Any] | None = None  # rank, epoch, weights, logit_scale, accuracy


def train_adaptor(
    config: AdaptorConfig,
    settings: TrainSettings,
    store: FeatureStore,
    entities: Sequence[EntityKeys],
    pairs: Sequence[TrainingPair],
    *,
    validation: ValidationSet | None,
    device: torch.device,
    log: Callable[[dict[str, Any]], None],
    group: Group | None = None,
    snapshots: Snapshots | None = None,
    resume_from: dict[str, Any] | None = None,
) -> TrainResult:
    """Train on `pairs`, whose features and whose entities' are in `store`; figures go to `log` every few steps.

    Two runs with the same seed on the same CPU give the same weights, also where one of them was cut off and goes on
    with `resume_from`, what its `snapshots` held. In a `group` of processes all of them call this with the same
    arguments; the first one validates and logs. Raises `UserError` when the loss is no longer finite, or where the
    pairs name fewer than two entities.
    """
    if len({pair.entity for pair in pairs}) < 2:
        raise UserError("the pairs name one entity only: there is nothing to tell it from; give pairs of at least two")
    group = group or Group()
    steps_an_epoch = math.ceil(math.ceil(len(pairs) / (settings.batch_size * group.size)) / settings.accumulate)
    steps = steps_an_epoch * settings.epochs
    trainer = Trainer(
        config=config, settings=settings, store=store, entities=entities, steps=steps, device=device, group=group
    )
    if trainer.adaptor.centre_D is not None:
        embeddings_ND = store.query_embeddings([pair.query for pair in pairs])
        trainer.adaptor.centre_D.copy_(torch.from_numpy(embeddings_ND.mean(axis=0)))
    progress = _Progress()
    if resume_from is not None:
        trainer.restore(resume_from["trainer"])
        progress = _Progress(**resume_from["progress"])
    queries_ND = None
    if group.first and settings.clusters(settings.epochs):
        queries_ND = store.query_embeddings([pair.query for pair in pairs])
    mean_loss = math.nan
    with tqdm(total=steps, initial=trainer.steps_done, desc="training", unit="step", disable=not group.first) as bar:
        while progress.epoch <= settings.epochs:
            epoch, started, pairs_done = progress.epoch, time.perf_counter(), 0
            batches = group.from_first(_epoch_batches(settings, epoch, len(pairs), queries_ND, group))
            for step in range(progress.steps_of_epoch, steps_an_epoch):
                rows = batches[step * settings.accumulate : (step + 1) * settings.accumulate]
                loss = trainer.step(
                    [[pairs[row] for row in batch] for batch in rows], synthesise=settings.synthesises(epoch)
                )
                progress.losses.append(loss)
                progress.steps_of_epoch += 1
                pairs_done += sum(len(batch) for batch in rows)
                bar.update()
                if trainer.steps_done % _LOG_EVERY_STEPS == 0:
                    log({"epoch": epoch, "loss": loss, **trainer.state()})
                if group.first and snapshots and snapshots.due(trainer.steps_done):
                    snapshots.save({"trainer": trainer.snapshot(), "progress": vars(progress)})
            mean_loss = float(np.mean(progress.losses))
            pairs_per_s = pairs_done / (time.perf_counter() - started)
            accuracy = None
            if group.first:
                accuracy = validate(trainer.adaptor, store, entities, validation, device) if validation else None
            measured = {"validation": accuracy.to_dict()} if accuracy else {}
            log({"epoch": epoch, "mean_loss": mean_loss, "pairs_per_s": pairs_per_s, **trainer.state(), **measured})
            bar.set_postfix_str(_postfix(mean_loss, accuracy))
            rank = accuracy.rank() if accuracy else float(epoch)
            if progress.best is None or rank > progress.best["rank"]:
                progress.best = {
                    "rank": rank,
                    "epoch": epoch,
                    "weights": {name: tensor.detach().clone() for name, tensor in trainer.adaptor.state_dict().items()},
                    "logit_scale": trainer.logit_scale().item(),
                    "accuracy": accuracy.to_dict() if accuracy else None,
                }
            progress.epoch, progress.steps_of_epoch, progress.losses = epoch + 1, 0, []
    best = progress.best
    assert best is not None
    trainer.adaptor.load_state_dict(best["weights"])
    return TrainResult(
        adaptor=trainer.adaptor.eval(),
        logit_scale=best["logit_scale"],
        best_epoch=best["epoch"],
        steps=steps,
        loss=mean_loss,
        accuracy=Accuracy(**best["accuracy"]) if best["accuracy"] else None,
    )


def _epoch_batches(
    settings: TrainSettings, epoch: int, pairs: int, queries_ND: npt.NDArray[np.float32] | None, group: Group
) -> list[Ints]:
    """The rows of the pairs of each batch of an epoch, over all processes; drawn from the seed and the epoch alone."""
    batch_size = settings.batch_size * group.size
    seed = (settings.seed, _STREAM, epoch)
    if settings.clusters(epoch):
        if queries_ND is None:  # threads may round differently: the first process decides for all
            return []
        cluster_size = settings.cluster_size or settings.batch_size
        return cluster_batches(queries_ND, cluster_size=cluster_size, batch_size=batch_size, seed=seed)
    order_N = np.random.default_rng(seed).permutation(pairs)
    return [order_N[start : start + batch_size] for start in range(0, pairs, batch_size)]


def _postfix(mean_loss: float, accuracy: Accuracy | None) -> str:
    values = {"loss": mean_loss}
    if accuracy is not None:
        values |= {name: value for name, value in accuracy.to_dict().items() if value is not None}
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())
