"""The settings of a training run, and one step of the optimiser.

All that is random in a step depends only on the seed and the step's number, so a resumed run equals an uninterrupted
one.

Shapes: B pairs of a batch over all processes, b those of this process, T text tokens, D embedding, S donors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from core.arrays import Int64Array
from core.errors import UserError
from model.adaptor import Adaptor, AdaptorConfig, EntityBatch
from model.distributed import Group
from model.features import EntityKeys, FeatureStore, KeyedPair
from model.losses import LogitScale, draw_donors, info_nce, other_image_negatives, own_image_negatives

_GRADIENT_NORM = 1.0
_STREAM = 1  # of random numbers; the order of pairs uses stream 0


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The hyperparameters of a training run. Raises `UserError` if the batch is not made of whole clusters."""

    epochs: int = 20
    patience: int = 3  # epochs without a better accuracy in validation, after which training stops; 0: never
    batch_size: int = 256  # pairs, per process
    accumulate: int = 1  # batches per step
    lr: float = 5e-4
    weight_decay: float = 0.05
    warmup: float = 0.05  # share of all steps
    modality_dropout: float = 0.1  # probability of hiding the image, and of hiding the text
    text_mask: float = 0.0  # probability of hiding a text token
    hard_negatives: str = "none"  # or clusters, synthesis, both
    n_sync: int = 8  # synthetic negatives per image
    synthetic_image: str = "own"  # whose image they have: the query's own entity, or "other"
    cluster_size: int | None = None  # similar queries per batch; None: the whole batch
    hard_negatives_from: int = 1  # epoch
    seed: int = 0

    def __post_init__(self) -> None:
        size = self.cluster_size
        if size is not None and (size < 2 or self.batch_size % size):
            raise UserError(f"cluster size must be at least 2 and divide the batch size {self.batch_size}, not {size}")

    def clusters(self, epoch: int) -> bool:
        """Whether batches of this epoch (counted from 1) are clusters of similar queries."""
        return self.hard_negatives in ("clusters", "both") and epoch >= self.hard_negatives_from

    def synthesises(self, epoch: int) -> bool:
        """Whether this epoch (counted from 1) uses synthetic negatives."""
        return self.hard_negatives in ("synthesis", "both") and epoch >= self.hard_negatives_from


