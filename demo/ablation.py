"""What each part of the method brings on Symbols: `python -m demo.ablation`, or `make ablation`.

Trains small adaptors on cached features, each arm with several seeds, and measures them on the held-out drawings over
the whole catalog. A finished run is a line of `runs.jsonl` and is not done again; the figures go to
`demo/ablation.json`, and as a table into `docs/ablation.md`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tqdm import tqdm

from core.errors import UserError
from core.files import atomic_write_bytes
from core.jsonl import RejectLog
from core.runtime import describe_run
from demo.ablation_reasons import reasons
from demo.ablation_table import ARMS, Arm, fill_in, table
from demo.build import BUILD, read_drawings
from model.adaptor import Adaptor, AdaptorConfig
from model.data import Pair, balance_pairs, known_pairs, load_entities, load_pairs
from model.encoders import open_image_encoder, open_text_encoder
from model.features import EntityKeys, FeatureStore, TrainingPair
from model.resume import fingerprint
from model.train import train_adaptor
from model.trainer import TrainSettings
from model.validation import ValidationSet, validate_each

DEMO = Path(__file__).parent
PAGE = DEMO.parent / "docs" / "ablation.md"
_CPU = torch.device("cpu")
_HOW = ("clean", "photo")


@dataclass(frozen=True, kw_only=True)
class Symbols:
    """Symbols as keys of cached features. `pairs` may be by any artist, `unfamiliar` only by such as the encoder never
    saw; `digest` says what all of it is.
    """

    store: FeatureStore
    entities: list[EntityKeys]
    pairs: list[TrainingPair]
    unfamiliar: list[TrainingPair]
    drawings: list[TrainingPair]  # clean ones to train on, by artists that the encoder was trained on
    unfamiliar_drawings: list[TrainingPair]
    queries: list[ValidationSet]  # test drawings, clean and photographed
    digest: str


def load_symbols(
    build: Path, cache: Path, *, image_encoder: str, text_encoder: str, max_per_entity: int, max_tokens: int = 256
) -> Symbols:
    """Read Symbols and compute the features that `cache` lacks. Raises `UserError` where Symbols is not built."""
    if not (build / "drawings.jsonl").is_file():
        raise UserError(f"Symbols is not built in {build}; run `make symbols`, or name its folder with --build")
    cache.mkdir(parents=True, exist_ok=True)
    rejects = RejectLog(cache / "rejected.jsonl")
    store = FeatureStore(
        cache, open_image_encoder(image_encoder), open_text_encoder(text_encoder, max_tokens=max_tokens)
    )
    catalog = build / "catalog.jsonl"
    records = load_entities(catalog, None, rejects)
    rows = {entity.entity_id: row for row, entity in enumerate(records)}
    entities = store.entity_keys(records, rejects.add)

    def keyed(pairs: Sequence[Pair], what: str) -> list[tuple[Pair, bytes]]:
        keys = store.image_keys([pair.image for pair in pairs], rejects.add, what)
        return [(pair, key) for pair, key in zip(pairs, keys, strict=True) if key is not None]

    def training(pairs: Sequence[Pair]) -> list[TrainingPair]:
        few = balance_pairs(pairs, max_per_entity, seed=0) if pairs else []
        return [TrainingPair(query=key, entity=rows[pair.entity_id]) for pair, key in keyed(few, "query images")]

    labelled = known_pairs(load_pairs(build / "pairs_train.jsonl", None, rejects), records, catalog, rejects)
    unfamiliar = {(d.artist, d.entity_id) for d in read_drawings(build) if d.role == "adapt"}
    queries = []
    for how in _HOW:
        asked = keyed(load_pairs(build / f"queries_test_{how}.jsonl", None, rejects), "test images")
        queries.append(
            ValidationSet(
                query_embeddings_QD=store.query_embeddings([key for _, key in asked]),
                entity_Q=np.array([rows[pair.entity_id] for pair, _ in asked], np.int64),
                seen_Q=[pair.seen for pair, _ in asked],
            )
        )
    pairs = training(labelled)
    clean = [pair for pair in labelled if pair.data_id.startswith("clean:")]
    if rejects.count:
        raise UserError(f"{rejects.count} record(s) of Symbols cannot be used, see {rejects.path}; build it anew")

    encoders = {"image": store.image_encoder.content_hash, "text": store.text_encoder.content_hash}
    return Symbols(
        store=store,
        entities=entities,
        pairs=pairs,
        unfamiliar=training([pair for pair in labelled if _drawn(pair) in unfamiliar]),
        drawings=training([pair for pair in clean if _drawn(pair) not in unfamiliar]),
        unfamiliar_drawings=training([pair for pair in clean if _drawn(pair) in unfamiliar]),
        queries=queries,
        digest=fingerprint(encoders, entities, pairs, queries),
    )


def _drawn(pair: Pair) -> tuple[str, str]:
    """Artist and entity of a pair of Symbols: `clean:ARTIST:ENTITY_ID`."""
    _, artist, entity_id = pair.data_id.split(":", 2)
    return artist, entity_id


def run(arm: Arm, symbols: Symbols, settings: TrainSettings, width: int) -> dict[str, Any]:
    """Train one arm with one seed; seen, unseen and HM from 0 to 1, by how the queries were made.

    The adaptor of the last epoch counts: nothing is chosen by accuracy.
    """
    store = symbols.store
    config = AdaptorConfig(
        patch_dim=store.image_encoder.patch_dim,
        text_dim=store.text_encoder.dim,
        embedding_dim=store.image_encoder.embedding_dim,
        width=width,
        dropout=0.1,
        residual=arm.residual,
        centre=arm.centre,
    )
    entities = [
        EntityKeys(images=entity.images if arm.image else (), text=entity.text if arm.text else None)
        for entity in symbols.entities
    ]
    if arm.trained:
        pairs = symbols.unfamiliar if arm.unfamiliar else symbols.pairs
        # As many steps on few pairs as on many.
        epochs = max(1, round(settings.epochs * len(symbols.pairs) / len(pairs)))
        settings = replace(settings, epochs=epochs, hard_negatives=arm.hard_negatives)
        adaptor = train_adaptor(
            config, settings, store, entities, pairs, validation=None, device=_CPU, log=lambda row: None
        ).adaptor
    else:
        adaptor = Adaptor(config).eval()  # the residual's start: the mean patch token, whatever the weights
    accuracies = validate_each(adaptor, store, entities, symbols.queries, _CPU)
    return {how: accuracy.to_dict() for how, accuracy in zip(_HOW, accuracies, strict=True)}


def run_all(
    arms: Sequence[Arm], symbols: Symbols, settings: TrainSettings, width: int, seeds: int, done: Path
) -> dict[str, list[dict[str, Any]]]:
    """Every arm with every seed, by the arm's name; runs that stand in the file `done` are taken from there."""
    finished = {}
    if done.exists():
        for line in done.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            finished[row["run"]] = row["accuracy"]
    results: dict[str, list[dict[str, Any]]] = {}
    plan = [(arm, seed) for seed in range(seeds) for arm in arms if arm.trained or seed == 0]
    for arm, seed in tqdm(plan, desc="runs", unit="run"):
        own = replace(settings, seed=seed)
        # Named by all that the result depends on.
        key = fingerprint({"arm": arm.key(), "settings": own.to_dict(), "width": width, "data": symbols.digest})
        if key not in finished:
            finished[key] = run(arm, symbols, own, width)
            line = json.dumps({"run": key, "arm": arm.name, "seed": seed, "accuracy": finished[key]})
            earlier = done.read_bytes() if done.exists() else b""
            atomic_write_bytes(done, earlier + line.encode() + b"\n")
        results.setdefault(arm.name, []).append(finished[key])
    return results


