"""`python -m benchmarks.generative.train`: train the baseline on Symbols and measure its accuracy.

It uses the demo's frozen image encoder, learns from the same pairs of seen entities as WikiCLIP, and answers the same
held-out queries over the whole catalog. `wikiclip evaluate` on the same files has WikiCLIP's accuracy. The baseline
learns as AutoVER does: to name the entity in an image, and to bring the retrieval states of two images of one entity
together. Before that, it learns the titles of the whole catalog, since a large language model knows Wikipedia's. This
needs `make symbols` and takes about 25 minutes on two cores.

Shapes: B images, P patches, C patch channels, L prompt tokens, T tokens of a name and its end, N entities, R retrieval
width.
"""

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.generative.models import EncoderShape, Size, build_model
from benchmarks.generative.recognizer import (
    END,
    IMAGE,
    GenerativeRecognizer,
    prompt,
    token_id,
    train_tokenizer,
)
from benchmarks.measure import write_outcome
from catalog import EntityRecord, read_catalog
from core.errors import UserError
from core.runtime import describe_run
from demo.build import BUILD
from demo.reference import encode_files, labelled_pairs
from evaluation.metrics import AnsweredQuery, rank_of, summarise
from imaging import load_pixels
from model.encoders import ImageEncoder
from model.encoders.tiny import load_tiny

IGNORED = -100  # the label of padding
KINDS = ("clean", "photo")
STEPS, LANGUAGE_STEPS = 6000, 1000
_TOKENS = 2000  # of the vocabulary trained on the titles
_QUESTION = ""  # the question is always the same, and a network trained from nothing does not need it
_NAMES_PER_BATCH = 192
_ENTITIES_PER_BATCH = 32  # with two images each
_LEARNING_RATE, _WEIGHT_DECAY, _WARMUP_STEPS = 1.5e-3, 0.05, 40
_LOGIT_SCALE = 20.0
_SEED = 3
_BATCH = 256


# ---- the network ----


class _FrozenTower(nn.Module):
    """The encoder's pooled patch tokens, scaled, in place of LLaVA's image tower. Takes pixels or pooled tokens."""

    def __init__(self, module: nn.Module, scale: float) -> None:
        super().__init__()
        self.module, self.scale = module, scale

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        tokens_BPC = pixel_values if pixel_values.ndim == 3 else pooled(self.module(pixel_values)[0])
        scaled_BPC = tokens_BPC * self.scale
        return BaseModelOutputWithPooling(last_hidden_state=scaled_BPC, hidden_states=(scaled_BPC,))


def pooled(patch_tokens_BPC: torch.Tensor) -> torch.Tensor:
    """Return the mean of each two by two patches, as LLaVA's successors do to have a quarter of the tokens."""
    batch, patches, channels = patch_tokens_BPC.shape
    side = math.isqrt(patches)
    grid = patch_tokens_BPC.transpose(1, 2).reshape(batch, channels, side, side)
    return F.avg_pool2d(grid, 2, ceil_mode=True).flatten(2).transpose(1, 2)


