"""The local engine: shards through the models on this machine, image encoder, text encoder and adaptor in batches.

Shapes: B samples of a chunk, J those with an image and a blank one, P patches, C patch channels, T text tokens,
D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing

import numpy as np
import numpy.typing as npt
import torch

from export.config import ExportConfig
from export.model import ExportModel, ImageModel
from export.prepare import Chunk, decode_pool, prepare_chunks
from export.reuse import BaseEntities
from export.shards import EmbeddedChunk, EmbeddedShard, Shard, StageTimes, join_chunks, prefetch
from model.adaptor import EntityBatch, embed_with_attention
from model.checkpoint import Checkpoint

WAITING = "waiting for images and texts"
IMAGE_STAGE, TEXT_STAGE, ADAPTOR_STAGE = "image encoder", "text encoder", "adaptor"
_CHUNKS_AHEAD = 2
_CHUNK_BYTES = 512 * 1024 * 1024  # of features
_MAX_CHUNK_BATCHES = 32  # larger chunks are not faster


def embed_shards(
    config: ExportConfig,
    model: ExportModel,
    shards: Iterable[Shard],
    times: StageTimes,
    *,
    base: BaseEntities | None = None,
    on_row: Callable[[int], object] = lambda row: None,
) -> Generator[EmbeddedShard]:
    """Embed shards in order, while a thread prepares the next chunks.

    Unchanged entities of `base` are copied. `on_row` is called with the last entity row of each embedded chunk.
    """
    embedder = open_embedder(config, model, times)
    tokenize = model.text_encoder.tokenize if model.text_encoder else list
    with decode_pool(config, model.image_encoder.preprocessing) as pool:
        size = chunk_size(model, config.batch_size)
        prepared = prepare_chunks(config, pool, tokenize, shards, chunk_size=size, base=base)
        embedded: list[EmbeddedChunk] = []
        with closing(prefetch(prepared, _CHUNKS_AHEAD)) as chunks:
            while (chunk := times.next(WAITING, chunks)) is not None:
                embedded.append(embedder.embed(chunk))
                if chunk.rows:
                    on_row(chunk.rows[-1])
                if chunk.ends is not None:
                    yield join_chunks(embedded)
                    embedded = []


def chunk_size(model: ExportModel, batch_size: int) -> int:
    """Return the samples per chunk, a multiple of `batch_size`: enough to sort texts by length, limited by memory."""
    image, text = model.image_encoder, model.text_encoder
    bytes_per_sample = 4 * (image.patches * image.patch_dim + (text.max_tokens * text.dim if text else 0))
    batches = _CHUNK_BYTES // max(1, bytes_per_sample * batch_size)
    return batch_size * max(1, min(_MAX_CHUNK_BATCHES, batches))


def open_embedder(
    config: ExportConfig, model: ExportModel, times: StageTimes | None = None
) -> Embedder | ImageEmbedder:
    """Return what embeds chunks with the model."""
    if isinstance(model, ImageModel):
        return ImageEmbedder(model, batch_size=config.batch_size, times=times)
    record = config.store_text and model.adaptor.has_learned()
    return Embedder(model, batch_size=config.batch_size, record_attention=record, times=times)


class ImageEmbedder:
    """Embeds the images of chunks, and drops samples without one."""

    def __init__(self, model: ImageModel, *, batch_size: int, times: StageTimes | None = None) -> None:
        self._model = model
        self._batch_size = batch_size
        self._times = times or StageTimes()

    def embed(self, chunk: Chunk) -> EmbeddedChunk:
        """Return the embeddings of a chunk's images, in order."""
        samples = zip(chunk.rows, chunk.pixels, strict=True)
        images = [(row, pixels) for row, pixels in samples if pixels is not None]
        batches = [np.empty((0, self._model.image_encoder.embedding_dim), np.float32)]
        with self._times.measure(IMAGE_STAGE):
            for start in range(0, len(images), self._batch_size):
                batch = images[start : start + self._batch_size]
                batches.append(self._model.embed_queries(np.stack([pixels for _, pixels in batch])))
        return EmbeddedChunk(rows=[row for row, _ in images], embeddings_BD=np.concatenate(batches), ends=chunk.ends)


