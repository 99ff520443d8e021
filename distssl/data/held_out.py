"""Which labelled images are the test where a run names no others: a fifth, the same for every run."""

from __future__ import annotations

import numpy as np

from distssl.data import draws

SEED = 0x5EED


def split(ids: np.ndarray, share: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Part ids, int64 [N], into train and test by a hash of each, so that neither depends on the others."""
    test = draws.hash64(SEED, ids) < np.uint64(share * 2**64)
    return ids[~test], ids[test]
