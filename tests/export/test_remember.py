"""`wikiclip export --remember`: labelled pictures become one more reference of their entity."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from core.errors import UserError
from export.cli import summary_lines
from export.config import ExportConfig
from export.leave_one_out import OwnQueries, search_own
from export.pipeline import ExportSummary, export_bundle
from export.remember import LabelledPictures, choose_handicap
from imaging import load_pixels
from index.build import build_index
from index.bundle import Bundle
from index.embeddings import Embeddings
from index.manifest import INDEX_FILE, RememberedEntry
from index.remembered import Remembered
from index.report import describe, describe_lines
from index.search import EntityIndex
from index.transfer import pull, push
from model.adaptor import Adaptor
from model.checkpoint import Checkpoint, save_checkpoint
from model.encoders import ImageEncoder
from tests.export.conftest import CatalogFiles, png

Vectors = npt.NDArray[Any]
DIM = 16
CONFIG = ExportConfig(catalog=Path("catalog"), out=Path("out"), batch_size=50)


def unit(vectors: Vectors) -> Vectors:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def slow_choice(pictures: Sequence[tuple[int, Vectors]], catalog_ED: Vectors) -> tuple[float, float, float] | None:
    """Return handicap, seen and held-out accuracy by searching for each picture with each handicap."""
    rows = sorted({row for row, _ in pictures})

    def right(number: int, handicap: float, *, own_is_remembered: bool) -> bool:
        own, query_D = pictures[number]
        scores = dict(enumerate(catalog_ED @ query_D))
        for row in rows:
            kept = [each for place, (label, each) in enumerate(pictures) if label == row and place != number]
            if kept and (row != own or own_is_remembered):
                scores[row] = max(scores[row], unit(np.sum(kept, axis=0)) @ query_D - handicap)
        return max(scores, key=scores.__getitem__) == own

    several = [n for n, (row, _) in enumerate(pictures) if sum(label == row for label, _ in pictures) > 1]

    def accuracies(handicap: float) -> tuple[float, float]:
        seen = [right(number, handicap, own_is_remembered=True) for number in several]
        held_out = [right(number, handicap, own_is_remembered=False) for number in range(len(pictures))]
        return float(np.mean(seen)), float(np.mean(held_out))

    before_seen, before_held_out = accuracies(10.0)
    best: tuple[float, float, float, float] | None = None
    smaller_is_safe = False
    for handicap in np.arange(21) / 50:
        seen, held_out = accuracies(handicap)
        is_safe = held_out >= before_held_out
        if seen > before_seen and is_safe and smaller_is_safe:
            found = (2 * seen * held_out / (seen + held_out), handicap, seen, held_out)
            best = found if best is None else max(best, found)
        smaller_is_safe = is_safe
    return None if best is None else best[1:]


def fake_catalog(folder: Path, seed: int, spread: float) -> tuple[EntityIndex, Vectors, list[tuple[int, Vectors]]]:
    """Return 24 entities with one image each, and up to four pictures of every other one."""
    rng = np.random.default_rng(seed)
    centres_ED = unit(rng.normal(size=(24, DIM)))
    catalog_ED = unit(centres_ED + spread * rng.normal(size=(24, DIM)) / DIM**0.5).astype(np.float16)
    pictures = [
        (row, unit(centres_ED[row] + rng.normal(size=DIM) / DIM**0.5).astype(np.float32))
        for row in range(0, 24, 2)
        for _ in range(1 + row % 4)
    ]
    images = Embeddings(DIM, [catalog_ED], [np.arange(24)])
    built = build_index(folder, images)
    stored_ED = images.part(0)
    return EntityIndex.read(folder / INDEX_FILE, images, built.parameters), stored_ED, pictures


@pytest.mark.parametrize("seed", range(3))
def test_the_handicap_is_that_of_a_slow_loop(tmp_path: Path, seed: int) -> None:
    index, stored_ED, pictures = fake_catalog(tmp_path, seed, spread=1.6)
    labelled = LabelledPictures()
    for row, embedding_D in pictures:
        labelled.add(row, embedding_D)
    rows_M, vectors_MD = labelled.vectors()
    chosen = choose_handicap(labelled.queries(), Embeddings(DIM, [vectors_MD], [rows_M]), CONFIG, index)
    expected = slow_choice(pictures, stored_ED)
    assert expected is not None
    assert chosen is not None
    handicap, seen, held_out = chosen
    assert (handicap, seen.after, held_out.after) == pytest.approx(
        (expected[0], 100 * expected[1], 100 * expected[2]), abs=0.01
    )
    assert seen.before < seen.after
    assert held_out.before == held_out.after


def test_nothing_is_remembered_if_it_would_not_help(tmp_path: Path) -> None:
    index, stored_ED, pictures = fake_catalog(tmp_path, 0, spread=1.6)
    single, known = LabelledPictures(), LabelledPictures()
    for row, embedding_D in dict(pictures).items():
        single.add(row, embedding_D)
    for row, _ in pictures:
        known.add(row, stored_ED[row])
    for each in (single, known):  # nothing to measure, and nothing to gain
        rows_M, vectors_MD = each.vectors()
        assert choose_handicap(each.queries(), Embeddings(DIM, [vectors_MD], [rows_M]), CONFIG, index) is None


def test_an_image_searched_without_itself_may_be_found_by_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images = Embeddings(DIM, [unit(rng.normal(size=(6, DIM))).astype(np.float16)], [np.array([0, 0, 1, 1, 2, 2])])
    built = build_index(tmp_path, images)
    index = EntityIndex.read(tmp_path / INDEX_FILE, images, built.parameters)
    query_D = images.at(np.array([2]))
    queries = OwnQueries(own_N=np.array([1]), position_NV=np.array([[2]]), embeddings_ND=query_D)
    without = search_own(queries, CONFIG, index, images, "nearest")
    index.remembered = Remembered(Embeddings(DIM, [query_D.astype(np.float16)], [np.array([1])]), 0.25)
    found = search_own(queries, CONFIG, index, images, "nearest")
    others = dict(zip(without.rows_NF[0].tolist(), without.scores_NF[0].tolist(), strict=True))
    own = images.at(np.array([3]))[0] @ query_D[0]
    assert others[1] == pytest.approx(float(own), abs=1e-5)
    assert found.rows_NF[0, 0] == 1
    assert found.scores_NF[0, 0] == pytest.approx(0.75, abs=1e-4)
    expected = {row: score for row, score in others.items() if row not in (1, -1)}
    assert dict(zip(found.rows_NF[0, 1:3].tolist(), found.scores_NF[0, 1:3].tolist(), strict=True)) == expected


def write_pairs(folder: Path, pictures: Sequence[tuple[str, bytes]], extra: Sequence[str] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (entity_id, data) in enumerate(pictures):
        (folder / f"{number}.png").write_bytes(data)
        row = {"data_id": str(number), "image": f"{number}.png", "entity_id": entity_id, "data_split": "train_seen"}
        rows.append(json.dumps(row))
    (folder / "pairs.jsonl").write_text("\n".join([*rows, *extra]) + "\n")
    return folder / "pairs.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    config: ExportConfig
    summary: ExportSummary
    pictures: list[tuple[str, bytes]]

    @property
    def entry(self) -> RememberedEntry:
        entry = Bundle.open(self.config.out).manifest.remembered
        assert entry is not None
        return entry


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, catalog: CatalogFiles, checkpoint: Path) -> Done:
    """Export with a centred checkpoint of random weights, which finds little without memory."""
    folder = tmp_path_factory.mktemp("remember")
    pictures = [(f"Q{number}", similar(70 + number, view)) for number in (1, 4, 5, 6, 8) for view in range(3)]
    validation = [(f"Q{number}", similar(70 + number, view)) for number in (1, 4, 5, 6, 8) for view in (3, 4)]
    random = Checkpoint.load(checkpoint)
    pixels = [load_pixels(data, random.image_encoder.preprocessing, max_pixels=10_000) for _, data in pictures]
    adaptor = Adaptor(dataclasses.replace(random.adaptor.config, centre=True))
    adaptor.centre_D = random.image_encoder.encode(np.stack(pixels)).image_embedding_BD.mean(dim=0)
    save_checkpoint(
        folder / "checkpoint",
        adaptor=adaptor,
        logit_scale=10.0,
        image_encoder=random.image_encoder,
        text_encoder=random.text_encoder,
        training={},
    )
    bad = [
        json.dumps({"data_id": "x", "image": "missing.png", "entity_id": "Q1", "data_split": "train_seen"}),
        json.dumps({"data_id": "y", "image": "0.png", "entity_id": "unknown", "data_split": "train_seen"}),
        json.dumps({"data_id": "z", "image": "pairs.jsonl", "entity_id": "Q1", "data_split": "train_seen"}),
        json.dumps({"data_id": "again", "image": "0.png", "entity_id": "Q1", "data_split": "train_seen"}),
    ]
    config = ExportConfig(
        catalog=catalog.path,
        checkpoint=folder / "checkpoint",
        out=folder / "out" / "things",
        remember=write_pairs(folder, pictures, bad),
        validation=write_pairs(folder / "validation", validation),
        batch_size=6,
        device="cpu",
        workers=1,
        progress=True,
    )
    return Done(config=config, summary=export_bundle(config), pictures=pictures)


def similar(seed: int, view: int) -> bytes:
    """Return an image that differs from the other views of the same seed in one corner."""
    pixels_HW3 = np.array(Image.open(io.BytesIO(png(500 + seed))))
    pixels_HW3[:3, :3] = 40 * view
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_are_found_by_their_mean(done: Done) -> None:
    assert done.config.checkpoint is not None
    model = Checkpoint.load(done.config.checkpoint)
    preprocessing = model.image_encoder.preprocessing
    pixels = [load_pixels(data, preprocessing, max_pixels=10_000) for _, data in done.pictures]
    queries_QD = model.embed_queries(np.stack(pixels))
    bundle = Bundle.open(done.config.out, "full")
    assert (bundle.manifest.schema_version, done.entry.entities, done.entry.pictures) == (2, 5, 15)
    index, names = bundle.index(), [entity_id for entity_id, _ in done.pictures]
    rows_QK, scores_QK = index.search(queries_QD, 5)
    with bundle.store() as store:
        found = [entity.entity_id for entity in store.by_rows(rows_QK[:, 0].tolist())]
    index.remembered = None
    plain_rows, plain_scores = index.search(queries_QD, 23)
    for number, own in enumerate(names):
        mean_D = unit(queries_QD[[name == own for name in names]].sum(axis=0))
        if found[number] == own and scores_QK[number, 0] > plain_scores[number, 0]:
            expected = mean_D @ queries_QD[number] - done.entry.handicap
            assert scores_QK[number, 0] == pytest.approx(expected, abs=1e-3)
    with bundle.store() as store:
        plain = [entity.entity_id for entity in store.by_rows(plain_rows[:, 0].tolist())]
    assert sum(map(str.__eq__, found, names)) > sum(map(str.__eq__, plain, names))


def test_what_was_remembered_is_reported(done: Done) -> None:
    entry = done.entry
    assert done.summary.remembered == entry
    line = (
        f"remembered 15 pictures of 5 entities, handicap {entry.handicap:.2f} (seen {entry.seen.before:.1f} -> "
        f"{entry.seen.after:.1f} %, held-out {entry.held_out.before:.1f} -> {entry.held_out.after:.1f} %)"
    )
    assert line in list(summary_lines(done.summary, done.config))
    assert f"memory       {line}" in describe_lines(describe(done.config.out, "quick"))
    rejected = [json.loads(each) for each in (done.config.out.parent / "rejected.jsonl").read_text().splitlines()]
    reasons = {each["line"]: each["reason"] for each in rejected if each["reason"].startswith("pairs.jsonl: ")}
    assert list(reasons) == [16, 17, 18]
    assert "missing.png does not exist" in reasons[16]
    assert "unknown is not in the catalog" in reasons[17]


def test_a_checkpoint_needs_validation_queries(done: Done, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--remember with --checkpoint needs --validation"):
        export_bundle(dataclasses.replace(done.config, out=tmp_path / "b", validation=None))


def test_it_resumes_to_the_same_bytes_and_travels(done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = dataclasses.replace(done.config, out=tmp_path / "out" / "things")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("export.pipeline.list_files", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_bundle(again)
    with pytest.raises(UserError, match="another batch size"):
        export_bundle(dataclasses.replace(again, resume=True, batch_size=4))
    resumed = export_bundle(dataclasses.replace(again, resume=True))
    assert resumed.fingerprint == done.summary.fingerprint
    assert Bundle.open(again.out, "full").manifest.files == Bundle.open(done.config.out).manifest.files
    with pytest.raises(UserError, match="another remember"):
        export_bundle(dataclasses.replace(again, resume=True, remember=None))
    push(again.out, str(tmp_path / "remote"))
    pull(str(tmp_path / "remote"), tmp_path / "pulled")
    queries_BD = unit(np.random.default_rng(0).normal(size=(20, 24))).astype(np.float32)
    for found, expected in zip(
        Bundle.open(tmp_path / "pulled").index().search(queries_BD, 5),
        Bundle.open(done.config.out).index().search(queries_BD, 5),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


def test_validation_queries_and_images_of_the_catalog_are_not_remembered(
    catalog: CatalogFiles, image_encoder: ImageEncoder, tmp_path: Path
) -> None:
    """Without a checkpoint, the catalog's images are found by themselves anyway."""
    known = [(each, catalog.images[each].read_bytes()) for each in ("Q0", "Q1")]
    config = ExportConfig(
        catalog=catalog.path,
        image_encoder=image_encoder.spec,
        out=tmp_path / "out" / "b",
        limit=4,
        validation=write_pairs(tmp_path / "validation", [("Q5", known[0][1])]),
        remember=write_pairs(tmp_path / "pairs", [*known, ("Q3", similar(3, 0))]),
        device="cpu",
        resume=True,
        workers=1,
    )
    with pytest.raises(UserError, match="1 of the pictures of --remember are --validation queries"):
        export_bundle(config)
    with pytest.raises(UserError, match="has no usable picture of an entity in the catalog"):
        export_bundle(dataclasses.replace(config, validation=None))
    reasons = (tmp_path / "out" / "rejected.jsonl").read_text()
    assert reasons.count("the catalog has this image of the entity already") == 2
    assert "Q3 has no usable image in the catalog" in reasons
    export_bundle(dataclasses.replace(config, validation=None, remember=None))
    assert not (config.out / "remembered").exists()
