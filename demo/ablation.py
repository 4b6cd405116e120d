"""The effect of each part of the method on Symbols: `python -m demo.ablation`, or `make ablation`.

As in the paper, an entity has one photograph, here of its first drawing. A quarter of the seen entities, which the
image encoder was trained on, is held out from the adaptor, so there are three kinds of entities (`STRATA`). Each arm
trains on cached features, with several seeds, until the accuracy on the validation drawings is flat. Test queries are
drawings of the held-out artists, searched in the whole catalog. Finished runs are lines of `runs.jsonl` and are not
repeated. Figures go to `demo/ablation.json`.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import click
import torch
from tqdm import tqdm

from core.errors import UserError
from core.files import atomic_write_bytes
from core.lines import RejectLog
from core.runtime import describe_run
from demo.build import BUILD, SPLIT_SEED, build_option, read_drawings
from model.adaptor import Adaptor, AdaptorConfig
from model.cli import PATH
from model.data import balance_pairs, known_pairs, load_entities, load_pairs
from model.encoders import open_image_encoder, open_text_encoder
from model.encoders.base import widths
from model.features import EntityKeys, FeatureStore, KeyedPair
from model.resume import FinishedRuns, fingerprint
from model.train import TrainingData, train_adaptor
from model.trainer import TrainSettings
from model.validation import right_answers

DEMO = Path(__file__).parent
KNOWN_SHARE = 0.25  # of the seen entities
STRATA = {
    "trained": "trained on",
    "known": "known to the encoder, held out from the adaptor",
    "unseen": "unseen by both",
}
_CPU = torch.device("cpu")
_VIEWS = ("clean", "photo")  # of the test drawings


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of the tables: the modalities that the adaptor sees, and how it is trained (`trained`: whether it is)."""

    name: str
    default: bool = True
    trained: bool = True
    image: bool = True
    text: bool = True
    layers: int = 2
    hard_negatives: str = "none"
    synthetic_image: str = "own"
    residual: bool = True
    start: Literal["patches", "image"] = "image"
    centre: bool = False
    unfamiliar: bool = False  # trains only on drawings by artists that the image encoder never saw


BASELINE = Arm(name="image alone, untrained", trained=False, text=False, layers=0)
ARMS = (
    BASELINE,
    Arm(name="image only", text=False),
    Arm(name="text only", image=False),
    Arm(name="ridge", layers=0),
    Arm(name="VGKA"),
    Arm(name="VGKA, both negatives", hard_negatives="both"),
    Arm(name="VGKA, clusters", default=False, hard_negatives="clusters"),
    Arm(name="VGKA, synthesis", default=False, hard_negatives="synthesis"),
    Arm(name="VGKA, both, images of others", default=False, hard_negatives="both", synthetic_image="other"),
    Arm(name="text only, ridge", default=False, image=False, layers=0),
    Arm(name="VGKA, start without text", default=False, start="patches"),
    Arm(name="VGKA, no residual", default=False, residual=False),
    Arm(name="VGKA, centred", default=False, centre=True),
    Arm(name="VGKA, unfamiliar artists", default=False, unfamiliar=True),
)


