"""The effect of each part of the method on Symbols: `python -m demo.ablation`, or `make ablation`.

Each arm trains small adaptors on cached features, with several seeds, and is measured on the held-out artists' drawings
over the whole catalog. Finished runs are lines of `runs.jsonl` and are not repeated. Figures go to `demo/ablation.json`
and, as a table, into `docs/ablation.md`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch
from tqdm import tqdm

from core.errors import UserError
from core.files import atomic_write_bytes
from core.jsonl import RejectLog
from core.markdown import fill_in
from core.runtime import describe_run
from demo.build import BUILD, build_option, read_drawings
from model.adaptor import Adaptor, AdaptorConfig
from model.cli import PATH
from model.data import Pair, balance_pairs, known_pairs, load_entities, load_pairs
from model.encoders import open_image_encoder, open_text_encoder
from model.encoders.base import widths
from model.features import EntityKeys, FeatureStore, KeyedPair
from model.resume import fingerprint
from model.train import TrainingData, train_adaptor
from model.trainer import TrainSettings
from model.validation import validate

DEMO = Path(__file__).parent
PAGE = DEMO.parent / "docs" / "ablation.md"
_CPU = torch.device("cpu")
_VIEWS = ("clean", "photo")  # of the test drawings


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of the table: the modalities that the adaptor sees, and how it is trained."""

    name: str
    paper: float | None = None  # overall accuracy in percent: InfoSeek, knowledge base of 100 k
    trained: bool = True
    image: bool = True
    text: bool = True
    hard_negatives: str = "none"
    residual: bool = True
    centre: bool = False
    unfamiliar: bool = False  # trains only on drawings by artists that the image encoder never saw


ARMS = (
    Arm(name="mean patch token, untrained", trained=False, text=False),
    Arm(name="image only", paper=44.8, text=False),
    Arm(name="text only", paper=50.8, image=False),
    Arm(name="image and text (VGKA)", paper=59.7),
    Arm(name="VGKA, clusters", paper=59.7, hard_negatives="clusters"),
    Arm(name="VGKA, synthesis", paper=58.9, hard_negatives="synthesis"),
    Arm(name="VGKA, both", paper=61.2, hard_negatives="both"),
    Arm(name="VGKA, no residual", residual=False),
    Arm(name="VGKA, centred", centre=True),
    Arm(name="VGKA, unfamiliar artists", unfamiliar=True),
)


class Symbols:
    """Symbols as keys of cached features. The pairs `unfamiliar` are drawings by artists that the encoder never saw.

    Computes the features that the folder `cache` lacks. Raises `UserError` if Symbols is not built.
    """

    def __init__(self, build: Path, cache: Path, image_encoder: str, max_per_entity: int) -> None:
        if not (build / "drawings.jsonl").is_file():
            raise UserError(f"Symbols is not built in {build}; run `make symbols`, or name its folder with --build")
        cache.mkdir(parents=True, exist_ok=True)
        rejects = RejectLog(cache / "rejected.jsonl")
        store = FeatureStore(cache, open_image_encoder(image_encoder), open_text_encoder("minilm"))
        catalog = build / "catalog.jsonl"
        records = load_entities(catalog, None, rejects)
        rows = {entity.entity_id: row for row, entity in enumerate(records)}
        self.store = store
        self.entities = store.entity_keys(records, rejects.add)

        def training(pairs: Sequence[Pair]) -> list[KeyedPair]:
            return store.pair_keys(balance_pairs(pairs, max_per_entity, seed=0), rows, rejects, "query images")

        labelled = known_pairs(load_pairs(build / "pairs_train.jsonl", None, rejects), rows, catalog, rejects)
        adapt_only = {f"{d.artist}:{d.entity_id}" for d in read_drawings(build) if d.role == "adapt"}
        unfamiliar = [pair for pair in labelled if pair.data_id.partition(":")[2] in adapt_only]
        self.pairs, self.unfamiliar = training(labelled), training(unfamiliar)
        self.queries = []  # test drawings, one set for each of _VIEWS
        for view in _VIEWS:
            pairs = load_pairs(build / f"queries_test_{view}.jsonl", None, rejects)
            self.queries.append(store.pair_keys(pairs, rows, rejects, "test images"))
        if rejects.count:
            raise UserError(f"{rejects.count} record(s) of Symbols cannot be used, see {rejects.path}; build it again")
        encoders = {"image": store.image_encoder.content_hash, "text": store.text_encoder.content_hash}
        self.digest = fingerprint(encoders, self.entities, self.pairs, *self.queries)


def run(arm: Arm, symbols: Symbols, settings: TrainSettings, width: int) -> dict[str, Any]:
    """Train one arm with one seed. Return seen, unseen and HM from 0 to 1, for each view of the test drawings.

    It measures the adaptor of the last epoch, so nothing is selected by accuracy.
    """
    store = symbols.store
    sizes = {**widths(store.image_encoder, store.text_encoder), "width": width}
    config = AdaptorConfig(**sizes, dropout=0.1, residual=arm.residual, centre=arm.centre)
    entities = [
        EntityKeys(images=entity.images if arm.image else (), text=entity.text if arm.text else None)
        for entity in symbols.entities
    ]
    if arm.trained:
        pairs = symbols.unfamiliar if arm.unfamiliar else symbols.pairs
        # Every arm takes the same number of steps.
        epochs = max(1, round(settings.epochs * len(symbols.pairs) / len(pairs)))
        settings = replace(settings, epochs=epochs, hard_negatives=arm.hard_negatives)
        data = TrainingData(config=config, store=store, entities=entities, pairs=pairs)
        adaptor = train_adaptor(data, settings, device=_CPU, log=None).adaptor
    else:
        adaptor = Adaptor(config).eval()  # its output is the residual, the mean patch token
    accuracies = validate(adaptor, store, entities, symbols.queries, _CPU)
    return {view: asdict(accuracy) for view, accuracy in zip(_VIEWS, accuracies, strict=True)}


