"""The engine for many machines: the stages of `export.engine` as a Ray Data pipeline (extra `ray`).

    one task reads the catalog, shard by shard -> actors that read and decode images, a CPU each
        -> actors that hold the models, a GPU each where there are any -> the driver, which writes

Chunks are those of the local engine, so the bundle is the same. A worker that dies is started anew by Ray and its
chunks are done again. All machines must see catalog, images, checkpoint, encoders and base under the same paths.
"""

from __future__ import annotations

import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from export.base import BaseEntities
from export.config import ExportConfig, load_checkpoint
from export.decode import DecodePool
from export.embed import Embedder, chunk_size
from export.embed_catalog import read_shards
from export.engine import EmbeddedShard, ShardBuilder, image_reader
from export.prepare import Chunk, Preparer, ShardRecords
from imaging import Preprocessing
from model.checkpoint import Checkpoint

Batch = dict[str, npt.NDArray[Any]]
_SHARD, _PLACE, _DATA = "shard", "place", "data"


def embed_shards_on_ray(
    config: ExportConfig,
    checkpoint: Checkpoint,
    numbers: Collection[int],
    *,
    copy_from_base: bool,
    done: Callable[[int], object] = lambda row: None,
) -> Generator[EmbeddedShard]:
    """Embed the shards of these numbers on Ray: the cluster that RAY_ADDRESS names, else this machine alone.

    Shards come in the order in which they are finished. Raises `UserError` where Ray is not installed.
    """
    ray, data = _import_ray()
    if not numbers:
        return
    import torch

    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False, logging_level="ERROR")
    try:
        resources = ray.cluster_resources()
        cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
        device = next(checkpoint.adaptor.parameters()).device.type
        embedding = max(1, gpus if device == "cuda" else cpus // 2)
        decoding = max(1, cpus - embedding)
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        prepared = data.read_datasource(_catalog_source(data, config, numbers), ray_remote_args={"num_cpus": 0})
        prepared = prepared.map_batches(
            _Prepare,
            batch_size=1,
            fn_constructor_args=(
                replace(config, base=config.base if copy_from_base else None, progress=False),
                checkpoint.image_encoder.preprocessing,
                chunk_size(checkpoint, config.batch_size),
            ),
            concurrency=(1, decoding),
            num_cpus=1,
        )
        embedded = prepared.map_batches(
            _Embed,
            batch_size=1,
            fn_constructor_args=(replace(config, device=device, progress=False), torch.get_num_threads()),
            concurrency=embedding,
            num_cpus=0 if device == "cuda" else 1,
            num_gpus=1 if device == "cuda" else 0,
        )
        yield from _gather(embedded, done)
    except Exception as error:
        if (told := _told(error)) is not None:
            raise told from error
        raise
    finally:
        if started_here:
            ray.shutdown()


@dataclass(frozen=True, kw_only=True)
class _Embedded:
    """A chunk without its pixels and texts, and what the models made of it."""

    rows: Sequence[int]
    ends: ShardRecords | None
    embeddings_BD: npt.NDArray[np.float32]
    attention: list[npt.NDArray[np.float32]]


def _gather(embedded: Any, done: Callable[[int], object]) -> Generator[EmbeddedShard]:
    """Whole shards from chunks that come in any order."""
    waiting: dict[int, dict[int, _Embedded]] = defaultdict(dict)
    lengths: dict[int, int] = {}
    entities = 0
    for batch in embedded.iter_batches(batch_size=1, batch_format="numpy"):
        number, place, chunk = int(batch[_SHARD][0]), int(batch[_PLACE][0]), pickle.loads(batch[_DATA][0])
        waiting[number][place] = chunk
        if chunk.ends is not None:
            lengths[number] = place + 1
        if len(waiting[number]) == lengths.get(number):
            chunks, builder = waiting.pop(number), ShardBuilder()
            for each in (chunks[place] for place in sorted(chunks)):
                shard = builder.add(each.rows, each.ends, each.embeddings_BD, each.attention)
            assert shard is not None, "the last chunk ends it"
            entities += len(shard.records.entities)
            done(entities - 1)
            yield shard


class _Prepare:
    """Shards to chunks, in a worker that may be on any machine. Images are decoded in a process of its own."""

    def __init__(self, config: ExportConfig, preprocessing: Preprocessing, size: int) -> None:
        pool = DecodePool(image_reader(config), preprocessing, thumbnail_px=config.thumbnail_px, workers=1)
        base = None if config.base is None else BaseEntities(config.base)
        self._preparer = Preparer(pool, _Untouched(), chunk_size=size, store_text=config.store_text, base=base)

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        shard = pickle.loads(batch[_DATA][0])
        for place, chunk in enumerate(self._preparer.chunks([shard])):
            yield _batch(shard.number, place, chunk)


class _Untouched:
    """Leaves texts as they are: whoever decodes images need not hold a language model to know its tokens."""

    def tokenize(self, texts: Sequence[str]) -> Any:
        return list(texts)


class _Embed:
    """Chunks through the models, in a worker that may be on any machine."""

    def __init__(self, config: ExportConfig, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)  # as in one process: with another number sums may be rounded otherwise
        checkpoint = load_checkpoint(config, config.device)
        self._text_encoder = checkpoint.text_encoder
        self._embedder = Embedder(checkpoint, batch_size=config.batch_size, listen=config.store_text)

    def __call__(self, batch: Batch) -> Batch:
        chunk: Chunk = pickle.loads(batch[_DATA][0])
        texts: Any = chunk.tokens
        embedded = self._embedder.embed(replace(chunk, tokens=self._text_encoder.tokenize(texts)))
        result = _Embedded(
            rows=chunk.rows, ends=chunk.ends, embeddings_BD=embedded.embeddings_BD, attention=embedded.attention
        )
        return _batch(int(batch[_SHARD][0]), int(batch[_PLACE][0]), result)


def _batch(shard: int, place: int, content: object) -> Batch:
    """One row. Ray's blocks hold columns of plain values, so what is ours goes in as bytes."""
    data = np.empty(1, object)
    data[0] = pickle.dumps(content, protocol=5)
    return {_SHARD: np.array([shard]), _PLACE: np.array([place]), _DATA: data}


def _catalog_source(data: Any, config: ExportConfig, numbers: Collection[int]) -> Any:
    """The shards of these numbers as a source of Ray Data, read by one task: a catalog can only be read in order."""
    from ray.data.block import BlockMetadata

    wanted = frozenset(numbers)

    class CatalogSource(data.Datasource):  # type: ignore[misc]
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
            metadata = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
            return [data.ReadTask(lambda: _read_blocks(config, wanted), metadata)]

    return CatalogSource()


def _read_blocks(config: ExportConfig, wanted: frozenset[int]) -> Iterable[Any]:
    import pyarrow

    for shard in read_shards(config):
        if shard.number in wanted:
            row = {_SHARD: [shard.number], _PLACE: [0], _DATA: [pickle.dumps(shard, protocol=5)]}
            yield pyarrow.table(row, schema=pyarrow.schema(
                [(_SHARD, pyarrow.int64()), (_PLACE, pyarrow.int64()), (_DATA, pyarrow.large_binary())]
            ))  # fmt: skip


def _import_ray() -> tuple[Any, Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError("--engine ray needs Ray; install it with `pip install 'wikiclip-serve[ray]'`") from None
    return ray, ray.data


def _told(error: BaseException | None) -> UserError | None:
    """What a worker had to say to the user, out of what Ray wraps around it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, UserError) and type(error).__module__ == UserError.__module__:
            error.args = (str(error).splitlines()[0],)  # Ray puts advice of its own below
            return error
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None
