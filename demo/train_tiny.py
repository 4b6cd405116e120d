"""Trains the built-in image encoder: on Symbols from nothing, `python -m demo.train_tiny`, and from there with icons by
many more artists, `python -m demo.train_tiny --with-icons`. `make tiny` does both.

As CLIP is trained, on two signals. Image with image: two artists' drawings of one entity, each photographed anew, are
each other's positive. Image with text: each image against the knowledge texts of all training entities, seen through
the frozen text encoder; things that only icons show have no text. A table of one prototype per training entity and
thing, dropped afterwards, contrasts each image with all of them instead of only those of its batch. Photographs get
harder as training goes on, and images larger.

Of Symbols only drawings with role `train` are read: seen entities, artists that are not held out; `demo/icons.py` says
which icons are. Resumes from its last snapshot.

Shapes: E entities a batch and I things of icons (two images each), N training entities, L those and all things of
icons, D embedding width.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from core.files import atomic_write, sha256_file
from demo.build import BUILD, CATALOG_ROLES, Drawing, read_drawings, visible
from demo.icons import ROLE as ICON_ROLE
from demo.icons import fetch_icons, plan_from, render_icons
from demo.photograph import Photographer
from imaging.preprocess import Preprocessing
from model.encoders import open_text_encoder
from model.encoders.tiny import BUILT_IN, TinyConfig, TinyEncoder, read_tiny, save_tiny


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = 4800
    small_share: float = 0.65  # of the steps, at `small_px`; the rest at the network's full size
    small_px: int = 64
    entities_per_batch: int = 64
    things_per_batch: int = 0  # that only icons show
    icon_share: float = 0.4  # of the second images of an entity that has icons
    learning_rate: float = 1.2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 150
    hardest_from: float = 0.5  # share of the training after which photographs and restyling are at full strength
    clean_share: float = 0.25  # of the images stay clean drawings throughout
    text_weight: float = 0.5
    prototype_weight: float = 1.0
    average_decay: float = 0.998
    start_share: float = 0.0  # of the encoder that training began from in the weights that are written
    length_share: float = 0.0  # of an embedding's length that `keep_length` adds at the end
    snapshot_every: int = 400  # steps
    seed: int = 7


# More of everything where it takes minutes: eight times as many images, larger ones, one more layer.
ON_GPU = Settings(
    steps=4700, small_share=0.4, entities_per_batch=512, learning_rate=2.4e-3, warmup_steps=391, average_decay=0.999,
    snapshot_every=783,
)  # fmt: skip
CONFIG_ON_GPU = TinyConfig(attention_layers=4, size_px=112)
# From a trained encoder on, with icons: an hour of two cores.
WITH_ICONS = Settings(
    steps=1200, small_share=0.417, small_px=80, entities_per_batch=96, things_per_batch=64, learning_rate=7e-4,
    warmup_steps=40, hardest_from=0.0, average_decay=0.995, start_share=0.5, length_share=0.2,
    snapshot_every=300,
)  # fmt: skip
_LOG_EVERY = 50  # steps


def drawings_digest(drawings: Sequence[Drawing]) -> str:
    """A hash over who drew which entity: kept with the weights, it says exactly what they were trained on."""
    rows = sorted(f"{d.artist} {d.entity_id} {d.icon}" for d in drawings)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def load_rgba(drawings: Sequence[Drawing], build: Path, size_px: int) -> torch.Tensor:
    """uint8 `[n, 4, size_px, size_px]`, colours premultiplied."""
    pixels = torch.empty(len(drawings), 4, size_px, size_px, dtype=torch.uint8)

    def read(place: int) -> None:
        image = Image.open(build / drawings[place].image).resize((size_px, size_px), Image.Resampling.BOX)
        rgba = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        rgba[:3] = (rgba[:3].short() * rgba[3:].short() // 255).byte()
        pixels[place] = rgba

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(read, range(len(drawings))):
            pass  # but raise what it raised
    return pixels


def read_icons(build: Path) -> list[Drawing]:
    """The icons to train with, fetched and rendered where they are not there yet."""
    icons = fetch_icons(build / "sources")
    planned = plan_from(build, icons)
    render_icons(planned, icons, build)
    return planned


class EntityBatches:
    """Yields `(drawing indices [2E], entity indices [2E])`: each epoch every entity once, by two artists if it can.

    Where an entity has both drawings and icons the first image is a drawing, and `icon_share` of the second are icons.
    Entities are numbered from `first_label`.
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
                mine = icons if drawing.role == ICON_ROLE else drawn
                mine[position[drawing.entity_id]].append(index)
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
                mine, icons = self._of_entity[entity], self._icons[entity]
                order = torch.randperm(len(mine), generator=self._generator).tolist()
                first.append(mine[order[0]])
                if icons and torch.rand((), generator=self._generator).item() < self._icon_share:
                    second.append(icons[int(torch.randint(len(icons), (), generator=self._generator))])
                else:
                    second.append(mine[order[1 % len(mine)]])
            yield torch.tensor(first + second), torch.tensor(chosen + chosen) + self._first_label


