"""`python -m benchmarks.generative.train`: train the baseline on Symbols and compare its accuracy with WikiCLIP's.

Both use the same frozen image encoder, learn from the same pairs of seen entities, and answer the same held-out queries
over the whole catalog. The baseline learns as AutoVER does: to name the entity in an image, and to bring the retrieval
states of two images of one entity together. Before that, it learns the titles of the whole catalog, since a large
language model knows Wikipedia's. This needs `make symbols` and takes about 25 minutes on two cores. The trained weights
are kept next to Symbols; a second run with the same settings only evaluates them.

Shapes: B images, P patches, C patch channels, L prompt tokens, T tokens of a name and its end, N entities, R retrieval
width.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.generative.models import EncoderShape, Size, build_model
from benchmarks.generative.names import END, IMAGE, token_id, train_tokenizer
from benchmarks.generative.recognizer import GenerativeRecognizer, prompt
from benchmarks.measure import write_results
from catalog import EntityRecord, read_catalog
from core.errors import UserError
from core.files import atomic_write
from core.jsonl import Rejected
from core.runtime import describe_run
from demo.build import BUILD
from evaluation.evaluate import answer_queries
from evaluation.metrics import AnsweredQuery, as_table, rank_of, summarise
from imaging import load_pixels
from index.bundle import Bundle
from model.data import ImageSource, Pair, read_pairs
from model.encoders import ImageEncoder, open_text_encoder
from model.encoders.tiny import load_tiny
from model.features import MAX_PIXELS, FeatureStore
from service.recognizer import Recognizer
from service.settings import load_settings

IGNORED = -100  # the label of padding
KINDS = ("clean", "photo")
_TOKENS = 2000  # of the vocabulary trained on the titles
_QUESTION = ""  # the question is always the same, and a network trained from nothing does not need it
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Settings:
    language_steps: int = 1000
    names_per_batch: int = 192
    steps: int = 6000
    entities_per_batch: int = 32  # with two images each
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup_steps: int = 40
    logit_scale: float = 20.0
    seed: int = 3


# ---- the network ----


class _FrozenTower(nn.Module):
    """The encoder's pooled patch tokens, scaled to a deviation of one, in place of LLaVA's image tower."""

    scale: torch.Tensor

    def __init__(self, module: nn.Module, scale: float) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        patch_tokens_BPC = _pooled(self.module(pixel_values)[0]) * self.scale
        return BaseModelOutputWithPooling(last_hidden_state=patch_tokens_BPC, hidden_states=(patch_tokens_BPC,))


def _pooled(patch_tokens_BPC: torch.Tensor) -> torch.Tensor:
    """Return the mean of each two by two patches, as LLaVA's successors do to have a quarter of the tokens."""
    batch, patches, channels = patch_tokens_BPC.shape
    side = math.isqrt(patches)
    grid = patch_tokens_BPC.transpose(1, 2).reshape(batch, channels, side, side)
    return F.avg_pool2d(grid, 2, ceil_mode=True).flatten(2).transpose(1, 2)


