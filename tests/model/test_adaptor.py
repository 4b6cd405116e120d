"""The adaptor, and the attention that it reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from core.errors import UserError
from model.adaptor import Adaptor, AdaptorConfig, Attention, EntityBatch, embed_with_attention


def config(**changes: Any) -> AdaptorConfig:
    values: dict[str, Any] = {"patch_dim": 12, "text_dim": 10, "embedding_dim": 12, "width": 16, "heads": 4}
    return AdaptorConfig(**{**values, **changes})


def adaptor(**changes: Any) -> Adaptor:
    """Return an adaptor whose output layer is not zero, so the output depends on the input."""
    torch.manual_seed(0)
    module = Adaptor(config(**changes)).eval()
    if module.layers:
        torch.nn.init.normal_(module.out.weight)
    if module.config.start == "image":
        torch.nn.init.normal_(module.ridge_LD)
        module.text_share.fill_(0.4)
    return module


def inputs(batch: int = 4, patches: int = 9, tokens: int = 7) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [
        torch.randn(batch, patches, 12),
        torch.ones(batch, dtype=torch.bool),
        torch.randn(batch, tokens, 10),
        torch.ones(batch, tokens, dtype=torch.bool),
        F.normalize(torch.randn(batch, 12), dim=1),
    ]


VARIANTS = [
    {},
    {"start": "image"},
    {"start": "image", "layers": 0},
    {"norm": "post"},
    {"self_attention": True},
    {"self_attention": True, "norm": "post", "layers": 1},
    {"residual": False, "embedding_dim": 20},
    {"null_patch_tokens": 1, "ffn_ratio": 1.5},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_embeddings_are_unit_vectors_and_depend_on_both_modalities(changes: dict[str, Any]) -> None:
    module, arguments = adaptor(**changes), inputs()
    with torch.no_grad():
        embedding_BD = module(*arguments)
        assert embedding_BD.shape == (4, module.config.embedding_dim)
        torch.testing.assert_close(embedding_BD.norm(dim=1), torch.ones(4))
        for changed in (range(0, 3, 2), range(2, 5, 2)):  # image, text
            other = [torch.randn_like(each) if number in changed else each for number, each in enumerate(arguments)]
            assert (module(*other) - embedding_BD).norm(dim=1).min() > 1e-3


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize(("image", "text"), [(True, True), (False, True), (True, False), (False, False)])
def test_a_sample_alone_equals_the_sample_in_a_padded_batch(changes: dict[str, Any], image: bool, text: bool) -> None:
    module = adaptor(**changes)
    patches, image_mask, tokens, text_mask, embeddings = inputs()
    image_mask[1] = image
    text_mask[1] = text
    text_mask[1, 4:] = False
    tokens[1, 4:] = torch.nan  # hidden tokens must not matter
    if not image:
        patches[1] = torch.nan
        embeddings[1] = torch.nan
    if not text:
        tokens[1] = torch.nan
    with torch.no_grad():
        together = module(patches, image_mask, tokens, text_mask, embeddings)[1]
        length = 4 if text else 0
        alone = module(
            patches[1:2] if image else torch.zeros(1, 3, 12),
            image_mask[1:2],
            tokens[1:2, :length],
            text_mask[1:2, :length],
            embeddings[1:2] if image else torch.zeros(1, 12),
        )[0]
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_the_residual_starts_at_the_mean_patch_token() -> None:
    torch.manual_seed(0)
    module, (patches, image_mask, tokens, text_mask, embeddings) = Adaptor(config()).eval(), inputs()
    image_mask[3] = False
    with torch.no_grad():
        embedding_BD = module(patches, image_mask, tokens, text_mask, embeddings)
    torch.testing.assert_close(embedding_BD[:3], F.normalize(patches.mean(dim=1), dim=1)[:3])
    torch.testing.assert_close(embedding_BD[3], F.normalize(module.null_mean_D, dim=0))


def test_the_start_is_the_image_mixed_with_what_the_text_predicts() -> None:
    """Without an image it is the prediction alone, without a text the image."""
    module = adaptor(start="image", layers=0)
    module.ridge_bias_D.normal_()
    module.mean_image_D.normal_()
    patches, image_mask, tokens, text_mask, embeddings = inputs(batch=4)
    image_mask[1], text_mask[2], image_mask[3], text_mask[3] = False, False, False, False
    text_mask[0, 4:] = False
    found = module(patches, image_mask, tokens, text_mask, embeddings)
    deviation_D = tokens[0, :4].mean(dim=0) @ module.ridge_LD + module.ridge_bias_D
    mixed_D = 0.6 * embeddings[0] + 0.4 * F.normalize(deviation_D, dim=0)
    torch.testing.assert_close(found[0], F.normalize(mixed_D, dim=0))
    alone_D = module.mean_image_D + tokens[1].mean(dim=0) @ module.ridge_LD + module.ridge_bias_D
    torch.testing.assert_close(found[1], F.normalize(alone_D, dim=0))
    torch.testing.assert_close(found[2], embeddings[2])
    torch.testing.assert_close(found[3], F.normalize(module.null_mean_D, dim=0))


def test_the_strength_is_folded_into_the_weights() -> None:
    module, arguments = adaptor(start="image"), inputs()
    with torch.no_grad():
        start_BD, learned_BD = module.parts(EntityBatch(*arguments))
        module.scale_learned_(0.25)
        torch.testing.assert_close(module(*arguments), F.normalize(start_BD + 0.25 * learned_BD, dim=1))
    assert module.has_learned()
    module.scale_learned_(0.0)
    assert not module.has_learned()


def test_a_residual_start_learns() -> None:
    torch.manual_seed(0)
    module, arguments = Adaptor(config()).train(), inputs()
    arguments[1][0] = False
    arguments[3][1] = False
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    target_BD = F.normalize(torch.randn(4, 12), dim=1)
    losses = []
    for _ in range(30):
        loss = (1 - (module(*arguments) * target_BD).sum(dim=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_the_order_of_patches_and_tokens_does_not_matter() -> None:
    module, (patches, image_mask, tokens, text_mask, embeddings) = adaptor(self_attention=True), inputs()
    with torch.no_grad():
        straight = module(patches, image_mask, tokens, text_mask, embeddings)
        shuffled = module(patches.flip(1), image_mask, tokens.flip(1), text_mask, embeddings)
    torch.testing.assert_close(straight, shuffled, atol=1e-6, rtol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    module, arguments = adaptor(dropout=0.5), inputs()
    torch.testing.assert_close(module(*arguments), module(*arguments))
    module.train()
    assert (module(*arguments) - module(*arguments)).abs().max() > 1e-3


def test_config_round_trips_and_rejects_unknown_fields() -> None:
    original = config(norm="post", dropout=0.2)
    assert AdaptorConfig.from_dict(original.to_dict()) == original
    with pytest.raises(UserError, match="unexpected"):
        AdaptorConfig.from_dict({**original.to_dict(), "unexpected": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_dim": 20}, "--no-residual"),
        ({"heads": 3}, "multiple of heads"),
    ],
)
def test_contradictory_sizes_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**changes)


@pytest.mark.parametrize("changes", VARIANTS)
def test_an_empty_batch_has_no_embeddings_and_a_gradient_of_zero(changes: dict[str, Any]) -> None:
    module = adaptor(**changes)
    embedding_BD = module(*inputs(batch=0, tokens=0))
    assert embedding_BD.shape == (0, module.config.embedding_dim)
    embedding_BD.sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("text_dim", "changes", "count"),
    [
        (2048, {}, "45.28 M"),
        (3072, {}, "46.59 M"),
        (2048, {"self_attention": True}, "58.40 M"),
        (3072, {"self_attention": True}, "59.71 M"),
        (2048, {"self_attention": True, "ffn_ratio": 8}, "84.62 M"),
        (3072, {"self_attention": True, "ffn_ratio": 8}, "85.94 M"),
    ],
)
def test_parameter_count_at_the_papers_sizes(text_dim: int, changes: dict[str, Any], count: str) -> None:
    """EVA-CLIP-8B's widths with LLaMA 3.2 1B or 3B. The paper has about 0.08 B parameters."""
    with torch.device("meta"):
        module = Adaptor(
            AdaptorConfig(
                patch_dim=1280,
                text_dim=text_dim,
                embedding_dim=1280,
                width=1280,
                heads=16,
                residual=False,
                **changes,
            )
        )
    assert f"{module.parameter_count() / 1e6:.2f} M" == count
    page = (Path(__file__).resolve().parents[2] / "docs" / "method.md").read_text(encoding="utf-8")
    assert count in page
    assert 0.04e9 < module.parameter_count() < 0.09e9


