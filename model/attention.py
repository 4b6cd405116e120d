"""What an adaptor listened to: the weight that each text token had in making an entity's embedding.

Shapes: B batch, P patches, T text tokens, C patch channels, L text channels, D embedding, Q queries, K keys.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch

from model.adaptor import Adaptor, Attention, DecoderLayer


@torch.no_grad()
def embed_with_attention(
    adaptor: Adaptor,
    patch_tokens_BPC: torch.Tensor,
    image_mask_B: torch.Tensor,
    text_tokens_BTL: torch.Tensor,
    text_mask_BT: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The entity embeddings `[B, D]` and, beside them, the attention to each text token `[B, T]`.

    The attention is the mean over layers, heads and the queries that take part; a row adds up to 1, to 0 for an entity
    without text. The adaptor must be in evaluation mode.
    """
    weights_BT = torch.zeros(text_mask_BT.shape, device=text_mask_BT.device)
    patches = patch_tokens_BPC.shape[1]
    # The queries of the adaptor are the patches and behind them the stand-ins; which of them take part is per entity.
    image_B1 = image_mask_B[:, None]
    used_BQ = torch.cat([image_B1.expand(-1, patches), ~image_B1.expand(-1, adaptor.config.null_patch_tokens)], dim=1)
    share_BQ1 = (used_BQ / used_BQ.sum(dim=1, keepdim=True))[:, :, None]

    def listen(module: torch.nn.Module, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        assert isinstance(module, Attention)
        attention_BQK = attention_weights(module, *inputs)
        weights_BT.add_((attention_BQK * share_BQ1).sum(dim=1)[:, 1:])  # the first key stands in for a missing text

    with ExitStack() as hooks:
        for layer in adaptor.layers:
            assert isinstance(layer, DecoderLayer)
            hooks.callback(layer.text_attention.register_forward_pre_hook(listen).remove)
        embeddings_BD = adaptor(patch_tokens_BPC, image_mask_B, text_tokens_BTL, text_mask_BT)
    return embeddings_BD, weights_BT / len(adaptor.layers)


def attention_weights(
    attention: Attention, queries_BQW: torch.Tensor, keys_BKW: torch.Tensor, mask_BK: torch.Tensor
) -> torch.Tensor:
    """How much each query attends to each key, the mean over heads: `[B, Q, K]`, rows adding up to 1."""
    queries_BHQE = attention.split(attention.query(queries_BQW))
    keys_BHKE = attention.split(attention.key(keys_BKW))
    logits_BHQK = queries_BHQE @ keys_BHKE.transpose(2, 3) / queries_BHQE.shape[-1] ** 0.5
    weights_BHQK: torch.Tensor = logits_BHQK.masked_fill(~mask_BK[:, None, None, :], -torch.inf).softmax(dim=-1)
    return weights_BHQK.mean(dim=1)
