"""Images of nothing: each its own, the same each time, of many kinds."""

from __future__ import annotations

import numpy as np
import pytest

from export.outliers import outlier_images


@pytest.mark.parametrize("size_px", [1, 32, 112])
def test_they_are_pixels_of_the_size_asked_for(size_px: int) -> None:
    images = list(outlier_images(20, size_px))
    assert len(images) == 20
    assert {(image.shape, image.dtype) for image in images} == {((size_px, size_px, 3), np.dtype(np.uint8))}
    assert list(outlier_images(0, size_px)) == []


def test_they_are_the_same_each_time_and_others_by_another_seed() -> None:
    def made(count: int, seed: int = 0) -> list[bytes]:
        return [image.tobytes() for image in outlier_images(count, 32, seed=seed)]

    assert made(20)[:9] == made(9)
    assert len({*made(20), *made(20, seed=1)}) == 40


def test_some_are_plain_some_smooth_some_noisy() -> None:
    values = np.stack(list(outlier_images(80, 48))).astype(float)
    spread_B = values.std(axis=(1, 2)).max(axis=1)
    steps_B = np.abs(np.diff(values, axis=2)).mean(axis=(1, 2, 3))  # between neighbours
    assert (spread_B == 0).sum() == 10
    assert ((spread_B > 20) & (steps_B < 4)).sum() >= 10  # gradients, regions
    assert (steps_B > 20).sum() >= 10  # noise, fine stripes
