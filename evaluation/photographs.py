"""Accuracy on photographs, without training and with each part of the method: `make photographs PHOTOS=FOLDER`.

The folder has `entities.jsonl`: entities with one photograph, or with five and more. Those with five are split into
folds, and each fold is unseen once. Photograph 0 is the entity's image, 1 and 2 are training pairs of seen entities.
Queries are 3 and 4 of seen entities and 1 to 4 of unseen ones. Training has a catalog without the unseen entities. Two
catalogs are searched: the entities with five photographs (`small`), and all (`full`).

Every arm runs `wikiclip train` and `wikiclip export` with their defaults (but `_NEGATIVES`), and the recogniser of
`wikiclip evaluate`. The handicap of memory is chosen on queries of the other half of the entities (`split_queries`).
Finished runs are lines of `runs.jsonl` in the work folder and are not repeated.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import click

from catalog import EntityRecord, read_catalog
from catalog.formats import write_catalog
from core.errors import UserError
from core.files import atomic_write_bytes
from core.lines import to_jsonl
from core.runtime import describe_run
from core.statistics import wilson_interval
from evaluation.evaluate import answer_queries, without
from evaluation.metrics import ratio_interval
from index.bundle import Bundle
from service.recognizer import Recognizer
from service.settings import Settings
from wikiclip.answers import Embedding
from wikiclip.cli import load, run

ROOT = Path(__file__).parents[1]
_PATH = click.Path(path_type=Path)
PHOTOGRAPHS = 5
_TRAINING, _SEEN_QUERIES, _UNSEEN_QUERIES = (1, 2), (3, 4), (1, 2, 3, 4)

Searched = Literal["small", "full"]
SEARCHED: tuple[Searched, ...] = ("small", "full")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A row of the table: the flags of `wikiclip train` (None: no training), and whether the export remembers pairs."""

    name: str
    training: tuple[str, ...] | None = ()
    remember: bool = False


