"""The Vision-Guided Knowledge Adaptor (VGKA): patch tokens attend to text tokens; their mean is the entity embedding.

A Transformer decoder over frozen features, `V' = FFN(MHA(P, T, T))` in the paper, then the mean over patches, projected
into the space of the query embedding and L2-normalised. It is the only part that is trained.

The paper leaves two details open, which `AdaptorConfig` sets: self-attention among the patches (default off, as in the
formula) and pre- or post-norm (default pre). Three parts are not in the paper. A LayerNorm precedes both input
projections, because some channels of language models are far larger than the rest. Learned null tokens replace a
missing image or text. What is learned is added to a start: the image's own embedding, mixed with what a ridge
regression predicts from the text.

Shapes: B batch, P patches, T text tokens, C patch channels, L text channels, W width inside, D embedding, N null
tokens, Q queries, K keys, H heads, E = W / H.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AdaptorConfig:
    """The sizes and options of an adaptor. Raises `UserError` if they contradict each other."""

    patch_dim: int  # C
    text_dim: int  # L
    embedding_dim: int  # D
    width: int = 256  # W
    layers: int = 2
    heads: int = 8
    ffn_ratio: float = 4.0
    norm: str = "pre"  # or post
    self_attention: bool = False
    dropout: float = 0.0
    residual: bool = True  # add the start to the output; the output layer starts at zero
    start: Literal["patches", "image"] = "patches"  # the mean patch token (checkpoints of 0.1), or image and ridge
    null_patch_tokens: int = 8  # N: queries in place of a missing image
    centre: bool = False  # subtract the mean query embedding from queries and entities

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"adaptor: width {self.width} must be a multiple of heads {self.heads}; change one of them")
        if self.residual and self.start == "patches" and self.patch_dim != self.embedding_dim:
            raise UserError(
                f"adaptor: the residual cannot add patch tokens of width {self.patch_dim} to an embedding of width "
                f"{self.embedding_dim}; turn it off (--no-residual), or use an encoder whose two widths are equal"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AdaptorConfig:
        """Return the config that `to_dict` wrote. Raises `UserError` on a missing or unknown field."""
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"adaptor config does not fit this version: {error}") from error


class EntityBatch(NamedTuple):
    """The adaptor's arguments."""

    patch_tokens_BPC: torch.Tensor
    image_mask_B: torch.Tensor
    text_tokens_BTL: torch.Tensor
    text_mask_BT: torch.Tensor
    image_embedding_BD: torch.Tensor


