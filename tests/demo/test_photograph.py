"""Synthetic photographs are reproducible, and `strength` scales their effects."""

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


def test_strength_zero_is_the_drawing_on_a_light_ground() -> None:
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


def test_restyling_at_strength_zero_changes_nothing_in_coloured_drawings() -> None:
    drawing = _drawing()
    assert torch.allclose(Photographer(0).restyle(drawing, torch.zeros(8)), drawing, atol=1e-4)


def test_compression_loses_more_at_higher_strength() -> None:
    photos = Photographer(1).photograph(_drawing(), 32, torch.ones(8))

    def loss(strength: float) -> float:
        compressed = Photographer(2).compress(photos, torch.full((8,), strength), probability=1.0)
        return float((compressed - photos).abs().mean())

    assert 0 < loss(0.1) < loss(1.0) < 0.1


def test_clean_drawings_are_not_compressed() -> None:
    photos = Photographer(1).photograph(_drawing(), 32, torch.linspace(0, 1, 8))
    strength = torch.tensor([0.0] * 4 + [1.0] * 4)
    compressed = Photographer(2).compress(photos, strength, probability=1.0)
    assert torch.equal(compressed[:4], photos[:4])
    assert ((compressed[4:] - photos[4:]).abs().amax((1, 2, 3)) > 0).all()
