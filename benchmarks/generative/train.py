"""`python -m benchmarks.generative.train`: the baseline trained on Symbols, and its accuracy beside WikiCLIP's.

Both have the same frozen image encoder, learn from the same pairs (seen entities only) and answer the same held-out
queries over the whole catalog. The baseline learns as AutoVER does: to name the entity after its image, and to bring
the retrieval token's states of two images of one entity together; before that it learns the titles of the whole
catalog by heart, as a large language model knows Wikipedia's. It needs `make symbols` first, and takes about 25
minutes of two cores; what was trained is kept beside Symbols and is only judged again by a second run.

Shapes: B images, P patches, C patch channels, T tokens of a name with its end, N entities, R retrieval width.
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
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.generative.names import END, IMAGE, train_tokenizer
from benchmarks.generative.recognizer import GenerativeRecognizer, prompt
from benchmarks.generative.tiny_llava import IGNORED, TinyLlava
from benchmarks.measure import write_results
from catalog import EntityRecord, read_catalog
from core.errors import UserError
from core.files import atomic_write
from core.jsonl import Rejected
from core.runtime import describe_run
from demo.build import BUILD
from evaluation.evaluate import answer_queries
from evaluation.metrics import AnsweredQuery, Evaluation, as_table, summarise
from imaging import load_pixels
from index.bundle import Bundle
from model.data import ImageSource, Pair, read_pairs
from model.encoders import open_text_encoder
from model.encoders.tiny import load_tiny
from model.features import MAX_PIXELS, FeatureStore
from service.recognizer import Recognizer
from service.settings import load_settings

TOKENS = 2000  # of the vocabulary trained on the titles
QUESTION = ""  # always the same one, so that a network that is trained from nothing needs none
KINDS = ("clean", "photo")


@dataclass(frozen=True, kw_only=True)
class Settings:
    language_steps: int = 1000
    names_per_batch: int = 192
    steps: int = 6000
    entities_per_batch: int = 32  # two images each
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup_steps: int = 40
    logit_scale: float = 20.0
    seed: int = 3


@dataclass(frozen=True, kw_only=True)
class Symbols:
    """The catalog in its order, and what may be learned from: image keys by entity row, seen entities only."""

    entity_ids: list[str]
    titles: list[str]
    catalog_keys: list[list[bytes]]
    training_keys: list[list[bytes]]


def read_symbols(build: Path, store: FeatureStore) -> Symbols:
    """Symbols with the features of all its images in the store. Raises `UserError` where it was not built."""
    if not (build / "catalog.jsonl").exists():
        raise UserError(f"{build} holds no Symbols; build it with `make symbols`")
    records = [item for item in read_catalog(build / "catalog.jsonl") if isinstance(item, EntityRecord)]
    row_of = {record.entity_id: row for row, record in enumerate(records)}
    sources = [
        (row, ImageSource(path=Path(image), line=0, record=image))
        for row, record in enumerate(records)
        for image in record.images
    ]
    pairs = [item for item in read_pairs(build / "pairs_train.jsonl") if isinstance(item, Pair)]
    wanted = [*sources, *((row_of[pair.entity_id], pair.image) for pair in pairs)]
    keys = store.image_keys([source for _, source in wanted], _unexpected, "images")
    by_row: tuple[list[list[bytes]], list[list[bytes]]] = ([[] for _ in records], [[] for _ in records])
    for position, ((row, _), key) in enumerate(zip(wanted, keys, strict=True)):
        assert key is not None, "rejected images raise"
        by_row[position >= len(sources)][row].append(key)
    return Symbols(
        entity_ids=[record.entity_id for record in records],
        titles=[record.title for record in records],
        catalog_keys=by_row[0],
        training_keys=by_row[1],
    )


def _unexpected(rejected: Rejected) -> None:
    raise UserError(f"{rejected.reason}; `make symbols` makes what is missing")


def train(network: TinyLlava, symbols: Symbols, store: FeatureStore, tokenizer: Any, settings: Settings) -> float:
    """Train in place, in bf16; the mean loss of the last tenth of the steps."""
    rng = random.Random(settings.seed)
    usable = [row for row, keys in enumerate(symbols.training_keys) if len(keys) > 1]
    names = [[*tokenizer.encode(title).ids, tokenizer.token_to_id(END)] for title in symbols.titles]
    prompt_1L = prompt(tokenizer, network.model.config.image_seq_length, QUESTION)
    network.train()
    network.model.model.vision_tower.eval()

    def language() -> torch.Tensor:
        drawn = rng.sample(names, min(settings.names_per_batch, len(names)))
        return network.language_loss(_padded(drawn), int(prompt_1L[0, -1]))

    def both() -> torch.Tensor:
        rows = rng.sample(usable, min(settings.entities_per_batch, len(usable)))
        drawn = [rng.sample(symbols.training_keys[row], 2) for row in rows]
        keys = [one for one, _ in drawn] + [other for _, other in drawn]
        patch_tokens_BPC = store.batch([(key, None) for key in keys], torch.device("cpu")).patch_tokens_BPC
        names_BT = _padded([names[row] for row in rows + rows])
        named, contrast = network.losses(patch_tokens_BPC, prompt_1L, names_BT, settings.logit_scale)
        return named + contrast

    _optimise(network, language, settings.language_steps, settings, "names")
    return _optimise(network, both, settings.steps, settings, "images and names")


def _optimise(
    network: TinyLlava, loss_of_a_batch: Callable[[], torch.Tensor], steps: int, settings: Settings, description: str
) -> float:
    """AdamW with warm-up and a cosine; the mean loss of the last tenth of the steps."""
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


@torch.inference_mode()
def entity_embeddings(
    network: TinyLlava, symbols: Symbols, store: FeatureStore, prompt_1L: torch.Tensor
) -> torch.Tensor:
    """`[N, R]`: the mean of an entity's images' retrieval embeddings, L2-normalised: one for each name of the tree."""
    keys = [(row, key) for row, some in enumerate(symbols.catalog_keys) for key in some]
    sums_NR = torch.zeros(len(symbols.entity_ids), store.image_encoder.embedding_dim)
    for start in tqdm(range(0, len(keys), 256), desc="entities", unit="batch"):
        chunk = keys[start : start + 256]
        batch = store.batch([(key, None) for _, key in chunk], torch.device("cpu"))
        embeddings_BR = network.retrieve(batch.patch_tokens_BPC, prompt_1L)
        sums_NR.index_add_(0, torch.tensor([row for row, _ in chunk]), embeddings_BR)
    return F.normalize(sums_NR, dim=1)


def judge(
    generative: GenerativeRecognizer, symbols: Symbols, queries: Sequence[Pair], *, faithful: bool
) -> list[AnsweredQuery]:
    """Each query's answer, right where the entity or one of the very same title is named."""
    answered = []
    size = 1 if faithful else 32
    title_of = dict(zip(symbols.entity_ids, symbols.titles, strict=True))
    for start in tqdm(range(0, len(queries), size), desc="faithful" if faithful else "optimised", unit="batch"):
        batch = queries[start : start + size]
        pixels = [
            load_pixels(pair.image.path.read_bytes(), generative.preprocessing, max_pixels=MAX_PIXELS) for pair in batch
        ]
        found = generative.faithful(pixels[0]) if faithful else generative.optimised(np.stack(pixels))
        for pair, row in zip(batch, found.rows, strict=True):
            rank = 1 if symbols.titles[row] == title_of[pair.entity_id] else None
            answered.append(AnsweredQuery(data_split=pair.data_split, seen=pair.seen, rank=rank))
    return answered


