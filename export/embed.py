"""Chunks through the models: image encoder, text encoder and adaptor, each in batches of its own size.

Shapes: B samples of a chunk, I those with an image, P patches, C patch channels, U distinct texts, T text tokens,
L text channels, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from export.prepare import Chunk
from export.stream import StageTimes
from model.adaptor import embed_with_attention
from model.checkpoint import Checkpoint

_CHUNK_BYTES = 512 * 1024 * 1024  # of features, whatever the models' widths
_CHUNKS_BATCHES = 32  # at most: more gains nothing
IMAGE_STAGE, TEXT_STAGE, ADAPTOR_STAGE = "image encoder", "text encoder", "adaptor"


@dataclass(frozen=True, kw_only=True)
class EmbeddedChunk:
    """`embeddings_BD` float32, L2-normalised. Of an embedder that listens, also `attention`: for each sample the
    weight float32 [T] of each token of its text.
    """

    embeddings_BD: npt.NDArray[np.float32]
    attention: list[npt.NDArray[np.float32]] = field(default_factory=list)


def chunk_size(checkpoint: Checkpoint, batch_size: int) -> int:
    """How many samples pass together, a multiple of `batch_size`: enough to sort texts by length, within memory."""
    image, text = checkpoint.image_encoder, checkpoint.text_encoder
    bytes_per_sample = 4 * (image.patches * image.patch_dim + text.max_tokens * text.dim)
    batches = _CHUNK_BYTES // (bytes_per_sample * batch_size)
    return batch_size * max(1, min(_CHUNKS_BATCHES, batches))


class Embedder:
    """Embeds chunks. The result depends on the chunk and on `batch_size`, and on nothing that came before.

    With `listen` it also tells what the adaptor attended to in each text.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, batch_size: int, listen: bool = False, times: StageTimes | None = None
    ) -> None:
        self._checkpoint = checkpoint
        self._batch_size = batch_size
        self._listen = listen
        self._times = times or StageTimes()
        self._device = next(checkpoint.adaptor.parameters()).device

    @torch.no_grad()
    def embed(self, chunk: Chunk) -> EmbeddedChunk:
        """The embeddings of a chunk's samples, in order."""
        embeddings_BD = np.empty((len(chunk.rows), self._checkpoint.image_encoder.embedding_dim), np.float32)
        if not chunk.rows:
            return EmbeddedChunk(embeddings_BD=embeddings_BD)
        attention: dict[int, npt.NDArray[np.float32]] = {}  # by sample
        with self._times.measure(IMAGE_STAGE):
            patch_tokens_IPC = self._encode_images(chunk)
        with self._times.measure(TEXT_STAGE):
            text = self._checkpoint.text_encoder.encode_tokens(chunk.tokens)
            self._settle()
        with self._times.measure(ADAPTOR_STAGE):
            image_of = np.cumsum([pixels is not None for pixels in chunk.pixels]) - 1
            lengths = [len(chunk.tokens[number]) for number in chunk.text_of]
            by_length = sorted(range(len(chunk.rows)), key=lengths.__getitem__)
            for start in range(0, len(by_length), self._batch_size):
                batch = by_length[start : start + self._batch_size]
                longest = lengths[batch[-1]]
                image_mask_B = torch.tensor([chunk.pixels[sample] is not None for sample in batch], device=self._device)
                patch_tokens_BPC = self._blank_patches(len(batch))
                patch_tokens_BPC[image_mask_B] = patch_tokens_IPC[
                    [int(image_of[sample]) for sample in batch if chunk.pixels[sample] is not None]
                ]
                text_of_B = torch.tensor([chunk.text_of[sample] for sample in batch], device=self._device)
                inputs = (
                    patch_tokens_BPC,
                    image_mask_B,
                    text.text_tokens_BTC[:, :longest].to(self._device)[text_of_B],
                    text.mask_BT[:, :longest].to(self._device)[text_of_B],
                )
                batch_BD: torch.Tensor
                if self._listen:
                    batch_BD, weights_BT = embed_with_attention(self._checkpoint.adaptor, *inputs)
                    for sample, weights_T in zip(batch, weights_BT.float().cpu().numpy(), strict=True):
                        attention[sample] = weights_T[: lengths[sample]].copy()
                else:
                    batch_BD = self._checkpoint.adaptor(*inputs)
                embeddings_BD[batch] = batch_BD.float().cpu().numpy()
        return EmbeddedChunk(embeddings_BD=embeddings_BD, attention=[attention[sample] for sample in sorted(attention)])

    def _encode_images(self, chunk: Chunk) -> torch.Tensor:
        """Patch tokens [I, P, C] of the samples that have an image, in order."""
        images = [pixels for pixels in chunk.pixels if pixels is not None]
        encoder, size = self._checkpoint.image_encoder, self._batch_size
        batches = [
            encoder.encode(np.stack(images[start : start + size])).patch_tokens_BPC.to(self._device)
            for start in range(0, len(images), size)
        ]
        self._settle()
        return torch.cat(batches) if batches else self._blank_patches(0)

    def _blank_patches(self, count: int) -> torch.Tensor:
        encoder = self._checkpoint.image_encoder
        return torch.zeros(count, encoder.patches, encoder.patch_dim, device=self._device)

    def _settle(self) -> None:
        """Wait for the GPU, so that the time it took counts where it was asked to work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