class Embedder:
    """Embeds chunks with a checkpoint. The result depends only on the chunk and on `batch_size`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        batch_size: int,
        record_attention: bool = False,
        times: StageTimes | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._batch_size = batch_size
        self._record_attention = record_attention
        self._times = times or StageTimes()
        self._device = checkpoint.device

    @torch.no_grad()
    def embed(self, chunk: Chunk) -> EmbeddedChunk:
        """Return the embeddings of a chunk's samples, in order."""
        embeddings_BD = np.empty((len(chunk.rows), self._checkpoint.image_encoder.embedding_dim), np.float32)
        if not chunk.rows:
            return EmbeddedChunk(rows=(), embeddings_BD=embeddings_BD, ends=chunk.ends)
        with self._times.measure(IMAGE_STAGE):
            patch_tokens_JPC, image_embedding_JD = self._encode_images(chunk)
        with self._times.measure(TEXT_STAGE):
            text = self._checkpoint.text_encoder.encode_tokens(chunk.tokens)
            self._synchronize()
        attention: dict[int, npt.NDArray[np.float32]] = {}  # by sample
        with self._times.measure(ADAPTOR_STAGE):
            has_image_B = np.array([pixels is not None for pixels in chunk.pixels])
            image_of_B = np.where(has_image_B, np.cumsum(has_image_B) - 1, -1)
            text_of_B = np.array(chunk.text_of)
            lengths = [len(chunk.tokens[number]) for number in chunk.text_of]
            by_length = sorted(range(len(chunk.rows)), key=lengths.__getitem__)
            for start in range(0, len(by_length), self._batch_size):
                batch = by_length[start : start + self._batch_size]
                longest = lengths[batch[-1]]
                inputs = EntityBatch(
                    patch_tokens_JPC[image_of_B[batch]],
                    torch.from_numpy(has_image_B[batch]).to(self._device),
                    text.text_tokens_BTC[text_of_B[batch], :longest].to(self._device),
                    text.mask_BT[text_of_B[batch], :longest].to(self._device),
                    image_embedding_JD[image_of_B[batch]],
                )
                batch_BD: torch.Tensor
                if self._record_attention:
                    batch_BD, weights_BT = embed_with_attention(self._checkpoint.adaptor, inputs)
                    for sample, weights_T in zip(batch, weights_BT.float().cpu().numpy(), strict=True):
                        attention[sample] = weights_T[: lengths[sample]].copy()
                else:
                    batch_BD = self._checkpoint.adaptor(*inputs)
                embeddings_BD[batch] = batch_BD.float().cpu().numpy()
        return EmbeddedChunk(
            rows=chunk.rows,
            embeddings_BD=embeddings_BD,
            attention=[attention[sample] for sample in sorted(attention)],
            ends=chunk.ends,
        )

    def _encode_images(self, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Return patch tokens [J, P, C] and embeddings [J, D] of samples with an image, then zeros for the others."""
        images = [pixels for pixels in chunk.pixels if pixels is not None]
        encoder, size = self._checkpoint.image_encoder, self._batch_size
        batches = [encoder.encode(np.stack(images[start : start + size])) for start in range(0, len(images), size)]
        tokens = [batch.patch_tokens_BPC.to(self._device) for batch in batches]
        tokens.append(torch.zeros(1, encoder.patches, encoder.patch_dim, device=self._device))
        embeddings = [batch.image_embedding_BD.to(self._device) for batch in batches]
        embeddings.append(torch.zeros(1, encoder.embedding_dim, device=self._device))
        self._synchronize()
        return torch.cat(tokens), torch.cat(embeddings)

    def _synchronize(self) -> None:
        """Wait for the GPU, so that its time is counted in the stage that used it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