def side_by_side(batches: Sequence[EntityBatches]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One batch of a batch of each: the first images of all, then the second ones, and their labels alike."""
    for each in zip(*batches, strict=False):  # none ends
        indices, labels = zip(*each, strict=True)
        yield _halves_joined(indices), _halves_joined(labels)


def _halves_joined(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    first, second = zip(*(tensor.chunk(2) for tensor in tensors), strict=True)
    return torch.cat([*first, *second])


class Objective(nn.Module):
    """The three contrasts. Everything in here is thrown away after training but for the encoder it shapes."""

    def __init__(self, text_NC: torch.Tensor, embedding_dim: int, settings: Settings, things: int = 0) -> None:
        super().__init__()
        self.settings = settings
        self.text_NC: torch.Tensor
        self.register_buffer("text_NC", text_NC, persistent=False)
        width = text_NC.shape[1]
        self.text_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, embedding_dim))
        self.prototypes = nn.Parameter(F.normalize(torch.randn(len(text_NC) + things, embedding_dim), dim=1))
        self.logit_scale = nn.Parameter(torch.tensor([math.log(10.0), math.log(10.0), math.log(16.0)]))

    def warm(self, prototypes_LD: torch.Tensor) -> None:
        """Start from an encoder that is trained: with prototypes, normalised, and as sure as it is."""
        self.prototypes.data.copy_(prototypes_LD)
        self.logit_scale.data.copy_(torch.tensor([14.0, 14.0, 20.0]).log())

    def forward(self, embedding: torch.Tensor, label: torch.Tensor, entities: int) -> dict[str, torch.Tensor]:
        """The contrasts of a batch as `side_by_side` gives it; `entities` of each half have a text."""
        image_scale, text_scale, prototype_scale = self.logit_scale.clamp(max=math.log(50.0)).exp()
        count = len(embedding)
        similarity = embedding @ embedding.T * image_scale
        similarity = similarity.masked_fill(torch.eye(count, dtype=torch.bool, device=embedding.device), -1e4)
        partner = (torch.arange(count, device=embedding.device) + count // 2) % count
        text_ND = F.normalize(self.text_head(self.text_NC), dim=1)
        own = torch.arange(entities, device=embedding.device)
        with_text = torch.cat([own, own + count // 2])
        image_to_text = embedding[with_text] @ text_ND.T * text_scale
        text_to_image = text_ND[label[:entities]] @ embedding.T * text_scale
        # Either of an entity's two images answers its text.
        text_loss = F.cross_entropy(image_to_text, label[with_text]) + 0.5 * (
            F.cross_entropy(_without(text_to_image, own + count // 2), own)
            + F.cross_entropy(_without(text_to_image, own), own + count // 2)
        )
        to_prototypes = embedding @ F.normalize(self.prototypes, dim=1).T
        margin = F.one_hot(label, len(self.prototypes)) * 0.1
        return {
            "image": F.cross_entropy(similarity, partner),
            "text": text_loss * self.settings.text_weight,
            "prototype": F.cross_entropy((to_prototypes - margin) * prototype_scale, label)
            * self.settings.prototype_weight,
        }


def _without(logits: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    return logits.scatter(1, column[:, None], -1e4)


def text_embeddings(build: Path, entities: list[str]) -> torch.Tensor:
    """Mean token state of each entity's knowledge text, `[N, C]`."""
    wanted = set(entities)
    texts = {}
    with (build / "catalog.jsonl").open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            if record["entity_id"] in wanted:
                texts[record["entity_id"]] = record["text"]
    encoder = open_text_encoder("minilm")
    rows = []
    for start in tqdm(range(0, len(entities), 64), desc="texts", unit="batch"):
        features = encoder.encode([texts[entity] for entity in entities[start : start + 64]])
        mask = features.mask_BT[..., None].float()
        rows.append((features.text_tokens_BTC.float() * mask).sum(1) / mask.sum(1))
    return F.normalize(torch.cat(rows), dim=1)


@torch.no_grad()
def embed(encoder: TinyEncoder, pixels_B3HW: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Embeddings of float images in 0 to 1, `[B, D]`, L2-normalised."""
    return F.normalize(_pooled(encoder, pixels_B3HW, device), dim=1)


@torch.no_grad()
def _pooled(encoder: TinyEncoder, pixels_B3HW: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The mean patch token of float images in 0 to 1, `[B, D]`: the embedding before it is normalised. As when serving,
    whether the encoder is being trained or not: batch normalisation neither takes from these images nor learns."""
    training = encoder.training
    encoder.eval()
    out = []
    for start in range(0, len(pixels_B3HW), 256):
        batch = _normalised(pixels_B3HW[start : start + 256].to(device))
        with torch.autocast(device.type, torch.bfloat16):
            out.append(encoder(batch)[0].float().mean(1))
    encoder.train(training)
    return torch.cat(out)


def _normalised(pixels_B3HW: torch.Tensor) -> torch.Tensor:
    """What the encoder takes, of pixels in 0 to 1."""
    return ((pixels_B3HW - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)


def mean_patch_tokens(encoder: TinyEncoder, rgba: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What embeddings of drawings are before they are normalised, `[n, D]`; drawings as `load_rgba` gives them."""
    return torch.cat([_pooled(encoder, on_white(rgba[i : i + 512]), device) for i in range(0, len(rgba), 512)])


def embed_drawings(encoder: TinyEncoder, rgba: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Embeddings of drawings, on white, `[n, D]`, L2-normalised."""
    return F.normalize(mean_patch_tokens(encoder, rgba, device), dim=1)


def prototypes(
    encoder: TinyEncoder, drawings: Sequence[Drawing], labels: list[str], build: Path, device: torch.device
) -> torch.Tensor:
    """What each label looks like to an encoder so far, `[L, D]`: the mean of the first two of its drawings, clean."""
    position = {label: place for place, label in enumerate(labels)}
    of_label: list[list[Drawing]] = [[] for _ in labels]
    for drawing in drawings:
        mine = of_label[position[drawing.entity_id]]
        if len(mine) < 2:
            mine.append(drawing)
    chosen = [drawing for mine in of_label for drawing in mine]
    embeddings = embed_drawings(encoder, load_rgba(chosen, build, encoder.config.size_px), device)
    places = torch.tensor([position[drawing.entity_id] for drawing in chosen], device=device)
    sums = torch.zeros(len(labels), embeddings.shape[1], device=device).index_add_(0, places, embeddings)
    return F.normalize(sums, dim=1)


class Validation:
    """Nearest drawing, no adaptor: held-out artists' validation queries against every drawing in the catalog."""

    def __init__(self, build: Path, drawings: list[Drawing], size_px: int, device: torch.device) -> None:
        catalog = [d for d in drawings if d.role in CATALOG_ROLES]
        self.catalog_ids = [d.entity_id for d in catalog]
        self.catalog = load_rgba(catalog, build, size_px).to(device)
        self.queries: dict[str, tuple[torch.Tensor, list[str], list[bool]]] = {}
        for how in ("clean", "photo"):
            lines = (build / f"queries_val_{how}.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
            images = torch.stack([_query_pixels(build / row["image"], size_px) for row in rows])
            unseen = [row["data_split"].endswith("unseen") for row in rows]
            self.queries[how] = (images, [row["entity_id"] for row in rows], unseen)

    def run(self, encoder: TinyEncoder, device: torch.device) -> dict[str, float]:
        catalog = embed_drawings(encoder, self.catalog, device)
        figures = {}
        for how, (images, entity_ids, unseen) in self.queries.items():
            nearest = (embed(encoder, images, device) @ catalog.T).argmax(1).tolist()
            right = [self.catalog_ids[n] == entity for n, entity in zip(nearest, entity_ids, strict=True)]
            for part, wanted in (("seen", False), ("unseen", True)):
                mine = [r for r, u in zip(right, unseen, strict=True) if u == wanted]
                figures[f"{how}_{part}"] = round(100 * sum(mine) / len(mine), 1)
        return figures


def on_white(rgba: torch.Tensor) -> torch.Tensor:
    """Premultiplied uint8 RGBA over white, float in 0 to 1."""
    values = rgba.float() / 255
    return values[:, :3] + 1 - values[:, 3:]


def _query_pixels(path: Path, size_px: int) -> torch.Tensor:
    image = Image.open(path).convert("RGBA")
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    pixels = np.array(white.resize((size_px, size_px), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def learning_rate(step: int, settings: Settings) -> float:
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * max(0.002, 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class State:
    """All that a resumed run needs to go on as if it had never stopped."""

    encoder: TinyEncoder
    average: TinyEncoder
    objective: Objective
    optimizer: torch.optim.Optimizer
    photographer: Photographer
    batches: list[EntityBatches]  # of entities, and of things that only icons show where there are any
    generator: torch.Generator
    begun_with: str  # settings and sizes
    step: int = 0

    def save(self, path: Path) -> None:
        snapshot = {
            "begun_with": self.begun_with,
            "step": self.step,
            "encoder": self.encoder.state_dict(),
            "average": self.average.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "photographer": self.photographer.generator.get_state(),
            "generator": self.generator.get_state(),
            "waiting": [batches.waiting for batches in self.batches],
        }
        with atomic_write(path) as temporary:
            torch.save(snapshot, temporary)

    def load(self, path: Path) -> None:
        """Raises `click.ClickException` where the snapshot is of a run with other settings."""
        snapshot: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        if snapshot.get("begun_with") != self.begun_with:
            raise click.ClickException(f"{path} is of a run with other settings; start over with --fresh")
        self.step = snapshot["step"]
        for name in ("encoder", "average", "objective", "optimizer"):
            getattr(self, name).load_state_dict(snapshot[name])
        self.photographer.generator.set_state(snapshot["photographer"])
        self.generator.set_state(snapshot["generator"])
        for batches, waiting in zip(self.batches, snapshot["waiting"], strict=True):
            batches.waiting = waiting


def train(
    build: Path,
    out: Path,
    settings: Settings,
    start: TinyConfig | Path,
    device: torch.device,
    snapshot: Path,
    icons: Sequence[Drawing] = (),
) -> None:
    """Train a new encoder, or the one in a file further, validating and saving a snapshot every so often, and write the
    averaged weights to `out`. `icons` have been rendered."""
    torch.manual_seed(settings.seed)
    torch.backends.cudnn.benchmark = True  # batches have two shapes in all
    drawings = read_drawings(build)
    training = [d for d in drawings if d.role == "train"]
    entities = sorted({d.entity_id for d in training})
    both = [*training, *visible(icons, build)]
    things = sorted({d.entity_id for d in both} - set(entities))
    # A flag's colours are what it is: restyled less.
    restyling = torch.tensor([0.35 if d.kind == "flag" else 1.0 for d in both], device=device)
    generator = torch.Generator().manual_seed(settings.seed)
    encoder = TinyEncoder(start) if isinstance(start, TinyConfig) else read_tiny(start)[0].train()
    encoder.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    config = encoder.config
    text_NC = text_embeddings(build, entities)
    objective = Objective(text_NC, config.embedding_dim, settings, len(things)).to(device)
    batches = [EntityBatches(both, entities, settings.entities_per_batch, generator, icon_share=settings.icon_share)]
    if things:
        batches.append(EntityBatches(both, things, settings.things_per_batch, generator, first_label=len(entities)))
    begun_from = sha256_file(start) if isinstance(start, Path) else None
    optimizer = torch.optim.AdamW(
        _parameter_groups(encoder, objective, settings), lr=settings.learning_rate, betas=(0.9, 0.98)
    )
    state = State(
        encoder=encoder,
        average=copy.deepcopy(encoder),
        objective=objective,
        optimizer=optimizer,
        photographer=Photographer(settings.seed, device),
        batches=batches,
        generator=generator,
        begun_with=json.dumps([asdict(settings), config.to_dict(), device.type, drawings_digest(both), begun_from]),
    )
    if snapshot.exists():
        state.load(snapshot)
    elif isinstance(start, Path):
        objective.warm(prototypes(encoder, both, [*entities, *things], build, device))
    validation = Validation(build, drawings, config.size_px, device)
    switch = int(settings.steps * settings.small_share)
    hardest_from = settings.steps * settings.hardest_from
    entities_a_batch = min(settings.entities_per_batch, len(entities))
    pool: torch.Tensor | None = None
    size_px = 0
    log = snapshot.with_suffix(".jsonl").open("a", encoding="utf-8")
    started, first = time.monotonic(), state.step
    progress = tqdm(total=settings.steps, initial=state.step, desc="training", unit="step", mininterval=5)
    for indices, label in side_by_side(state.batches):
        if state.step >= settings.steps:
            break
        wanted_px = settings.small_px if state.step < switch else config.size_px
        if pool is None or size_px != wanted_px:
            size_px = wanted_px
            pool = load_rgba(both, build, size_px).to(device)
        ramp = min(1.0, 0.1 + 0.9 * state.step / hardest_from) if hardest_from else 1.0
        chosen = indices.to(device)
        pixels = _photographs(state, pool[chosen], restyling[chosen], size_px, ramp, settings)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step, settings)
        with torch.autocast(device.type, torch.bfloat16):
            _, embedding = encoder(_normalised(pixels))
        losses = objective(embedding.float(), label.to(device), entities_a_batch)
        loss = sum(losses.values(), torch.zeros((), device=device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        _average(state, settings)
        state.step += 1
        progress.update()
        validates = state.step % settings.snapshot_every == 0 or state.step == settings.steps
        if state.step % _LOG_EVERY == 0 or validates:  # in between a GPU is not waited for
            if not torch.isfinite(loss):
                raise click.ClickException(f"the loss is {loss.item()} at step {state.step}; lower the learning rate")
            row = {name: round(value.item(), 3) for name, value in losses.items()}
            row |= {"step": state.step, "steps_per_s": round((state.step - first) / (time.monotonic() - started), 2)}
            log.write(json.dumps(row) + "\n")
            log.flush()
            progress.set_postfix(row)
        if validates:
            figures = validation.run(state.average, device)
            log.write(json.dumps({"step": state.step, **figures}) + "\n")
            log.flush()
            tqdm.write(f"step {state.step}: {figures}")
            state.save(snapshot)
    progress.close()
    log.close()
    preprocessing = Preprocessing(
        size_px=config.size_px, resize="squash", crop="none", interpolation="bicubic",
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    )  # fmt: skip
    notes = {
        "command": "python -m demo.train_tiny" + (" --with-icons" if icons else ""),
        "settings": asdict(settings),
        "training_drawings": len(training),
        "training_drawings_sha256": drawings_digest(training),
        "icons": len(icons),
        "icons_sha256": drawings_digest(icons),
        "begun_from_sha256": begun_from,
        "torch": torch.__version__,
    }
    average = state.average
    if isinstance(start, Path):  # WiSE-FT, Wortsman et al., 2022
        mix(average, read_tiny(start)[0].to(device), settings.start_share)
    if settings.length_share:
        drawn = load_rgba(training, build, config.size_px)
        keep_length(average, mean_patch_tokens(average, drawn, device), settings.length_share)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_tiny(average.cpu(), preprocessing, out, notes=notes)


def _parameter_groups(encoder: nn.Module, objective: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    parameters = [*encoder.parameters(), *objective.parameters()]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _photographs(
    state: State, rgba: torch.Tensor, restyling: torch.Tensor, size_px: int, ramp: float, settings: Settings
) -> torch.Tensor:
    """This batch's drawings restyled and photographed, as hard as `ramp` (0 to 1) allows by now."""
    photographer = state.photographer
    strength, chance, style = torch.rand(3, len(rgba), generator=photographer.generator, device=rgba.device)
    strength = strength * ramp * (chance > settings.clean_share)
    style = style * restyling * ramp
    photos = photographer.photograph(photographer.restyle(rgba.float() / 255, style), size_px, strength)
    return photographer.compress(photos, strength)


@torch.no_grad()
def mix(encoder: TinyEncoder, other: TinyEncoder, share: float) -> None:
    """Put `share` of another's weights into an encoder's; what is only counted becomes the other's."""
    for mine, theirs in zip(encoder.state_dict().values(), other.state_dict().values(), strict=True):
        if mine.is_floating_point():
            mine.lerp_(theirs, share)
        else:
            mine.copy_(theirs)


@torch.no_grad()
def keep_length(encoder: TinyEncoder, pooled_nD: torch.Tensor, share: float) -> None:
    """Let an embedding tell, once it is normalised, how long it was: the surer of an image, the longer (as in MagFace,
    Meng et al., CVPR 2021).

    Every mean patch token (`pooled_nD` are those of drawings) gets the same vector added, `share` of their median
    length, in the direction in which embeddings differ least. What lies there after normalising is the more, the
    shorter the rest was; cosines hardly change. Whether a query is known is judged by its embedding, too, and that is
    where this shows (`export/open_set.py`).
    """
    directions_DD = torch.linalg.eigh(torch.cov(F.normalize(pooled_nD, dim=1).T)).eigenvectors
    added_D = share * pooled_nD.norm(dim=1).median() * directions_DD[:, 0]
    # Before the projection, which has no bias; saliency is a softmax over patches, which have all the same added.
    encoder.norm.bias.add_(torch.linalg.pinv(encoder.projection.weight) @ added_D)


def _average(state: State, settings: Settings) -> None:
    """Exponential moving average of the weights, quicker while there is little to average."""
    decay = min(settings.average_decay, (1 + state.step) / (10 + state.step))
    mix(state.average, state.encoder, 1 - decay)


@click.command()
@click.option(
    "--build", type=click.Path(path_type=Path, file_okay=False), default=BUILD, help="Where Symbols was built."
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=BUILT_IN, help="The safetensors file to write."
)
@click.option("--with-icons", is_flag=True, help="Train the encoder in that file further, with icons by many artists.")
@click.option(
    "--steps",
    type=int,
    help=f"Training steps.  [default: {Settings.steps}; {ON_GPU.steps} on a GPU; {WITH_ICONS.steps} with icons]",
)
@click.option(
    "--entities-per-batch",
    type=int,
    help=f"Two images each.  [default: {Settings.entities_per_batch}; {ON_GPU.entities_per_batch} on a GPU; "
    f"{WITH_ICONS.entities_per_batch} with icons]",
)
@click.option("--seed", default=Settings.seed, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--fresh", is_flag=True, help="Start over instead of resuming from the last snapshot.")
def main(
    build: Path,
    out: Path,
    with_icons: bool,
    steps: int | None,
    entities_per_batch: int | None,
    seed: int,
    device: str,
    fresh: bool,
) -> None:
    """Train the tiny image encoder on Symbols, from nothing or, with icons, further."""
    snapshot = build / ("tiny_with_icons.pt" if with_icons else "tiny_training.pt")
    if fresh:
        snapshot.unlink(missing_ok=True)
        snapshot.with_suffix(".jsonl").unlink(missing_ok=True)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    start: TinyConfig | Path
    if with_icons:
        settings, start = WITH_ICONS, out
    else:
        settings, start = (ON_GPU, CONFIG_ON_GPU) if chosen == "cuda" else (Settings(), TinyConfig())
    settings = replace(
        settings,
        steps=steps or settings.steps,
        entities_per_batch=entities_per_batch or settings.entities_per_batch,
        seed=seed,
    )
    icons = read_icons(build) if with_icons else []
    train(build, out, settings, start, torch.device(chosen), snapshot, icons)


if __name__ == "__main__":
    main()