def run_all(
    arms: Sequence[Arm], symbols: Symbols, settings: TrainSettings, width: int, seeds: int, runs: Path
) -> dict[str, list[dict[str, Any]]]:
    """Return the results of every arm with every seed, by the arm's name. Finished ones are read from `runs`."""
    rows = [json.loads(line) for line in runs.read_bytes().splitlines()] if runs.exists() else []
    finished = {row["run"]: row["accuracy"] for row in rows}
    results: dict[str, list[dict[str, Any]]] = {}
    plan = [(arm, seed) for seed in range(seeds) for arm in arms if arm.trained or seed == 0]
    for arm, seed in tqdm(plan, desc="runs", unit="run"):
        seeded = replace(settings, seed=seed)
        key = fingerprint({"arm": asdict(arm), "settings": asdict(seeded), "width": width, "data": symbols.digest})
        if key not in finished:
            finished[key] = run(arm, symbols, seeded, width)
            rows.append({"run": key, "arm": arm.name, "seed": seed, "accuracy": finished[key]})
            atomic_write_bytes(runs, "".join(json.dumps(row) + "\n" for row in rows).encode())
        results.setdefault(arm.name, []).append(finished[key])
    return results


def table(figures: dict[str, Any]) -> str:
    """Return the figures as Markdown: top-1 in percent, mean over the seeds ± standard deviation, one arm per line."""
    lines = [
        "| entity side | clean: seen | unseen | HM | photographed: seen | unseen | HM | paper |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    paper = {arm.name: arm.paper for arm in ARMS}
    for name, runs in figures["arms"].items():
        cells = [_cell([run[view][part] for run in runs]) for view in _VIEWS for part in ("seen", "unseen", "hm")]
        reported = paper.get(name)
        lines.append(f"| {name} | {' | '.join(cells)} | {'' if reported is None else reported} |")
    settings = figures["settings"]
    lines += [
        "",
        f"{settings['seeds']} seed(s), {settings['epochs']} epoch(s) of {settings['pairs']} pairs in batches of "
        f"{settings['batch_size']}, n-sync {settings['n_sync']}, learning rate {settings['lr']}, width "
        f"{settings['width']}; {figures['hardware']['name']}, {figures['date']}.",
    ]
    return "\n".join(lines)


def _cell(shares: Sequence[float]) -> str:
    percent = [100 * share for share in shares]
    return f"{mean(percent):.1f}" + (f" ± {stdev(percent):.1f}" if len(percent) > 1 else "")


@click.command(context_settings={"show_default": True})
@click.option("--arm", "only", multiple=True, type=click.Choice([arm.name for arm in ARMS]), help="Only these arms.")
@click.option("--seeds", default=3, type=click.IntRange(min=1), help="Runs of each arm.")
@click.option("--epochs", default=3, type=click.IntRange(min=1), help="Passes over the pairs in each run.")
@click.option("--max-per-entity", default=2, type=click.IntRange(min=1), help="Training pairs per entity.")
@click.option("--batch-size", default=128, help="Pairs in a batch.")
@click.option("--lr", default=5e-4, help="Peak learning rate.")
@click.option("--n-sync", default=2, help="Synthetic negatives per image.")
@click.option("--width", default=128, help="Channels inside the adaptor.")
@click.option("--image-encoder", default="tiny", help="tiny, onnx:PATH or hf:ID_OR_PATH.")
@build_option
@click.option("--work", type=PATH, default=BUILD / "ablation", help="Folder of cached features and finished runs.")
@click.option("--out", type=PATH, default=DEMO / "ablation.json", help="Figures, JSON.")
@click.option("--page", type=PATH, default=PAGE, help="Page whose table is replaced.")
def main(
    only: tuple[str, ...], seeds: int, max_per_entity: int, width: int, image_encoder: str,
    build: Path, work: Path, out: Path, page: Path, **training: Any,
) -> None:  # fmt: skip
    """Train every arm on Symbols, measure it and write the figures. An interrupted command resumes."""
    settings = TrainSettings(**training, cluster_size=training["batch_size"] // 4, modality_dropout=0.1)
    symbols = Symbols(build, work, image_encoder, max_per_entity)
    arms = [arm for arm in ARMS if (symbols.unfamiliar or not arm.unfamiliar) and (not only or arm.name in only)]
    results = run_all(arms, symbols, settings, width, seeds, work / "runs.jsonl")
    described = describe_run(
        {**asdict(settings), "seeds": seeds, "max_per_entity": max_per_entity, "width": width,
         "image_encoder": image_encoder.partition(":")[0], "pairs": len(symbols.pairs),
         "unfamiliar_pairs": len(symbols.unfamiliar), "data": symbols.digest}
    )  # fmt: skip
    figures = {**described, "arms": results}
    atomic_write_bytes(out, (json.dumps(figures, indent=1) + "\n").encode())
    fill_in(page, "ablation", table(figures))
    click.echo(table(figures))


if __name__ == "__main__":
    main()
