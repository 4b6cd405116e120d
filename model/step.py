"""One step of the optimiser, and all that changes with it.

Whatever is random in a step follows from the seed and the step's number alone, so a run that was cut off goes on as if
it had not been.

Shapes: B pairs of a batch over all processes, b those of this process, T text tokens, D embedding, S donors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from core.errors import UserError
from model.adaptor import Adaptor, AdaptorConfig
from model.augment import draw_modalities, hide_tokens
from model.distributed import Group
from model.features import EntityBatch, EntityKeys, FeatureStore
from model.loss import LogitScale, info_nce
from model.negatives import NO_DONOR, draw_donors, harden, synthetic_cosines
from model.train_settings import TrainSettings

_GRADIENT_NORM = 1.0
_STREAM = 1  # of random numbers; the order of the pairs has stream 0


@dataclass(frozen=True, kw_only=True)
class TrainingPair:
    """A query image, by key, and the row of its entity."""

    query: bytes
    entity: int


class Trainer:
    """Adaptor, temperature and optimiser. In a group every process holds the same, step after step."""

    def __init__(
        self,
        *,
        config: AdaptorConfig,
        settings: TrainSettings,
        store: FeatureStore,
        entities: Sequence[EntityKeys],
        steps: int,
        device: torch.device,
        group: Group,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.adaptor = Adaptor(config).to(device).train()
        self.logit_scale = LogitScale().to(device)
        self.steps_done = 0
        self._settings = settings
        self._store = store
        self._entities = entities
        self._device = device
        self._group = group
        self._text_numbers = _numbered([entity.text for entity in entities])
        parameter_groups = _parameter_groups(self.adaptor, self.logit_scale, settings.weight_decay)
        self._optimizer = torch.optim.AdamW(parameter_groups, lr=settings.lr)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, _warm_cosine(settings, steps))

    def step(self, batches: Sequence[Sequence[TrainingPair]], *, synthesise: bool) -> float:
        """Add up the gradients of the batches and move once; returns their mean loss before it.

        `synthesise` lets synthetic negatives stand in. Raises `UserError` if loss or gradient is not finite.
        """
        seed = np.random.SeedSequence((self._settings.seed, _STREAM, self.steps_done))
        rng = np.random.default_rng(seed)
        torch.manual_seed(int(seed.generate_state(1)[0]) + self._group.rank)
        self._optimizer.zero_grad(set_to_none=True)
        value = 0.0
        for batch in batches:
            loss = self._loss(batch, rng, synthesise) / len(batches)
            loss.backward()  # type: ignore[no-untyped-call]
            value += loss.item()
        self._group.add_gradients((*self.adaptor.parameters(), *self.logit_scale.parameters()))
        norm = nn.utils.clip_grad_norm_(self.adaptor.parameters(), _GRADIENT_NORM)
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

    def snapshot(self) -> dict[str, Any]:
        """All that `restore` needs, in plain values and tensors."""
        return {
            "steps_done": self.steps_done,
            "adaptor": self.adaptor.state_dict(),
            "logit_scale": self.logit_scale.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        self.steps_done = snapshot["steps_done"]
        self.adaptor.load_state_dict(snapshot["adaptor"])
        self.logit_scale.load_state_dict(snapshot["logit_scale"])
        self._optimizer.load_state_dict(snapshot["optimizer"])
        self._schedule.load_state_dict(snapshot["schedule"])

    def _loss(self, batch: Sequence[TrainingPair], rng: np.random.Generator, synthesise: bool) -> torch.Tensor:
        """The loss over the whole batch; its gradient reaches what this process embedded."""
        settings, device, group = self._settings, self._device, self._group
        mine = group.share(len(batch))
        # Every process draws for all rows, so that all of them stay in step.
        drawn = [
            draw_modalities(self._entities[pair.entity], pair.query, settings.modality_dropout, rng) for pair in batch
        ]
        # A hidden text is read all the same and masked afterwards: another image may be read with it.
        rows = [(image, self._entities[pair.entity].text) for (image, _), pair in zip(drawn, batch, strict=True)]
        inputs = self._store.batch(rows[mine], device)
        tokens_bT = hide_tokens(inputs.text_mask_BT, settings.text_mask)
        shown_b = torch.tensor([text is not None for _, text in drawn[mine]], dtype=torch.bool, device=device)
        embeddings_BD = torch.from_numpy(self._store.query_embeddings([pair.query for pair in batch])).to(device)
        queries_BD = self.adaptor.centred(embeddings_BD)
        entity_B = np.array([pair.entity for pair in batch])
        entities_B = torch.from_numpy(entity_B).to(device)

        own_bD = self._embed(inputs, inputs.text_tokens_BTL, tokens_bT & shown_b[:, None])
        cosines_BB = queries_BD @ group.gather(own_bD, len(batch)).T
        if synthesise:
            text_B = self._text_numbers[entity_B]
            donors_BS = np.full((len(batch), settings.n_sync), NO_DONOR, np.int64)
            for rank in range(group.size):  # a process has the texts of its own share only
                share = group.share(len(batch), rank)
                donors_bS = draw_donors(entity_B[share], text_B[share], settings.n_sync, rng)
                donors_BS[share] = np.where(donors_bS == NO_DONOR, NO_DONOR, donors_bS + share.start)
            donors_BS[[image is None for image, _ in drawn]] = NO_DONOR  # nothing of the entity would be left

            def embed(donor_B: torch.Tensor) -> torch.Tensor:
                donor_b = donor_B[mine] - mine.start
                swapped_bD = self._embed(inputs, inputs.text_tokens_BTL[donor_b], tokens_bT[donor_b])
                return group.gather(swapped_bD, len(batch))

            donors = torch.from_numpy(donors_BS).to(device)
            synthetic_BBS = synthetic_cosines(queries_BD, donors, embed)
            cosines_BB = harden(cosines_BB, synthetic_BBS, donors, entities_B, torch.from_numpy(text_B).to(device))
        # Gradients are added up over the processes, and each would bring the temperature's whole.
        scale = self.logit_scale() if group.first else self.logit_scale().detach()
        return info_nce(cosines_BB, entities_B, scale)

    def _embed(self, inputs: EntityBatch, text_tokens_bTL: torch.Tensor, text_mask_bT: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._device.type == "cuda"):
            embeddings_bD = self.adaptor(inputs.patch_tokens_BPC, inputs.image_mask_B, text_tokens_bTL, text_mask_bT)
        result: torch.Tensor = embeddings_bD.float()
        return result


def _numbered(texts: Sequence[bytes | None]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A number for each text, equal ones alike; -1 for none."""
    numbers: dict[bytes, int] = {}
    return np.array([-1 if text is None else numbers.setdefault(text, len(numbers)) for text in texts], np.int64)


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