@click.command(context_settings={"show_default": True})
@click.option("--arm", "only", multiple=True, type=click.Choice([arm.name for arm in ARMS]), help="Only these arms.")
@click.option("--seeds", default=3, type=click.IntRange(min=1), help="Runs of each arm.")
@click.option("--epochs", default=3, type=click.IntRange(min=1), help="Passes over the pairs in each run.")
@click.option("--max-per-entity", default=2, type=click.IntRange(min=1), help="Pairs of an entity that are trained on.")
@click.option("--batch-size", default=128, help="Pairs in a batch.")
@click.option("--lr", default=5e-4, help="Highest learning rate.")
@click.option("--n-sync", default=2, help="Texts that each image is read with for synthetic negatives.")
@click.option("--width", default=128, help="Channels inside the adaptor.")
@click.option("--image-encoder", default="tiny", help="tiny, onnx:PATH or hf:ID_OR_PATH.")
@click.option(
    "--build", type=click.Path(path_type=Path, file_okay=False), default=BUILD, help="Where Symbols was built."
)
@click.option(
    "--work", type=click.Path(path_type=Path, file_okay=False), default=BUILD / "ablation",
    help="Folder of cached features and finished runs.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=DEMO / "ablation.json", help="Figures, JSON."
)
@click.option(
    "--page", type=click.Path(path_type=Path, dir_okay=False, exists=True), default=PAGE,
    help="Page whose table is replaced.",
)  # fmt: skip
def main(
    only: tuple[str, ...],
    seeds: int,
    epochs: int,
    max_per_entity: int,
    batch_size: int,
    lr: float,
    n_sync: int,
    width: int,
    image_encoder: str,
    build: Path,
    work: Path,
    out: Path,
    page: Path,
) -> None:
    """Train every arm on Symbols, measure it, and write the figures; cut off, it goes on where it was."""
    settings = TrainSettings(
        epochs=epochs, batch_size=batch_size, lr=lr, n_sync=n_sync, cluster_size=batch_size // 4, modality_dropout=0.1
    )
    symbols = load_symbols(
        build, work, image_encoder=image_encoder, text_encoder="minilm", max_per_entity=max_per_entity
    )
    arms = [arm for arm in ARMS if (symbols.unfamiliar or not arm.unfamiliar) and (not only or arm.name in only)]
    results = run_all(arms, symbols, settings, width, seeds, work / "runs.jsonl")
    described = describe_run(
        {**asdict(settings), "seeds": seeds, "max_per_entity": max_per_entity, "width": width,
         "image_encoder": image_encoder.partition(":")[0], "pairs": len(symbols.pairs),
         "unfamiliar_pairs": len(symbols.unfamiliar), "data": symbols.digest}
    )  # fmt: skip
    why = reasons(symbols.store, symbols.entities, symbols.drawings, symbols.unfamiliar_drawings, symbols.queries[0])
    figures = {**described, "arms": results, "reasons": why}
    atomic_write_bytes(out, (json.dumps(figures, indent=1) + "\n").encode())
    atomic_write_bytes(page, fill_in(page.read_text(encoding="utf-8"), table(figures)).encode())
    click.echo(table(figures))


if __name__ == "__main__":
    main()
