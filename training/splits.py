"""Splits that keep photos of the same content together: by the official split, else by perceptual hash.

Photos whose 64-bit pHash (`phash` of the embeddings table) differs in few bits are near-duplicates: a burst, a crop, a
re-encoding. They, and chains of them, form a group; a group is never divided between train, validation and test.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from picinspector.errors import PhotoError, UsageError
from picinspector.photo import decode
from picinspector.storage import fetch

#: Bits of 64 by which near-duplicates may differ: the default of imagededup's `find_duplicates` for this hash
#: (idealo.github.io/imagededup); Krawetz, who described the hash ("Looks Like It", hackerfactor.com, 2011), takes more
#: than 10 bits for another photo. Measured on BIQ2021's 12,000 photos: all 127 pairs that a finer hash knows are within
#: 8; at 10 the largest group has 28 photos, at 14 chance chains 1,669 together.
MAX_DISTANCE_BITS = 10
#: Shares of photos that have no official split, train, validation and test; SPAQ's authors test on 20 % as well.
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
#: Share of an official train part that becomes validation where there is none.
VALIDATION_SHARE = 0.1

_BLOCK_ROWS = 4096
_FETCH_PHOTOS = 64


def hash_photos(uris: Sequence[str], workers: int = 4) -> np.ndarray:
    """The perceptual hash of every photo, as the library itself computes it: uint64 (N,).

    Args:
        uris: paths or fsspec URLs.
        workers: threads that decode; Pillow lets go of the interpreter lock.

    Raises:
        UsageError: a photo cannot be read; the message names it.
    """

    def hash_photo(uri: str, data: bytes | PhotoError) -> int:
        try:
            if isinstance(data, PhotoError):
                raise data
            return int(decode(data, []).facts["phash"])
        except PhotoError as error:
            raise UsageError(f"{uri}: {error.message}; take it out of the labels") from error

    hashes = []
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(uris), _FETCH_PHOTOS):
            batch = uris[start : start + _FETCH_PHOTOS]
            hashes += list(pool.map(hash_photo, batch, fetch(batch)))
    return np.array(hashes, dtype=np.uint64)


def near_pairs(phash: np.ndarray, max_distance: int = MAX_DISTANCE_BITS) -> np.ndarray:
    """Every pair of hashes at most `max_distance` bits apart: int64 (P, 2), the smaller index first.

    All pairs are compared, as blocks of one matrix product: exact at any distance, where an index of 64-bit hashes
    helps at small ones only. Two minutes for 100,000 photos on one core (extrapolated from 1.6 s for 12,000).

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

    Args:
        phash: uint64 (N,).
        known: groups that the labels name; photos of one stay together too.

    Returns:
        int64 (N,), the index of the first photo of each photo's group.
    """
    count = len(phash)
    pairs = near_pairs(phash, max_distance)
    first_of: dict[str, int] = {}
    links = [(first_of.setdefault(name, row), row) for row, name in enumerate(known or ()) if name is not None]
    edges = np.concatenate([pairs, np.array(links, dtype=np.int64).reshape(-1, 2)])
    graph = coo_array((np.ones(len(edges), dtype=bool), (edges[:, 0], edges[:, 1])), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    _, first = np.unique(component, return_index=True)
    return np.asarray(first[component], dtype=np.int64)


def split_by_content(
    groups: np.ndarray,
    official: Sequence[str | None] | None = None,
    shares: dict[str, float] | None = None,
    seed: int = 0,
) -> list[str]:
    """A split for every photo: the official one where there is one, else its group's.

    A photo without an official split follows a near-duplicate that has one (test before validation before train), so
    that nothing like a test photo is trained on. Other groups are dealt out by `shares` of the photos.

    Args:
        groups: (N,) from `content_groups`.
        official: one of `datasets.SPLITS` or None for each photo. Kept as it is, even where a group is divided by it.
        shares: part -> share of the photos; default `SHARES`.
        seed: of the order.
    """
    shares = shares or SHARES
    official = official if official is not None else [None] * len(groups)
    part_of: dict[int, str] = {}
    for part in ("train", "validation", "test"):  # a later one wins
        part_of |= {int(group): part for group, split in zip(groups, official, strict=True) if split == part}
    open_groups, sizes = np.unique([group for group in groups if int(group) not in part_of], return_counts=True)
    part_of |= _deal(open_groups, sizes, shares, seed)
    return [split if split is not None else part_of[int(group)] for split, group in zip(official, groups, strict=True)]


def cut_validation(
    splits: Sequence[str], groups: np.ndarray, share: float = VALIDATION_SHARE, seed: int = 0
) -> list[str]:
    """Turn a share of the train photos, by whole groups, into validation where there is none yet."""
    if "validation" in splits:
        return list(splits)
    train = np.array([split == "train" for split in splits])
    names, sizes = np.unique(groups[train], return_counts=True)
    part_of = _deal(names, sizes, {"train": 1.0 - share, "validation": share}, seed)
    return [
        part_of[int(group)] if is_train else split for split, group, is_train in zip(splits, groups, train, strict=True)
    ]


def _deal(names: np.ndarray, sizes: np.ndarray, shares: dict[str, float], seed: int) -> dict[int, str]:
    """Group -> part. Large groups first, equal ones in random order, each to the part that lacks most photos."""
    lacks = {part: share * int(sizes.sum()) for part, share in shares.items()}
    order = np.random.default_rng(seed).permutation(len(names))
    part_of: dict[int, str] = {}
    for index in order[np.argsort(-sizes[order], kind="stable")]:
        part = max(lacks, key=lambda name: lacks[name])
        part_of[int(names[index])] = part
        lacks[part] -= int(sizes[index])
    return part_of
