"""How to train: what `wikiclip train` takes, but for files and the adaptor's shape."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from core.errors import UserError

HARD_NEGATIVES = ("none", "clusters", "synthesis", "both")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Figures of a training run. Raises `UserError` on those that cannot work."""

    epochs: int = 20
    batch_size: int = 256  # pairs, in each process
    accumulate: int = 1  # batches whose gradients make one step
    lr: float = 5e-4
    weight_decay: float = 0.05
    warmup: float = 0.05  # share of all steps
    modality_dropout: float = 0.1  # chance of hiding the image, and as much of hiding the text
    text_mask: float = 0.0  # chance of hiding a token of a text
    hard_negatives: str = "none"
    n_sync: int = 8  # texts that an image is read with, to make synthetic negatives
    cluster_size: int | None = None  # queries that look alike and share a batch; None: a whole batch
    hard_negatives_from: int = 1  # epoch
    seed: int = 0

    def __post_init__(self) -> None:
        size = self.cluster_size
        limits = {
            "epochs must be at least 1": self.epochs >= 1,
            "batch size must be at least 2: the negatives come from the batch": self.batch_size >= 2,
            "accumulate must be at least 1": self.accumulate >= 1,
            "lr must be above 0 and at most 1": 0 < self.lr <= 1,
            "weight decay must be at least 0": self.weight_decay >= 0,
            "warmup must be at least 0 and below 1": 0 <= self.warmup < 1,
            "modality dropout must be from 0 to 0.5": 0 <= self.modality_dropout <= 0.5,
            "text mask must be at least 0 and below 1": 0 <= self.text_mask < 1,
            f"hard negatives must be one of {', '.join(HARD_NEGATIVES)}": self.hard_negatives in HARD_NEGATIVES,
            "n-sync must be at least 1": self.n_sync >= 1,
            f"cluster size must be at least 2 and go into the batch size {self.batch_size} without rest": size is None
            or (size >= 2 and self.batch_size % size == 0),
            "hard negatives cannot start before epoch 1": self.hard_negatives_from >= 1,
            "seed must be at least 0": self.seed >= 0,
        }
        for message, holds in limits.items():
            if not holds:
                raise UserError(message)

    def clusters(self, epoch: int) -> bool:
        """Whether the batches of this epoch, counted from 1, are made of queries that look alike."""
        return self.hard_negatives in ("clusters", "both") and epoch >= self.hard_negatives_from

    def synthesises(self, epoch: int) -> bool:
        """Whether synthetic negatives stand in during this epoch, counted from 1."""
        return self.hard_negatives in ("synthesis", "both") and epoch >= self.hard_negatives_from

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
