"""Whether an adaptor's weights may be stored in half precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.adaptor import Adaptor
from model.features import EntityKeys, FeatureStore
from model.validation import embed

# Below this cosine between an embedding by float16 weights and by float32 ones, halving them would cost something.
_HALF_COSINE = 0.9999
_HALF_SAMPLE = 256


def half_cosine(adaptor: Adaptor, store: FeatureStore, entities: Sequence[EntityKeys], device: torch.device) -> float:
    """The lowest cosine between embeddings by float32 weights and by float16 ones, over a sample of the entities."""
    some = entities[:: max(1, len(entities) // _HALF_SAMPLE)]
    rows = [(entity.images[0] if entity.images else None, entity.text) for entity in some]
    halved = Adaptor(adaptor.config).to(device).eval()
    halved.load_state_dict({name: tensor.half().float() for name, tensor in adaptor.state_dict().items()})
    full_ND, half_ND = embed(adaptor, store, rows, device), embed(halved, store, rows, device)
    return (full_ND * half_ND).sum(dim=1).min().item()


def halving_is_free(cosine: float) -> bool:
    """Whether weights may be stored in float16; False also where halving them overflows."""
    return cosine >= _HALF_COSINE