def _retrieved(
    network: TinyLlava, symbols: Symbols, store: FeatureStore, queries: Sequence[Pair], prompt_1L: torch.Tensor,
    entities_NR: torch.Tensor,
) -> list[AnsweredQuery]:  # fmt: skip
    """What the baseline's own retrieval embedding would answer: the rank of the entity among the first ten."""
    keys = store.image_keys([pair.image for pair in queries], _unexpected, "queries")
    answered = []
    for pair, key in zip(queries, keys, strict=True):
        with torch.inference_mode():
            embedding_1R = network.retrieve(store.batch([(key, None)], torch.device("cpu")).patch_tokens_BPC, prompt_1L)
        best = (embedding_1R @ entities_NR.T)[0].topk(min(10, len(entities_NR))).indices.tolist()
        ids = [symbols.entity_ids[row] for row in best]
        rank = ids.index(pair.entity_id) + 1 if pair.entity_id in ids else None
        answered.append(AnsweredQuery(data_split=pair.data_split, seen=pair.seen, rank=rank))
    return answered


def wikiclip_answers(bundle: Path, queries: Path) -> list[AnsweredQuery]:
    """What the bundle answers to the same queries, as `wikiclip evaluate` measures it."""
    opened = Bundle.open(bundle)
    with (
        Recognizer(opened, load_settings(cache="off", device="cpu")) as recognizer,
        tempfile.TemporaryDirectory() as at,
    ):
        answered, _ = answer_queries(
            recognizer, [queries], Path(at) / "predictions.jsonl", image_root=None, batch_size=256
        )
    return answered