def draw_modalities(
    entity: EntityKeys, query: bytes, modality_dropout: float, rng: np.random.Generator
) -> tuple[bytes | None, bytes | None]:
    """Return a random image of the entity and its text, one of them sometimes hidden to train the null tokens.

    It never returns the query's own image, which would make the task trivial, and never hides both.
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


def hide_tokens(text_mask_BT: torch.Tensor, share: float) -> torch.Tensor:
    """Hide each text token with probability `share`, using torch's global generator.

    A text keeps at least one token: without any, the adaptor would read it as missing.
    """
    if share == 0 or text_mask_BT.shape[1] == 0:
        return text_mask_BT
    chance_BT = torch.rand(text_mask_BT.shape, device=text_mask_BT.device).masked_fill(~text_mask_BT, -1.0)
    return text_mask_BT & ((chance_BT >= share) | (chance_BT == chance_BT.amax(dim=1, keepdim=True)))


class Batch(NamedTuple):
    """Pairs over all processes, and the cluster of each. Donors of texts come from the same cluster."""

    pairs: Sequence[KeyedPair]
    cluster_B: Int64Array


class Trainer:
    """The adaptor, temperature and optimiser. They are the same in every process of a group after every step."""

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
        texts = dict.fromkeys(entity.text for entity in entities if entity.text is not None)
        numbers = {text: number for number, text in enumerate(texts)}
        self._text_numbers = np.array([numbers[e.text] if e.text else -1 for e in entities], np.int64)
        parameter_groups = _parameter_groups(self.adaptor, self.logit_scale, settings.weight_decay)
        self._optimizer = torch.optim.AdamW(parameter_groups, lr=settings.lr)
        warmup = round(settings.warmup * steps)

        def factor(step: int) -> float:
            """Return the learning rate's factor: linear warm-up, then half a cosine down to zero."""
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, factor)
        self._parts: dict[str, Any] = {
            "adaptor": self.adaptor,
            "logit_scale": self.logit_scale,
            "optimizer": self._optimizer,
            "schedule": self._schedule,
        }

    def step(self, batches: Sequence[Batch], *, synthesise: bool) -> float:
        """Take one optimiser step on the summed gradients of the batches. Return their mean loss before the step.

        `synthesise` uses synthetic negatives. Raises `UserError` if loss or gradient is not finite.
        """
        seed = np.random.SeedSequence((self._settings.seed, _STREAM, self.steps_done))
        rng = np.random.default_rng(seed)
        torch.manual_seed(int(seed.generate_state(1)[0]) + self._group.rank)
        self._optimizer.zero_grad(set_to_none=True)
        value = 0.0
        for batch in batches:
            loss = self._loss(*batch, rng, synthesise) / len(batches)
            loss.backward()  # type: ignore[no-untyped-call]
            value += loss.item()
        self._group.add_gradients((*self.adaptor.parameters(), *self.logit_scale.parameters()))
        norm = nn.utils.clip_grad_norm_(self.adaptor.parameters(), _GRADIENT_NORM)
        if not (math.isfinite(value) and math.isfinite(norm.item())):
            raise UserError(
                f"training diverged at step {self.steps_done + 1} (loss {value}, gradient norm {norm.item()}) "
                "and wrote nothing; lower --lr, raise --warmup, or check the encoders' outputs"
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
        """Return what `restore` needs, as plain values and tensors."""
        return {"steps_done": self.steps_done, **{name: part.state_dict() for name, part in self._parts.items()}}

    def restore(self, snapshot: dict[str, Any]) -> None:
        self.steps_done = snapshot["steps_done"]
        for name, part in self._parts.items():
            part.load_state_dict(snapshot[name])

    def _loss(
        self, batch: Sequence[KeyedPair], cluster_B: Int64Array, rng: np.random.Generator, synthesise: bool
    ) -> torch.Tensor:
        """Return the loss over the whole batch. Its gradient covers the embeddings of this process."""
        settings, device, group = self._settings, self._device, self._group
        mine = group.share(len(batch))
        # Every process draws for all rows, so their generators stay equal.
        queries = [pair.views[rng.integers(len(pair.views))] if pair.views else pair.query for pair in batch]
        drawn = [
            draw_modalities(self._entities[pair.entity], query, settings.modality_dropout, rng)
            for pair, query in zip(batch, queries, strict=True)
        ]
        # A hidden text is loaded and masked, since another image may be read with it.
        rows = [(image, self._entities[pair.entity].text) for (image, _), pair in zip(drawn, batch, strict=True)]
        inputs = self._store.batch(rows[mine], device)
        tokens_bT = hide_tokens(inputs.text_mask_BT, settings.text_mask)
        shown_b = torch.tensor([text is not None for _, text in drawn[mine]], dtype=torch.bool, device=device)
        embeddings_BD = torch.from_numpy(self._store.query_embeddings(queries))
        queries_BD = self.adaptor.centred(embeddings_BD.to(device))
        entity_B = np.array([pair.entity for pair in batch])
        entities_B = torch.from_numpy(entity_B).to(device)

        own_bD = self._embed(inputs, inputs.text_tokens_BTL, tokens_bT & shown_b[:, None])
        cosines_BB = queries_BD @ group.gather(own_bD, len(batch)).T
        if synthesise:
            text_B = self._text_numbers[entity_B]
            sizes = [len(batch[group.share(len(batch), rank)]) for rank in range(group.size)]
            rank_B = np.repeat(np.arange(group.size), sizes)  # a process loads only the texts of its own share
            donors_BS = draw_donors(entity_B, text_B, cluster_B * group.size + rank_B, settings.n_sync, rng)
            hidden = [row for row, (image, _) in enumerate(drawn) if image is None]
            donors_BS[hidden] = np.array(hidden, np.int64)[:, None]  # a swapped text alone is another entity

            def embed(donor_B: torch.Tensor) -> torch.Tensor:
                donor_b = donor_B[mine] - mine.start
                swapped_bD = self._embed(inputs, inputs.text_tokens_BTL[donor_b], tokens_bT[donor_b])
                return group.gather(swapped_bD, len(batch))

            donors = torch.from_numpy(donors_BS).to(device)
            if settings.synthetic_image == "own":
                cosines_BB = own_image_negatives(cosines_BB, queries_BD, donors, entities_B, embed)
            else:
                texts_B = torch.from_numpy(text_B).to(device)
                cosines_BB = other_image_negatives(cosines_BB, queries_BD, donors, entities_B, texts_B, embed)
        # Gradients are summed over processes, and each computes the temperature's whole gradient.
        scale = self.logit_scale() if group.first else self.logit_scale().detach()
        return info_nce(cosines_BB, entities_B, scale)

    def _embed(self, inputs: EntityBatch, text_tokens_bTL: torch.Tensor, text_mask_bT: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._device.type == "cuda"):
            swapped = inputs._replace(text_tokens_BTL=text_tokens_bTL, text_mask_BT=text_mask_bT)
            embeddings_bD = self.adaptor(*swapped)
        result: torch.Tensor = embeddings_bD.float()
        return result


def _parameter_groups(adaptor: Adaptor, logit_scale: LogitScale, weight_decay: float) -> list[dict[str, Any]]:
    """Apply weight decay to matrices only, not to norms, biases, null tokens and the scale."""
    matrices = [p for name, p in adaptor.named_parameters() if p.ndim >= 2 and not name.startswith("null_")]
    decayed = {id(parameter) for parameter in matrices}
    others = [p for p in (*adaptor.parameters(), *logit_scale.parameters()) if id(p) not in decayed]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
