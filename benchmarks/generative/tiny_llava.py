"""The baseline at a size that can be trained here: the built-in image encoder's patch tokens into a small Llama.

The network is LLaVA's (frozen tower, projector, language model) with AutoVER's retrieval head; only the tower is not
CLIP's but the very encoder that retrieval uses, so that the two methods see the same.

Shapes: B images, P patches, C patch channels, L prompt tokens, T tokens of a name with its end, R retrieval width, V
vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.generative.sizes import Size, Tower, build_model
from model.encoders import ImageEncoder

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

IGNORED = -100  # a label that is no token


def size_for(encoder: ImageEncoder, *, width: int = 160, layers: int = 3) -> Size:
    """A language model of about a million parameters beside its vocabulary, over this encoder's patches."""
    grid = round(encoder.patches**0.5)
    assert grid * grid == encoder.patches, "patches lie in a square"
    side = -(-grid // 2)
    size_px = encoder.preprocessing.size_px
    tower = Tower(width=encoder.patch_dim, layers=1, heads=1, size_px=size_px, patch_px=size_px // side)
    return Size(
        tower=tower, width=width, layers=layers, heads=4, key_value_heads=4, mlp_width=3 * width, tied=True,
        retrieval_dim=encoder.embedding_dim,
    )  # fmt: skip


def pooled(patch_tokens_BPC: torch.Tensor) -> torch.Tensor:
    """The mean of each two by two patches, about `[B, P / 4, C]`: a quarter of the tokens, as LLaVA's successors do it.

    Of an odd number of rows the last is halved along itself only, and so are columns.
    """
    batch, patches, channels = patch_tokens_BPC.shape
    side = round(patches**0.5)
    grid = patch_tokens_BPC.transpose(1, 2).reshape(batch, channels, side, side)
    return F.avg_pool2d(grid, 2, ceil_mode=True).flatten(2).transpose(1, 2)


class _FrozenTower(nn.Module):
    """The encoder's pooled patch tokens, where LLaVA looks for hidden states; scaled to a deviation of one."""

    scale: torch.Tensor

    def __init__(self, module: nn.Module, scale: float) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        patch_tokens_BPC = pooled(self.module(pixel_values)[0]) * self.scale
        return BaseModelOutputWithPooling(last_hidden_state=patch_tokens_BPC, hidden_states=(patch_tokens_BPC,))


class TinyLlava(nn.Module):
    """`model` and `head` are what `GenerativeRecognizer` takes; `forward` is what training needs of them."""

    def __init__(
        self, encoder: ImageEncoder, tower: nn.Module, *, scale: float, image_token: int, vocabulary: int
    ) -> None:
        super().__init__()
        model, head = build_model(size_for(encoder), image_token=image_token, vocabulary=vocabulary, device="cpu")
        model.config.vision_feature_layer = -1
        model.config.vision_feature_select_strategy = "full"  # there is no class token to leave out
        model.model.vision_tower = _FrozenTower(tower, scale)
        self.model: LlavaForConditionalGeneration = model
        self.head = head
        for part in (model.model.multi_modal_projector, model.model.language_model, model.lm_head, head):
            part.requires_grad_(True)
        tower.requires_grad_(False)

    def states(self, patch_tokens_BPC: torch.Tensor, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Last hidden states `[B, L, width]` over cached patch tokens, as the encoder gave them, and token ids."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        model: Any = self.model.model
        projected = model.multi_modal_projector(pooled(patch_tokens_BPC) * model.vision_tower.scale)
        image = BaseModelOutputWithPooling(pooler_output=list(projected))
        states: torch.Tensor = model(
            input_ids=tokens_BL, mm_encoder_outputs={"image": image}, use_cache=False
        ).last_hidden_state
        return states

    def retrieve(self, patch_tokens_BPC: torch.Tensor, prompt_1L: torch.Tensor) -> torch.Tensor:
        """Retrieval embeddings `[B, R]`, L2-normalised."""
        states = self.states(patch_tokens_BPC, prompt_1L.expand(len(patch_tokens_BPC), -1))
        return F.normalize(self.head(states[:, -1]), dim=1)

    def language_loss(self, names_BT: torch.Tensor, start: int) -> torch.Tensor:
        """The loss on names alone, behind the token `start`: what a language model brings along."""
        model: Any = self.model.model
        inputs_BT = F.pad(names_BT[:, :-1].clamp(min=0), (1, 0), value=start)
        states = model(input_ids=inputs_BT, use_cache=False).last_hidden_state
        wanted = names_BT != IGNORED
        loss: torch.Tensor = F.cross_entropy(self.model.lm_head(states[wanted]).float(), names_BT[wanted])
        return loss

    def losses(
        self, patch_tokens_BPC: torch.Tensor, prompt_1L: torch.Tensor, names_BT: torch.Tensor, logit_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The language model's loss on the names, and the contrast of first and second halves of the batch.

        Image `i` of the first half shows the entity of image `i` of the second. `names_BT` are token ids closed by the
        end, then `IGNORED`. The retrieval token's state says what to retrieve and predicts the name's first token.
        """
        length = prompt_1L.shape[1]
        inputs_BT = names_BT[:, :-1].clamp(min=0)
        tokens = torch.cat([prompt_1L.expand(len(names_BT), -1), inputs_BT], dim=1)
        states = self.states(patch_tokens_BPC, tokens)[:, length - 1 :]
        wanted = names_BT != IGNORED
        named = F.cross_entropy(self.model.lm_head(states[wanted]).float(), names_BT[wanted])
        one, other = F.normalize(self.head(states[:, 0]).float(), dim=1).chunk(2)
        logits = logit_scale * one @ other.T
        truth = torch.arange(len(one))
        return named, (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
