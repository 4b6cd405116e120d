"""Trains the built-in image encoder on Symbols from nothing: `python -m demo.train_tiny`, or `make tiny`.

As CLIP is trained, on two signals. Image with image: two artists' drawings of one entity, each photographed anew, are
each other's positive. Image with text: each image against the knowledge texts of all training entities, seen through
the frozen text encoder. A table of one prototype per training entity, dropped afterwards, contrasts each image with
every entity instead of only those of its batch. Photographs get harder as training goes on; images grow from 64 px to
their full size.

Only drawings with role `train` are read: seen entities, artists that are not held out. Resumes from its last snapshot.

Shapes: E entities a batch (two images each), N training entities, D embedding width.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from core.files import durable
from demo.build import BUILD, CATALOG_ROLES, Drawing
from demo.photograph import Photographer
from imaging.preprocess import Preprocessing
from model.encoders import load_text_encoder
from model.tiny import BUILT_IN, TinyConfig, TinyEncoder, save_tiny


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = 4800
    small_share: float = 0.65  # of the steps, at `small_px`; the rest at the network's full size
    small_px: int = 64
    entities_per_batch: int = 64
    learning_rate: float = 1.2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 150
    hardest_from: float = 0.5  # share of the training after which photographs and restyling are at full strength
    clean_share: float = 0.25  # of the images stay clean drawings throughout
    text_weight: float = 0.5
    prototype_weight: float = 1.0
    average_decay: float = 0.998
    snapshot_every: int = 400  # steps
    seed: int = 7


# More of everything where it takes minutes: eight times as many images, larger ones, one more layer.
ON_GPU = Settings(
    steps=4700, small_share=0.4, entities_per_batch=512, learning_rate=2.4e-3, warmup_steps=391, average_decay=0.999,
    snapshot_every=783,
)  # fmt: skip
CONFIG_ON_GPU = TinyConfig(attention_layers=4, size_px=112)
_LOG_EVERY = 50  # steps


def read_drawings(build: Path) -> list[Drawing]:
    with (build / "drawings.jsonl").open(encoding="utf-8") as file:
        return [Drawing(**json.loads(line)) for line in file]


def drawings_digest(drawings: list[Drawing]) -> str:
    """A hash over who drew which entity: kept with the weights, it says exactly what they were trained on."""
    rows = sorted(f"{d.artist} {d.entity_id} {d.icon}" for d in drawings)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def load_rgba(drawings: list[Drawing], build: Path, size_px: int) -> torch.Tensor:
    """uint8 `[n, 4, size_px, size_px]`, colours premultiplied."""

    def pixels_of(drawing: Drawing) -> npt.NDArray[np.uint8]:
        return np.asarray(Image.open(build / drawing.image).resize((size_px, size_px), Image.Resampling.BOX))

    with ThreadPoolExecutor() as pool:
        tensor = torch.from_numpy(np.stack(list(pool.map(pixels_of, drawings)))).permute(0, 3, 1, 2).contiguous()
    tensor[:, :3] = (tensor[:, :3].short() * tensor[:, 3:].short() // 255).byte()
    return tensor


class EntityBatches:
    """Yields `(drawing indices [2E], entity indices [2E])`: each epoch every entity once, by two artists if it can."""

    def __init__(self, drawings: list[Drawing], entities: list[str], size: int, generator: torch.Generator) -> None:
        position = {entity: i for i, entity in enumerate(entities)}
        self._of_entity: list[list[int]] = [[] for _ in entities]
        for index, drawing in enumerate(drawings):
            self._of_entity[position[drawing.entity_id]].append(index)
        self._size = size
        self._generator = generator
        self._waiting: list[int] = []

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            if len(self._waiting) < self._size:
                self._waiting = torch.randperm(len(self._of_entity), generator=self._generator).tolist()
            chosen, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
            first, second = [], []
            for entity in chosen:
                mine = self._of_entity[entity]
                order = torch.randperm(len(mine), generator=self._generator).tolist()
                first.append(mine[order[0]])
                second.append(mine[order[1 % len(mine)]])
            yield torch.tensor(first + second), torch.tensor(chosen + chosen)


class Objective(nn.Module):
    """The three contrasts. Everything in here is thrown away after training but for the encoder it shapes."""

    def __init__(self, text_NC: torch.Tensor, embedding_dim: int, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.text_NC: torch.Tensor
        self.register_buffer("text_NC", text_NC, persistent=False)
        width = text_NC.shape[1]
        self.text_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, embedding_dim))
        self.prototypes = nn.Parameter(F.normalize(torch.randn(len(text_NC), embedding_dim), dim=1))
        self.logit_scale = nn.Parameter(torch.tensor([math.log(10.0), math.log(10.0), math.log(16.0)]))

    def forward(self, embedding: torch.Tensor, entity: torch.Tensor) -> dict[str, torch.Tensor]:
        image_scale, text_scale, prototype_scale = self.logit_scale.clamp(max=math.log(50.0)).exp()
        count = len(embedding)
        similarity = embedding @ embedding.T * image_scale
        similarity = similarity.masked_fill(torch.eye(count, dtype=torch.bool, device=embedding.device), -1e4)
        partner = (torch.arange(count, device=embedding.device) + count // 2) % count
        text_ND = F.normalize(self.text_head(self.text_NC), dim=1)
        image_to_text = embedding @ text_ND.T * text_scale
        text_to_image = text_ND[entity[: count // 2]] @ embedding.T * text_scale
        own = torch.arange(count // 2, device=embedding.device)
        # Either of an entity's two images answers its text.
        text_loss = F.cross_entropy(image_to_text, entity) + 0.5 * (
            F.cross_entropy(_without(text_to_image, own + count // 2), own)
            + F.cross_entropy(_without(text_to_image, own), own + count // 2)
        )
        to_prototypes = embedding @ F.normalize(self.prototypes, dim=1).T
        margin = F.one_hot(entity, len(self.prototypes)) * 0.1
        return {
            "image": F.cross_entropy(similarity, partner),
            "text": text_loss * self.settings.text_weight,
            "prototype": F.cross_entropy((to_prototypes - margin) * prototype_scale, entity)
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
    encoder = load_text_encoder("minilm")
    rows = []
    for start in tqdm(range(0, len(entities), 64), desc="texts", unit="batch"):
        features = encoder.encode([texts[entity] for entity in entities[start : start + 64]])
        mask = features.mask_BT[..., None].float()
        rows.append((features.text_tokens_BTC.float() * mask).sum(1) / mask.sum(1))
    return F.normalize(torch.cat(rows), dim=1)


@torch.no_grad()
def embed(encoder: TinyEncoder, pixels_B3HW: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Embeddings of float images in 0 to 1, `[B, D]`."""
    out = []
    for start in range(0, len(pixels_B3HW), 256):
        batch = _normalised(pixels_B3HW[start : start + 256].to(device))
        with torch.autocast(device.type, torch.bfloat16):
            out.append(encoder(batch)[1].float())
    return torch.cat(out)