class Symbols:
    """Symbols as keys of cached features. `strata` has the stratum of each row of `entities`.

    `queries` are the test drawings, by view. `validation` are those that choose epoch and strength. The pairs
    `unfamiliar` are drawings by artists that the encoder never saw. Computes the features that the folder `cache`
    lacks. Raises `UserError` if Symbols is not built.
    """

    def __init__(self, build: Path, cache: Path, image_encoder: str, max_per_entity: int) -> None:
        if not (build / "drawings.jsonl").is_file():
            raise UserError(f"Symbols is not built in {build}; run `make symbols`, or name its folder with --build")
        cache.mkdir(parents=True, exist_ok=True)
        rejects = RejectLog(cache / "rejected.jsonl")
        store = FeatureStore(cache, open_image_encoder(image_encoder), open_text_encoder("minilm"))
        catalog = build / "catalog.jsonl"
        drawings = read_drawings(build)
        drawing_of = {str(build / drawing.image): drawing for drawing in drawings}
        records, pictured = [], set()
        for record in load_entities(catalog, None, rejects):
            pictured_by = [drawing_of[image] for image in record.images[:1]]
            pictured |= {f"{drawing.artist}:{drawing.entity_id}" for drawing in pictured_by}
            records.append(replace(record, images=tuple(str(build / drawing.photo()) for drawing in pictured_by)))
        rows = {entity.entity_id: row for row, entity in enumerate(records)}
        self.store = store
        self.entities = store.entity_keys(records, rejects.add)
        splits = {drawing.entity_id: drawing.split for drawing in drawings}
        self.strata = split_strata([splits[record.entity_id] for record in records])

        pairs = known_pairs(load_pairs(build / "pairs_train.jsonl", None, rejects), rows, catalog, rejects)
        adapt_only = {f"{d.artist}:{d.entity_id}" for d in drawings if d.role == "adapt"}
        trained, unfamiliar = [], []
        for pair in pairs:
            drawing = pair.data_id.partition(":")[2]
            if self.strata[rows[pair.entity_id]] == "trained" and drawing not in pictured:
                trained.append(pair)
                if drawing in adapt_only:
                    unfamiliar.append(pair)
        self.pairs, self.unfamiliar = (
            store.pair_keys(balance_pairs(each, max_per_entity, seed=0), rows, rejects, "query images")
            for each in (trained, unfamiliar)
        )

        def queries(part: str, view: str) -> list[KeyedPair]:
            loaded = load_pairs(build / f"queries_{part}_{view}.jsonl", None, rejects)
            keyed = store.pair_keys(loaded, rows, rejects, f"{part} images")
            return [replace(pair, seen=self.strata[pair.entity] == "trained") for pair in keyed]

        self.queries = {view: queries("test", view) for view in _VIEWS}
        self.validation = [pair for view in _VIEWS for pair in queries("val", view)]
        if rejects.count:
            raise UserError(f"{rejects.count} record(s) of Symbols cannot be used, see {rejects.path}; build it again")
        others = {
            "image": store.image_encoder.content_hash,
            "text": store.text_encoder.content_hash,
            "strata": self.strata,
        }
        self.digest = fingerprint(others, self.entities, self.pairs, self.validation, *self.queries.values())

    def query_counts(self) -> dict[str, int]:
        """Return the number of test queries of a view, by stratum."""
        of_query = [self.strata[pair.entity] for pair in self.queries["photo"]]
        return {stratum: of_query.count(stratum) for stratum in STRATA}

    def shown(self, arm: Arm) -> list[EntityKeys]:
        """Return the entities with the modalities that the arm sees."""
        return [
            EntityKeys(images=entity.images if arm.image else (), text=entity.text if arm.text else None)
            for entity in self.entities
        ]

    def training_data(self, arm: Arm, width: int) -> TrainingData:
        """Return what the arm trains on: neither held-out entities nor their texts, but for those of validation."""
        shown = self.shown(arm)
        validated = {pair.entity for pair in self.validation}
        kept = [row for row, stratum in enumerate(self.strata) if stratum == "trained" or row in validated]
        new_row = {row: number for number, row in enumerate(kept)}

        def moved(pairs: Sequence[KeyedPair]) -> list[KeyedPair]:
            return [replace(pair, entity=new_row[pair.entity]) for pair in pairs]

        return TrainingData(
            config=self.config(arm, width),
            store=self.store,
            entities=[shown[row] for row in kept],
            pairs=moved(self.unfamiliar if arm.unfamiliar else self.pairs),
            validation=moved(self.validation),
        )

    def config(self, arm: Arm, width: int) -> AdaptorConfig:
        sizes = {**widths(self.store.image_encoder, self.store.text_encoder), "width": width, "layers": arm.layers}
        return AdaptorConfig(**sizes, dropout=0.1, residual=arm.residual, start=arm.start, centre=arm.centre)

    def answered(self, arm: Arm, adaptor: Adaptor) -> dict[str, dict[str, float]]:
        """Return the share of test queries answered right, from 0 to 1: of each view, by stratum and over all."""
        (found,) = right_answers(adaptor, self.store, self.shown(arm), list(self.queries.values()), _CPU, (1.0,))
        shares: dict[str, dict[str, float]] = {}
        for (view, queries), correct_Q in zip(self.queries.items(), found, strict=True):
            of_query = [self.strata[pair.entity] for pair in queries]
            shares[view] = {
                stratum: float(correct_Q[[each == stratum for each in of_query]].mean()) for stratum in STRATA
            }
            shares[view]["all"] = float(correct_Q.mean())
        return shares


def split_strata(splits: Sequence[str]) -> list[str]:
    """Return the stratum of each entity, given its split in `drawings.jsonl`."""
    draw = random.Random(f"{SPLIT_SEED} known").random
    return [
        "unseen" if split.endswith("unseen") else "known" if draw() < KNOWN_SHARE else "trained" for split in splits
    ]


