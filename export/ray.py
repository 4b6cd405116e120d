"""The engine for several machines: the stages of `export.local` as a Ray Data pipeline (extra `ray`).

    a task reads the catalog -> actors decode images, on a CPU each -> actors run the models, on a GPU each if there are
    any -> the driver writes

Chunks are those of the local engine, so the bundle is the same. Ray restarts workers that die and repeats their chunks.
Catalog, images, checkpoint, encoders and base need the same paths on all machines.
"""

from __future__ import annotations

import os
import pickle
from collections import defaultdict
from collections.abc import Collection, Generator, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from core.errors import UserError, needed_by
from export.config import ExportConfig
from export.local import chunk_size, open_embedder
from export.model import ExportModel, load_model
from export.prepare import Chunk, decode_pool, prepare_chunks
from export.reuse import BaseEntities
from export.shards import EmbeddedChunk, EmbeddedShard, join_chunks, read_shards
from imaging import Preprocessing

Batch = dict[str, npt.NDArray[Any]]
_SHARD, _PLACE, _DATA = "shard", "place", "data"


def embed_shards_on_ray(
    config: ExportConfig, model: ExportModel, numbers: Collection[int], *, copy_from_base: bool
) -> Generator[EmbeddedShard]:
    """Embed the shards of these numbers, in any order, on the cluster at RAY_ADDRESS or on this machine.

    Raises `MissingExtra` if Ray is not installed.
    """
    ray, data = _import_ray()
    if not numbers:
        return
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False, logging_level="ERROR")
    try:
        resources = ray.cluster_resources()
        cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
        device = model.device.type
        embedders = max(1, gpus if device == "cuda" else cpus // 2)
        data.DataContext.get_current().enable_progress_bars = False
        prepared = data.read_datasource(_catalog_source(data, config, numbers), ray_remote_args={"num_cpus": 0})
        prepared = prepared.map_batches(
            _Prepare,
            batch_size=1,
            fn_constructor_args=(
                replace(config, base=config.base if copy_from_base else None, progress=False),
                model.image_encoder.preprocessing,
                chunk_size(model, config.batch_size),
            ),
            concurrency=(1, max(1, cpus - embedders)),
            num_cpus=1,
        )
        embedded = prepared.map_batches(
            _Embed,
            batch_size=1,
            fn_constructor_args=(replace(config, device=device, progress=False), torch.get_num_threads()),
            concurrency=embedders,
            num_cpus=0 if device == "cuda" else 1,
            num_gpus=1 if device == "cuda" else 0,
        )
        yield from _join(embedded)
    except Exception as error:
        if (user_error := _find_user_error(error)) is not None:
            raise user_error from error
        raise
    finally:
        if started_here:
            ray.shutdown()


def _join(embedded: Any) -> Generator[EmbeddedShard]:
    """Yield each shard once all of its chunks have arrived."""
    waiting: dict[int, dict[int, EmbeddedChunk]] = defaultdict(dict)
    lengths: dict[int, int] = {}
    for batch in embedded.iter_batches(batch_size=1, batch_format="numpy"):
        number, place, chunk = int(batch[_SHARD][0]), int(batch[_PLACE][0]), pickle.loads(batch[_DATA][0])
        waiting[number][place] = chunk
        if chunk.ends is not None:
            lengths[number] = place + 1
        if len(waiting[number]) == lengths.get(number):
            chunks = waiting.pop(number)
            yield join_chunks([chunks[place] for place in sorted(chunks)])


class _Prepare:
    """Worker that turns shards into chunks. It decodes images in one process of its own."""

    def __init__(self, config: ExportConfig, preprocessing: Preprocessing, size: int) -> None:
        pool = decode_pool(replace(config, workers=1), preprocessing)
        base = None if config.base is None else BaseEntities(config.base)
        self._chunks = partial(prepare_chunks, config, pool, list, chunk_size=size, base=base)

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        shard = pickle.loads(batch[_DATA][0])
        for place, chunk in enumerate(self._chunks([shard])):
            yield _batch(shard.number, place, chunk)


class _Embed:
    """Worker that embeds chunks."""

    def __init__(self, config: ExportConfig, threads: int) -> None:
        torch.set_num_threads(threads)  # the thread count affects rounding
        model = load_model(config, torch.device(config.device))
        self._text_encoder = model.text_encoder
        self._embedder = open_embedder(config, model)

    def __call__(self, batch: Batch) -> Batch:
        chunk: Chunk = pickle.loads(batch[_DATA][0])
        if self._text_encoder is not None:
            texts: Any = chunk.tokens
            chunk = replace(chunk, tokens=self._text_encoder.tokenize(texts))
        embedded = self._embedder.embed(chunk)
        return _batch(int(batch[_SHARD][0]), int(batch[_PLACE][0]), embedded)


def _batch(shard: int, place: int, content: object) -> Batch:
    """Return a row for Ray. Its blocks have columns of plain values, so the content is pickled."""
    data = np.empty(1, object)
    data[0] = pickle.dumps(content, protocol=5)
    return {_SHARD: np.array([shard]), _PLACE: np.array([place]), _DATA: data}


def _catalog_source(data: Any, config: ExportConfig, numbers: Collection[int]) -> Any:
    """Return a Ray Data source of the shards of these numbers. One task reads it, because a catalog is sequential."""
    from ray.data.block import BlockMetadata

    class CatalogSource(data.Datasource):  # type: ignore[misc]
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
            metadata = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
            return [data.ReadTask(lambda: _read_blocks(config, frozenset(numbers)), metadata)]

    return CatalogSource()


def _read_blocks(config: ExportConfig, numbers: frozenset[int]) -> Iterable[Any]:
    import pyarrow

    columns = {_SHARD: pyarrow.int64(), _PLACE: pyarrow.int64(), _DATA: pyarrow.large_binary()}
    for shard in read_shards(config):
        if shard.number in numbers:
            row = {_SHARD: [shard.number], _PLACE: [0], _DATA: [pickle.dumps(shard, protocol=5)]}
            yield pyarrow.table(row, schema=pyarrow.schema(columns))


def _import_ray() -> tuple[Any, Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics
    with needed_by("--engine ray"):
        import ray
        import ray.data
    return ray, ray.data


def _find_user_error(error: BaseException | None) -> UserError | None:
    """Find a worker's `UserError` among the exceptions that Ray wraps around it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, UserError) and not type(error).__module__.startswith("ray."):
            error.args = (str(error).splitlines()[0],)  # Ray appends further lines
            return error
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None
