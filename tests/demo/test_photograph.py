"""Photographs of drawings: repeatable, gentle at strength 0, hard at strength 1."""

from __future__ import annotations

import torch

from demo.photograph import Photographer, premultiply


def _drawing() -> torch.Tensor:
    drawing = torch.zeros(8, 4, 48, 48)
    drawing[:, 0, 12:36, 12:36] = 1.0
    drawing[:, 3, 12:36, 12:36] = 1.0
    return premultiply(drawing)


def test_the_same_seed_gives_the_same_photographs() -> None:
    strength = torch.linspace(0, 1, 8)
    first, second = (Photographer(3).photograph(_drawing(), 32, strength) for _ in range(2))
    other = Photographer(4).photograph(_drawing(), 32, strength)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_strength_zero_leaves_the_drawing_on_a_light_ground() -> None:
    photo = Photographer(0).photograph(_drawing(), 32, torch.zeros(8))
    assert photo.shape == (8, 3, 32, 32)
    assert (photo[:, 0, 14:18, 14:18] > 0.95).all()  # red in the middle
    assert (photo[:, 1, 14:18, 14:18] < 0.05).all()
    assert (photo[:, :, 0, 0] > 0.8).all()  # light in the corner


def test_strength_one_changes_more_than_strength_zero() -> None:
    clean = Photographer(0).photograph(_drawing(), 32, torch.zeros(8))
    hard = Photographer(0).photograph(_drawing(), 32, torch.ones(8))
    assert (hard - clean).abs().mean() > 0.1
    assert hard.min() >= 0
    assert hard.max() <= 1


def test_restyling_at_strength_zero_changes_nothing_but_single_colours() -> None:
    drawing = _drawing()
    assert torch.allclose(Photographer(0).restyle(drawing, torch.zeros(8)), drawing, atol=1e-4)
