"""The Vision-Guided Knowledge Adaptor (VGKA): patch tokens ask, text tokens answer, the mean is the entity's embedding.

A Transformer decoder over frozen features, `V' = FFN(MHA(P, T, T))`, then the mean over patches, projected into the
space of the query embedding and L2-normalised. It is all that is trained.

What the paper leaves open is configured: self-attention among the patches (default off, as the formula reads), pre- or
post-norm (default pre). Two things are ours: both inputs pass a LayerNorm before their projection, because language
models have channels far larger than the rest; and learned stand-in tokens take the place of a missing image or text.

Shapes: B batch, P patches, T text tokens, C patch channels, L text channels, W width inside, D embedding, N stand-ins.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AdaptorConfig:
    """The shape of an adaptor. Raises `UserError` where the figures contradict each other."""

    patch_dim: int  # C
    text_dim: int  # L
    embedding_dim: int  # D
    width: int = 256  # W
    layers: int = 2
    heads: int = 8
    ffn_ratio: float = 4.0
    norm: str = "pre"
    self_attention: bool = False
    dropout: float = 0.0
    residual: bool = True  # add the mean patch token to the output, the output layer starting at zero
    null_patch_tokens: int = 8  # N: queries that stand in for a missing image
    centre: bool = False  # both sides of the comparison live around the mean query embedding

    def __post_init__(self) -> None:
        for name in (
            "patch_dim",
            "text_dim",
            "embedding_dim",
            "width",
            "layers",
            "heads",
            "ffn_ratio",
            "null_patch_tokens",
        ):
            if getattr(self, name) <= 0:
                raise UserError(f"adaptor: {name} must be above 0, it is {getattr(self, name)}")
        if self.width % self.heads:
            raise UserError(f"adaptor: width {self.width} is no multiple of heads {self.heads}; change one of them")
        if self.norm not in ("pre", "post"):
            raise UserError(f"adaptor: norm must be pre or post, not {self.norm!r}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"adaptor: dropout must be at least 0 and below 1, it is {self.dropout}")
        if self.residual and self.patch_dim != self.embedding_dim:
            raise UserError(
                f"adaptor: the residual adds patch tokens of width {self.patch_dim} to an embedding of width "
                f"{self.embedding_dim}; turn it off (--no-residual), or take an encoder whose two widths are equal"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AdaptorConfig:
        """The config that `to_dict` wrote. Raises `UserError` on a missing or unknown field."""
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"adaptor config does not fit this version: {error}") from error


class Attention(nn.Module):
    """Multi-head attention with keys and values from another sequence (or the same one)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, queries_BQW: torch.Tensor, keys_BKW: torch.Tensor, mask_BK: torch.Tensor) -> torch.Tensor:
        """`mask_BK` is true at the keys that may be attended to; at least one in each row. Returns `[B, Q, W]`."""
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
        """Heads apart: `[B, N, W]` to `[B, H, N, W / H]`."""
        batch, tokens, width = tokens_BNW.shape
        return tokens_BNW.reshape(batch, tokens, self.heads, width // self.heads).transpose(1, 2)


class DecoderLayer(nn.Module):
    """Self-attention if asked for, attention to the text, then the feed-forward network, each added to its input."""

    def __init__(self, config: AdaptorConfig) -> None:
        super().__init__()
        width = config.width
        self.pre_norm = config.norm == "pre"
        if config.self_attention:
            self.self_attention: Attention | None = Attention(width, config.heads, config.dropout)
            self.self_norm: nn.LayerNorm | None = nn.LayerNorm(width)
        else:
            self.self_attention = self.self_norm = None
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
        x: torch.Tensor = queries_BQW
        if self.self_attention is not None and self.self_norm is not None:
            if self.pre_norm:
                normed = self.self_norm(x)
                x = x + self.drop(self.self_attention(normed, normed, query_mask_BQ))
            else:
                x = self.self_norm(x + self.drop(self.self_attention(x, x, query_mask_BQ)))
        if self.pre_norm:
            x = x + self.drop(self.text_attention(self.text_norm(x), text_BTW, text_mask_BT))
            x = x + self.drop(self.ffn(self.ffn_norm(x)))
        else:
            x = self.text_norm(x + self.drop(self.text_attention(x, text_BTW, text_mask_BT)))
            x = self.ffn_norm(x + self.drop(self.ffn(x)))
        return x


class Adaptor(nn.Module):
    """Patch tokens and text tokens of an entity in, its embedding out.

    The stand-in queries run beside the patches of every sample and only the pooling chooses between them, so that
    shapes never depend on the data and the module can be exported.
    """

    def __init__(self, config: AdaptorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_in = nn.Sequential(nn.LayerNorm(config.patch_dim), nn.Linear(config.patch_dim, width))
        self.text_in = nn.Sequential(nn.LayerNorm(config.text_dim), nn.Linear(config.text_dim, width))
        self.null_patches_NW = nn.Parameter(torch.randn(config.null_patch_tokens, width) * 0.5)
        self.null_text_W = nn.Parameter(torch.randn(width) * 0.5)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(width) if config.norm == "pre" else nn.Identity()
        self.out = nn.Linear(width, config.embedding_dim)
        # The mean query embedding, set before training and never learned; None without centring.
        self.centre_D: torch.Tensor | None
        self.register_buffer("centre_D", torch.zeros(config.embedding_dim) if config.centre else None)
        if config.residual:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)
            # The residual of an entity without an image, whose embedding would otherwise start as the zero vector.
            self.null_mean_D = nn.Parameter(torch.randn(config.embedding_dim) * config.embedding_dim**-0.5)

    def forward(
        self,
        patch_tokens_BPC: torch.Tensor,
        image_mask_B: torch.Tensor,
        text_tokens_BTL: torch.Tensor,
        text_mask_BT: torch.Tensor,
    ) -> torch.Tensor:
        """The entity embeddings `[B, D]`, L2-normalised.

        `image_mask_B` is true where there is an image; what stands in `patch_tokens_BPC` elsewhere is ignored. A sample
        whose row of `text_mask_BT` is all false has no text. P and T may be any number, T also 0.
        """
        batch, patches, _ = patch_tokens_BPC.shape
        image_B1 = image_mask_B[:, None]
        # Zeroed, not only masked: NaN in an ignored place would still poison sums through NaN x 0.
        patch_tokens_BPC = patch_tokens_BPC.masked_fill(~image_B1[:, :, None], 0.0)
        text_tokens_BTL = text_tokens_BTL.masked_fill(~text_mask_BT[:, :, None], 0.0)

        null_patches_BNW = self.null_patches_NW.expand(batch, -1, -1)
        x = torch.cat([self.patch_in(patch_tokens_BPC), null_patches_BNW], dim=1)
        nulls = self.config.null_patch_tokens
        used_BQ = torch.cat([image_B1.expand(-1, patches), ~image_B1.expand(-1, nulls)], dim=1)

        null_text_B1W = self.null_text_W.expand(batch, 1, -1)
        text_BTW = torch.cat([null_text_B1W, self.text_in(text_tokens_BTL)], dim=1)
        no_text_B1 = ~text_mask_BT.any(dim=1, keepdim=True)
        attend_BT = torch.cat([no_text_B1, text_mask_BT], dim=1)

        for layer in self.layers:
            x = layer(x, used_BQ, text_BTW, attend_BT)
        x = self.final_norm(x)

        weight_BQ1 = (used_BQ / used_BQ.sum(dim=1, keepdim=True)).to(x.dtype)[:, :, None]
        embedding_BD: torch.Tensor = self.out((x * weight_BQ1).sum(dim=1))
        if self.config.residual:
            # The mean is brought to length 1 so that what is learned weighs the same whatever the encoder's scale.
            mean_BD = self.centred(F.normalize(patch_tokens_BPC.mean(dim=1), dim=1))
            embedding_BD = embedding_BD + torch.where(image_B1, mean_BD, self.null_mean_D)
        return F.normalize(embedding_BD, dim=1)

    def centred(self, image_embedding_BD: torch.Tensor) -> torch.Tensor:
        """An encoder's L2-normalised embeddings in the space of the entity embeddings: what queries are asked with.

        With centring they lose what all images share, the mean query embedding, and are brought to length 1 again;
        without it they are that space's already.
        """
        if self.centre_D is None:
            return image_embedding_BD
        return F.normalize(image_embedding_BD - self.centre_D, dim=1)

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
