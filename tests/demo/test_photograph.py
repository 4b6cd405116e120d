"""Photographs of drawings: repeatable, gentle at strength 0, hard at strength 1."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from demo.photograph import Photographer, premultiply, through_jpeg, to_jpeg, to_tensor


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


@pytest.mark.parametrize("quality", [30, 60, 90])
def test_jpeg_in_batches_loses_what_a_jpeg_file_loses(quality: int) -> None:
    photos = Photographer(1).photograph(_drawing(), 32, torch.linspace(0.2, 1, 8))
    files = torch.stack([to_tensor(Image.open(io.BytesIO(to_jpeg(photo, quality)))) for photo in photos])
    ours = through_jpeg(photos, torch.full((8,), quality))
    assert (ours - files).abs().mean() < 0.3 * (photos - files).abs().mean()


def test_each_photograph_has_its_own_quality() -> None:
    photos = Photographer(1).photograph(_drawing(), 32, torch.ones(8))
    qualities = torch.linspace(30, 95, 8).long()
    together = through_jpeg(photos, qualities)
    for photo, quality, alone in zip(photos, qualities, together, strict=True):
        assert torch.allclose(through_jpeg(photo[None], quality[None])[0], alone, atol=1e-6)


def test_compression_leaves_clean_drawings_alone() -> None:
    photos = Photographer(1).photograph(_drawing(), 32, torch.linspace(0, 1, 8))
    strength = torch.tensor([0.0] * 4 + [1.0] * 4)
    compressed = Photographer(2).compress(photos, strength, probability=1.0)
    assert torch.equal(compressed[:4], photos[:4])
    assert ((compressed[4:] - photos[4:]).abs().amax((1, 2, 3)) > 0).all()