def test_centring_subtracts_the_mean_from_both_sides_and_is_saved_with_the_weights() -> None:
    """An untrained adaptor returns the mean patch token, which centring maps to the equal query."""
    centre_D = torch.full((12,), 0.2)
    module = Adaptor(config(centre=True)).eval()
    assert module.centre_D is not None
    module.centre_D.copy_(centre_D)
    arguments = inputs()
    mean_BD = F.normalize(arguments[0].mean(dim=1), dim=1)
    with torch.no_grad():
        torch.testing.assert_close(module(*arguments), F.normalize(mean_BD - centre_D, dim=1))
        torch.testing.assert_close(module.centred(mean_BD), module(*arguments))
    assert "centre_D" not in dict(module.named_parameters())
    twin = Adaptor(config(centre=True))
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(twin.centred(mean_BD), module.centred(mean_BD))
    without = Adaptor(config())
    assert without.centred(mean_BD) is mean_BD
    assert "centre_D" not in without.state_dict()


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image_mask_B = torch.tensor([True, False, True])
    text_mask_BT = torch.tensor([[True] * 5, [True, True, True, False, False], [False] * 5])
    patches = torch.randn(3, 4, 8, generator=generator)
    texts = torch.randn(3, 5, 6, generator=generator)
    return patches, image_mask_B, texts, text_mask_BT, torch.randn(3, 8, generator=generator)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("self_attention", [False, True])
