"""Train the built-in image encoder on Symbols: `python -m demo.train_tiny`, then `--with-icons`. `make tiny` does both.

It learns from three contrasts. Image to image, as in CLIP-style training: two artists' drawings of one entity, each
photographed differently, are positives. Image to text: each image against the texts of all training entities, through
the frozen text encoder; things that only icons show have no text. Image to prototype: each image against one learned
vector per training entity and thing, which is dropped afterwards. Photographs get harder and images larger over the
training.

Of Symbols, it reads only drawings with role `train`. `demo/icons.py` selects the icons. Resumes from its last snapshot.

Shapes: E entities and I things of icons in a batch (two images each), N training entities, L those and all things of
icons, C text channels, D embedding width.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from core.errors import UserError
from core.files import sha256_file
from demo.build import Drawing, build_option, read_drawings, visible
from demo.icons import fetch_icons, plan_from, render_icons
from demo.photograph import Photographer
from demo.reference import evaluate_encoder
from demo.tiny_data import (
    EntityBatches,
    drawings_digest,
    load_rgba,
    mean_patch_tokens,
    normalised,
    prototypes,
    text_embeddings,
)
from imaging.preprocess import Preprocessing
from model.encoders import resolve_device
from model.encoders.base import TorchImageEncoder
from model.encoders.tiny import BUILT_IN, TinyConfig, TinyEncoder, read_tiny, save_tiny
from model.resume import Snapshots, fingerprint
from model.validation import Accuracy
from wikiclip.cli import run

_SHOWN_EVERY = 50  # steps
_PARTS = ("encoder", "average", "objective", "optimizer")  # of `Training`


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = 4800
    small_share: float = 0.65  # of the steps, at `small_px`; the rest at the network's full size
    small_px: int = 64
    entities_per_batch: int = 64
    things_per_batch: int = 0  # shown by icons only
    icon_share: float = 0.4  # of the second images of an entity that has icons
    learning_rate: float = 1.2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 150
    hardest_from: float = 0.5  # share of the steps after which photographs and restyling have full strength
    clean_share: float = 0.25  # of images that stay clean drawings
    text_weight: float = 0.5
    prototype_weight: float = 1.0
    average_decay: float = 0.998
    start_share: float = 0.0  # of the initial encoder's weights in the result
    length_share: float = 0.0  # of the embedding length that `keep_length` adds at the end
    snapshot_every: int = 400  # steps
    seed: int = 7


# Eight times as many images, larger ones, and one more layer.
ON_GPU = Settings(
    steps=4700, small_share=0.4, entities_per_batch=512, learning_rate=2.4e-3, warmup_steps=391, average_decay=0.999,
    snapshot_every=783,
)  # fmt: skip
CONFIG_ON_GPU = TinyConfig(attention_layers=4, size_px=112)
# Starts from a trained encoder. Takes an hour on two cores.
WITH_ICONS = Settings(
    steps=1200, small_share=0.417, small_px=80, entities_per_batch=96, things_per_batch=64, learning_rate=7e-4,
    warmup_steps=40, hardest_from=0.0, average_decay=0.995, start_share=0.5, length_share=0.2,
    snapshot_every=300,
)  # fmt: skip


class Objective(nn.Module):
    """The three contrasts, with the parameters that only training needs."""

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
        """Start from the prototypes and logit scales of a trained encoder."""
        self.prototypes.data.copy_(prototypes_LD)
        self.logit_scale.data.copy_(torch.tensor([14.0, 14.0, 20.0]).log())

    def forward(self, embedding: torch.Tensor, label: torch.Tensor, entities: int) -> dict[str, torch.Tensor]:
        """Return the losses of a batch of `EntityBatches`. The first `entities` rows of each half have a text."""
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
        # Both images of an entity are positives of its text, so each is hidden while the other is the target.
        first, second = (
            F.cross_entropy(text_to_image.scatter(1, hidden[:, None], -1e4), target)
            for target, hidden in ((own, own + count // 2), (own + count // 2, own))
        )
        text_loss = F.cross_entropy(image_to_text, label[with_text]) + 0.5 * (first + second)
        to_prototypes = embedding @ F.normalize(self.prototypes, dim=1).T
        margin = F.one_hot(label, len(self.prototypes)) * 0.1
        prototype_loss = F.cross_entropy((to_prototypes - margin) * prototype_scale, label)
        return {
            "image": F.cross_entropy(similarity, partner),
            "text": text_loss * self.settings.text_weight,
            "prototype": prototype_loss * self.settings.prototype_weight,
        }


def learning_rate(step: int, settings: Settings) -> float:
    """Return the learning rate of a step: linear warm-up, then half a cosine."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * max(0.002, 0.5 * (1 + math.cos(math.pi * done)))


