"""Training the adaptor: frozen features from the cache, InfoNCE, nothing else moves.

Shapes: B pairs of a batch, D embedding.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from core.errors import UserError
from model.adaptor import Adaptor, AdaptorConfig
from model.features import EntityKeys, FeatureStore
from model.loss import LogitScale, info_nce
from model.validation import Accuracy, ValidationSet, embed, validate

_LOG_EVERY_STEPS = 10
_GRADIENT_NORM = 1.0
# Below this cosine between an embedding by float16 weights and by float32 ones, halving them would cost something.
_HALF_COSINE = 0.9999
_HALF_SAMPLE = 256


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. Raises `UserError` on figures that cannot work."""

    epochs: int = 20
    batch_size: int = 256  # pairs
    lr: float = 5e-4
    weight_decay: float = 0.05
    warmup: float = 0.05  # share of all steps
    modality_dropout: float = 0.1  # chance of hiding the image, and as much of hiding the text
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "epochs must be at least 1": self.epochs >= 1,
            "batch size must be at least 2: the negatives come from the batch": self.batch_size >= 2,
            "lr must be above 0 and at most 1": 0 < self.lr <= 1,
            "weight decay must be at least 0": self.weight_decay >= 0,
            "warmup must be at least 0 and below 1": 0 <= self.warmup < 1,
            "modality dropout must be from 0 to 0.5": 0 <= self.modality_dropout <= 0.5,
        }
        for message, holds in limits.items():
            if not holds:
                raise UserError(message)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TrainingPair:
    """A query image, by key, and the row of its entity."""

    query: bytes
    entity: int


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The adaptor of the best epoch (of the last one without validation), and how it came to be."""

    adaptor: Adaptor
    logit_scale: float
    best_epoch: int
    steps: int
    loss: float  # mean over the last epoch
    accuracy: Accuracy | None


def train_adaptor(
    config: AdaptorConfig,
    settings: TrainSettings,
    store: FeatureStore,
    entities: Sequence[EntityKeys],
    pairs: Sequence[TrainingPair],
    *,
    validation: ValidationSet | None,
    device: torch.device,
    log: TextIO,
) -> TrainResult:
    """Train on `pairs`, whose features and whose entities' are in `store`; a JSON line to `log` every few steps.

    Two runs with the same seed on the same CPU give the same weights. Raises `UserError` when the loss is no longer
    finite, or where the pairs name fewer than two entities.
    """
    if len({pair.entity for pair in pairs}) < 2:
        raise UserError("the pairs name one entity only: there is nothing to tell it from; give pairs of at least two")
    steps = math.ceil(len(pairs) / settings.batch_size) * settings.epochs
    trainer = _Trainer(config=config, settings=settings, store=store, entities=entities, steps=steps, device=device)
    best: tuple[float, int, dict[str, torch.Tensor], float, Accuracy | None] | None = None
    mean_loss = math.nan
    with tqdm(total=steps, desc="training", unit="step") as progress:
        for epoch in range(1, settings.epochs + 1):
            started, losses = time.perf_counter(), []
            order = trainer.rng.permutation(len(pairs))
            for start in range(0, len(pairs), settings.batch_size):
                losses.append(trainer.step([pairs[row] for row in order[start : start + settings.batch_size]]))
                progress.update()
                if trainer.steps_done % _LOG_EVERY_STEPS == 0:
                    _write(log, {"epoch": epoch, "loss": losses[-1], **trainer.state()})
            mean_loss = float(np.mean(losses))
            pairs_per_s = len(pairs) / (time.perf_counter() - started)
            accuracy = validate(trainer.adaptor, store, entities, validation, device) if validation else None
            measured = {"validation": accuracy.to_dict()} if accuracy else {}
            row = {"epoch": epoch, "mean_loss": mean_loss, "pairs_per_s": pairs_per_s, **trainer.state(), **measured}
            _write(log, row)
            progress.set_postfix_str(_postfix(mean_loss, accuracy))
            rank = accuracy.rank() if accuracy else float(epoch)
            if best is None or rank > best[0]:
                weights = {name: tensor.detach().clone() for name, tensor in trainer.adaptor.state_dict().items()}
                best = (rank, epoch, weights, trainer.logit_scale().item(), accuracy)
    assert best is not None
    _, best_epoch, weights, logit_scale, accuracy = best
    trainer.adaptor.load_state_dict(weights)
    return TrainResult(
        adaptor=trainer.adaptor.eval(),
        logit_scale=logit_scale,
        best_epoch=best_epoch,
        steps=steps,
        loss=mean_loss,
        accuracy=accuracy,
    )


class _Trainer:
    """What changes from step to step."""

    def __init__(
        self,
        *,
        config: AdaptorConfig,
        settings: TrainSettings,
        store: FeatureStore,
        entities: Sequence[EntityKeys],
        steps: int,
        device: torch.device,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.rng = np.random.default_rng(settings.seed)
        self.adaptor = Adaptor(config).to(device).train()
        self.logit_scale = LogitScale().to(device)
        self.steps_done = 0
        self._settings = settings
        self._store = store
        self._entities = entities
        self._device = device
        groups = _parameter_groups(self.adaptor, self.logit_scale, settings.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, lr=settings.lr)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, _warm_cosine(settings, steps))

    def step(self, batch: Sequence[TrainingPair]) -> float:
        """One step of the optimiser; the loss before it. Raises `UserError` if loss or gradient is not finite."""
        dropout, device = self._settings.modality_dropout, self._device
        rows = [draw_modalities(self._entities[pair.entity], pair.query, dropout, self.rng) for pair in batch]
        queries_BD = torch.from_numpy(self._store.query_embeddings([pair.query for pair in batch])).to(device)
        entity_B = torch.tensor([pair.entity for pair in batch], device=device)
        inputs = self._store.batch(rows, device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            embeddings_BD = self.adaptor(*inputs.arguments())
        loss = info_nce(queries_BD @ embeddings_BD.float().T, entity_B, self.logit_scale())
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.adaptor.parameters(), _GRADIENT_NORM)
        value = loss.item()
        if not (math.isfinite(value) and math.isfinite(norm.item())):
            raise UserError(
                f"training diverged at step {self.steps_done + 1}: loss {value}, gradient norm {norm.item()}; nothing "
                "is written. Lower --lr, raise --warmup, or check what the encoders give"
            )
        self._optimizer.step()
        self._schedule.step()
        self.logit_scale.clamp_()
        self.steps_done += 1
        return value

    def state(self) -> dict[str, float]:
        lr = float(self._optimizer.param_groups[0]["lr"])
        return {"step": self.steps_done, "lr": lr, "logit_scale": self.logit_scale().item()}


def draw_modalities(
    entity: EntityKeys, query: bytes, modality_dropout: float, rng: np.random.Generator
) -> tuple[bytes | None, bytes | None]:
    """One of the entity's images at random and its text, of which one may be hidden, so that stand-ins are learned.

    The query's own image is never drawn: finding it again teaches nothing. Never are both hidden.
    """
    others = [image for image in entity.images if image != query]
    image = others[rng.integers(len(others))] if others else None
    chance = rng.random()
    if image is not None and entity.text is not None:
        if chance < modality_dropout:
            return None, entity.text
        if chance < 2 * modality_dropout:
            return image, None
    return image, entity.text


def half_cosine(adaptor: Adaptor, store: FeatureStore, entities: Sequence[EntityKeys], device: torch.device) -> float:
    """The lowest cosine between embeddings by float32 weights and by float16 ones, over a sample of the entities."""
    some = entities[:: max(1, len(entities) // _HALF_SAMPLE)]
    rows = [(entity.images[0] if entity.images else None, entity.text) for entity in some]
    halved = Adaptor(adaptor.config).to(device).eval()
    halved.load_state_dict({name: tensor.half().float() for name, tensor in adaptor.state_dict().items()})
    full_ND, half_ND = embed(adaptor, store, rows, device), embed(halved, store, rows, device)
    return (full_ND * half_ND).sum(dim=1).min().item()


def halving_is_free(cosine: float) -> bool:
    """Whether weights may be stored in float16; False also where halving them overflows."""
    return cosine >= _HALF_COSINE


def _parameter_groups(adaptor: Adaptor, logit_scale: LogitScale, weight_decay: float) -> list[dict[str, Any]]:
    """Decay pulls matrices towards zero; norms, biases, stand-in tokens and the scale have no reason to be there."""
    matrices = [p for name, p in adaptor.named_parameters() if p.ndim >= 2 and not name.startswith("null_")]
    decayed = {id(parameter) for parameter in matrices}
    others = [p for p in (*adaptor.parameters(), *logit_scale.parameters()) if id(p) not in decayed]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _warm_cosine(settings: TrainSettings, steps: int) -> Callable[[int], float]:
    """The share of the full learning rate at a step: a straight rise, then half a cosine down to zero."""
    warmup = round(settings.warmup * steps)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return share


def _write(log: TextIO, row: dict[str, Any]) -> None:
    log.write(json.dumps(row) + "\n")
    log.flush()


def _postfix(mean_loss: float, accuracy: Accuracy | None) -> str:
    values = {"loss": mean_loss}
    if accuracy is not None:
        values |= {name: value for name, value in accuracy.to_dict().items() if value is not None}
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())
