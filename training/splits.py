"""Splits that keep photos of the same content together: by the official split, else by perceptual hash.

A group of near-duplicates (`picinspector.duplicates`) is never divided between train, validation and test.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from picinspector.errors import PhotoError, UsageError
from picinspector.photo import decode
from picinspector.storage import fetch

#: Shares of photos that have no official split, train, validation and test; SPAQ's authors test on 20 % as well.
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
#: Share of an official train part that becomes validation where there is none.
VALIDATION_SHARE = 0.1

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
        groups: (N,) from `duplicates.content_groups`.
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