_NEGATIVES = ("--hard-negatives", "both", "--n-sync", "2")  # 8, the default, takes three times as long
BASELINE = Arm(name="image alone", training=None)
ARMS = (
    BASELINE,
    Arm(name="ridge", training=("--adaptor", "ridge")),
    Arm(name="VGKA"),
    Arm(name="VGKA, negatives", training=_NEGATIVES),
    Arm(name="VGKA, negatives, memory", training=_NEGATIVES, remember=True),
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The ranks of a query's entity in both searches, None below the tenth. `photograph` is its number, from 0."""

    entity_id: str
    photograph: int
    seen: bool
    small: int | None
    full: int | None

    def query(self) -> tuple[str, int]:
        return self.entity_id, self.photograph

    def is_within(self, k: int, searched: Searched) -> bool:
        rank: int | None = getattr(self, searched)
        return rank is not None and rank <= k


# ---- the photographs ----


class Photographs:
    """The entities of the folder, each with its photographs. `queried` are the ids of those with five, in order."""

    def __init__(self, folder: Path) -> None:
        """Raise `CatalogError` if `entities.jsonl` cannot be read, `UserError` if it has a bad record."""
        path = folder.resolve() / "entities.jsonl"
        self.records: dict[str, EntityRecord] = {}
        for item in read_catalog(path):
            if not isinstance(item, EntityRecord):
                raise UserError(f"{path}, line {item.line}: {item.reason}")
            self.records[item.entity_id] = item
        self.queried = [each.entity_id for each in self.records.values() if len(each.images) >= PHOTOGRAPHS]
        digest = hashlib.sha256(path.read_bytes())
        for record in self.records.values():
            for image in record.images[: PHOTOGRAPHS if record.entity_id in self.queried else 1]:
                try:
                    digest.update(Path(image).read_bytes())
                except OSError as error:
                    raise UserError(f"{path}, line {record.line}: {image} cannot be read: {error.strerror}") from None
        self.digest = digest.hexdigest()

    def write_catalog(self, path: Path, without: frozenset[str] = frozenset()) -> None:
        """Write all other entities with their first photograph."""
        records = (record for entity_id, record in self.records.items() if entity_id not in without)
        write_catalog(path, (replace(record, images=record.images[:1]) for record in records))

    def pairs(self, unseen: frozenset[str]) -> Iterator[dict[str, str]]:
        """Yield the rows of the training pairs."""
        for entity_id in self.queried:
            if entity_id not in unseen:
                yield from self._rows(entity_id, _TRAINING, "train_seen")

    def queries(self, unseen: frozenset[str]) -> Iterator[dict[str, str]]:
        """Yield the rows of the queries."""
        for entity_id in self.queried:
            if entity_id in unseen:
                yield from self._rows(entity_id, _UNSEEN_QUERIES, "test_unseen")
            else:
                yield from self._rows(entity_id, _SEEN_QUERIES, "test_seen")

    def _rows(self, entity_id: str, photographs: Iterable[int], split: str) -> Iterator[dict[str, str]]:
        for number in photographs:
            image = self.records[entity_id].images[number]
            yield {"data_id": f"{entity_id}:{number}", "image": image, "entity_id": entity_id, "data_split": split}


def split_folds(entity_ids: Sequence[str], folds: int) -> list[frozenset[str]]:
    """Return the unseen entities of each fold. Neighbours, which may be alike, are in different folds.

    Raise `UserError` if there are fewer entities than folds.
    """
    if len(entity_ids) < folds:
        raise UserError(
            f"{len(entity_ids)} entities have {PHOTOGRAPHS} photographs, too few for {folds} folds; add photographs, "
            "or lower --folds"
        )
    return [frozenset(entity_ids[fold::folds]) for fold in range(folds)]


def split_queries(
    queries: Sequence[dict[str, str]], unseen: frozenset[str]
) -> list[tuple[list[dict[str, str]], list[dict[str, str]]]]:
    """Return each half of the queries with the other half, to validate on. An entity's queries are in one half."""
    entity_ids = sorted({row["entity_id"] for row in queries}, key=lambda entity_id: (entity_id in unseen, entity_id))
    first = frozenset(entity_ids[::2])
    halves = [[row for row in queries if (row["entity_id"] in first) is half] for half in (True, False)]
    return [(halves[0], halves[1]), (halves[1], halves[0])]


# ---- figures ----


def pool(answers: Sequence[Answer], baseline: Sequence[Answer], searched: Searched) -> dict[str, Any]:
    """Return the accuracies of seen and unseen entities in percent, and their ratios to the baseline's.

    Both have the answers to the same queries, in the same order. A seen entity's query is asked in several folds, with
    answers that depend on each other. So Wilson's intervals count each picture once, and those of ratios resample
    entities. A ratio is None where the baseline has nothing right, and its interval where it has no upper bound.
    """
    pooled = {}
    for part, seen in (("seen", True), ("unseen", False)):
        own, others = ([each for each in some if each.seen is seen] for some in (answers, baseline))
        right, others_right = ([each.is_within(1, searched) for each in some] for some in (own, others))
        pictures = len({each.query() for each in own})
        low, high = wilson_interval(sum(right) / len(right) * pictures, pictures)
        interval = ratio_interval(right, others_right, [each.entity_id for each in own])
        pooled[part] = {
            "answers": len(own),
            "pictures": pictures,
            "top_1": _percent(right),
            "interval": (round(100 * low, 2), round(100 * high, 2)),
            "recall_at_5": _percent([each.is_within(5, searched) for each in own]),
            "ratio": round(sum(right) / sum(others_right), 3) if any(others_right) else None,
            "ratio_interval": None if interval is None else (round(interval[0], 3), round(interval[1], 3)),
        }
    return pooled


def _percent(flags: Sequence[bool]) -> float:
    return round(100 * sum(flags) / len(flags), 2)


# ---- runs ----


class Runs:
    """The runs of one encoder. `features` has cached features, and `folder` is for what only these runs need."""

    def __init__(self, photographs: Photographs, spec: str, features: Path, folder: Path, *, smoke: bool) -> None:
        self._photographs = photographs
        self._spec = spec
        self._features = features
        self._smoke = smoke
        self._catalog, self._image_bundle = folder / "catalog.jsonl", folder / "image"
        self._embeddings: dict[str, Sequence[float]] = {}  # by image
        photographs.write_catalog(self._catalog)

    def begin_fold(self, unseen: frozenset[str], folder: Path) -> None:
        """Let the next runs be of this fold. `folder` is for what only these need."""
        self._fold, self._pairs = folder, folder / "pairs.jsonl"
        self._photographs.write_catalog(folder / "training.jsonl", without=unseen)
        self._pairs.write_bytes(to_jsonl(self._photographs.pairs(unseen)))
        self._unseen, self._queries = unseen, list(self._photographs.queries(unseen))

    def run(self, arm: Arm) -> dict[str, Any]:
        """Return the arm's answers, how long each step took, and what the steps chose.

        Arms with the same training share a checkpoint, and the bundle without memory is the base of that with it.
        """
        seconds: dict[str, float] = defaultdict(float)
        chosen: dict[str, Any] = {}
        answers: list[Answer] = []
        base, flags = self._image_bundle, ["--image-encoder", self._spec]
        if arm.training is not None:
            checkpoint, base = (self._fold / " ".join([name, *arm.training]) for name in ("checkpoint", "bundle"))
            flags = ["--checkpoint", str(checkpoint)]
            if not checkpoint.exists():
                with _timed(seconds, "train"):
                    chosen |= self._train(arm.training, checkpoint)
        for asked, validation in split_queries(self._queries, self._unseen) if arm.remember else [(self._queries, [])]:
            bundle, memory = base, list[str | Path]()
            if arm.remember:
                bundle, queries = self._fold / f"memory {len(answers)}", self._fold / "validation.jsonl"
                queries.write_bytes(to_jsonl(validation))
                memory = ["--remember", self._pairs, "--validation", queries]
                memory += ["--base", base] if base.exists() else []
            if not bundle.exists():
                with _timed(seconds, "export"):
                    summary = _command("export", "--catalog", self._catalog, "--out", bundle, "--json", *flags, *memory)
                if arm.remember:
                    chosen.setdefault("remembered", []).append(summary["remembered"])
            with _timed(seconds, "evaluate"):
                answers += self._answer(bundle, asked)
        return {
            "seconds": {step: round(each, 1) for step, each in seconds.items()},
            "chosen": chosen,
            "answers": [asdict(answer) for answer in sorted(answers, key=Answer.query)],
        }

    def _train(self, flags: Sequence[str], out: Path) -> dict[str, Any]:
        """Train an adaptor. Return what the training chose."""
        report = _command(
            "train", "--catalog", self._fold / "training.jsonl", "--pairs", self._pairs, "--catalog-pairs",
            "--image-encoder", self._spec, "--text-encoder", "minilm", "--cache-dir", self._features, "--out", out,
            "--json", *flags, *(["--epochs", "1"] if self._smoke else []),
        )  # fmt: skip
        text_share = (report.get("ridge") or {}).get("text_share")
        return {"text_share": text_share, **{name: report.get(name) for name in ("best_epoch", "strength")}}

    def _answer(self, path: Path, rows: Sequence[Mapping[str, str]]) -> list[Answer]:
        """Answer queries in both catalogs."""
        bundle = Bundle.open(path)
        queries = self._fold / "queries.jsonl"
        queries.write_bytes(to_jsonl(self._embed(bundle, rows)))
        with bundle.store() as store:
            ids = [each.entity_id for each in store.by_rows(range(len(store)))]
        singles = frozenset(row for row, entity_id in enumerate(ids) if entity_id not in set(self._photographs.queried))
        ranks: dict[str, list[int | None]] = {}
        for searched, held_out in zip(SEARCHED, (singles, frozenset[int]()), strict=True):
            with Recognizer(without(bundle, held_out), Settings(cache="off")) as recognizer:
                answered, _ = answer_queries(
                    recognizer, [queries], queries.with_name("predictions.jsonl"), image_root=None, batch_size=64
                )
            ranks[searched] = [each.rank for each in answered]
        return [
            Answer(
                entity_id=row["entity_id"],
                photograph=int(row["data_id"].rpartition(":")[2]),
                seen=row["data_split"] == "test_seen",
                small=small,
                full=full,
            )
            for row, small, full in zip(rows, ranks["small"], ranks["full"], strict=True)
        ]

    def _embed(self, bundle: Bundle, rows: Sequence[Mapping[str, str]]) -> Iterator[dict[str, Any]]:
        """Yield queries with the embedding of each image, which all bundles share. Raise `UserError` without one."""
        new = [row["image"] for row in rows if row["image"] not in self._embeddings]
        if new:
            with Recognizer(bundle, Settings(cache="off")) as recognizer:
                embeddings = recognizer.embed_many([Path(image).read_bytes() for image in new])
            for image, found in zip(new, embeddings, strict=True):
                if not isinstance(found, Embedding):
                    raise UserError(f"{image} cannot be used: {found.detail}")
                self._embeddings[image] = found.embedding
        for row in rows:
            query = {name: value for name, value in row.items() if name != "image"}
            yield {**query, "embedding": self._embeddings[row["image"]]}


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[step] += time.perf_counter() - started


def _command(name: str, *arguments: str | Path) -> dict[str, Any]:
    """Run a command of `wikiclip` in this process and return the JSON object that it prints."""
    with redirect_stdout(io.StringIO()) as output:
        load(name).main([str(argument) for argument in arguments], standalone_mode=False)
    report: dict[str, Any] = json.loads(output.getvalue().splitlines()[-1])
    return report


@click.command(context_settings={"show_default": True})
@click.option(
    "--photos", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True,
    help="Folder of the photographs, with entities.jsonl.",
)  # fmt: skip
@click.option("--encoder", "specs", multiple=True, default=["photo"], help="Image encoder; may be given several times.")
@click.option("--arm", "only", multiple=True, type=click.Choice([arm.name for arm in ARMS]), help="Only these arms.")
@click.option("--folds", default=5, type=click.IntRange(min=2), help="Parts of the entities; each is unseen once.")
@click.option(
    "--work", type=_PATH, default=ROOT / "build" / "photographs", help="Folder of features and finished runs."
)
@click.option("--out", type=_PATH, default=ROOT / "evaluation" / "photographs.json", help="Figures, JSON.")
@click.option("--smoke", is_flag=True, help="Run one fold with one epoch, and write WORK/smoke.json instead.")
def main(
    photos: Path,
    specs: tuple[str, ...],
    only: tuple[str, ...],
    folds: int,
    work: Path,
    out: Path,
    smoke: bool,
) -> None:
    """Measure every arm on photographs, and write the figures. An interrupted command resumes."""
    photographs = Photographs(photos)
    unseen = split_folds(photographs.queried, folds)[: 1 if smoke else None]
    arms = [arm for arm in ARMS if not only or arm.name in only or arm is BASELINE]
    described = describe_run(
        {
            "folds": folds,
            "entities": len(photographs.records),
            "queried": len(photographs.queried),
            "photographs": photographs.digest,
            "text_encoder": "minilm",
            "arms": {arm.name: arm.training for arm in arms},
        }
    )
    rows = run_all(photographs, specs, arms, unseen, work, key={"commit": described["commit"], "smoke": smoke})
    figures = {**described, **summarise_runs(rows)}
    if smoke:
        out = work / "smoke.json"
    atomic_write_bytes(out, (json.dumps(figures, indent=1) + "\n").encode())
    click.echo(f"written to {out}")


def run_all(
    photographs: Photographs,
    specs: Sequence[str],
    arms: Sequence[Arm],
    unseen: Sequence[frozenset[str]],
    work: Path,
    key: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return the result of every encoder, fold and arm, and print each. Finished ones are read from `runs.jsonl`.

    `key` is what else results depend on.
    """
    from model.encoders import open_image_encoder
    from model.resume import FinishedRuns, fingerprint

    work.mkdir(parents=True, exist_ok=True)
    finished = FinishedRuns(work / "runs.jsonl")
    results = []
    for spec in specs:
        encoder = spec if ":" not in spec else f"{spec.partition(':')[0]}:{Path(spec).name}"
        key = {**key, "encoder": open_image_encoder(spec).content_hash, "data": photographs.digest}
        with TemporaryDirectory(dir=work) as folder:
            runs = Runs(photographs, spec, work / "features", Path(folder), smoke=bool(key["smoke"]))
            for fold, unseen_ids in enumerate(unseen):
                baseline: list[Answer] = []
                with TemporaryDirectory(dir=folder) as fold_folder:
                    runs.begin_fold(unseen_ids, Path(fold_folder))
                    for arm in arms:
                        run_key = fingerprint({**key, "unseen": sorted(unseen_ids), **asdict(arm)})
                        if run_key not in finished:
                            about = {"encoder": encoder, "fold": fold, "arm": arm.name}
                            finished.add(run_key, {**about, **runs.run(arm)})
                        row = finished[run_key]
                        results.append(row)
                        baseline = baseline or _answers(row)  # of the first arm
                        click.echo(f"{encoder}, fold {fold + 1} of {len(unseen)}, {arm.name}: {_line(row, baseline)}")
    return results


def _answers(row: Mapping[str, Any]) -> list[Answer]:
    return [Answer(**answer) for answer in row["answers"]]


def _line(row: Mapping[str, Any], baseline: Sequence[Answer]) -> str:
    """Return a run's accuracies, their ratios to the baseline, and its times as text."""
    parts = []
    for searched in SEARCHED:
        pooled = pool(_answers(row), baseline, searched)
        accuracies = " / ".join(f"{pooled[part]['top_1']:.1f}" for part in ("seen", "unseen"))
        ratios = " / ".join(f"{pooled[part]['ratio'] or math.nan:.2f}" for part in ("seen", "unseen"))
        parts.append(f"{searched} {accuracies} ({ratios})")
    times = ", ".join(f"{step} {seconds:.0f} s" for step, seconds in row["seconds"].items())
    return f"seen / unseen (ratios): {', '.join(parts)}; {times}"


def summarise_runs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of all runs: accuracies by encoder, catalog and arm, and what was chosen in each fold."""
    answers: dict[str, dict[str, list[Answer]]] = {}
    chosen: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        answers.setdefault(row["encoder"], {}).setdefault(row["arm"], []).extend(_answers(row))
        chosen.setdefault(row["encoder"], {}).setdefault(row["arm"], []).append(row["chosen"])
    return {
        "minutes": round(sum(seconds for row in rows for seconds in row["seconds"].values()) / 60, 1),
        "encoders": {
            encoder: {
                searched: {arm: pool(each, by_arm[BASELINE.name], searched) for arm, each in by_arm.items()}
                for searched in SEARCHED
            }
            for encoder, by_arm in answers.items()
        },
        "chosen": chosen,
    }


if __name__ == "__main__":
    run(main, name="python -m evaluation.photographs")