class Attention(nn.Module):
    """Multi-head attention (MHA in the paper's formula)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, queries_BQW: torch.Tensor, keys_BKW: torch.Tensor, mask_BK: torch.Tensor) -> torch.Tensor:
        """Return `[B, Q, W]`. `mask_BK` is true at the keys that may be attended to, at least one in each row."""
        attended_BHQE = F.scaled_dot_product_attention(
            self.split(self.query(queries_BQW)),
            self.split(self.key(keys_BKW)),
            self.split(self.value(keys_BKW)),
            attn_mask=mask_BK[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        out: torch.Tensor = self.out(attended_BHQE.transpose(1, 2).flatten(2))
        return out

    def split(self, tokens_BNW: torch.Tensor) -> torch.Tensor:
        """Split into heads: `[B, N, W]` to `[B, H, N, E]`."""
        batch, tokens, width = tokens_BNW.shape
        return tokens_BNW.reshape(batch, tokens, self.heads, width // self.heads).transpose(1, 2)

    def weights(self, queries_BQW: torch.Tensor, keys_BKW: torch.Tensor, mask_BK: torch.Tensor) -> torch.Tensor:
        """Return the attention of each query to each key, averaged over heads: `[B, Q, K]`. Rows add up to 1."""
        queries_BHQE, keys_BHKE = self.split(self.query(queries_BQW)), self.split(self.key(keys_BKW))
        logits_BHQK = queries_BHQE @ keys_BHKE.transpose(2, 3) / queries_BHQE.shape[-1] ** 0.5
        weights_BHQK: torch.Tensor = logits_BHQK.masked_fill(~mask_BK[:, None, None, :], -torch.inf).softmax(dim=-1)
        return weights_BHQK.mean(dim=1)


class DecoderLayer(nn.Module):
    """Optional self-attention, attention to the text, then the feed-forward network, each with a residual."""

    def __init__(self, config: AdaptorConfig) -> None:
        super().__init__()
        width = config.width
        self.pre_norm = config.norm == "pre"
        self.self_attention = Attention(width, config.heads, config.dropout) if config.self_attention else None
        self.self_norm = nn.LayerNorm(width) if config.self_attention else nn.Identity()
        self.text_attention = Attention(width, config.heads, config.dropout)
        self.text_norm = nn.LayerNorm(width)
        hidden = round(width * config.ffn_ratio)
        self.ffn = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(hidden, width)
        )
        self.ffn_norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self, queries_BQW: torch.Tensor, query_mask_BQ: torch.Tensor, text_BTW: torch.Tensor, text_mask_BT: torch.Tensor
    ) -> torch.Tensor:
        x = queries_BQW
        attention = self.self_attention
        if attention is not None:
            x = self._residual(x, self.self_norm, lambda x: attention(x, x, query_mask_BQ))
        x = self._residual(x, self.text_norm, lambda x: self.text_attention(x, text_BTW, text_mask_BT))
        return self._residual(x, self.ffn_norm, self.ffn)

    def _residual(
        self, x: torch.Tensor, norm: nn.Module, block: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        out: torch.Tensor = x + self.drop(block(norm(x))) if self.pre_norm else norm(x + self.drop(block(x)))
        return out


class Adaptor(nn.Module):
    """Map an entity's patch tokens, image embedding and text tokens to its embedding.

    Null queries run along with the patches of every sample, and pooling selects one or the other. Shapes therefore
    never depend on the data, and the module can be exported. Without layers, the embedding is the start.
    """

    def __init__(self, config: AdaptorConfig) -> None:
        super().__init__()
        self.config = config
        width, dim = config.width, config.embedding_dim
        if config.layers:
            self.patch_in = nn.Sequential(nn.LayerNorm(config.patch_dim), nn.Linear(config.patch_dim, width))
            self.text_in = nn.Sequential(nn.LayerNorm(config.text_dim), nn.Linear(config.text_dim, width))
            self.null_patches_NW = nn.Parameter(torch.randn(config.null_patch_tokens, width) * 0.5)
            self.null_text_W = nn.Parameter(torch.randn(width) * 0.5)
            self.final_norm = nn.LayerNorm(width) if config.norm == "pre" else nn.Identity()
            self.out = nn.Linear(width, dim)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        # Set before training and not learned: the mean query embedding (None without centring), and the regression of
        # `model.ridge`.
        self.centre_D: torch.Tensor | None
        self.ridge_LD: torch.Tensor
        self.ridge_bias_D: torch.Tensor
        self.mean_image_D: torch.Tensor
        self.text_share: torch.Tensor
        self.register_buffer("centre_D", torch.zeros(dim) if config.centre else None)
        if config.residual:
            if config.layers:
                nn.init.zeros_(self.out.weight)
                nn.init.zeros_(self.out.bias)
            # The start where there is nothing to start from. The zero vector has no direction.
            self.null_mean_D = nn.Parameter(torch.randn(dim) * dim**-0.5)
            if config.start == "image":
                self.register_buffer("ridge_LD", torch.zeros(config.text_dim, dim))
                self.register_buffer("ridge_bias_D", torch.zeros(dim))
                self.register_buffer("mean_image_D", torch.zeros(dim))
                self.register_buffer("text_share", torch.zeros(()))

    def forward(
        self,
        patch_tokens_BPC: torch.Tensor,
        image_mask_B: torch.Tensor,
        text_tokens_BTL: torch.Tensor,
        text_mask_BT: torch.Tensor,
        image_embedding_BD: torch.Tensor,
    ) -> torch.Tensor:
        """Return the L2-normalised entity embeddings `[B, D]`, `v` in the paper.

        `image_mask_B` is true where there is an image. Other rows of `patch_tokens_BPC` and `image_embedding_BD` are
        ignored. A sample whose row of `text_mask_BT` is all false has no text. P and T may be any number, T also 0.
        """
        start_BD, learned_BD = self.parts(
            EntityBatch(patch_tokens_BPC, image_mask_B, text_tokens_BTL, text_mask_BT, image_embedding_BD)
        )
        return F.normalize(start_BD + learned_BD, dim=1)

    def parts(self, batch: EntityBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the start and the learned output, `[B, D]` each. Their normalised sum is the embedding."""
        no_image_B1 = ~batch.image_mask_B[:, None]
        batch = batch._replace(  # zero, not only mask: NaN x 0 is NaN
            patch_tokens_BPC=batch.patch_tokens_BPC.masked_fill(no_image_B1[:, :, None], 0.0),
            text_tokens_BTL=batch.text_tokens_BTL.masked_fill(~batch.text_mask_BT[:, :, None], 0.0),
            image_embedding_BD=batch.image_embedding_BD.masked_fill(no_image_B1, 0.0),
        )
        start_BD = self._start(batch)
        return start_BD, self._learned(batch) if self.layers else torch.zeros_like(start_BD)

    @torch.no_grad()
    def scale_learned_(self, strength: float) -> None:
        """Multiply the learned output by a constant, for good."""
        if self.layers:
            self.out.weight.mul_(strength)
            self.out.bias.mul_(strength)

    def has_learned(self) -> bool:
        """Return whether anything is added to the start. Otherwise the attention to the text has no meaning."""
        return len(self.layers) > 0 and bool(self.out.weight.any())

    def _start(self, batch: EntityBatch) -> torch.Tensor:
        has_image_B1 = batch.image_mask_B[:, None]
        if not self.config.residual:
            return batch.image_embedding_BD.new_zeros(len(has_image_B1), self.config.embedding_dim)
        if self.config.start == "patches":
            # At length 1, the mean has the same weight against the learned part for every encoder.
            mean_BD = self.centred(F.normalize(batch.patch_tokens_BPC.mean(dim=1), dim=1))
            return torch.where(has_image_B1, mean_BD, self.null_mean_D)
        tokens_B1 = batch.text_mask_BT.sum(dim=1, keepdim=True)
        has_text_B1 = tokens_B1 > 0
        mean_text_BL = batch.text_tokens_BTL.sum(dim=1) / tokens_B1.clamp(min=1)
        deviation_BD = mean_text_BL @ self.ridge_LD + self.ridge_bias_D
        image_BD = self.centred(batch.image_embedding_BD)
        both_BD = (1 - self.text_share) * image_BD + self.text_share * F.normalize(deviation_BD, dim=1)
        text_BD = F.normalize(self.mean_image_D + deviation_BD, dim=1)
        with_image_BD = torch.where(has_text_B1, both_BD, image_BD)
        without_BD = torch.where(has_text_B1, text_BD, self.null_mean_D)
        return torch.where(has_image_B1, with_image_BD, without_BD)

    def _learned(self, batch: EntityBatch) -> torch.Tensor:
        size, patches, _ = batch.patch_tokens_BPC.shape
        null_patches_BNW = self.null_patches_NW.expand(size, -1, -1)
        x = torch.cat([self.patch_in(batch.patch_tokens_BPC), null_patches_BNW], dim=1)
        used_BQ = self.pooled_queries(batch.image_mask_B, patches)

        null_text_B1W = self.null_text_W.expand(size, 1, -1)
        text_BTW = torch.cat([null_text_B1W, self.text_in(batch.text_tokens_BTL)], dim=1)
        no_text_B1 = ~batch.text_mask_BT.any(dim=1, keepdim=True)
        attend_BT = torch.cat([no_text_B1, batch.text_mask_BT], dim=1)

        for layer in self.layers:
            x = layer(x, used_BQ, text_BTW, attend_BT)
        x = self.final_norm(x)

        weight_BQ1 = (used_BQ / used_BQ.sum(dim=1, keepdim=True)).to(x.dtype)[:, :, None]
        learned_BD: torch.Tensor = self.out((x * weight_BQ1).sum(dim=1))
        return learned_BD

    def pooled_queries(self, image_mask_B: torch.Tensor, patches: int) -> torch.Tensor:
        """Return the mask `[B, P + N]` of the queries that are pooled: the patches, or the null queries."""
        image_B1 = image_mask_B[:, None]
        nulls = self.config.null_patch_tokens
        return torch.cat([image_B1.expand(-1, patches), ~image_B1.expand(-1, nulls)], dim=1)

    def centred(self, image_embedding_BD: torch.Tensor) -> torch.Tensor:
        """Return query embeddings `[B, D]` in the space of the entity embeddings, from L2-normalised image embeddings.

        With centring, subtract the mean query embedding and normalise again. Without it, return them unchanged.
        """
        if self.centre_D is None:
            return image_embedding_BD
        return F.normalize(image_embedding_BD - self.centre_D, dim=1)

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


@torch.no_grad()
def embed_with_attention(adaptor: Adaptor, batch: EntityBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the entity embeddings `[B, D]` and the attention to each text token `[B, T]`.

    The attention is the mean over layers, heads and pooled queries. A row adds up to 1, or to 0 for an entity without
    text. The adaptor must be in evaluation mode.
    """
    weights_BT = torch.zeros(batch.text_mask_BT.shape, device=batch.text_mask_BT.device)
    used_BQ = adaptor.pooled_queries(batch.image_mask_B, batch.patch_tokens_BPC.shape[1])
    share_BQ1 = (used_BQ / used_BQ.sum(dim=1, keepdim=True))[:, :, None]

    def add_weights(module: nn.Module, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        assert isinstance(module, Attention)
        weights_BT.add_((module.weights(*inputs) * share_BQ1).sum(dim=1)[:, 1:])  # the first key is the null text

    with ExitStack() as hooks:
        for layer in adaptor.layers:
            assert isinstance(layer, DecoderLayer)
            hooks.callback(layer.text_attention.register_forward_pre_hook(add_weights).remove)
        embeddings_BD = adaptor(*batch)
    return embeddings_BD, weights_BT / max(1, len(adaptor.layers))
