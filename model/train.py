"""The training loop: epochs, validation, snapshots and the log. Only the adaptor and the temperature are trained.

Shapes: N pairs, D embedding.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from core.arrays import Float32Array, Int64Array
from core.errors import UserError
from core.files import atomic_write_bytes
from model.adaptor import Adaptor, AdaptorConfig
from model.distributed import Group
from model.features import EntityKeys, FeatureStore, KeyedPair
from model.losses import cluster_batches
from model.resume import Snapshots
from model.ridge import Ridge, RidgeData, fit_ridge, refit
from model.trainer import Batch, Trainer, TrainSettings
from model.validation import Accuracy, is_better, measure, right_answers

STRENGTHS = (0.1, 0.25, 0.5, 0.75, 1.0)

_LOG_EVERY_STEPS = 10
_STREAM = 0  # of random numbers; the steps use stream 1


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a run trains and validates on, the same in every process. Validation searches all `entities`.

    `held_out` are the rows of entities that only `validation` has queries of.
    """

    config: AdaptorConfig
    store: FeatureStore
    entities: Sequence[EntityKeys]
    pairs: Sequence[KeyedPair]
    catalog_pairs: int = 0  # of `pairs`
    validation: Sequence[KeyedPair] = ()
    held_out: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The adaptor of the best epoch and strength (without validation: the last one, 1) and the figures of the run.

    Strength is the factor of the learned output. It is folded into the adaptor. Epoch 0 is the start. `curve` has the
    accuracy after each epoch, at its best strength. `last` are the weights after the last epoch, at strength 1.
    """

    adaptor: Adaptor
    last: Mapping[str, torch.Tensor]
    logit_scale: float
    best_epoch: int
    strength: float
    steps: int
    loss: float | None  # mean over the last epoch
    accuracy: Accuracy | None
    curve: Sequence[Mapping[str, Any]]
    ridge: Ridge | None


@dataclass(kw_only=True)
class _Progress:
    """The progress of a run, as plain values and tensors."""

    epoch: int = 1
    steps_of_epoch: int = 0
    losses: list[float] = field(default_factory=list)  # of the steps of this epoch
    curve: list[dict[str, Any]] = field(default_factory=list)
    start: list[bool] = field(default_factory=list)  # which validation queries the start answers right
    highest: float = -1.0  # rank of an epoch, even if it may be chance
    highest_epoch: int = 0
    best: dict[str, Any] | None = None  # rank, row of the curve, weights, logit_scale


def train_adaptor(
    data: TrainingData,
    settings: TrainSettings,
    *,
    device: torch.device,
    log: Callable[[Mapping[str, Any]], None] | None,
    group: Group | None = None,
    snapshots: Snapshots | None = None,
    resume_from: dict[str, Any] | None = None,
) -> TrainResult:
    """Train an adaptor. Figures go to `log` every few steps.

    With validation, an epoch at some strength is kept if it is better than the start by more than chance, and better
    than the others by its rank. Without, the last one is kept.

    Two runs with the same seed on the same CPU give the same weights, even if one was interrupted and resumed with
    `resume_from`, the values of its snapshot. All processes of a `group` call this with the same arguments, and the
    first one validates and logs. Raises `UserError` if the loss is not finite or the pairs name fewer than two
    entities.
    """
    store, pairs = data.store, data.pairs
    if len({pair.entity for pair in pairs}) < 2:
        raise UserError("the pairs name only one entity, which leaves no negatives; give pairs of two or more")
    group = group or Group()
    epochs = settings.epochs if data.config.layers else 0
    steps_an_epoch = math.ceil(math.ceil(len(pairs) / (settings.batch_size * group.size)) / settings.accumulate)
    steps = steps_an_epoch * epochs
    trainer = Trainer(
        config=data.config, settings=settings, store=store, entities=data.entities, steps=steps, device=device,
        group=group,
    )  # fmt: skip
    adaptor = trainer.adaptor
    if adaptor.centre_D is not None:
        embeddings_ND = store.query_embeddings([pair.query for pair in pairs])
        adaptor.centre_D.copy_(torch.from_numpy(embeddings_ND.mean(axis=0)))
    ridge = None
    if data.config.residual and data.config.start == "image":
        ridge_data = _ridge_data(adaptor, data)
        ridge = group.from_first(fit_ridge(ridge_data, seed=settings.seed) if group.first else None)
        assert ridge is not None
        refit(ridge, ridge_data, data.held_out).start(adaptor)
    progress = _Progress()

    def finish_epoch(epoch: int) -> dict[str, Any]:
        """Validate, and keep the weights if they are the best so far. Return the accuracy at the best strength."""
        row: dict[str, Any] = {"epoch": epoch, "strength": 1.0}
        rank, better = float(epoch), True
        if group.first and data.validation:
            strengths = STRENGTHS if epoch else (1.0,)
            found = right_answers(adaptor, store, data.entities, [data.validation], device, strengths)
            correct = [of_strength for (of_strength,) in found]
            seen = [pair.seen for pair in data.validation]
            accuracies = [measure(each_Q, seen) for each_Q in correct]
            chosen = max(range(len(strengths)), key=lambda number: accuracies[number].rank())
            progress.start = progress.start if epoch else correct[0].tolist()
            row |= {"strength": strengths[chosen], **asdict(accuracies[chosen])}
            rank = accuracies[chosen].rank()
            better = epoch == 0 or is_better(correct[chosen], np.array(progress.start), seen)
        progress.curve.append(row)
        if rank > progress.highest:
            progress.highest, progress.highest_epoch = rank, epoch
        if better and (progress.best is None or rank > progress.best["rank"]):
            progress.best = {
                "rank": rank,
                "row": row,
                "weights": {name: tensor.detach().clone() for name, tensor in adaptor.state_dict().items()},
                "logit_scale": trainer.logit_scale().item(),
            }
        return row

    def stops() -> bool:
        """Return whether the last epochs brought nothing."""
        return bool(data.validation) and 0 < settings.patience < progress.epoch - progress.highest_epoch

    if resume_from is None:
        finish_epoch(0)
    else:
        trainer.restore(resume_from["trainer"])
        progress = _Progress(**resume_from["progress"])
    queries_ND = None
    if group.first and settings.clusters(epochs):
        queries_ND = store.query_embeddings([pair.query for pair in pairs])
    mean_loss = None
    with tqdm(total=steps, initial=trainer.steps_done, desc="training", unit="step", disable=not group.first) as bar:
        while progress.epoch <= epochs and not group.from_first(stops()):
            epoch, started, pairs_done = progress.epoch, time.perf_counter(), 0
            batches = group.from_first(_epoch_batches(settings, epoch, len(pairs), queries_ND, group))
            for step in range(progress.steps_of_epoch, steps_an_epoch):
                rows = batches[step * settings.accumulate : (step + 1) * settings.accumulate]
                parts = [Batch([pairs[row] for row in rows_B], cluster_B) for rows_B, cluster_B in rows]
                loss = trainer.step(parts, synthesise=settings.synthesises(epoch))
                progress.losses.append(loss)
                progress.steps_of_epoch += 1
                pairs_done += sum(len(rows_B) for rows_B, _ in rows)
                bar.update()
                if log and trainer.steps_done % _LOG_EVERY_STEPS == 0:
                    log({"epoch": epoch, "loss": loss, **trainer.state()})
                if group.first and snapshots and snapshots.due(trainer.steps_done):
                    snapshots.save({"trainer": trainer.snapshot(), "progress": vars(progress)})
            mean_loss = float(np.mean(progress.losses))
            pairs_per_s = pairs_done / (time.perf_counter() - started)
            validated = {name: value for name, value in finish_epoch(epoch).items() if name != "epoch"}
            if log:
                row = {"epoch": epoch, "mean_loss": mean_loss, "pairs_per_s": pairs_per_s, **trainer.state()}
                log({**row, "validation": validated} if data.validation else row)
            bar.set_postfix(loss=mean_loss, **{name: value for name, value in validated.items() if value is not None})
            progress.epoch, progress.steps_of_epoch, progress.losses = epoch + 1, 0, []
    best = progress.best
    assert best is not None
    chosen = dict(best["row"])
    last = {name: tensor.detach().clone() for name, tensor in adaptor.state_dict().items()}
    adaptor.load_state_dict(best["weights"])
    strength = chosen.pop("strength")
    if chosen.pop("epoch"):
        adaptor.scale_learned_(strength)
    if ridge is not None:
        ridge.start(adaptor)  # fitted to all entities
    return TrainResult(
        adaptor=adaptor.eval(),
        last=last,
        logit_scale=best["logit_scale"],
        best_epoch=best["row"]["epoch"],
        strength=strength,
        steps=trainer.steps_done,
        loss=mean_loss,
        accuracy=Accuracy(**chosen) if chosen else None,
        curve=progress.curve,
        ridge=ridge,
    )


def _ridge_data(adaptor: Adaptor, data: TrainingData) -> RidgeData:
    """Return what the ridge regression is fitted to: the entities, their images and the labelled queries."""
    store, entities = data.store, data.entities
    has_text = [row for row, entity in enumerate(entities) if entity.text is not None]
    texts_NL = np.zeros((len(entities), data.config.text_dim), np.float32)
    texts_NL[has_text] = store.mean_text_tokens([text for entity in entities if (text := entity.text) is not None])
    # A query that is an image of its entity would find itself. Without others, views of these images are used.
    # Where the user names unseen entities, they choose, since the encoders may know those of the training pairs.
    labels = [-1 if pair.seen is None or data.held_out else int(pair.seen) for pair in data.validation]
    labelled = [*((pair, -1) for pair in data.pairs), *zip(data.validation, labels, strict=True)]
    labelled = [each for each in labelled if each[0].query not in entities[each[0].entity].images]
    labelled = [each for each in labelled if not each[0].views] or labelled
    queries = [pair for pair, _ in labelled]

    def embed(keys: Sequence[bytes]) -> Float32Array:
        embeddings_BD = torch.from_numpy(store.query_embeddings(keys)).to(adaptor.mean_image_D.device)
        return adaptor.centred(embeddings_BD).cpu().numpy()

    return RidgeData(
        texts_NL=texts_NL,
        has_text_N=np.array([entity.text is not None for entity in entities]),
        images_ID=embed([image for entity in entities for image in entity.images]),
        owner_I=np.repeat(np.arange(len(entities)), [len(entity.images) for entity in entities]),
        queries_QD=embed([pair.query for pair in queries]),
        entity_Q=np.array([pair.entity for pair in queries], np.int64),
        seen_Q=np.array([label for _, label in labelled]) if 0 in labels else None,
    )


def _epoch_batches(
    settings: TrainSettings, epoch: int, pairs: int, queries_ND: Float32Array | None, group: Group
) -> list[tuple[Int64Array, Int64Array]]:
    """Return the rows of pairs in each batch of an epoch, over all processes, and the cluster of each row.

    They depend only on seed and epoch. Without clusters, a batch is one.
    """
    batch_size = settings.batch_size * group.size
    seed = (settings.seed, _STREAM, epoch)
    if settings.clusters(epoch):
        if queries_ND is None:  # rounding may differ between processes: the first one clusters for all
            return []
        cluster_size = settings.cluster_size or settings.batch_size
        return cluster_batches(queries_ND, cluster_size=cluster_size, batch_size=batch_size, seed=seed)
    order_N = np.random.default_rng(seed).permutation(pairs)
    parts = [order_N[start : start + batch_size] for start in range(0, pairs, batch_size)]
    return [(rows_B, np.zeros_like(rows_B)) for rows_B in parts]


@contextmanager
def open_log(path: Path, tensorboard: Path, *, after_step: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Open the log of a run, and yield a function that writes a row: a `step`, figures, and those of `validation`.

    Rows go to the JSONL file `path` and, if TensorBoard is installed, to the folder `tensorboard`. Rows of an earlier
    run are kept up to the snapshot at `after_step` (0 keeps none), so a resumed run has one log. An epoch's summary is
    written after the snapshot of its last step, so it is dropped and written again.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if after_step and path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may leave part of a line
    kept = [row for row in rows if (row["step"], "mean_loss" in row) < (after_step, True)]
    atomic_write_bytes(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
    try:
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(str(tensorboard), purge_step=after_step + 1)
    except ImportError:
        writer = None
    with path.open("a", encoding="utf-8") as file:

        def write(row: Mapping[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            if writer is not None:
                validation = {f"validation/{name}": value for name, value in row.get("validation", {}).items()}
                for name, value in {**row, **validation}.items():
                    if name not in ("step", "validation") and value is not None:
                        writer.add_scalar(name, value, row["step"])

        try:
            yield write
        finally:
            if writer is not None:
                writer.close()
