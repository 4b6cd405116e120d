"""`wikiclip train` from files to a checkpoint, run in process, and the log of a run."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from catalog.images import TarShards
from core.arrays import Pixels
from core.errors import CatalogError, EncoderSpecError, UserError
from core.lines import Rejected, RejectLog
from model.adaptor import AdaptorConfig
from model.checkpoint import Checkpoint
from model.cli import train
from model.data import ImageSource, load_entities
from model.encoders import ImageFeatures, open_image_encoder, open_text_encoder
from model.encoders.onnx import OnnxImageEncoder
from model.features import VIEWS, EntityKeys, FeatureStore, KeyedPair, catalog_pairs
from model.train import TrainingData, open_log, train_adaptor
from model.trainer import TrainSettings, draw_modalities
from model.validation import Accuracy


def run(dataset: Any, tiny_spec: str, text_spec: str, out: Path, *more: str) -> Result:
    arguments = ["--catalog", dataset.catalog, "--pairs", dataset.pairs, "--image-encoder", tiny_spec]
    arguments += ["--text-encoder", text_spec, "--out", out, "--cache-dir", out.parent / "cache", "--device", "cpu"]
    arguments += ["--epochs", 3, "--batch-size", 8, "--width", 16, "--heads", 2, "--max-tokens", 16]
    arguments += ["--hold-out", 0, *more]
    return CliRunner().invoke(train, [str(argument) for argument in arguments], catch_exceptions=True)


def report(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output + repr(result.exception)
    values: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return values


def test_trains_validates_and_writes_a_checkpoint(dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path) -> None:
    out = tmp_path / "checkpoint"
    figures = report(run(dataset, tiny_spec, text_spec, out, "--validation", str(dataset.validation), "--json"))
    assert (figures["pairs"], figures["entities"], figures["rejected"], figures["steps"]) == (8, 12, 0, 3)
    assert 0 <= figures["validation"]["hm"] <= 1
    log = [json.loads(line) for line in (tmp_path / "checkpoint.train.jsonl").read_text().splitlines()]
    validated = [{"epoch": row["epoch"], **row["validation"]} for row in log if "validation" in row]
    assert validated == figures["curve"][1:]
    best = figures["curve"][figures["best_epoch"]]
    assert best == {"epoch": best["epoch"], "strength": figures["strength"], **figures["validation"]}
    loaded = Checkpoint.load(out, text_encoder_spec=text_spec)
    assert loaded.values["training"]["best_epoch"] == best["epoch"]


def test_held_out_entities_choose_and_the_start_is_a_choice(
    dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path
) -> None:
    """A learning rate that destroys everything leaves the start."""
    options = ["--catalog-pairs", "--hold-out", "0.25", "--patience", "2"]
    figures = report(run(dataset, tiny_spec, text_spec, tmp_path / "a", *options, "--json"))
    assert figures["held_out"] == 2
    ranks = [row["top1"] if row["hm"] is None else row["hm"] for row in figures["curve"]]
    assert [row["epoch"] for row in figures["curve"]] == list(range(len(ranks)))
    assert figures["best_epoch"] in (0, int(np.argmax(ranks)))
    ridge = run(dataset, tiny_spec, text_spec, tmp_path / "b", *options, "--adaptor", "ridge")
    assert re.search("kept the start: .*2 entities held out", ridge.output)


def test_training_that_destroys_everything_keeps_the_start(
    dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path
) -> None:
    store, entities = store_with_entities(dataset, tiny_spec, text_spec, tmp_path / "cache")
    config = AdaptorConfig(patch_dim=24, text_dim=16, embedding_dim=24, width=16, heads=2, start="image")
    images = [KeyedPair(query=image, entity=row) for row, each in enumerate(entities) for image in each.images]
    data = TrainingData(config=config, store=store, entities=entities, pairs=images, validation=images)
    settings = TrainSettings(epochs=9, batch_size=8, lr=1.0, patience=2)
    result = train_adaptor(data, settings, device=torch.device("cpu"), log=None)
    assert result.accuracy == Accuracy(top1=1.0, seen=None, unseen=None, hm=None)  # images find themselves
    assert [row["epoch"] for row in result.curve] == [0, 1, 2]
    assert result.best_epoch == 0
    assert not result.adaptor.out.weight.any()


def test_a_second_run_uses_the_cache_and_gives_the_same_result(
    dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path
) -> None:
    first = report(run(dataset, tiny_spec, text_spec, tmp_path / "a", "--json"))
    second = report(run(dataset, tiny_spec, text_spec, tmp_path / "b", "--json"))
    assert first["features_computed"] > 0
    assert second["features_computed"] == 0
    assert second["loss"] == first["loss"]
    assert (tmp_path / "a" / "checkpoint.json").read_bytes() == (tmp_path / "b" / "checkpoint.json").read_bytes()


def test_loss_falls(dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path) -> None:
    options = ["--epochs", "60", "--lr", "0.003", "--modality-dropout", "0", "--dropout", "0"]
    report(run(dataset, tiny_spec, text_spec, tmp_path / "c", *options, "--json"))
    log = [json.loads(line) for line in (tmp_path / "c.train.jsonl").read_text().splitlines()]
    losses = [row["mean_loss"] for row in log if "mean_loss" in row]
    assert losses[-1] < 0.6 * losses[0]


def test_bad_records_are_counted_and_named(dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path) -> None:
    broken = dataset.folder / "broken.png"
    broken.write_bytes((dataset.folder / "e0-2.png").read_bytes()[:200])
    rows = [
        {"data_id": "x", "image": "nowhere.png", "entity_id": "Q1", "data_split": "train"},
        {"data_id": "y", "image": "e1-2.png", "entity_id": "Q999", "data_split": "train"},
        {"data_id": "z", "image": broken.name, "entity_id": "Q1", "data_split": "train"},
        {"data_id": "w", "entity_id": "Q1", "data_split": "train"},
    ]
    pairs = dataset.folder / "bad-pairs.jsonl"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    pairs.write_text("{no json\n" + lines + dataset.pairs.read_text(), encoding="utf-8")
    figures = report(run(dataset, tiny_spec, text_spec, tmp_path / "d", "--pairs", str(pairs), "--json"))
    assert (figures["pairs"], figures["rejected"]) == (8, 5)
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert {row["line"]: row["reason"].split(" ")[0] for row in rejected} == {
        1: "not",
        2: "image",
        3: "entity_id",
        4: "image",
        5: "data_id,",
    }


def test_a_file_without_usable_pairs_is_an_error(dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"data_id": "1", "image": "gone.png", "entity_id": "Q1", "data_split": "train"}\n')
    result = run(dataset, tiny_spec, text_spec, tmp_path / "e", "--pairs", str(pairs))
    assert isinstance(result.exception, CatalogError)
    assert "no usable pair" in str(result.exception)
    assert not (tmp_path / "e").exists()


def test_divergence_keeps_the_earlier_checkpoint(
    dataset: Any,
    tiny_spec: str,
    text_spec: str,
    save_onnx: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "f"
    report(run(dataset, tiny_spec, text_spec, out, "--json"))
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    encode = OnnxImageEncoder.encode

    def diverge(self: OnnxImageEncoder, pixels_BHW3: Pixels) -> ImageFeatures:
        features = encode(self, pixels_BHW3)
        return replace(features, image_embedding_BD=features.image_embedding_BD * float("nan"))

    monkeypatch.setattr(OnnxImageEncoder, "encode", diverge)
    result = run(dataset, f"onnx:{save_onnx(tmp_path, offset=0.25)}", text_spec, out)
    assert isinstance(result.exception, UserError)
    assert "diverged" in str(result.exception)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "'--epochs': 0 is not in the range x>=1"),
        (["--batch-size", "1"], "'--batch-size'"),
        (["--heads", "3"], "heads"),
        (["--lr", "0"], "'--lr': 0.0 is not in the range 0<x<=1"),
        (["--modality-dropout", "0.9"], "'--modality-dropout'"),
        (["--text-mask", "1"], "'--text-mask'"),
        (["--accumulate", "0"], "'--accumulate'"),
        (["--n-sync", "0"], "'--n-sync'"),
        (["--cluster-size", "3"], "cluster size"),
        (["--hard-negatives-from", "0"], "'--hard-negatives-from'"),
        (["--max-per-entity", "0"], "'--max-per-entity'"),
        (["--snapshot-every", "-1"], "'--snapshot-every'"),
        (["--device", "abacus"], "device"),
        (["--max-tokens", "1000"], "32 tokens"),
    ],
)
def test_invalid_settings(
    dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path, *, arguments: list[str], message: str
) -> None:
    result = run(dataset, tiny_spec, text_spec, tmp_path / "g", *arguments)
    assert isinstance(result.exception, UserError) or result.exit_code == 2
    assert message in f"{result.exception} {result.output}"


def test_an_unknown_encoder(dataset: Any, text_spec: str, tmp_path: Path) -> None:
    result = run(dataset, "resnet", text_spec, tmp_path / "h")
    assert isinstance(result.exception, EncoderSpecError)


def unexpected(rejected: Rejected) -> None:
    pytest.fail(rejected.reason)


def store_with_entities(dataset: Any, tiny_spec: str, text_spec: str, cache: Path) -> tuple[FeatureStore, list[Any]]:
    store = FeatureStore(cache, open_image_encoder(tiny_spec), open_text_encoder(text_spec, max_tokens=16))
    entities = load_entities(dataset.catalog, None, RejectLog(cache.parent / "rejected.jsonl"))
    return store, store.entity_keys(entities, unexpected)


def test_only_the_adaptor_changes(dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path) -> None:
    store, entities = store_with_entities(dataset, tiny_spec, text_spec, tmp_path / "cache")
    module: torch.nn.Module = store.image_encoder.module  # type: ignore[attr-defined]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    config = AdaptorConfig(patch_dim=24, text_dim=16, embedding_dim=24, width=16, heads=2)
    pairs = [KeyedPair(query=entity.images[0], entity=row) for row, entity in enumerate(entities) if entity.images]
    settings = TrainSettings(epochs=4, batch_size=6, modality_dropout=0.3, lr=0.01)
    cpu = torch.device("cpu")
    data = TrainingData(config=config, store=store, entities=entities, pairs=pairs)
    result = train_adaptor(data, settings, device=cpu, log=lambda row: None)
    torch.manual_seed(settings.seed)
    start = type(result.adaptor)(config)
    unmoved = [
        name
        for (name, now), was in zip(result.adaptor.named_parameters(), start.parameters(), strict=True)
        # A key's bias adds a constant to a query's scores, which the softmax ignores.
        if torch.equal(now, was) and not name.endswith("key.bias")
    ]
    assert unmoved == []
    assert result.logit_scale != pytest.approx(1 / 0.07, abs=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_the_query_is_never_its_entitys_image() -> None:
    rng = np.random.default_rng(0)
    entity = EntityKeys(images=(b"a", b"b", b"c"), text=b"t")
    drawn = {draw_modalities(entity, b"b", 0.0, rng) for _ in range(100)}
    assert drawn == {(b"a", b"t"), (b"c", b"t")}
    only = EntityKeys(images=(b"b",), text=b"t")
    assert draw_modalities(only, b"view", 0.0, rng) == (b"b", b"t")


def test_modality_dropout_hides_each_at_its_rate_and_never_both() -> None:
    rng = np.random.default_rng(0)
    both = EntityKeys(images=(b"a",), text=b"t")
    drawn = [draw_modalities(both, b"q", 0.2, rng) for _ in range(2000)]
    assert drawn.count((None, None)) == 0
    assert 0.16 < drawn.count((None, b"t")) / 2000 < 0.24
    assert 0.16 < drawn.count((b"a", None)) / 2000 < 0.24
    only_image = EntityKeys(images=(b"a",), text=None)
    assert {draw_modalities(only_image, b"q", 0.5, rng) for _ in range(50)} == {(b"a", None)}


def test_catalog_pairs_and_their_limit(dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path) -> None:
    """Eleven entities have two images each, and the eight seen ones also a labelled pair."""
    plain = report(run(dataset, tiny_spec, text_spec, tmp_path / "k", "--catalog-pairs", "--json"))
    assert (plain["pairs"], plain["catalog_pairs"], plain["entities"]) == (8 + 22, 22, 12)
    limit = ["--catalog-pairs", "--max-per-entity", "2", "--json"]
    limited = report(run(dataset, tiny_spec, text_spec, tmp_path / "l", *limit))
    assert (limited["pairs"], limited["catalog_pairs"]) == (8 + 8 + 6, 14)


def test_an_entity_with_one_image_is_queried_with_views_of_it(
    dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in dataset.catalog.read_text().splitlines()][:4]
    rows[0]["images"] = ["broken.png", rows[0]["images"][0]]  # the first cannot be read
    rows[1]["images"] = rows[1]["images"][:1]
    (dataset.folder / "broken.png").write_bytes(b"x")
    catalog = dataset.folder / "few-images.jsonl"
    catalog.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = load_entities(catalog, None, RejectLog(tmp_path / "rejected.jsonl"))
    other = ImageSource(image=str(dataset.folder / "e0-2.png"), line=1, record="")

    def viewed() -> tuple[FeatureStore, list[Any], list[KeyedPair]]:
        encoders = open_image_encoder(tiny_spec), open_text_encoder(text_spec, max_tokens=16)
        store = FeatureStore(tmp_path / "cache", *encoders)
        entities = store.entity_keys(records, lambda rejected: None)
        labelled = store.image_keys([other], unexpected, "query images")
        pairs = [KeyedPair(query=key, entity=0) for key in labelled if key] + catalog_pairs(entities, Counter(), None)
        return store, entities, store.with_views(pairs, entities, records)

    store, entities, pairs = viewed()
    assert [len(pair.views) for pair in pairs] == [0, VIEWS, VIEWS, 0, 0, 0, 0]  # entities 2 and 3 have two images
    image = store.query_embeddings(entities[0].images)[0]
    cosines = store.query_embeddings(pairs[1].views) @ image
    assert len(np.unique(cosines.round(6))) == VIEWS
    assert cosines.max() < 0.9999
    assert cosines.mean() > (store.query_embeddings(pairs[2].views) @ image).mean()

    again, _, same = viewed()
    assert same == pairs
    assert again.computed == 0
    np.testing.assert_array_equal(again.query_embeddings(pairs[1].views) @ image, cosines)


def test_training_on_catalog_pairs_alone(dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path) -> None:
    arguments = ["--catalog", dataset.catalog, "--image-encoder", tiny_spec, "--text-encoder", text_spec]
    arguments += ["--out", tmp_path / "k", "--cache-dir", tmp_path / "cache", "--epochs", 2, "--width", 16]
    arguments += ["--heads", 2, "--max-tokens", 16, "--device", "cpu", "--hold-out", 0, "--json"]
    given = [str(argument) for argument in arguments]
    figures = report(CliRunner().invoke(train, [*given, "--catalog-pairs"]))
    assert (figures["pairs"], figures["catalog_pairs"], figures["entities"]) == (22, 22, 12)
    smoke = report(CliRunner().invoke(train, [*given, "--catalog-pairs", "--smoke", "--batch-size", "2"]))
    assert smoke["entities"] == 6
    with pytest.raises(UserError, match="give --pairs, or --catalog-pairs"):
        CliRunner().invoke(train, given, catch_exceptions=False)


def test_a_catalog_without_texts(dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in dataset.catalog.read_text().splitlines()]
    bare = dataset.catalog.with_name("without-texts.jsonl")
    bare.write_text("".join(json.dumps({**row, "text": ""}) + "\n" for row in rows))
    figures = report(run(dataset, tiny_spec, text_spec, tmp_path / "a", "--catalog", str(bare), "--json"))
    assert figures["ridge"]["text_share"] == 0.0


def test_a_part_of_a_catalog_with_fetched_images(
    dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in dataset.catalog.read_text().splitlines()]
    with TarShards(tmp_path / "images", shard_bytes=10_000) as shards:
        for row in rows:
            for name in row["images"]:
                shards.add(f"https://example.org/{name}", (dataset.folder / name).read_bytes(), "image/png", {})
            row["images"] = [f"https://example.org/{name}" for name in row["images"]]
        rows[0]["images"].append("https://example.org/never-fetched.png")
    catalog = tmp_path / "by-url.jsonl"
    catalog.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--catalog", str(catalog), "--catalog-pairs", "--images", str(tmp_path / "images"), "--json"]
    whole = report(run(dataset, tiny_spec, text_spec, tmp_path / "a", *more))
    assert (whole["pairs"], whole["catalog_pairs"], whole["rejected"]) == (8 + 22, 22, 1)
    pairs = tmp_path / "one-pair.jsonl"
    one = json.loads(dataset.pairs.read_text().splitlines()[0])
    pairs.write_text(json.dumps({**one, "image": str(dataset.folder / one["image"])}))
    more += ["--pairs", str(pairs), "--max-entities", "4"]
    part = run(dataset, tiny_spec, text_spec, tmp_path / "b", *more)
    figures = report(part)
    assert (figures["entities"], figures["catalog_pairs"], figures["features_computed"]) == (5, 10, 0)
    assert "drew 4 of 10 entities with an image; 1 more are in the pairs" in part.stderr
    assert re.search(r"features take up to [\d.]+kB in", part.stderr)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(
        UserError, match=r"the features of 12 images and 5 texts take about .*kB, and .* limit them with --max-ent"
    ):
        raise run(dataset, tiny_spec, text_spec, tmp_path / "c", *more, "--cache-dir", str(tmp_path / "new")).exception  # type: ignore[misc]


def test_a_catalog_without_pairs_is_an_error(dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in dataset.catalog.read_text().splitlines()]
    bare = [
        {**line, "images": [str(dataset.folder / name) for name in line["images"][:1]], "text": ""} for line in lines
    ]
    catalog = tmp_path / "bare.jsonl"
    catalog.write_text("".join(json.dumps(line) + "\n" for line in bare))
    arguments = ["--catalog", catalog, "--image-encoder", tiny_spec, "--text-encoder", text_spec, "--catalog-pairs"]
    arguments += ["--out", tmp_path / "k", "--cache-dir", tmp_path / "cache", "--max-tokens", "16"]
    with pytest.raises(CatalogError, match="to make a pair; give --pairs"):
        CliRunner().invoke(train, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.mark.parametrize("how", ["clusters", "synthesis", "both"])
def test_hard_negatives_start_at_their_epoch(
    dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path, how: str
) -> None:
    def losses(out: str, *more: str) -> list[float]:
        flags = ["--batch-size", "4", "--epochs", "2", "--lr", "0.003", "--text-mask", "0.2"]
        figures = report(run(dataset, tiny_spec, text_spec, tmp_path / out, *flags, *more, "--json"))
        assert figures["steps"] == 4
        log = [json.loads(line) for line in (tmp_path / f"{out}.train.jsonl").read_text().splitlines()]
        return [row["mean_loss"] for row in log if "mean_loss" in row]

    plain = losses("plain")
    hard = ["--hard-negatives", how, "--n-sync", "2", "--cluster-size", "2"]
    late = losses("late", *hard, "--hard-negatives-from", "2")
    early = losses("early", *hard)
    assert late[0] == plain[0]
    assert late[1] != plain[1]
    assert early[0] != plain[0]
    assert early == losses("again", *hard)


def test_half_precision_is_stored_if_it_changes_nothing(
    dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path
) -> None:
    figures = report(run(dataset, tiny_spec, text_spec, tmp_path / "i", "--json"))
    assert figures["weights"] == "float16"
    assert figures["half_cosine"] > 0.9999
    assert {t.dtype for t in load_file(tmp_path / "i" / "adaptor.safetensors").values()} == {torch.float16}
    report(run(dataset, tiny_spec, text_spec, tmp_path / "j", "--no-half", "--json"))
    assert {t.dtype for t in load_file(tmp_path / "j" / "adaptor.safetensors").values()} == {torch.float32}


def test_smoke_runs_on_little_data_and_keeps_the_checkpoint(
    dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path
) -> None:
    out = tmp_path / "m"
    report(run(dataset, tiny_spec, text_spec, out, "--json"))
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    row = json.loads(dataset.pairs.read_text().splitlines()[0])
    pairs = dataset.folder / "many-pairs.jsonl"
    many = [{**row, "data_id": f"oven_query_train_{number}"} for number in range(30)]
    pairs.write_text("".join(json.dumps(each) + "\n" for each in many) + dataset.pairs.read_text())
    more = ["--pairs", str(pairs), "--validation", str(dataset.validation), "--batch-size", "3", "--cluster-size", "3"]
    result = run(
        dataset, tiny_spec, text_spec, out, *more, "--hard-negatives", "both", "--epochs", "50", "--smoke", "--json"
    )
    figures = report(result)
    assert result.stderr.count(f"2 of 9 rows of {pairs} are of OVEN's query split") == 1
    # Three batches of three, with two pairs of the first entity, of which the file has thirty.
    assert (figures["pairs"], figures["steps"], figures["checkpoint"]) == (9, 3, str(tmp_path / "m.smoke"))
    assert figures["validation"] is not None
    assert Checkpoint.load(tmp_path / "m.smoke", text_encoder_spec=text_spec).values["training"]["epochs"] == 1
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


class Recorder:
    """Record the calls to TensorBoard's writer."""

    asked: list[Any]

    def __init__(self, folder: str, purge_step: int) -> None:
        Recorder.asked = [(Path(folder).name, purge_step)]

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        Recorder.asked.append((tag, scalar_value, global_step))

    def close(self) -> None:
        Recorder.asked.append("closed")


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Recorder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return Recorder


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_has_one_log_without_repeated_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.train.jsonl"
    with open_log(path, tmp_path / "x.tensorboard", after_step=0) as log:
        for step in (10, 20, 30):
            log({"step": step, "loss": 1.0})
            log({"step": step, "mean_loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 4')  # incomplete
    with open_log(path, tmp_path / "x.tensorboard", after_step=20) as log:
        log({"step": 20, "mean_loss": 0.5})
        log({"step": 30, "loss": 0.5})
    assert steps(path) == [10, 10, 20, 20, 30]
    assert json.loads(path.read_text().splitlines()[-1])["loss"] == 0.5
    with open_log(path, tmp_path / "x.tensorboard", after_step=0) as log:
        log({"step": 1})
    assert steps(path) == [1]


def test_tensorboard_gets_the_figures_if_installed(tensorboard: type[Recorder], tmp_path: Path) -> None:
    with open_log(tmp_path / "x.train.jsonl", tmp_path / "x.tensorboard", after_step=7) as log:
        log({"step": 10, "loss": 0.5, "validation": {"hm": 0.25, "unseen": None}})
    assert tensorboard.asked == [("x.tensorboard", 8), ("loss", 0.5, 10), ("validation/hm", 0.25, 10), "closed"]
