"""Photos of the same content: a burst, a crop, a re-encoding.

Photos whose 64-bit pHash (`phash` of the embeddings table) differs in few bits are near-duplicates. They, and chains of
them, form a group. What is learnt from labels must not be checked on photos of a group that it has seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

#: Bits of 64 by which near-duplicates may differ: the default of imagededup's `find_duplicates` for this hash
#: (idealo.github.io/imagededup); Krawetz, who described the hash ("Looks Like It", hackerfactor.com, 2011), takes more
#: than 10 bits for another photo. Measured on BIQ2021's 12,000 photos: all 127 pairs that a finer hash knows are within
#: 8; at 10 the largest group has 28 photos, at 14 chance chains 1,669 together.
MAX_DISTANCE_BITS = 10

_BLOCK_ROWS = 4096


def near_pairs(phash: np.ndarray, max_distance: int = MAX_DISTANCE_BITS) -> np.ndarray:
    """Every pair of hashes at most `max_distance` bits apart: int64 (P, 2), the smaller index first.

    All pairs are compared, as blocks of one matrix product: exact at any distance, where an index of 64-bit hashes
    helps at small ones only. Time grows with N squared, so 100,000 photos are about the limit: two minutes on one core
    (extrapolated from 1.6 s for 12,000). Memory is 0.3 GB at most, and 16 bytes a pair that is found.

    Args:
        phash: uint64 (N,).
    """
    bits = np.unpackbits(phash.astype(">u8").view(np.uint8).reshape(-1, 8), axis=1)  # (N, 64)
    signs = bits.astype(np.float32) * 2 - 1  # their product is 64 - 2 x distance
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(signs), _BLOCK_ROWS):
        for other in range(start, len(signs), _BLOCK_ROWS):
            product = signs[start : start + _BLOCK_ROWS] @ signs[other : other + _BLOCK_ROWS].T
            left, right = np.nonzero(product >= 64 - 2 * max_distance)
            found = np.stack([left + start, right + other], axis=1)
            pairs.append(found[found[:, 0] < found[:, 1]])
    return np.concatenate(pairs)


def content_groups(
    phash: np.ndarray, known: Sequence[str | None] | None = None, max_distance: int = MAX_DISTANCE_BITS
) -> np.ndarray:
    """Groups of photos with the same content: connected components of near-duplicates.

    The limit is that of `near_pairs`, where N counts different hashes: equal ones cost nothing.

    Args:
        phash: uint64 (N,).
        known: groups that are known otherwise; photos of one stay together too.

    Returns:
        int64 (N,), the index of the first photo of each photo's group.
    """
    count = len(phash)
    distinct, first_with, index = np.unique(phash, return_index=True, return_inverse=True)
    equal = np.stack([np.arange(count), first_with[index]], axis=1)
    near = first_with[near_pairs(distinct, max_distance)]
    first_of: dict[str, int] = {}
    links = [(first_of.setdefault(name, row), row) for row, name in enumerate(known or ()) if name is not None]
    edges = np.concatenate([equal, near, np.array(links, dtype=np.int64).reshape(-1, 2)])
    graph = coo_array((np.ones(len(edges), dtype=bool), (edges[:, 0], edges[:, 1])), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    _, first = np.unique(component, return_index=True)
    return np.asarray(first[component], dtype=np.int64)
