"""Seeded orders that are the same on every machine, library version and number of processes.

An item's place is decided by a hash of (seed, item), so no state has to be carried or saved, and
numpy's generators, whose streams may change between versions, are not involved.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea and Flood, 2014): a bijection of 64-bit words in
    which every input bit changes about half of the output bits."""
    z = (values + np.uint64(_GOLDEN)).astype(np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def key(*numbers: int) -> int:
    """One 64-bit key of several integers; the order of them counts."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = mix(state ^ mix(np.array([number & _MASK], np.uint64)))
    return int(state[0])


def permutation(count: int, *numbers: int) -> NDArray[np.int64]:
    """The integers below `count` in an order drawn from the key of `numbers`."""
    hashes = mix(np.arange(count, dtype=np.uint64) ^ np.uint64(key(*numbers)))
    return np.argsort(hashes, kind="stable").astype(np.int64, copy=False)