def test_recording_attention_changes_no_embedding(norm: str, self_attention: bool) -> None:
    torch.manual_seed(0)
    config = AdaptorConfig(
        patch_dim=8, text_dim=6, embedding_dim=8, width=16, heads=4, norm=norm, self_attention=self_attention
    )
    adaptor = Adaptor(config).eval()
    embeddings, weights = embed_with_attention(adaptor, EntityBatch(*_inputs()))
    assert torch.equal(embeddings, adaptor(*_inputs()))
    assert not adaptor.layers[0].text_attention._forward_pre_hooks
    assert weights.sum(dim=1).tolist() == pytest.approx([1, 1, 0], abs=1e-5)
    assert (weights[1, 3:] == 0).all()
    assert (weights >= 0).all()


def test_the_weights_reproduce_the_modules_output() -> None:
    """With one head, weights times values equal the module's output."""
    torch.manual_seed(0)
    attention = Attention(12, 1, 0.0).eval()
    queries, keys = torch.randn(2, 3, 12), torch.randn(2, 5, 12)
    mask = torch.tensor([[True, True, False, True, True], [True, False, False, False, False]])
    mixed = attention.out(attention.weights(queries, keys, mask) @ attention.value(keys))
    assert torch.allclose(mixed, attention(queries, keys, mask), atol=1e-5)


def test_the_mean_is_over_the_pooled_queries() -> None:
    """Without an image, only the null queries count, whatever the patch tokens are."""
    torch.manual_seed(0)
    adaptor = Adaptor(AdaptorConfig(patch_dim=8, text_dim=6, embedding_dim=8, width=16, heads=4)).eval()
    patches, image_mask, *rest = _inputs()
    _, first = embed_with_attention(adaptor, EntityBatch(patches, image_mask, *rest))
    _, other = embed_with_attention(adaptor, EntityBatch(patches + 7 * ~image_mask[:, None, None], image_mask, *rest))
    assert torch.allclose(first, other)
    _, without = embed_with_attention(adaptor, EntityBatch(patches, torch.zeros(3, dtype=torch.bool), *rest))
    assert torch.allclose(first[1], without[1], atol=1e-6)
    assert not torch.allclose(first[0], without[0], atol=1e-6)
