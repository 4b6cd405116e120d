"""`wikiclip bench export`: the speed of an export relative to its models alone, and what int8 gains and costs.

Throughput: shards of a synthetic catalog through the whole export (read, decode, tokenise, models, write), and each
model stage alone on chunks in memory. Without a GPU the stages share the cores, so an export can at most be as fast as
the three stages one after another. A machine whose models run elsewhere has to keep up with the slowest stage alone.
With `--device cuda` the models have the shapes of CLIP ViT-L/14 and Llama 3.2 1B in 16 bits, and the figures include
the time for Wikipedia's six million entities. `python -m benchmarks.catalog_scale` exports a large catalog.

int8: the file that `wikiclip export --int8` writes in turn with the float file, one image on one thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm

from benchmarks.generative.models import ENCODERS, open_encoder, quantised_file, write_encoder
from benchmarks.measure import Probe, gpu_figures, ratio_interval, sample, sample_gpu
from benchmarks.synthetic import photograph
from catalog import EntityRecord, read_catalog
from catalog.images import ImageReader
from demo.build import BUILD
from evaluation.pages import Bars, Report
from export.calibrate import read_queries, row_of
from export.config import ExportConfig, load_checkpoint
from export.local import ADAPTOR_STAGE, IMAGE_STAGE, TEXT_STAGE, Embedder, chunk_size, embed_shards
from export.pipeline import SAMPLED_ENTITIES
from export.precision import catalog_images, measure_cost, quantise
from export.prepare import Chunk, decode_pool, prepare_chunks
from export.shards import EntityImages, Reservoir, StageTimes, read_shards
from export.staging import StagingDir, write_shards
from imaging import Preprocessing
from index.bundle import Bundle
from model.adaptor import Adaptor, AdaptorConfig
from model.checkpoint import Checkpoint, save_checkpoint
from model.encoders import open_image_encoder, open_text_encoder, resolve_device

_WARM_UP_SHARDS = 1
_WORDS = ("river", "stone", "tower", "bird", "market", "north", "island", "castle", "music", "harbour", "forest", "sea")
WIKI6M_ENTITIES = 6_063_945
_IMAGES = 1000  # different ones; a larger catalog repeats them
REPORT = Report(
    title="The exporter",
    plots=(
        Bars(
            title="Throughput", label="entities/s",
            values=("throughput/entities_per_s", "throughput/stages_alone_per_s/*"),
        ),
        Bars(
            title="int8 and float32, one image on one thread", label="ms",
            values=("int8_speed/*/float32_ms", "int8_speed/*/int8_ms"),
        ),
    ),
)  # fmt: skip


# ---- synthetic catalogs and checkpoints ----


def write_catalog(folder: Path, records: int, *, words: int, size_px: int, image_every: int) -> Path:
    """Write a catalog of entities with texts of `words` words. Each `image_every`th has an image of `size_px`."""
    (folder / "images").mkdir(parents=True)
    for number in range(min(_IMAGES, -(-records // image_every))):
        (folder / "images" / f"{number}.jpg").write_bytes(photograph(number, size_px, size_px))
    rng = np.random.default_rng(0)
    path = folder / "catalog.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(records):
            has_image = number % image_every == 0
            row = {
                "entity_id": f"Q{number}",
                "title": f"Thing {number}",
                "text": f"Thing {number}. " + " ".join(rng.choice(_WORDS, words)),
                "images": [f"images/{number // image_every % _IMAGES}.jpg"] if has_image else [],
            }
            file.write(json.dumps(row) + "\n")
    return path


def make_checkpoint(folder: Path, image_encoder: str, text_encoder: str, *, width: int, heads: int = 2) -> Path:
    """Write a checkpoint with a random adaptor for two encoder specs."""
    image, text = open_image_encoder(image_encoder), open_text_encoder(text_encoder)
    config = AdaptorConfig(
        patch_dim=image.patch_dim, text_dim=text.dim, embedding_dim=image.embedding_dim, width=width, layers=2,
        heads=heads,
    )  # fmt: skip
    torch.manual_seed(0)
    save_checkpoint(
        folder, adaptor=Adaptor(config), logit_scale=10.0, image_encoder=image, text_encoder=text, training={}
    )
    return folder


def write_tokenizer(folder: Path) -> int:
    """Write a tokenizer with one token per word. Return the size of its vocabulary."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(("[UNK]", *_WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return len(vocabulary)


