"""InfoNCE over pairs of query embedding and entity embedding.

The loss takes cosines, so that who stands in as a negative is decided before it and the softmax stays as it is.

Shapes: B pairs of a batch, D embedding; row i of `cosines_BB` is query i against the entity of every pair.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

MAX_LOGIT_SCALE = 100.0
INITIAL_LOGIT_SCALE = 1 / 0.07


class LogitScale(nn.Module):
    """1 / temperature, learned on a log scale; past `MAX_LOGIT_SCALE` training turns unstable."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_LOGIT_SCALE)))

    def forward(self) -> torch.Tensor:
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """To be called after each step. In `forward` a clamp would leave the parameter without gradient for good."""
        self.log_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))


def info_nce(cosines_BB: torch.Tensor, entity_B: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """The mean over queries of `-log softmax(logit_scale * cosines)` at the query's own pair.

    `entity_B` holds an integer for each pair's entity: another pair of the same entity is left out of the softmax,
    being neither the positive nor a negative.
    """
    same_BB = entity_B[:, None] == entity_B[None, :]
    others_BB = same_BB & ~torch.eye(len(entity_B), dtype=torch.bool, device=entity_B.device)
    logits_BB = (logit_scale * cosines_BB).masked_fill(others_BB, -torch.inf)
    return F.cross_entropy(logits_BB, torch.arange(len(entity_B), device=entity_B.device))
