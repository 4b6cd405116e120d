"""What is hidden from the adaptor in training: an image, a text, some of a text's tokens.

Shapes: B batch, T text tokens.
"""

from __future__ import annotations

import numpy as np
import torch

from model.features import EntityKeys


def draw_modalities(
    entity: EntityKeys, query: bytes, modality_dropout: float, rng: np.random.Generator
) -> tuple[bytes | None, bytes | None]:
    """One of the entity's images at random and its text, of which one may be hidden, so that stand-ins are learned.

    The query's own image is never drawn: finding it again teaches nothing. Never are both hidden.
    """
    others = [image for image in entity.images if image != query]
    image = others[rng.integers(len(others))] if others else None
    chance = rng.random()
    if image is not None and entity.text is not None:
        if chance < modality_dropout:
            return None, entity.text
        if chance < 2 * modality_dropout:
            return image, None
    return image, entity.text


def hide_tokens(text_mask_BT: torch.Tensor, share: float) -> torch.Tensor:
    """The mask with each token hidden at a chance of `share`, by torch's own generator.

    A text that has tokens keeps at least one: none at all would say that the entity has no text.
    """
    if share == 0 or text_mask_BT.shape[1] == 0:
        return text_mask_BT
    chance_BT = torch.rand(text_mask_BT.shape, device=text_mask_BT.device).masked_fill(~text_mask_BT, -1.0)
    return text_mask_BT & ((chance_BT >= share) | (chance_BT == chance_BT.amax(dim=1, keepdim=True)))