def _write_large_encoders(folder: Path) -> None:
    """Write random encoders of the shapes of CLIP ViT-L/14 and Llama 3.2 1B, in 16 bits."""
    from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection, LlamaConfig, LlamaModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    text = LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(ENCODERS["vit-l14"].config()).half().save_pretrained(folder / "image")
    CLIPImageProcessorPil().save_pretrained(folder / "image")
    LlamaModel(text).bfloat16().save_pretrained(folder / "text")
    write_tokenizer(folder / "text")


def _write_inputs(folder: Path, shards: int, shard_size: int, device: str) -> ExportConfig:
    """Write a catalog of `shards` and a checkpoint unless they exist. Return the settings of an export."""
    checkpoint, image_encoder, text_encoder = folder / "checkpoint", "tiny", "minilm"
    if device != "cpu":
        image_encoder, text_encoder = f"hf:{folder / 'image'}", f"hf:{folder / 'text'}"
    if not checkpoint.exists():
        write_catalog(folder, shards * shard_size, words=300, size_px=320, image_every=1)
        if device == "cpu":
            make_checkpoint(checkpoint, image_encoder, text_encoder, width=128)
        else:
            _write_large_encoders(folder)
            make_checkpoint(checkpoint, image_encoder, text_encoder, width=768, heads=12)
    return ExportConfig(
        catalog=folder / "catalog.jsonl", checkpoint=checkpoint, out=folder / "out", shard_size=shard_size,
        device=device, image_encoder=image_encoder, text_encoder=text_encoder,
    )  # fmt: skip


# ---- measuring ----


def measure(bundle_path: Path, *, smoke: bool, device: str = "cpu", folder: Path | None = None) -> dict[str, object]:
    """Return throughput and the effect of int8; `int8_symbols` only if the demo's data were built.

    `folder` keeps catalog and checkpoint for the next run. Raise `UserError` if the device does not exist.
    """
    gpu = resolve_device(device).type == "cuda"
    shards, shard_size, rounds = (3, 1024, 2) if gpu else (3, 32, 1) if smoke else (4, 128, 3)
    with TemporaryDirectory(prefix="bench.") as temporary:
        root = Path(temporary)
        config = _write_inputs(folder or root / "made", shards, shard_size, device)
        throughput = _throughput(config, root, 1 if smoke else rounds)
        if gpu:
            reason = "not measured: int8 is for CPUs"
            return {"throughput": throughput, "int8_speed": {}, "int8_symbols": reason}
        names = ("vit-b32-2-layers",) if smoke else ("vit-b32", "vit-b16")
        images, repeats = (4, 8) if smoke else (32, 30)
        return {
            "throughput": throughput,
            "int8_speed": {name: _int8_speed(root, name, images=images, repeats=repeats) for name in names},
            "int8_symbols": _int8_symbols(bundle_path, root, queries=200 if smoke else None),
        }


def _throughput(config: ExportConfig, root: Path, rounds: int) -> dict[str, Any]:
    checkpoint = load_checkpoint(config, config.device)
    counted = [*read_shards(config)][_WARM_UP_SHARDS:]
    with decode_pool(config, checkpoint.image_encoder.preprocessing) as pool:
        size = chunk_size(checkpoint, config.batch_size)
        chunks = list(prepare_chunks(config, pool, checkpoint.text_encoder, counted, chunk_size=size))
    entities = sum(len(shard.records) for shard in counted)
    seconds: dict[str, list[float]] = {}
    gpu_samples: list[str] = []
    _stage_seconds(checkpoint, chunks[:1], config.batch_size)  # warm up
    for number in tqdm(range(rounds), desc="throughput", unit="round"):
        with sample_gpu(gpu_samples):
            seconds.setdefault("export", []).append(_export_seconds(config, checkpoint, root / f"staging{number}"))
        for stage, stage_s in _stage_seconds(checkpoint, chunks, config.batch_size).items():
            seconds.setdefault(stage, []).append(stage_s)
    stages = [stage for stage in seconds if stage != "export"]
    medians = {name: float(np.median(each)) for name, each in seconds.items()}
    slowest = max(stages, key=medians.__getitem__)
    export_s = np.array(seconds["export"])
    share = float(np.median(np.array(seconds[slowest]) / export_s))
    share_of_all = float(np.median(np.sum([seconds[stage] for stage in stages], axis=0) / export_s))
    return {
        "models": "tiny, MiniLM" if config.device == "cpu" else "CLIP ViT-L/14, Llama 3.2 1B",
        "entities": entities,
        "rounds": rounds,
        "text": "300 words",
        "image": "JPEG 320x320",
        "gpu": gpu_figures(gpu_samples),
        "entities_per_s": round(entities / medians["export"], 2),
        "hours_for_wikipedia": round(WIKI6M_ENTITIES * medians["export"] / entities / 3600, 2),
        "stages_alone_per_s": {stage: round(entities / medians[stage], 2) for stage in stages},
        "slowest": slowest,
        "share_of_slowest": round(share, 3),
        "share_of_all_models": round(share_of_all, 3),
    }