class TinyLlava(nn.Module):
    """A LLaVA of about a million parameters plus its vocabulary, over the patch tokens of a frozen encoder.

    `GenerativeRecognizer` takes its `model` and `head`. The methods take cached patch tokens, for training.
    """

    def __init__(
        self, encoder: ImageEncoder, tower: nn.Module, *, scale: float, image_token: int, vocabulary: int
    ) -> None:
        super().__init__()
        side = math.isqrt(encoder.patches)
        assert side * side == encoder.patches, "patches form a square"
        size_px = encoder.preprocessing.size_px
        shape = EncoderShape(
            width=encoder.patch_dim, layers=1, heads=1, size_px=size_px, patch_px=size_px // math.ceil(side / 2)
        )
        size = Size(
            tower=shape, width=160, layers=3, heads=4, key_value_heads=4, mlp_width=480, tied=True,
            retrieval_dim=encoder.embedding_dim,
        )  # fmt: skip
        self.model, self.head = build_model(size, image_token=image_token, vocabulary=vocabulary, device="cpu")
        self.model.config.vision_feature_layer = -1
        self.model.config.vision_feature_select_strategy = "full"  # there is no class token to remove
        self._llava: Any = self.model.model
        self._llava.vision_tower = _FrozenTower(tower, scale)
        for part in (self._llava.multi_modal_projector, self._llava.language_model, self.model.lm_head, self.head):
            part.requires_grad_(True)
        tower.requires_grad_(False)

    def _states(self, patch_tokens_BPC: torch.Tensor, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Return last hidden states `[B, L, width]`."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        projected = self._llava.multi_modal_projector(_pooled(patch_tokens_BPC) * self._llava.vision_tower.scale)
        features = {"image": BaseModelOutputWithPooling(pooler_output=list(projected))}
        states: torch.Tensor = self._llava(
            input_ids=tokens_BL, mm_encoder_outputs=features, use_cache=False
        ).last_hidden_state
        return states

    def retrieve(self, patch_tokens_BPC: torch.Tensor, prompt_1L: torch.Tensor) -> torch.Tensor:
        """Return retrieval embeddings `[B, R]`, L2-normalised."""
        states = self._states(patch_tokens_BPC, prompt_1L.expand(len(patch_tokens_BPC), -1))
        return F.normalize(self.head(states[:, -1]), dim=1)

    def language_loss(self, names_BT: torch.Tensor, start: int) -> torch.Tensor:
        """Return the loss on names alone, after the token `start`."""
        inputs_BT = F.pad(names_BT[:, :-1].clamp(min=0), (1, 0), value=start)
        return self._name_loss(self._llava(input_ids=inputs_BT, use_cache=False).last_hidden_state, names_BT)

    def losses(
        self, patch_tokens_BPC: torch.Tensor, prompt_1L: torch.Tensor, names_BT: torch.Tensor, logit_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss on the names and the contrastive loss of the first and second halves of the batch.

        Image `i` of the first half shows the same entity as image `i` of the second. `names_BT` are token ids with the
        end, padded with `IGNORED`. The retrieval token's state also predicts the first token of the name.
        """
        tokens = torch.cat([prompt_1L.expand(len(names_BT), -1), names_BT[:, :-1].clamp(min=0)], dim=1)
        states = self._states(patch_tokens_BPC, tokens)[:, prompt_1L.shape[1] - 1 :]
        one, other = F.normalize(self.head(states[:, 0]).float(), dim=1).chunk(2)
        logits = logit_scale * one @ other.T
        truth = torch.arange(len(one))
        contrast = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
        return self._name_loss(states, names_BT), contrast

    def _name_loss(self, states: torch.Tensor, names_BT: torch.Tensor) -> torch.Tensor:
        counted = names_BT != IGNORED
        return F.cross_entropy(self.model.lm_head(states[counted]).float(), names_BT[counted])


# ---- training ----


@dataclass(frozen=True, kw_only=True)
class Symbols:
    """The catalog in order, with the keys of cached images by entity row. Only seen entities have training images."""

    entity_ids: list[str]
    titles: list[str]
    catalog_keys: list[list[bytes]]
    training_keys: list[list[bytes]]


def read_symbols(build: Path, store: FeatureStore) -> Symbols:
    """Cache the features of all images of Symbols. Raise `UserError` if Symbols was not built."""
    if not (build / "catalog.jsonl").exists():
        raise UserError(f"{build} has no Symbols; build it with `make symbols`")
    records = [item for item in read_catalog(build / "catalog.jsonl") if isinstance(item, EntityRecord)]
    row_of = {record.entity_id: row for row, record in enumerate(records)}
    catalog = [
        (row, ImageSource(path=Path(image), line=0, record=image))
        for row, record in enumerate(records)
        for image in record.images
    ]
    pairs = [item for item in read_pairs(build / "pairs_train.jsonl") if isinstance(item, Pair)]
    training = [(row_of[pair.entity_id], pair.image) for pair in pairs]
    keys = iter(_image_keys(store, [source for _, source in catalog + training], "images"))
    by_row: list[list[list[bytes]]] = []
    for sources in (catalog, training):
        by_row.append([[] for _ in records])
        for (row, _), key in zip(sources, keys, strict=False):
            by_row[-1][row].append(key)
    return Symbols(
        entity_ids=[record.entity_id for record in records],
        titles=[record.title for record in records],
        catalog_keys=by_row[0],
        training_keys=by_row[1],
    )


def _image_keys(store: FeatureStore, sources: Sequence[ImageSource], description: str) -> list[bytes]:
    def fail(rejected: Rejected) -> None:
        raise UserError(f"{rejected.reason}; build it again with `make symbols`")

    return [key for key in store.image_keys(sources, fail, description) if key is not None]


def train(network: TinyLlava, symbols: Symbols, store: FeatureStore, tokenizer: Any, settings: Settings) -> float:
    """Train in place, in bf16. Return the mean loss of the last tenth of the steps."""
    rng = random.Random(settings.seed)
    trainable = [row for row, keys in enumerate(symbols.training_keys) if len(keys) > 1]
    names = [[*tokenizer.encode(title).ids, token_id(tokenizer, END)] for title in symbols.titles]
    prompt_1L = prompt(tokenizer, network.model.config.image_seq_length, _QUESTION)
    network.train()
    network.model.model.vision_tower.eval()

    def language() -> torch.Tensor:
        drawn = rng.sample(names, min(settings.names_per_batch, len(names)))
        return network.language_loss(_padded(drawn), int(prompt_1L[0, -1]))

    def both() -> torch.Tensor:
        rows = rng.sample(trainable, min(settings.entities_per_batch, len(trainable)))
        drawn = [rng.sample(symbols.training_keys[row], 2) for row in rows]
        keys = [one for one, _ in drawn] + [other for _, other in drawn]
        patch_tokens_BPC = store.batch([(key, None) for key in keys], _CPU).patch_tokens_BPC
        names_BT = _padded([names[row] for row in rows + rows])
        named, contrast = network.losses(patch_tokens_BPC, prompt_1L, names_BT, settings.logit_scale)
        return named + contrast

    _optimise(network, language, settings.language_steps, settings, "names")
    return _optimise(network, both, settings.steps, settings, "images and names")


def _optimise(
    network: TinyLlava, loss_of_a_batch: Callable[[], torch.Tensor], steps: int, settings: Settings, description: str
) -> float:
    """Run AdamW with warm-up and cosine decay. Return the mean loss of the last tenth of the steps."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / settings.warmup_steps)
        * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps)))),
    )  # fmt: skip
    losses: list[float] = []
    bar = tqdm(range(steps), desc=description, unit="step")
    for step in bar:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of_a_batch()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 20 == 0:
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return float(np.mean(losses[-max(1, steps // 10) :])) if losses else math.nan


def _padded(names: Sequence[Sequence[int]]) -> torch.Tensor:
    longest = max(map(len, names))
    return torch.tensor([[*name, *[IGNORED] * (longest - len(name))] for name in names])


# ---- evaluation ----


@torch.inference_mode()
def _entity_embeddings(
    network: TinyLlava, symbols: Symbols, store: FeatureStore, prompt_1L: torch.Tensor
) -> torch.Tensor:
    """Return `[N, R]`: the mean retrieval embedding of each entity's images, L2-normalised."""
    keys = [(row, key) for row, keys in enumerate(symbols.catalog_keys) for key in keys]
    sums_NR = torch.zeros(len(symbols.entity_ids), store.image_encoder.embedding_dim)
    for start in tqdm(range(0, len(keys), 256), desc="entities", unit="batch"):
        chunk = keys[start : start + 256]
        batch = store.batch([(key, None) for _, key in chunk], _CPU)
        embeddings_BR = network.retrieve(batch.patch_tokens_BPC, prompt_1L)
        sums_NR.index_add_(0, torch.tensor([row for row, _ in chunk]), embeddings_BR)
    return F.normalize(sums_NR, dim=1)


def _answered(query: Pair, rank: int | None) -> AnsweredQuery:
    return AnsweredQuery(data_split=query.data_split, seen=query.seen, rank=rank)


def _generated_answers(
    generative: GenerativeRecognizer, symbols: Symbols, queries: Sequence[Pair], *, faithful: bool
) -> list[AnsweredQuery]:
    """Answer queries by generation. An answer is right if it names the entity or another one of the same title."""
    answered = []
    size = 1 if faithful else 32
    title_of = dict(zip(symbols.entity_ids, symbols.titles, strict=True))
    for start in tqdm(range(0, len(queries), size), desc="faithful" if faithful else "optimised", unit="batch"):
        batch = queries[start : start + size]
        images = [pair.image.path.read_bytes() for pair in batch]
        pixels = [load_pixels(image, generative.preprocessing, max_pixels=MAX_PIXELS) for image in images]
        found = generative.faithful(pixels[0]) if faithful else generative.optimised(np.stack(pixels))
        for query, row in zip(batch, found.rows, strict=True):
            answered.append(_answered(query, 1 if symbols.titles[row] == title_of[query.entity_id] else None))
    return answered


@torch.inference_mode()
def _retrieved_answers(
    network: TinyLlava, symbols: Symbols, store: FeatureStore, queries: Sequence[Pair], prompt_1L: torch.Tensor,
    entities_NR: torch.Tensor,
) -> list[AnsweredQuery]:  # fmt: skip
    """Answer queries with the baseline's own retrieval embedding."""
    answered = []
    for query, key in zip(queries, _image_keys(store, [query.image for query in queries], "queries"), strict=True):
        embedding_1R = network.retrieve(store.batch([(key, None)], _CPU).patch_tokens_BPC, prompt_1L)
        rows = (embedding_1R @ entities_NR.T)[0].topk(min(10, len(entities_NR))).indices.tolist()
        answered.append(_answered(query, rank_of(query.entity_id, [symbols.entity_ids[row] for row in rows])))
    return answered


def _wikiclip_answers(bundle: Path, queries: Path) -> list[AnsweredQuery]:
    """Answer queries with the bundle, as `wikiclip evaluate` does."""
    with (
        Recognizer(Bundle.open(bundle), load_settings(cache="off", device="cpu")) as recognizer,
        tempfile.TemporaryDirectory() as folder,
    ):
        predictions = Path(folder) / "predictions.jsonl"
        return answer_queries(recognizer, [queries], predictions, image_root=None, batch_size=256)[0]


def run(
    build: Path, bundle: Path, settings: Settings, *, fresh: bool, faithful_queries: int | None = None
) -> dict[str, Any]:
    """Train unless weights for the same settings exist, and return accuracies by system and kind of query."""
    encoder = load_tiny()
    store = FeatureStore(build / "features", encoder, open_text_encoder("minilm"))
    symbols = read_symbols(build, store)
    tokenizer = train_tokenizer(symbols.titles, tokens=_TOKENS)
    samples = [(keys[0], None) for keys in symbols.training_keys if keys][:512]
    torch.manual_seed(settings.seed)
    network = TinyLlava(
        encoder, encoder.module, scale=1 / float(store.batch(samples, _CPU).patch_tokens_BPC.std()),
        image_token=token_id(tokenizer, IMAGE), vocabulary=tokenizer.get_vocab_size(),
    )  # fmt: skip
    path = build / "generative.pt"
    identity = {"settings": asdict(settings), "encoder": encoder.content_hash, "titles": len(symbols.titles)}
    saved = torch.load(path, weights_only=True) if path.exists() and not fresh else None
    if saved is None or saved["identity"] != identity:
        started = time.perf_counter()
        loss = train(network, symbols, store, tokenizer, settings)
        minutes = round((time.perf_counter() - started) / 60, 1)
        saved = {"identity": identity, "weights": network.state_dict(), "loss": loss, "minutes": minutes}
        with atomic_write(path) as temporary:
            torch.save(saved, temporary)
    network.load_state_dict(saved["weights"])
    network.eval()
    prompt_1L = prompt(tokenizer, network.model.config.image_seq_length, _QUESTION)
    entities_NR = _entity_embeddings(network, symbols, store, prompt_1L)
    generative = GenerativeRecognizer(
        network.model, network.head, tokenizer, symbols.titles, entities_NR,
        preprocessing=encoder.preprocessing, question=_QUESTION,
    )  # fmt: skip
    figures: dict[str, Any] = {}
    for kind in KINDS:
        query_file = build / f"queries_test_{kind}.jsonl"
        queries = [item for item in read_pairs(query_file) if isinstance(item, Pair)]
        count = min(faithful_queries or len(queries), len(queries))
        sample = [queries[i] for i in np.linspace(0, len(queries), count, endpoint=False).astype(int)]
        systems = {
            "wikiclip": _wikiclip_answers(bundle, query_file),
            "generative, faithful": _generated_answers(generative, symbols, sample, faithful=True),
            "generative, optimised": _generated_answers(generative, symbols, queries, faithful=False),
            "generative, its retrieval alone": _retrieved_answers(
                network, symbols, store, queries, prompt_1L, entities_NR
            ),
        }
        for name, answered in systems.items():
            evaluation = summarise(answered, rejected=0)
            click.echo(f"{kind}, {name}\n{as_table(evaluation)}\n")
            keys = ("queries", "seen", "unseen", "hm", "intervals")
            figures.setdefault(name, {})[kind] = {key: getattr(evaluation, key) for key in keys}
    return {
        "accuracy": figures,
        "entities": len(symbols.titles),
        "titles_shared": len(symbols.titles) - len(set(symbols.titles)),
        "parameters_trained": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "training_minutes": saved["minutes"],
        "last_loss": round(saved["loss"], 4),
        "training_images": sum(map(len, symbols.training_keys)),
    }


@click.command()
@click.option(
    "--build", type=click.Path(path_type=Path, file_okay=False), default=BUILD, help="Where Symbols was built."
)
@click.option("--bundle", type=click.Path(path_type=Path), default=Path("demo/bundle"), help="WikiCLIP's bundle.")
@click.option("--steps", default=Settings.steps, show_default=True, type=click.IntRange(min=1), help="Training steps.")
@click.option(
    "--language-steps", default=Settings.language_steps, show_default=True, type=click.IntRange(min=0),
    help="Training steps on titles alone, before the others.",
)  # fmt: skip
@click.option("--results", type=click.Path(path_type=Path, file_okay=False), default=Path("benchmarks/results"))
@click.option("--fresh", is_flag=True, help="Train even if trained weights exist.")
@click.option(
    "--faithful", "faithful_queries", type=click.IntRange(min=1),
    help="Queries of each kind in the slow mode.  [default: all]",
)  # fmt: skip
@click.option("--threads", default=2, show_default=True, type=click.IntRange(min=1), help="Threads for torch.")
def main(steps: int, language_steps: int, results: Path, threads: int, **options: Any) -> None:
    """Train the generative baseline on Symbols and compare its accuracy with WikiCLIP's, seen and unseen."""
    torch.set_num_threads(threads)
    settings = Settings(steps=steps, language_steps=language_steps)
    outcome = {**describe_run(asdict(settings)), "figures": run(settings=settings, **options)}
    path = write_results(results, "generative", outcome)
    click.echo(json.dumps(outcome))
    click.echo(f"written to {path}", err=True)


if __name__ == "__main__":
    main()