def run(arm: Arm, symbols: Symbols, settings: TrainSettings, width: int) -> dict[str, Any]:
    """Train one arm with one seed. Return its accuracies (`Symbols.answered`) and steps.

    They are those of the last epoch, whatever `wikiclip train` would keep: `kept` has that, and its accuracies.
    """
    last = Adaptor(symbols.config(arm, width)).eval()
    if not arm.trained:
        return {"accuracy": symbols.answered(arm, last), "steps": 0}
    settings = replace(settings, hard_negatives=arm.hard_negatives, synthetic_image=arm.synthetic_image)
    result = train_adaptor(symbols.training_data(arm, width), settings, device=_CPU, log=None)
    last.load_state_dict(result.last)
    return {
        "accuracy": symbols.answered(arm, last),
        "steps": result.steps,
        "text_share": result.ridge.text_share if result.ridge else None,
        "kept": {
            "epoch": result.best_epoch,
            "strength": result.strength,
            "accuracy": symbols.answered(arm, result.adaptor),
        },
        "curve": result.curve,
    }


def run_all(
    arms: Sequence[Arm], symbols: Symbols, settings: TrainSettings, width: int, seeds: int, runs: Path
) -> dict[str, list[dict[str, Any]]]:
    """Return the results of every arm with every seed, by the arm's name. Finished ones are read from `runs`."""
    finished = FinishedRuns(runs)
    results: dict[str, list[dict[str, Any]]] = {}
    plan = [(arm, seed) for seed in range(seeds) for arm in arms if arm.trained or seed == 0]
    for arm, seed in tqdm(plan, desc="runs", unit="run"):
        seeded = replace(settings, seed=seed)
        key = fingerprint({"arm": asdict(arm), "settings": asdict(seeded), "width": width, "data": symbols.digest})
        if key not in finished:
            finished.add(key, {"arm": arm.name, "seed": seed, "result": run(arm, symbols, seeded, width)})
        results.setdefault(arm.name, []).append(finished[key]["result"])
    return results


def summarise(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return top-1 in percent by view of the test drawings and arm: mean over the seeds ± standard deviation."""
    return {
        view: {
            arm: {part: _cell([100 * run["accuracy"][view][part] for run in runs]) for part in (*STRATA, "all")}
            for arm, runs in results.items()
        }
        for view in _VIEWS
    }


def _cell(percents: Sequence[float]) -> str:
    return f"{mean(percents):.1f}" + (f" ± {stdev(percents):.1f}" if len(percents) > 1 else "")


@click.command(context_settings={"show_default": True})
@click.option("--all", "every", is_flag=True, help="Run the other arms, too.")
@click.option("--arm", "only", multiple=True, type=click.Choice([arm.name for arm in ARMS]), help="Only these arms.")
@click.option("--seeds", default=3, type=click.IntRange(min=1), help="Runs of each arm.")
@click.option("--epochs", default=20, type=click.IntRange(min=1), help="Most passes over the pairs in each run.")
@click.option("--patience", default=3, type=click.IntRange(min=0), help="Epochs without a better accuracy, to stop.")
@click.option("--max-per-entity", default=2, type=click.IntRange(min=1), help="Training pairs per entity.")
@click.option("--batch-size", default=128, help="Pairs in a batch.")
@click.option("--lr", default=5e-4, help="Peak learning rate.")
@click.option("--n-sync", default=2, help="Synthetic negatives per image.")
@click.option("--width", default=128, help="Channels inside the adaptor.")
@click.option("--image-encoder", default="tiny", help="tiny, onnx:PATH or hf:ID_OR_PATH.")
@build_option
@click.option("--work", type=PATH, default=BUILD / "ablation", help="Folder of cached features and finished runs.")
@click.option("--out", type=PATH, default=DEMO / "ablation.json", help="Figures, JSON.")
def main(
    every: bool, only: tuple[str, ...], seeds: int, max_per_entity: int, width: int, image_encoder: str,
    build: Path, work: Path, out: Path, **training: Any,
) -> None:  # fmt: skip
    """Train every arm on Symbols, measure it and write the figures. An interrupted command resumes."""
    settings = TrainSettings(**training, cluster_size=training["batch_size"] // 4)
    symbols = Symbols(build, work, image_encoder, max_per_entity)
    arms = [arm for arm in ARMS if (symbols.unfamiliar or not arm.unfamiliar)]
    arms = [arm for arm in arms if (arm.name in only if only else every or arm.default)]
    results = run_all(arms, symbols, settings, width, seeds, work / "runs.jsonl")
    described = describe_run(
        {**asdict(settings), "seeds": seeds, "max_per_entity": max_per_entity, "width": width,
         "image_encoder": image_encoder.partition(":")[0], "pairs": len(symbols.pairs),
         "unfamiliar_pairs": len(symbols.unfamiliar), "queries": symbols.query_counts(), "data": symbols.digest}
    )  # fmt: skip
    figures = {**described, "summary": summarise(results), "arms": results}
    atomic_write_bytes(out, (json.dumps(figures, indent=1) + "\n").encode())
    click.echo(f"written to {out}")


if __name__ == "__main__":
    main()