def _export_seconds(config: ExportConfig, checkpoint: Checkpoint, out: Path) -> float:
    """Return the seconds from the end of the warm-up shards to the last shard on disk."""
    times, staging = StageTimes(), StagingDir(out)
    staging.begin({})
    started = 0.0
    shards = embed_shards(replace(config, out=out), checkpoint, read_shards(config), times)
    for number, _ in enumerate(write_shards(config, checkpoint, staging, shards, times), start=1):
        if number == _WARM_UP_SHARDS:
            started = time.perf_counter()
    return time.perf_counter() - started


def _stage_seconds(checkpoint: Checkpoint, chunks: Sequence[Chunk], batch_size: int) -> dict[str, float]:
    """Return the seconds of each model stage on prepared chunks."""
    times = StageTimes()
    embedder = Embedder(checkpoint, batch_size=batch_size, times=times)
    for chunk in chunks:
        embedder.embed(chunk)
    return {stage: times.seconds[stage] for stage in (IMAGE_STAGE, TEXT_STAGE, ADAPTOR_STAGE)}


def _int8_speed(root: Path, name: str, *, images: int, repeats: int) -> dict[str, Any]:
    """Time a random CLIP tower in float32 and int8."""
    path, _ = write_encoder(name, root / "vit")
    shape = ENCODERS[name]
    files = {"float32": path, "int8": quantised_file(path, shape.size_px, root / "vit", images=images)}
    encoders = {precision: open_encoder(file, shape, threads=1) for precision, file in files.items()}
    pixels_1HW3 = np.random.default_rng(0).integers(0, 256, (1, shape.size_px, shape.size_px, 3), np.uint8)

    def probe(precision: str) -> Probe:
        return Probe(name=precision, call=lambda _: encoders[precision].encode(pixels_1HW3))

    metrics = sample([probe(precision) for precision in encoders], rounds=repeats, moment_s=0, description="int8")
    float_ms, int8_ms = (metrics[precision].samples for precision in ("float32", "int8"))
    return {
        "float32_ms": round(float(np.median(float_ms)), 2),
        "int8_ms": round(float(np.median(int8_ms)), 2),
        "times": round(float(np.median(float_ms) / np.median(int8_ms)), 2),
        "interval": ratio_interval(float_ms, int8_ms),
    }


def _int8_symbols(bundle_path: Path, root: Path, *, queries: int | None) -> dict[str, Any] | str:
    """Return the top-1 of the bundle's encoder in float and int8 on held-out drawings."""
    catalog, query_file = BUILD / "catalog.jsonl", BUILD / "queries_test_clean.jsonl"
    bundle = Bundle.open(bundle_path)
    if bundle.name != "symbols" or not query_file.is_file():
        return "not measured: it needs demo/bundle, and the demo's data, which `make symbols` builds"
    preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
    reservoir: Reservoir[EntityImages] = Reservoir(SAMPLED_ENTITIES // 2)
    for row, record in enumerate(read_catalog(catalog)):
        assert isinstance(record, EntityRecord), "the demo's own catalog has no bad record"
        reservoir.add((row, tuple(record.images)))
    calibration = [pixels for _, pixels in catalog_images(ImageReader(), preprocessing, reservoir.items)]
    quantised = root / "symbols.int8.onnx"
    quantise(bundle.image_encoder_path, quantised, calibration, preprocessing)
    with bundle.store() as store:
        labelled = [(row_of(q.entity_id, store), q.pixels_HW3) for q in read_queries(query_file, preprocessing, [])]
    chosen = labelled if queries is None else labelled[:: -(-len(labelled) // queries)]
    cost = measure_cost(bundle.image_encoder_path, quantised, chosen, preprocessing, bundle.index())
    return {"queries": len(chosen), "calibrated_on": len(calibration), **cost}