class TinyLlava(nn.Module):
    """A LLaVA of about a million parameters plus its vocabulary, over the patch tokens of a frozen encoder.

    `GenerativeRecognizer` takes its `model` and `head`. The methods take pooled patch tokens.
    """

    def __init__(
        self, encoder: ImageEncoder, tower: nn.Module, *, scale: float, image_token: int, vocabulary: int
    ) -> None:
        super().__init__()
        side = math.ceil(math.isqrt(encoder.patches) / 2)
        size_px = encoder.preprocessing.size_px
        shape = EncoderShape(width=encoder.patch_dim, layers=1, heads=1, size_px=size_px, patch_px=size_px // side)
        size = Size(
            tower=shape, width=160, layers=3, heads=4, key_value_heads=4, mlp_width=480, tied=True,
            retrieval_dim=encoder.embedding_dim,
        )  # fmt: skip
        self.model, self.head = build_model(size, image_token=image_token, vocabulary=vocabulary, device="cpu")
        self.model.config.vision_feature_layer = -1
        self.model.config.vision_feature_select_strategy = "full"  # there is no class token to remove
        self.model.requires_grad_(True)
        self.head.requires_grad_(True)
        self.model.model.vision_tower = _FrozenTower(tower, scale).eval().requires_grad_(False)

    def retrieve(self, tokens_BPC: torch.Tensor, prompt_1L: torch.Tensor) -> torch.Tensor:
        """Return retrieval embeddings `[B, R]`, L2-normalised."""
        prompts_BL = prompt_1L.expand(len(tokens_BPC), -1)
        outputs = self.model.model(input_ids=prompts_BL, pixel_values=tokens_BPC, use_cache=False)
        return F.normalize(self.head(outputs.last_hidden_state[:, -1]), dim=1)

    def losses(
        self, tokens_BPC: torch.Tensor, prompt_1L: torch.Tensor, names_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss on the names and the contrastive loss of the first and second halves of the batch.

        Image `i` of the first half shows the same entity as image `i` of the second. `names_BT` are token ids with the
        end, padded with `IGNORED`. The retrieval token's state also predicts the first token of the name.
        """
        outputs = self.model(
            input_ids=torch.cat([prompt_1L.expand(len(names_BT), -1), names_BT.clamp(min=0)], dim=1),
            pixel_values=tokens_BPC,
            labels=F.pad(names_BT, (1, 0), value=IGNORED),
            logits_to_keep=names_BT.shape[1] + 1,
            output_hidden_states=True,
            use_cache=False,
        )
        states_BC = outputs.hidden_states[-1][:, prompt_1L.shape[1] - 1]
        one, other = F.normalize(self.head(states_BC).float(), dim=1).chunk(2)
        logits = _LOGIT_SCALE * one @ other.T
        truth = torch.arange(len(one))
        return outputs.loss, (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


# ---- training ----


def patch_tokens(encoder: ImageEncoder, paths: Sequence[Path]) -> torch.Tensor:
    """Return the pooled patch tokens of images."""
    batches = encode_files(encoder, paths, batch_size=_BATCH)
    return torch.cat([pooled(features.patch_tokens_BPC) for features in batches])


def train(
    network: TinyLlava,
    titles: Sequence[str],
    images_IPC: torch.Tensor,
    rows_I: Sequence[int],
    tokenizer: Any,
    prompt_1L: torch.Tensor,
    *,
    steps: int,
    language_steps: int,
) -> None:
    """Train in place, in bf16: the names first, then images and names. `rows_I` are the entity rows of the images."""
    rng = random.Random(_SEED)
    images_of: dict[int, list[int]] = {}
    for image, row in enumerate(rows_I):
        images_of.setdefault(row, []).append(image)
    trainable = [row for row, images in images_of.items() if len(images) > 1]
    start, end = int(prompt_1L[0, -1]), token_id(tokenizer, END)
    names = [torch.tensor([*tokenizer.encode(title).ids, end]) for title in titles]

    def padded(drawn: Sequence[torch.Tensor]) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence(list(drawn), batch_first=True, padding_value=IGNORED)

    def language() -> torch.Tensor:
        drawn = rng.sample(names, min(_NAMES_PER_BATCH, len(names)))
        names_BT = F.pad(padded(drawn), (1, 0), value=IGNORED)
        tokens_BT = torch.where(names_BT == IGNORED, start, names_BT)
        loss: torch.Tensor = network.model(input_ids=tokens_BT, labels=names_BT, use_cache=False).loss
        return loss

    def both() -> torch.Tensor:
        rows = rng.sample(trainable, min(_ENTITIES_PER_BATCH, len(trainable)))
        drawn = np.array([rng.sample(images_of[row], 2) for row in rows])
        tokens_BPC = images_IPC[drawn.T.ravel()]
        named, contrast = network.losses(tokens_BPC, prompt_1L, padded([names[row] for row in rows + rows]))
        return named + contrast

    network.train()
    _optimise(network, language, language_steps, "names")
    _optimise(network, both, steps, "images and names")
    network.eval()


def _optimise(network: TinyLlava, loss_of_a_batch: Callable[[], torch.Tensor], steps: int, description: str) -> None:
    """Run AdamW with warm-up and cosine decay."""
    from transformers import get_cosine_schedule_with_warmup

    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, _LEARNING_RATE, weight_decay=_WEIGHT_DECAY, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, _WARMUP_STEPS, steps)
    for _ in tqdm(range(steps), desc=description, unit="step"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of_a_batch()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


# ---- evaluation ----


def run(build: Path, *, steps: int, language_steps: int) -> dict[str, Any]:
    """Train, and return accuracies by system and kind of query."""
    if not (build / "catalog.jsonl").exists():
        raise UserError(f"{build} has no Symbols; build it with `make symbols`")
    encoder = load_tiny()
    records = [item for item in read_catalog(build / "catalog.jsonl") if isinstance(item, EntityRecord)]
    row_of = {record.entity_id: row for row, record in enumerate(records)}
    titles = [record.title for record in records]
    pairs = labelled_pairs(build / "pairs_train.jsonl")
    training_IPC = patch_tokens(encoder, [pair.image.path for pair in pairs])
    tokenizer = train_tokenizer(titles, tokens=_TOKENS)
    torch.manual_seed(_SEED)
    network = TinyLlava(
        encoder, encoder.module, scale=1 / float(training_IPC.std()), image_token=token_id(tokenizer, IMAGE),
        vocabulary=tokenizer.get_vocab_size(),
    )  # fmt: skip
    prompt_1L = prompt(tokenizer, network.model.config.image_seq_length, _QUESTION)
    started = time.perf_counter()
    training_rows = [row_of[pair.entity_id] for pair in pairs]
    train(
        network, titles, training_IPC, training_rows, tokenizer, prompt_1L, steps=steps, language_steps=language_steps
    )
    minutes = round((time.perf_counter() - started) / 60, 1)

    @torch.inference_mode()
    def embed(paths: Sequence[Path]) -> torch.Tensor:
        tokens_IPC = patch_tokens(encoder, paths)
        return torch.cat([network.retrieve(part, prompt_1L) for part in torch.split(tokens_IPC, _BATCH)])

    shown = [(row, Path(image)) for row, record in enumerate(records) for image in record.images]
    sums_NR = torch.zeros(len(records), encoder.embedding_dim)
    sums_NR.index_add_(0, torch.tensor([row for row, _ in shown]), embed([path for _, path in shown]))
    entities_NR = F.normalize(sums_NR, dim=1)
    generative = GenerativeRecognizer(
        network.model, network.head, tokenizer, titles, entities_NR,
        preprocessing=encoder.preprocessing, question=_QUESTION,
    )  # fmt: skip
    figures: dict[str, Any] = {}
    for kind in KINDS:
        queries = labelled_pairs(build / f"queries_test_{kind}.jsonl")
        embeddings_BR = embed([query.image.path for query in queries])
        found = {"generative, its retrieval alone": (embeddings_BR @ entities_NR.T).argmax(dim=1).tolist()}
        for mode in ("faithful", "optimised"):
            answer, preprocessing = getattr(generative, mode), encoder.preprocessing
            images = (query.image.path.read_bytes() for query in queries)
            pixels = (load_pixels(image, preprocessing) for image in images)
            found[f"generative, {mode}"] = [answer(each).row for each in tqdm(pixels, mode, len(queries), unit="query")]
        for name, rows in found.items():
            # Generation is also right if it names another entity of the same title.
            labels = [record.entity_id for record in records] if "retrieval" in name else titles
            ranks = [rank_of(labels[row_of[q.entity_id]], [labels[row]]) for q, row in zip(queries, rows, strict=True)]
            answered = [
                AnsweredQuery(data_split=query.data_split, seen=query.seen, rank=rank)
                for query, rank in zip(queries, ranks, strict=True)
            ]
            evaluation = summarise(answered, rejected=0)
            keys = ("queries", "seen", "unseen", "hm", "intervals")
            figures.setdefault(name, {})[kind] = {key: getattr(evaluation, key) for key in keys}
    return {
        "accuracy": figures,
        "parameters_trained": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "training_minutes": minutes,
        "training_images": len(training_IPC),
    }


@click.command(context_settings={"show_default": True})
@click.option("--build", type=click.Path(path_type=Path), default=BUILD, help="Where Symbols was built.")
@click.option("--steps", default=STEPS, type=click.IntRange(min=1), help="Training steps.")
@click.option("--language-steps", default=LANGUAGE_STEPS, help="Steps on titles alone, before the others.")
@click.option("--results", type=click.Path(path_type=Path), default=Path("benchmarks/results"))
def main(build: Path, steps: int, language_steps: int, results: Path) -> None:
    """Train the generative baseline on Symbols and measure its accuracy, seen and unseen."""
    settings = {"steps": steps, "language_steps": language_steps}
    outcome = {**describe_run(settings), "figures": run(build, **settings)}
    write_outcome(results, "generative", outcome, "", {})
    click.echo(json.dumps(outcome))


if __name__ == "__main__":
    main()
