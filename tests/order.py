"""Calls that show in which order the sums of dQ were made."""

import dataclasses

import numpy as np
from cases import Case

TILE = 128  # keys of the Hopper family's tiles in the calls that are made with this


@dataclasses.dataclass(frozen=True)
class Cancelling(Case):
    """Tiles of keys by threes or more: a large one, the same negated, and some of ordinary size.

    Queries are zero, so that all probabilities are equal, and the first two tiles have the same
    values, so that their parts of dQ cancel to the bit. Added in the order of keys, nothing is
    rounded away of the others' parts; added before the second of the two, it is.

    ordinary: tiles of that size after each two.
    """

    ordinary: int = 1

    def arrays(self, dtype):
        arrays = super().arrays(dtype)
        arrays["query"] = np.zeros_like(arrays["query"])
        key, value = arrays["key"], arrays["value"]
        for first in range(0, self.k_len, (2 + self.ordinary) * TILE):
            large, negated = (slice(x, x + TILE) for x in (first, first + TILE))
            key[:, large] *= 8192
            key[:, negated] = -key[:, large]
            value[:, negated] = value[:, large]
        return arrays
