"""The attention that is told is the attention that was used."""

from __future__ import annotations

import pytest
import torch

from model.adaptor import Adaptor, AdaptorConfig, Attention, embed_with_attention


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image_mask_B = torch.tensor([True, False, True])
    text_mask_BT = torch.tensor([[True] * 5, [True, True, True, False, False], [False] * 5])
    patches = torch.randn(3, 4, 8, generator=generator)
    texts = torch.randn(3, 5, 6, generator=generator)
    return patches, image_mask_B, texts, text_mask_BT


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("self_attention", [False, True])
def test_listening_changes_no_embedding(norm: str, self_attention: bool) -> None:
    torch.manual_seed(0)
    config = AdaptorConfig(
        patch_dim=8, text_dim=6, embedding_dim=8, width=16, heads=4, norm=norm, self_attention=self_attention
    )
    adaptor = Adaptor(config).eval()
    embeddings, weights = embed_with_attention(adaptor, *_inputs())
    assert torch.equal(embeddings, adaptor(*_inputs()))
    assert not adaptor.layers[0].text_attention._forward_pre_hooks
    assert weights.sum(dim=1).tolist() == pytest.approx([1, 1, 0], abs=1e-5)
    assert (weights[1, 3:] == 0).all()
    assert (weights >= 0).all()


def test_the_weights_are_those_that_mix_the_values() -> None:
    """With them the module's own output is made again, head by head."""
    torch.manual_seed(0)
    attention = Attention(12, 1, 0.0).eval()
    queries, keys = torch.randn(2, 3, 12), torch.randn(2, 5, 12)
    mask = torch.tensor([[True, True, False, True, True], [True, False, False, False, False]])
    mixed = attention.out(attention.weights(queries, keys, mask) @ attention.value(keys))
    assert torch.allclose(mixed, attention(queries, keys, mask), atol=1e-5)


def test_the_mean_is_over_the_queries_that_take_part() -> None:
    """An entity without an image is heard through the stand-ins alone, whatever stands in its patches."""
    torch.manual_seed(0)
    adaptor = Adaptor(AdaptorConfig(patch_dim=8, text_dim=6, embedding_dim=8, width=16, heads=4)).eval()
    patches, image_mask, texts, text_mask = _inputs()
    _, first = embed_with_attention(adaptor, patches, image_mask, texts, text_mask)
    _, other = embed_with_attention(adaptor, patches + 7 * ~image_mask[:, None, None], image_mask, texts, text_mask)
    assert torch.allclose(first, other)
    _, without = embed_with_attention(adaptor, patches, torch.zeros(3, dtype=torch.bool), texts, text_mask)
    assert torch.allclose(first[1], without[1], atol=1e-6)
    assert not torch.allclose(first[0], without[0], atol=1e-6)
