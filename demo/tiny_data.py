"""Data for training the tiny encoder: drawings as tensors, batches, text embeddings and prototypes.

Shapes: n drawings, B images, E entities of a batch, N training entities, L those and all things of icons, C text
channels, D embedding width.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
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
    """Draws `(drawing indices [2B], labels [2B])`: the first images of all, then their second images.

    A batch has `sizes[i]` entities of `groups[i]`, each once per epoch, by two artists if possible. Their labels are
    their positions in all groups. If an entity has both drawings and icons, its first image is a drawing, and
    `icon_share` of the second ones are icons. A batch depends only on the seed and its number.
    """

    def __init__(
        self,
        drawings: Sequence[Drawing],
        groups: Sequence[Sequence[str]],
        sizes: Sequence[int],
        seed: int,
        icon_share: float = 0.0,
    ) -> None:
        labels = {entity: label for label, entity in enumerate(chain(*groups))}
        drawn: list[list[int]] = [[] for _ in labels]
        icons: list[list[int]] = [[] for _ in labels]
        for index, drawing in enumerate(drawings):
            if drawing.entity_id in labels:
                of_role = icons if drawing.role == ICON_ROLE else drawn
                of_role[labels[drawing.entity_id]].append(index)
        self._images = [own or others for own, others in zip(drawn, icons, strict=True)]
        self._icons = [others if own else [] for own, others in zip(drawn, icons, strict=True)]
        self._groups = [[labels[entity] for entity in group] for group in groups]
        self._sizes = sizes
        self._seed = seed
        self._icon_share = icon_share

    def batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        random = np.random.default_rng((self._seed, 0, number))
        rows = []
        for group, size in zip(self._groups, self._sizes, strict=True):
            epoch, place = divmod(number, max(1, len(group) // max(1, size)))
            order = np.random.default_rng((self._seed, 1, epoch)).permutation(group)
            for label in order[place * size : (place + 1) * size]:
                images, icons = random.permutation(self._images[label]), self._icons[label]
                second = images[1 % len(images)]
                if icons and random.random() < self._icon_share:
                    second = random.choice(icons)
                rows.append((label, images[0], second))
        label, first, second = torch.tensor(np.array(rows)).T
        return torch.cat([first, second]), torch.cat([label, label])


def text_embeddings(build: Path, entities: list[str]) -> torch.Tensor:
    """Return the L2-normalised mean token state of each entity's text, `[N, C]`."""
    with (build / "catalog.jsonl").open(encoding="utf-8") as file:
        texts = {record["entity_id"]: record["text"] for record in map(json.loads, file)}
    encoder = open_text_encoder("minilm")
    rows = []
    for start in tqdm(range(0, len(entities), 64), desc="texts", unit="batch"):
        features = encoder.encode([texts[entity] for entity in entities[start : start + 64]])
        rows.append(features.text_tokens_BTC.sum(1))  # padding is zero
    return F.normalize(torch.cat(rows), dim=1)


def normalised(pixels_B3HW: torch.Tensor) -> torch.Tensor:
    """Return the encoder's input for pixels from 0 to 1."""
    return ((pixels_B3HW - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def mean_patch_tokens(encoder: TinyEncoder, rgba: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `[n, D]`, the embeddings of drawings (as `load_rgba` returns them) before normalisation.

    The encoder must be in evaluation mode.
    """
    tokens = []
    for part in torch.split(rgba, 256):
        values = part.to(device).float() / 255
        on_white = values[:, :3] + 1 - values[:, 3:]
        with torch.autocast(device.type, torch.bfloat16):
            tokens.append(encoder(normalised(on_white))[0].float().mean(1))
    return torch.cat(tokens)


def prototypes(
    encoder: TinyEncoder, drawings: Sequence[Drawing], labels: list[str], build: Path, device: torch.device
) -> torch.Tensor:
    """Return the mean embedding of the first two drawings of each label, `[L, D]`, L2-normalised."""
    of_label: dict[str, list[Drawing]] = {label: [] for label in labels}
    for drawing in drawings:
        of_label[drawing.entity_id].append(drawing)
    chosen = [group[:2] for group in of_label.values()]
    rgba = load_rgba([drawing for group in chosen for drawing in group], build, encoder.config.size_px)
    embeddings_nD = F.normalize(mean_patch_tokens(encoder, rgba, device), dim=1)
    sums = [part.sum(0) for part in torch.split(embeddings_nD, [len(group) for group in chosen])]
    return F.normalize(torch.stack(sums), dim=1)
