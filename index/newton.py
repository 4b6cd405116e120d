"""Newton's method, for the convex losses that are fitted at export. Shapes: F weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_MAX_STEPS = 100
_LEAST_SIZE = 1e-6  # of a step

Float64Array = npt.NDArray[np.float64]


def minimise(
    loss: Callable[[Float64Array], float],
    derivatives: Callable[[Float64Array], tuple[Float64Array, Float64Array]],
    count: int,
    *,
    tolerance: float,
) -> Float64Array:
    """The weights `[F]` with the least loss, from zero on, `count` of them.

    `derivatives` gives gradient `[F]` and Hessian `[F, F]`. Ends where a step gains less than `tolerance` of the loss,
    or of 1 where that is more.
    """
    weights_F = np.zeros(count)
    before = loss(weights_F)
    for _ in range(_MAX_STEPS):
        gradient_F, hessian_FF = derivatives(weights_F)
        step_F = np.linalg.solve(hessian_FF, gradient_F)
        size = 1.0
        while size > _LEAST_SIZE and loss(weights_F - size * step_F) > before:
            size /= 2  # far from the optimum a full step can overshoot
        weights_F = weights_F - size * step_F
        after = loss(weights_F)
        if before - after < tolerance * max(1.0, before):
            break
        before = after
    return weights_F
