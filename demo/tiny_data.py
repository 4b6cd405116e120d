"""Data for training the tiny encoder: drawings as tensors, batches, text embeddings and prototypes.

Shapes: n drawings, B images, E entities of a batch, N training entities, L those and all things of icons, C text
channels, D embedding width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

from demo.build import Drawing
from demo.icons import ROLE as ICON_ROLE
from model.encoders import open_text_encoder
from model.encoders.tiny import TinyEncoder


def drawings_digest(drawings: Sequence[Drawing]) -> str:
    """Return a hash of who drew which entity. It is stored with the weights to identify their training data."""
    rows = sorted(f"{d.artist} {d.entity_id} {d.icon}" for d in drawings)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def load_rgba(drawings: Sequence[Drawing], build: Path, size_px: int) -> torch.Tensor:
    """Load drawings as uint8 `[n, 4, size_px, size_px]`, colours premultiplied by alpha."""
    pixels = torch.empty(len(drawings), 4, size_px, size_px, dtype=torch.uint8)

    def read(row: int) -> None:
        image = Image.open(build / drawings[row].image).resize((size_px, size_px), Image.Resampling.BOX)
        rgba = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        rgba[:3] = (rgba[:3].short() * rgba[3:].short() // 255).byte()
        pixels[row] = rgba

    with ThreadPoolExecutor() as pool:
        list(pool.map(read, range(len(drawings))))
    return pixels


class EntityBatches:
    """Yields `(drawing indices [2E], labels [2E])`: every entity once per epoch, by two artists if possible.

    If an entity has both drawings and icons, its first image is a drawing, and `icon_share` of the second ones are
    icons. Entities are labelled from `first_label`.
    """

    def __init__(
        self,
        drawings: list[Drawing],
        entities: list[str],
        size: int,
        generator: torch.Generator,
        *,
        icon_share: float = 0.0,
        first_label: int = 0,
    ) -> None:
        position = {entity: i for i, entity in enumerate(entities)}
        drawn: list[list[int]] = [[] for _ in entities]
        icons: list[list[int]] = [[] for _ in entities]
        for index, drawing in enumerate(drawings):
            if drawing.entity_id in position:
                of_role = icons if drawing.role == ICON_ROLE else drawn
                of_role[position[drawing.entity_id]].append(index)
        self._of_entity = [own or others for own, others in zip(drawn, icons, strict=True)]
        self._icons = [others if own else [] for own, others in zip(drawn, icons, strict=True)]
        self._size = size
        self._generator = generator
        self._icon_share = icon_share
        self._first_label = first_label
        self.waiting: list[int] = []

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            if len(self.waiting) < self._size:
                self.waiting = torch.randperm(len(self._of_entity), generator=self._generator).tolist()
            chosen, self.waiting = self.waiting[: self._size], self.waiting[self._size :]
            first, second = [], []
            for entity in chosen:
                images, icons = self._of_entity[entity], self._icons[entity]
                order = torch.randperm(len(images), generator=self._generator).tolist()
                first.append(images[order[0]])
                if icons and torch.rand((), generator=self._generator).item() < self._icon_share:
                    second.append(icons[int(torch.randint(len(icons), (), generator=self._generator))])
                else:
                    second.append(images[order[1 % len(images)]])
            yield torch.tensor(first + second), torch.tensor(chosen + chosen) + self._first_label


def joined_batches(batches: Sequence[EntityBatches]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Join a batch of each: the first images of all, then the second images of all, and their labels likewise."""
    for each in zip(*batches, strict=False):  # endless
        indices, labels = zip(*each, strict=True)
        yield _join_halves(indices), _join_halves(labels)


def _join_halves(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    first, second = zip(*(tensor.chunk(2) for tensor in tensors), strict=True)
    return torch.cat([*first, *second])


def text_embeddings(build: Path, entities: list[str]) -> torch.Tensor:
    """Return the L2-normalised mean token state of each entity's text, `[N, C]`."""
    with (build / "catalog.jsonl").open(encoding="utf-8") as file:
        texts = {record["entity_id"]: record["text"] for record in map(json.loads, file)}
    encoder = open_text_encoder("minilm")
    rows = []
    for start in tqdm(range(0, len(entities), 64), desc="texts", unit="batch"):
        features = encoder.encode([texts[entity] for entity in entities[start : start + 64]])
        mask = features.mask_BT[..., None].float()
        rows.append((features.text_tokens_BTC.float() * mask).sum(1) / mask.sum(1))
    return F.normalize(torch.cat(rows), dim=1)


def on_white(rgba: torch.Tensor) -> torch.Tensor:
    """Lay premultiplied uint8 RGBA over white. Returns floats from 0 to 1."""
    values = rgba.float() / 255
    return values[:, :3] + 1 - values[:, 3:]


def normalised(pixels_B3HW: torch.Tensor) -> torch.Tensor:
    """Return the encoder's input for pixels from 0 to 1."""
    return ((pixels_B3HW - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def mean_patch_tokens(encoder: TinyEncoder, rgba: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `[n, D]`, the embeddings of drawings (as `load_rgba` returns them) before normalisation.

    The encoder runs in evaluation mode and keeps its own mode, so its batch normalisation does not learn from these
    drawings.
    """
    training = encoder.training
    encoder.eval()
    tokens = []
    for part in torch.split(rgba, 256):
        with torch.autocast(device.type, torch.bfloat16):
            tokens.append(encoder(normalised(on_white(part.to(device))))[0].float().mean(1))
    encoder.train(training)
    return torch.cat(tokens)


def prototypes(
    encoder: TinyEncoder, drawings: Sequence[Drawing], labels: list[str], build: Path, device: torch.device
) -> torch.Tensor:
    """Return the mean embedding of the first two drawings of each label, `[L, D]`, L2-normalised."""
    position = {label: row for row, label in enumerate(labels)}
    of_label: list[list[Drawing]] = [[] for _ in labels]
    for drawing in drawings:
        of_label[position[drawing.entity_id]].append(drawing)
    chosen = [drawing for group in of_label for drawing in group[:2]]
    tokens = mean_patch_tokens(encoder, load_rgba(chosen, build, encoder.config.size_px), device)
    rows = torch.tensor([position[drawing.entity_id] for drawing in chosen], device=device)
    sums = torch.zeros(len(labels), tokens.shape[1], device=device)
    sums.index_add_(0, rows, F.normalize(tokens, dim=1))
    return F.normalize(sums, dim=1)
