from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from model.losses import MAX_LOGIT_SCALE, LogitScale, info_nce


def slow_info_nce(cosines: list[list[float]], entities: list[int], scale: float) -> float:
    total = 0.0
    for i, row in enumerate(cosines):
        denominator = 0.0
        for j, cosine in enumerate(row):
            if i == j or entities[i] != entities[j]:
                denominator += math.exp(scale * cosine)
        total += -math.log(math.exp(scale * row[i]) / denominator)
    return total / len(cosines)


@pytest.mark.parametrize("entities", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 2, 1, 0], [7, 7, 7, 7, 7, 8]])
def test_equals_the_formula(entities: list[int]) -> None:
    torch.manual_seed(0)
    queries, values = (F.normalize(torch.randn(6, 5, dtype=torch.float64), dim=1) for _ in range(2))
    cosines_BB = queries @ values.T
    loss = info_nce(cosines_BB, torch.tensor(entities), torch.tensor(9.0, dtype=torch.float64))
    assert loss.item() == pytest.approx(slow_info_nce(cosines_BB.tolist(), entities, 9.0), rel=1e-9)


def test_another_pair_of_the_same_entity_gets_no_gradient() -> None:
    cosines_BB = torch.rand(3, 3, requires_grad=True)
    loss = info_nce(cosines_BB, torch.tensor([4, 9, 4]), torch.tensor(5.0))
    loss.backward()  # type: ignore[no-untyped-call]
    assert cosines_BB.grad is not None
    assert cosines_BB.grad[0, 2] == cosines_BB.grad[2, 0] == 0
    assert cosines_BB.grad[0, 1] > 0 > cosines_BB.grad[0, 0]


def test_a_batch_of_one_entity_has_no_loss_and_no_nan() -> None:
    assert info_nce(torch.rand(4, 4), torch.tensor([1, 1, 1, 1]), torch.tensor(5.0)).item() == 0


def test_the_scale_is_held_and_can_come_back() -> None:
    scale = LogitScale()
    with torch.no_grad():
        scale.log_scale.fill_(20.0)
    scale.clamp_()
    assert scale().item() == pytest.approx(MAX_LOGIT_SCALE)
    scale().backward()
    assert scale.log_scale.grad is not None
    assert scale.log_scale.grad.item() == pytest.approx(MAX_LOGIT_SCALE, rel=1e-4)
