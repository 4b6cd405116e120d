"""Which entities a search may find."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Selection:
    """A filter, made once and used by many searches; searches with one and the same selection can go together.

    `types` is what was asked for, `allowed_E` bool [E] says of each row of the store whether it may be found.
    """

    types: tuple[str, ...]
    allowed_E: npt.NDArray[np.bool_]
