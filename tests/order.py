"""Calls that show in which order the sums of dQ were made."""

import dataclasses

import numpy as np
from cases import Case

TILE = 128  # keys of the Hopper family's tiles in the calls that are made with this


@dataclasses.dataclass(frozen=True)
class Cancelling(Case):
    """Tiles of keys by threes: large ones, the same negated, and some of ordinary size.

    Queries are zero, so that all probabilities are equal, and the first two tiles of three have
    the same values, so that their parts of dQ cancel to the bit. Added in the order of keys,
    nothing is rounded away of the third's part; added between the other two, it is.

    apart: tiles of ordinary size that lie between the large ones and the negated.
    """

    apart: int = 0

    def arrays(self, dtype):
        arrays = super().arrays(dtype)
        arrays["query"] = np.zeros_like(arrays["query"])
        key, value = arrays["key"], arrays["value"]
        for first in range(0, self.k_len, (3 + self.apart) * TILE):
            large = slice(first, first + TILE)
            negated = slice(large.stop + self.apart * TILE, large.stop + (self.apart + 1) * TILE)
            key[:, large] *= 8192
            key[:, negated] = -key[:, large]
            value[:, negated] = value[:, large]
        return arrays