def _normalised(pixels_B3HW: torch.Tensor) -> torch.Tensor:
    """What the encoder takes, of pixels in 0 to 1."""
    return ((pixels_B3HW - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)


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
        encoder.eval()
        pieces = [on_white(self.catalog[i : i + 512]) for i in range(0, len(self.catalog), 512)]
        catalog = torch.cat([embed(encoder, piece, device) for piece in pieces])
        figures = {}
        for how, (images, entity_ids, unseen) in self.queries.items():
            nearest = (embed(encoder, images, device) @ catalog.T).argmax(1).tolist()
            right = [self.catalog_ids[n] == entity for n, entity in zip(nearest, entity_ids, strict=True)]
            for part, wanted in (("seen", False), ("unseen", True)):
                mine = [r for r, u in zip(right, unseen, strict=True) if u == wanted]
                figures[f"{how}_{part}"] = round(100 * sum(mine) / len(mine), 1)
        encoder.train()
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
    batches: EntityBatches
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
            "waiting": self.batches._waiting,
        }
        with durable(path) as temporary:
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
        self.batches._waiting = snapshot["waiting"]


def train(build: Path, out: Path, settings: Settings, config: TinyConfig, device: torch.device, snapshot: Path) -> None:
    """Train, validating and saving a snapshot every so often, and write the averaged weights to `out`."""
    torch.manual_seed(settings.seed)
    torch.backends.cudnn.benchmark = True  # batches have two shapes in all
    drawings = read_drawings(build)
    training = [d for d in drawings if d.role == "train"]
    entities = sorted({d.entity_id for d in training})
    kind_of = {"flag": 0.35, "emoji": 1.0, "brand": 1.0}  # a flag's colours are what it is: restyled less
    restyling = torch.tensor([kind_of[d.kind] for d in training], device=device)
    generator = torch.Generator().manual_seed(settings.seed)
    encoder = TinyEncoder(config).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective = Objective(text_embeddings(build, entities), config.embedding_dim, settings).to(device)
    optimizer = torch.optim.AdamW(
        _parameter_groups(encoder, objective, settings), lr=settings.learning_rate, betas=(0.9, 0.98)
    )
    state = State(
        encoder=encoder,
        average=copy.deepcopy(encoder),
        objective=objective,
        optimizer=optimizer,
        photographer=Photographer(settings.seed, device),
        batches=EntityBatches(training, entities, settings.entities_per_batch, generator),
        generator=generator,
        begun_with=json.dumps([asdict(settings), config.to_dict(), device.type]),
    )
    if snapshot.exists():
        state.load(snapshot)
    validation = Validation(build, drawings, config.size_px, device)
    switch = int(settings.steps * settings.small_share)
    pool: torch.Tensor | None = None
    size_px = 0
    log = snapshot.with_suffix(".jsonl").open("a", encoding="utf-8")
    started, first = time.monotonic(), state.step
    progress = tqdm(total=settings.steps, initial=state.step, desc="training", unit="step", mininterval=5)
    for indices, entity in state.batches:
        if state.step >= settings.steps:
            break
        wanted_px = settings.small_px if state.step < switch else config.size_px
        if pool is None or size_px != wanted_px:
            size_px = wanted_px
            pool = load_rgba(training, build, size_px).to(device)
        ramp = min(1.0, 0.1 + 0.9 * state.step / (settings.steps * settings.hardest_from))
        chosen = indices.to(device)
        pixels = _photographs(state, pool[chosen], restyling[chosen], size_px, ramp, settings)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step, settings)
        with torch.autocast(device.type, torch.bfloat16):
            _, embedding = encoder(_normalised(pixels))
        losses = objective(embedding.float(), entity.to(device))
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
        "command": "python -m demo.train_tiny",
        "settings": asdict(settings),
        "training_drawings": len(training),
        "training_drawings_sha256": drawings_digest(training),
        "torch": torch.__version__,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_tiny(state.average.cpu(), preprocessing, out, notes=notes)


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
def _average(state: State, settings: Settings) -> None:
    """Exponential moving average of the weights, quicker while there is little to average."""
    decay = min(settings.average_decay, (1 + state.step) / (10 + state.step))
    for mean, now in zip(state.average.state_dict().values(), state.encoder.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(now, 1 - decay)
        else:
            mean.copy_(now)


@click.command()
@click.option(
    "--build", type=click.Path(path_type=Path, file_okay=False), default=BUILD, help="Where Symbols was built."
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=BUILT_IN, help="The safetensors file to write."
)
@click.option("--steps", type=int, help=f"Training steps.  [default: {Settings.steps}; {ON_GPU.steps} on a GPU]")
@click.option(
    "--entities-per-batch",
    type=int,
    help=f"Two images each.  [default: {Settings.entities_per_batch}; {ON_GPU.entities_per_batch} on a GPU]",
)
@click.option("--seed", default=Settings.seed, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--fresh", is_flag=True, help="Start over instead of resuming from the last snapshot.")
def main(
    build: Path, out: Path, steps: int | None, entities_per_batch: int | None, seed: int, device: str, fresh: bool
) -> None:
    """Train the tiny image encoder on Symbols."""
    snapshot = build / "tiny_training.pt"
    if fresh:
        snapshot.unlink(missing_ok=True)
        snapshot.with_suffix(".jsonl").unlink(missing_ok=True)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    settings, config = (ON_GPU, CONFIG_ON_GPU) if chosen == "cuda" else (Settings(), TinyConfig())
    settings = replace(
        settings,
        steps=steps or settings.steps,
        entities_per_batch=entities_per_batch or settings.entities_per_batch,
        seed=seed,
    )
    train(build, out, settings, config, torch.device(chosen), snapshot)


if __name__ == "__main__":
    main()