class Training:
    """A training run. A step depends only on the settings, its number and the state of the parts."""

    def __init__(
        self, build: Path, settings: Settings, encoder: TinyEncoder, device: torch.device, icons: Sequence[Drawing]
    ) -> None:
        torch.backends.cudnn.benchmark = True  # there are only two batch shapes
        self.build = build
        self.settings = settings
        self.device = device
        self.drawings = [d for d in read_drawings(build) if d.role == "train"]
        self.images = [*self.drawings, *visible(icons, build)]
        self.entities = sorted({d.entity_id for d in self.drawings})
        self.things = sorted({d.entity_id for d in self.images} - set(self.entities))
        self.encoder = copy.deepcopy(encoder).train().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.encoder).eval().requires_grad_(False)
        config = encoder.config
        texts_NC = text_embeddings(build, self.entities)
        self.objective = Objective(texts_NC, config.embedding_dim, settings, len(self.things)).to(device)
        sizes = (settings.entities_per_batch, settings.things_per_batch)
        labels = (self.entities, self.things)
        self.batches = EntityBatches(self.images, labels, sizes, settings.seed, settings.icon_share)
        parameters = [*self.encoder.parameters(), *self.objective.parameters()]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
        self.preprocessing = Preprocessing(
            size_px=config.size_px, resize="squash", crop="none", interpolation="bicubic",
            mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        )  # fmt: skip
        self.step = 0

    def snapshot(self) -> dict[str, Any]:
        return {"step": self.step, **{name: getattr(self, name).state_dict() for name in _PARTS}}

    def restore(self, snapshot: dict[str, Any]) -> None:
        self.step = snapshot["step"]
        for name in _PARTS:
            getattr(self, name).load_state_dict(snapshot[name])

    def run(self, snapshots: Snapshots) -> None:
        """Take the remaining steps, and show losses, validate and save snapshots in between."""
        settings, device = self.settings, self.device
        # A flag is identified by its colours, so it is restyled less.
        restyling = torch.tensor([0.35 if d.kind == "flag" else 1.0 for d in self.images], device=device)
        pool = torch.empty(0)
        with tqdm(total=settings.steps, initial=self.step, desc="training", unit="step", mininterval=5) as progress:
            while self.step < settings.steps:
                small = self.step < int(settings.steps * settings.small_share)
                size_px = settings.small_px if small else self.encoder.config.size_px
                if pool.shape[-1] != size_px:
                    pool = load_rgba(self.images, self.build, size_px).to(device)
                indices, label = (each.to(device) for each in self.batches.batch(self.step))
                pixels = self._photographs(pool[indices], restyling[indices], size_px)
                losses = self._update(pixels, label)
                progress.update()
                validates = snapshots.due(self.step) or self.step == settings.steps
                if self.step % _SHOWN_EVERY == 0 or validates:  # reading the loss waits for the GPU
                    shown = {name: round(value.item(), 3) for name, value in losses.items()}
                    if not all(map(math.isfinite, shown.values())):
                        raise UserError(f"loss {shown} at step {self.step}; lower the learning rate")
                    progress.set_postfix(shown)
                if validates:
                    tqdm.write(f"step {self.step}: {self._validate()}")
                    snapshots.save(self.snapshot())

    def _photographs(self, rgba: torch.Tensor, restyling: torch.Tensor, size_px: int) -> torch.Tensor:
        """Restyle and photograph a batch of drawings, harder in later steps."""
        settings = self.settings
        photographer = Photographer(settings.seed * 10**9 + self.step, self.device)
        hardest_from = settings.steps * settings.hardest_from
        ramp = min(1.0, 0.1 + 0.9 * self.step / hardest_from) if hardest_from else 1.0
        strength, chance, style = torch.rand(3, len(rgba), generator=photographer.generator, device=rgba.device)
        strength = strength * ramp * (chance > settings.clean_share)
        drawings = photographer.restyle(rgba.float() / 255, style * restyling * ramp)
        return photographer.compress(photographer.photograph(drawings, size_px, strength), strength)

    def _update(self, pixels: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
        """Take one step of the optimiser, and update the moving average of the weights. Return the losses."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, settings)
        with torch.autocast(self.device.type, torch.bfloat16):
            _, embedding = self.encoder(normalised(pixels))
        with_text = min(settings.entities_per_batch, len(self.entities))
        losses: dict[str, torch.Tensor] = self.objective(embedding.float(), label, with_text)
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses.values(), torch.zeros((), device=self.device)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
        self.optimizer.step()
        decay = min(settings.average_decay, (1 + self.step) / (10 + self.step))  # faster in the first steps
        mix(self.average, self.encoder, 1 - decay)
        self.step += 1
        return losses

    def _validate(self) -> dict[str, Accuracy]:
        """Return the averaged encoder's accuracy on the validation drawings, clean and photographed."""
        config = asdict(self.average.config)
        encoder = TorchImageEncoder(
            self.average, self.preprocessing, saved_config=config, spec="tiny", device=self.device
        )
        return evaluate_encoder(encoder, self.build, "val")


def train(
    build: Path,
    out: Path,
    settings: Settings,
    start: TinyConfig | Path,
    device: torch.device,
    snapshot: Path,
    icons: Sequence[Drawing] = (),
) -> None:
    """Train a new encoder, or the one in the file `start`, and write its averaged weights to `out`.

    Resumes from the file `snapshot`. Raises `CheckpointError` if that is of a run with other settings or data. `icons`
    must be rendered already.
    """
    torch.manual_seed(settings.seed)
    first = TinyEncoder(start) if isinstance(start, TinyConfig) else read_tiny(start)[0].to(device)
    training = Training(build, settings, first, device, icons)
    average = training.average
    begun_from = None if isinstance(start, TinyConfig) else sha256_file(start)
    about = {
        "settings": asdict(settings),
        "training_drawings": len(training.drawings),
        "training_drawings_sha256": drawings_digest(training.drawings),
        "icons": len(icons),
        "icons_sha256": drawings_digest(icons),
        "begun_from_sha256": begun_from,
        "torch": torch.__version__,
    }
    key = fingerprint({**about, "config": asdict(first.config), "device": device.type})
    snapshots = Snapshots(path=snapshot, every_steps=settings.snapshot_every, run=key)
    if saved := snapshots.load():
        training.restore(saved)
    elif begun_from:
        labels = [*training.entities, *training.things]
        training.objective.warm(prototypes(first, training.images, labels, build, device))
    training.run(snapshots)
    if begun_from:  # WiSE-FT, Wortsman et al., 2022
        mix(average, first, settings.start_share)
    if settings.length_share:
        drawn = load_rgba(training.drawings, build, average.config.size_px)
        keep_length(average, mean_patch_tokens(average, drawn, device), settings.length_share)
    notes = {"command": "python -m demo.train_tiny" + (" --with-icons" if icons else ""), **about}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_tiny(average.cpu(), training.preprocessing, out, notes=notes)


@torch.no_grad()
def mix(encoder: TinyEncoder, other: TinyEncoder, share: float) -> None:
    """Move an encoder's weights towards another's by `share`, and copy the other's counters."""
    for ours, theirs in zip(encoder.state_dict().values(), other.state_dict().values(), strict=True):
        if ours.is_floating_point():
            ours.lerp_(theirs, share)
        else:
            ours.copy_(theirs)


@torch.no_grad()
def keep_length(encoder: TinyEncoder, pooled_nD: torch.Tensor, share: float) -> None:
    """Make a normalised embedding show its length before normalisation, which grows with the encoder's certainty.

    As in MagFace (Meng et al., CVPR 2021), length is a measure of quality. This adds one vector to every mean patch
    token: `share` of the median length of `pooled_nD` (those of drawings), in the direction in which embeddings differ
    least. After normalisation, that component is larger for shorter embeddings, and cosines hardly change. The
    open-set model uses it.
    """
    directions_DD = torch.linalg.eigh(torch.cov(F.normalize(pooled_nD, dim=1).T)).eigenvectors
    added_D = share * pooled_nD.norm(dim=1).median() * directions_DD[:, 0]
    # Added before the projection, which has no bias. Saliency is unchanged: its softmax ignores a common term.
    encoder.norm.bias.add_(torch.linalg.pinv(encoder.projection.weight) @ added_D)


@click.command()
@build_option
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=BUILT_IN, help="The safetensors file to write."
)
@click.option("--with-icons", is_flag=True, help="Train the encoder in that file further, with icons by many artists.")
@click.option("--steps", type=int, help="Training steps.  [default: those of the recipe]")
@click.option("--device", default="auto", help="auto, cpu or cuda.")
@click.option("--fresh", is_flag=True, help="Start over instead of resuming from the last snapshot.")
def main(build: Path, out: Path, with_icons: bool, steps: int | None, device: str, fresh: bool) -> None:
    """Train the tiny image encoder on Symbols, or train it further with icons."""
    snapshot = build / ("tiny_with_icons.pt" if with_icons else "tiny_training.pt")
    if fresh:
        snapshot.unlink(missing_ok=True)
    chosen = resolve_device(device)
    settings, config = (ON_GPU, CONFIG_ON_GPU) if chosen.type == "cuda" else (Settings(), TinyConfig())
    icons: list[Drawing] = []
    if with_icons:
        settings = WITH_ICONS
        source = fetch_icons(build / "sources")
        icons = plan_from(build, source)
        render_icons(icons, source, build)
    settings = replace(settings, steps=steps or settings.steps)
    train(build, out, settings, out if with_icons else config, chosen, snapshot, icons)


if __name__ == "__main__":
    run(main)
