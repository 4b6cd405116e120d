"""`wikiclip bench export`: how near an export comes to the speed of its models, and what int8 gains and costs.

Throughput: shards of a made catalog through the whole export (reading, decoding, tokenising, models, writing), against
each model stage alone in a loop on chunks that are ready. The stages share the cores of a machine without a GPU, so all
three after each other are the most that any order of work can reach there; the slowest alone is what a machine has to
reach whose models run elsewhere. `python -m benchmarks.catalog_scale` exports a large catalog.

On a GPU (`--device cuda`) that, with models of the shapes of CLIP ViT-L/14 and Llama 3.2 1B in 16 bits, and what it
makes of Wikipedia's six million entities; no int8, which is for CPUs.

int8: the file that `wikiclip export --int8` writes against the float one, one image on one thread, taking turns.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.export_models import large_encoders, make_checkpoint, write_catalog, write_large_encoders
from benchmarks.generative.models import ENCODERS, open_encoder, quantised_file, write_encoder
from benchmarks.gpu import gpu_figures, sample_gpu
from benchmarks.sizing import WIKI6M_ENTITIES
from catalog import EntityRecord, read_catalog
from catalog.images import LocalImages
from demo.build import BUILD
from evaluation.metrics import RESAMPLINGS, percentile_interval
from evaluation.pages import Bar, bar_plot, page, section, table
from export.calibrate import read_queries, row_of
from export.config import ExportConfig, load_checkpoint
from export.embed import ADAPTOR_STAGE, IMAGE_STAGE, TEXT_STAGE, Embedder
from export.embed_catalog import SAMPLED_ENTITIES, read_shards
from export.engine import decode_pool, embed_shards, preparer_of
from export.int8 import catalog_images, measure_cost
from export.onnx_export import INPUT, OUTPUTS
from export.prepare import Chunk
from export.quantise import quantise
from export.sample import CatalogImages, Reservoir
from export.staging import StagingDir
from export.stream import StageTimes
from export.write import ShardWriter
from imaging import Preprocessing
from index.bundle import Bundle
from model.checkpoint import Checkpoint
from model.encoders import resolve_device
from service.encoder import OnnxEncoder

AIMED_SHARE, AIMED_SPEED, AIMED_LOSS = 0.9, 2.0, 0.5
WARM_UP_SHARDS = 1
Figures = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Setup:
    """What is exported: a catalog of `shards` of `shard_size` entities, and a checkpoint, both in `folder`."""

    models: str
    folder: Path
    shards: int
    shard_size: int
    rounds: int
    device: str

    def write(self) -> None:
        """Make them, where they are not there already."""
        if self.checkpoint.exists():
            return
        write_catalog(self.folder, self.shards * self.shard_size, words=300, size_px=320, image_every=1)
        if self.device == "cpu":
            make_checkpoint(self.checkpoint, "tiny", "minilm", width=128)
        else:
            write_large_encoders(self.folder)
            make_checkpoint(self.checkpoint, *large_encoders(self.folder), width=768, heads=12)

    def config(self, out: Path) -> ExportConfig:
        # Where an encoder of one's own lies, a checkpoint does not say.
        image_encoder, text_encoder = (None, None) if self.device == "cpu" else large_encoders(self.folder)
        return ExportConfig(
            catalog=self.folder / "catalog.jsonl", checkpoint=self.checkpoint, out=out, shard_size=self.shard_size,
            device=self.device, image_encoder=image_encoder, text_encoder=text_encoder,
        )  # fmt: skip

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"


def measure(bundle_path: Path, *, smoke: bool, device: str = "cpu", folder: Path | None = None) -> dict[str, object]:
    """Throughput, and int8 by encoder; `symbols` only where the demo's data were built.

    `folder` keeps what is exported for the next run. Raises `UserError` where there is no such device.
    """
    with TemporaryDirectory(prefix="bench.") as temporary:
        root = Path(temporary)
        kept = folder or root / "made"
        if resolve_device(device).type == "cuda":
            setup = _Setup(
                models="CLIP ViT-L/14, Llama 3.2 1B", folder=kept, shards=3, shard_size=1024, rounds=1 if smoke else 2,
                device=device,
            )  # fmt: skip
            throughput = _throughput(setup, root)
            return {"throughput": throughput, "int8_speed": {}, "int8_symbols": "not measured: int8 is for CPUs"}
        shards, shard_size, rounds = (3, 32, 1) if smoke else (4, 128, 3)
        setup = _Setup(
            models="tiny, MiniLM", folder=kept, shards=shards, shard_size=shard_size, rounds=rounds, device=device
        )
        throughput = _throughput(setup, root)
        if smoke:
            speed = {"ViT-B/32, 2 of 12 layers": _speed(root, "vit-b32-2-layers", images=4, repeats=8)}
        else:
            vits = {"ViT-B/32": "vit-b32", "ViT-B/16": "vit-b16"}
            speed = {told: _speed(root, name, images=32, repeats=30) for told, name in vits.items()}
        symbols = _symbols(bundle_path, root, queries=200 if smoke else None)
    return {"throughput": throughput, "int8_speed": speed, "int8_symbols": symbols}


def _throughput(setup: _Setup, root: Path) -> dict[str, Any]:
    setup.write()
    config = setup.config(root / "out")
    checkpoint = load_checkpoint(config, setup.device)
    counted = [*read_shards(config)][WARM_UP_SHARDS:]
    with decode_pool(config, checkpoint) as pool:
        chunks = list(preparer_of(config, checkpoint, pool, None).chunks(counted))
    entities = sum(len(shard.records) for shard in counted)
    taken: dict[str, list[float]] = {}
    gpu_samples: list[str] = []
    _alone_s(checkpoint, chunks[:1], config.batch_size)  # what is planned, compiled and allocated once
    for number in tqdm(range(setup.rounds), desc="throughput", unit="round"):
        with sample_gpu(gpu_samples):
            taken.setdefault("export", []).append(_export_s(config, checkpoint, root / f"spool{number}"))
        for stage, stage_s in _alone_s(checkpoint, chunks, config.batch_size).items():
            taken.setdefault(stage, []).append(stage_s)
    stages = [stage for stage in taken if stage != "export"]
    medians = {name: float(np.median(each)) for name, each in taken.items()}
    slowest = max(stages, key=medians.__getitem__)
    export_s, alone_s = (np.array(taken[name]) for name in ("export", slowest))
    together_s = np.sum([taken[stage] for stage in stages], axis=0)
    share = float(np.median(alone_s / export_s))
    return {
        "models": setup.models, "entities": entities, "rounds": setup.rounds, "text": "300 words",
        "image": "JPEG 320x320", "gpu": gpu_figures(gpu_samples),
        "entities_per_s": round(entities / medians["export"], 2),
        "hours_for_wikipedia": round(WIKI6M_ENTITIES * medians["export"] / entities / 3600, 2),
        "stages_alone_per_s": {stage: round(entities / medians[stage], 2) for stage in stages},
        "slowest": slowest,
        "share_of_slowest": round(share, 3),
        "share_of_all_models": round(float(np.median(together_s / export_s)), 3),
        "aim": f"{AIMED_SHARE} of the slowest: {'reached' if share >= AIMED_SHARE else 'missed'}",
    }  # fmt: skip


def _export_s(config: ExportConfig, checkpoint: Checkpoint, out: Path) -> float:
    """Seconds from the end of the shards that warm up to the last shard on disk."""
    times, spool = StageTimes(), StagingDir(out)
    spool.begin({})
    started = 0.0
    shards = embed_shards(replace(config, out=out), checkpoint, read_shards(config), times)
    with ShardWriter(spool, checkpoint.text_encoder, times) as writer, closing(shards):
        for number, embedded in enumerate(shards, start=1):
            writer.write(embedded)
            if number == WARM_UP_SHARDS:
                started = time.perf_counter()
    return time.perf_counter() - started


def _alone_s(checkpoint: Checkpoint, chunks: Sequence[Chunk], batch_size: int) -> dict[str, float]:
    """Seconds of each stage on chunks that are ready, one chunk after the other."""
    times = StageTimes()
    embedder = Embedder(checkpoint, batch_size=batch_size, times=times)
    for chunk in chunks:
        embedder.embed(chunk)
    return {stage: times.seconds[stage] for stage in (IMAGE_STAGE, TEXT_STAGE, ADAPTOR_STAGE)}


def _speed(root: Path, name: str, *, images: int, repeats: int) -> dict[str, Any]:
    """Milliseconds an image of both files of a CLIP tower of random weights, on one thread, taking turns."""
    path, _ = write_encoder(name, root / "vit")
    shape = ENCODERS[name]
    files = {"float32": path, "int8": quantised_file(path, shape.size_px, root / "vit", images=images)}
    encoders = {precision: open_encoder(file, shape, threads=1) for precision, file in files.items()}
    return _take_turns(encoders, shape.size_px, repeats)


def _take_turns(encoders: Mapping[str, OnnxEncoder], size_px: int, repeats: int) -> dict[str, Any]:
    pixels_1HW3 = np.random.default_rng(0).integers(0, 256, (1, size_px, size_px, 3), np.uint8)
    taken_ms: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(repeats):
        for name, encoder in encoders.items():
            started = time.perf_counter()
            encoder.encode(pixels_1HW3)
            taken_ms[name].append(1000 * (time.perf_counter() - started))
    drawn = np.random.default_rng(0).integers(repeats, size=(RESAMPLINGS, repeats))
    medians = {name: np.median(np.array(each)[drawn], axis=1) for name, each in taken_ms.items()}
    times = float(np.median(taken_ms["float32"]) / np.median(taken_ms["int8"]))
    low, high = percentile_interval(medians["float32"] / medians["int8"])
    return {
        "float32_ms": round(float(np.median(taken_ms["float32"])), 2),
        "int8_ms": round(float(np.median(taken_ms["int8"])), 2),
        "times": round(times, 2),
        "interval": [round(low, 2), round(high, 2)],
        "aim": f"{AIMED_SPEED} times: {'reached' if times >= AIMED_SPEED else 'missed'}",
    }


def _symbols(bundle_path: Path, root: Path, *, queries: int | None) -> dict[str, Any] | str:
    """Top-1 of the bundle's encoder in both forms on drawings that nothing was trained on, and the speed of both."""
    catalog, asked = BUILD / "catalog.jsonl", BUILD / "queries_test_clean.jsonl"
    bundle = Bundle.open(bundle_path)
    if bundle.name != "symbols" or not asked.is_file():
        return "not measured: it needs demo/bundle, and the demo's data, which `make symbols` builds"
    shape = Preprocessing.from_dict(bundle.manifest.preprocessing)
    sample: Reservoir[CatalogImages] = Reservoir(SAMPLED_ENTITIES // 2)
    for row, record in enumerate(read_catalog(catalog)):
        assert isinstance(record, EntityRecord), "the demo's own catalog has no bad record"
        sample.add(CatalogImages(row=row, images=tuple(record.images)))
    calibration = [pixels for _, pixels in catalog_images(LocalImages(), shape, sample.items)]
    quantised = root / "symbols.int8.onnx"
    quantise(bundle.image_encoder_path, quantised, np.stack(calibration), shape, input_name=INPUT)
    with bundle.store() as store:
        judged = [(row_of(query.entity_id, store), query.pixels_HW3) for query in read_queries(asked, shape, [])]
    chosen = judged if queries is None else judged[:: -(-len(judged) // queries)]
    cost = measure_cost(bundle.image_encoder_path, quantised, chosen, shape, bundle.index())
    files = {"float32": bundle.image_encoder_path, "int8": quantised}
    encoders = {
        precision: OnnxEncoder(
            file, shape, input_name=INPUT, patches_name=OUTPUTS[0], embedding_name=OUTPUTS[1],
            embedding_dim=bundle.manifest.embedding_dim, device="cpu", threads=1,
        )
        for precision, file in files.items()
    }  # fmt: skip
    lost = round(cost["top_1_float"] - cost["top_1_int8"], 2)
    return {
        "queries": len(chosen),
        "calibrated_on": len(calibration),
        **cost,
        "points_lost": lost,
        "aim": f"at most {AIMED_LOSS} points lost: {'reached' if lost <= AIMED_LOSS else 'missed'}",
        "speed": _take_turns(encoders, shape.size_px, 30),
    }


def report(figures: Figures) -> str:
    """The figures as an HTML page."""
    throughput, symbols = figures["throughput"], figures["int8_symbols"]
    bars = [Bar(name="whole export", value=throughput["entities_per_s"])]
    bars += [Bar(name=f"{stage} alone", value=each) for stage, each in throughput["stages_alone_per_s"].items()]
    said = (
        f"<p>{throughput['share_of_slowest']:.0%} of the slowest model stage alone ({throughput['slowest']}); "
        f"{throughput['share_of_all_models']:.0%} of all model stages after each other.</p>"
    )
    speed = [
        Bar(name=f"{name}, {precision}", value=each[f"{precision}_ms"])
        for name, each in figures["int8_speed"].items()
        for precision in ("float32", "int8")
    ]
    rows = [[name, f"{each['times']}", f"{each['interval'][0]} to {each['interval'][1]}"]
            for name, each in figures["int8_speed"].items()]  # fmt: skip
    accuracy = (
        f"<p>{symbols}</p>"
        if isinstance(symbols, str)
        else table(("", ""), [[key, str(value)] for key, value in symbols.items() if key != "speed"])
    )
    return page(
        "The exporter",
        section("Throughput", bar_plot(bars, title="Entities a second", x_label="entities/s"), said)
        + (
            section(
                "int8 against float32, one image on one thread",
                bar_plot(speed, title="Milliseconds an image", x_label="ms"),
                table(("encoder", "times as fast", "95 % interval"), rows),
            )
            if speed
            else ""
        )
        + section("int8 on Symbols", accuracy),
    )
