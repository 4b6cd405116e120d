"""Images of nothing: each its own, the same each time, of many kinds."""

from __future__ import annotations

import numpy as np
import pytest

from export.outliers import outlier_images


@pytest.mark.parametrize("size_px", [1, 32, 112])
def test_they_are_pixels_of_the_size_asked_for(size_px: int) -> None:
    images_BSS3 = outlier_images(20, size_px)
    assert images_BSS3.shape == (20, size_px, size_px, 3)
    assert images_BSS3.dtype == np.uint8
    assert outlier_images(0, size_px).shape == (0, size_px, size_px, 3)


def test_they_are_the_same_each_time_and_others_by_another_seed() -> None:
    assert np.array_equal(outlier_images(20, 32), outlier_images(20, 32))
    assert np.array_equal(outlier_images(20, 32)[:9], outlier_images(9, 32))
    assert not np.array_equal(outlier_images(20, 32), outlier_images(20, 32, seed=1))


def test_no_two_are_alike_and_some_are_plain_some_noisy() -> None:
    images_BSS3 = outlier_images(80, 48)
    assert len({image.tobytes() for image in images_BSS3}) == 80
    values = images_BSS3.astype(float)
    spread_B = values.std(axis=(1, 2)).max(axis=1)
    steps_B = np.abs(np.diff(values, axis=2)).mean(axis=(1, 2, 3))  # between neighbours
    assert (spread_B == 0).sum() == 10
    assert ((spread_B > 20) & (steps_B < 4)).sum() >= 10  # gradients, regions
    assert (steps_B > 20).sum() >= 10  # noise, fine stripes