def run(
    build: Path, bundle: Path, settings: Settings, *, fresh: bool, faithful_queries: int | None = None
) -> dict[str, Any]:
    """Train, unless that was done with the same settings, and judge: the figures by system and kind of query."""
    encoder = load_tiny()
    store = FeatureStore(build / "features", encoder, open_text_encoder("minilm"))
    symbols = read_symbols(build, store)
    tokenizer = train_tokenizer(symbols.titles, tokens=TOKENS)
    image_token = tokenizer.token_to_id(IMAGE)
    assert image_token is not None, "it was trained with it"
    some = [(keys[0], None) for keys in symbols.training_keys if keys][:512]
    torch.manual_seed(settings.seed)
    network = TinyLlava(
        encoder, encoder.module, scale=1 / float(store.batch(some, torch.device("cpu")).patch_tokens_BPC.std()),
        image_token=image_token, vocabulary=tokenizer.get_vocab_size(),
    )  # fmt: skip
    prompt_1L = prompt(tokenizer, network.model.config.image_seq_length, QUESTION)
    kept = build / "generative.pt"
    identity = {"settings": asdict(settings), "encoder": encoder.content_hash, "titles": len(symbols.titles)}
    saved = torch.load(kept, weights_only=True) if kept.exists() and not fresh else None
    if saved is None or saved["identity"] != identity:
        started = time.perf_counter()
        loss = train(network, symbols, store, tokenizer, settings)
        saved = {
            "identity": identity, "weights": network.state_dict(), "loss": loss,
            "minutes": round((time.perf_counter() - started) / 60, 1),
        }  # fmt: skip
        with atomic_write(kept) as temporary:
            torch.save(saved, temporary)
    network.load_state_dict(saved["weights"])
    network.eval()
    entities_NR = entity_embeddings(network, symbols, store, prompt_1L)
    generative = GenerativeRecognizer(
        network.model,
        network.head,
        tokenizer,
        symbols.titles,
        entities_NR,
        preprocessing=encoder.preprocessing,
        question=QUESTION,
    )
    figures: dict[str, Any] = {}
    for kind in KINDS:
        path = build / f"queries_test_{kind}.jsonl"
        queries = [item for item in read_pairs(path) if isinstance(item, Pair)]
        systems = {
            "wikiclip": wikiclip_answers(bundle, path),
            "generative, faithful": judge(generative, symbols, _spread(queries, faithful_queries), faithful=True),
            "generative, optimised": judge(generative, symbols, queries, faithful=False),
            "generative, its retrieval alone": _retrieved(network, symbols, store, queries, prompt_1L, entities_NR),
        }
        for name, answered in systems.items():
            evaluation = summarise(answered, rejected=0)
            click.echo(f"{kind}, {name}\n{as_table(evaluation)}\n")
            figures.setdefault(name, {})[kind] = _figures(evaluation)
    return {
        "accuracy": figures,
        "entities": len(symbols.titles),
        "titles_shared": len(symbols.titles) - len(set(symbols.titles)),
        "parameters_trained": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "training_minutes": saved["minutes"],
        "last_loss": round(saved["loss"], 4),
        "training_images": sum(map(len, symbols.training_keys)),
    }


def _spread(queries: Sequence[Pair], count: int | None) -> list[Pair]:
    """So many of them, evenly spread; None for all."""
    if count is None or count >= len(queries):
        return list(queries)
    return [queries[place] for place in np.linspace(0, len(queries), count, endpoint=False).astype(int)]


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "queries": evaluation.queries,
        "seen": evaluation.seen,
        "unseen": evaluation.unseen,
        "hm": evaluation.hm,
        "intervals": evaluation.intervals,
    }


@click.command()
@click.option(
    "--build", type=click.Path(path_type=Path, file_okay=False), default=BUILD, help="Where Symbols was built."
)
@click.option("--bundle", type=click.Path(path_type=Path), default=Path("demo/bundle"), help="WikiCLIP's side.")
@click.option("--steps", default=Settings.steps, show_default=True, type=click.IntRange(min=1), help="Training steps.")
@click.option(
    "--language-steps", default=Settings.language_steps, show_default=True, type=click.IntRange(min=0),
    help="Steps on titles alone, before.",
)  # fmt: skip
@click.option("--results", type=click.Path(path_type=Path, file_okay=False), default=Path("benchmarks/results"))
@click.option("--fresh", is_flag=True, help="Train anew even if it was done.")
@click.option("--faithful", type=click.IntRange(min=1), help="Queries for the slow mode, of each kind.  [default: all]")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(min=1), help="Threads for torch.")
def main(
    build: Path,
    bundle: Path,
    steps: int,
    language_steps: int,
    results: Path,
    fresh: bool,
    faithful: int | None,
    threads: int,
) -> None:
    """Train the generative baseline on Symbols and compare its accuracy with WikiCLIP's, seen and unseen."""
    torch.set_num_threads(threads)
    settings = Settings(steps=steps, language_steps=language_steps)
    figures = run(build, bundle, settings, fresh=fresh, faithful_queries=faithful)
    outcome = {**describe_run(asdict(settings)), "figures": figures}
    path = write_results(results, "generative", outcome)
    click.echo(json.dumps(outcome))
    click.echo(f"written to {path}", err=True)


if __name__ == "__main__":
    main()
