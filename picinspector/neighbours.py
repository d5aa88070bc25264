"""Which embeddings are alike: pairs of a high cosine, among thousands by all products, among millions by an index."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

#: Up to so many, every pair is looked at: seconds.
EXACT_ROWS = 20_000
#: Neighbours of a photo that are looked at beyond that. A series longer than this hangs together by its chain.
_NEIGHBOURS = 32
_BLOCK_ROWS = 2048
#: Of the inverted file (Sivic & Zisserman 2003; faiss): lists, of which so many are searched, and vectors that each is
#: learnt from. Measured: `python -m benchmarks.grouping`.
_LISTS_PER_ROOT = 4
_PROBES = 16
_TRAINED_ON = 40


def alike(
    vectors: np.ndarray, least: float, confirmed: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Pairs of vectors whose cosine is `least` or more.

    Up to `EXACT_ROWS` all of them. Beyond, of each vector's 32 nearest, those that an inverted file finds; the same on
    every call with the same number of threads.

    Args:
        vectors: float16 (N, D), L2-normalised; rows of zeros are like none.
        least: of the cosine, above 0.
        confirmed: rows (P,) and rows (P,) to bool (P,), which pairs count. Asked block by block: of photos that are all
            of one thing there are more pairs than fit.
        seed: of the lists' centroids.

    Returns:
        int64 (P, 2), the smaller index first, each pair once, in order; their cosines, float32 (P,).
    """
    pairs = _exact(vectors, least) if len(vectors) <= EXACT_ROWS else _indexed(vectors, least, seed)
    found = [_only(confirmed, *part) for part in pairs]
    left, right, cosine = (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else _NONE
    first, last = np.minimum(left, right), np.maximum(left, right)
    _, index = np.unique(first * len(vectors) + last, return_index=True)
    return np.stack([first[index], last[index]], axis=1), cosine[index]


_NONE = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
_Found = tuple[np.ndarray, np.ndarray, np.ndarray]


def _only(
    confirmed: Callable[[np.ndarray, np.ndarray], np.ndarray] | None, left: np.ndarray, right: np.ndarray,
    cosine: np.ndarray,
) -> _Found:  # fmt: skip
    keep = confirmed(left, right) if confirmed is not None else slice(None)
    return left[keep], right[keep], cosine[keep]


def _exact(vectors: np.ndarray, least: float) -> Iterator[_Found]:
    wide = vectors.astype(np.float32)
    for start in range(0, len(wide), _BLOCK_ROWS):
        product = wide[start : start + _BLOCK_ROWS] @ wide[start:].T  # (B, N - start)
        left, right = np.nonzero(np.triu(product >= least, 1))
        yield left + start, right + start, product[left, right]


def _indexed(vectors: np.ndarray, least: float, seed: int) -> Iterator[_Found]:
    import faiss

    count, width = vectors.shape
    lists = int(_LISTS_PER_ROOT * count**0.5)
    quantizer = faiss.IndexFlatIP(width)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, width, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
    )
    index.cp.seed, index.cp.niter, index.cp.spherical = seed, 8, True
    rows = np.random.default_rng(seed).choice(count, min(count, _TRAINED_ON * lists), replace=False)
    index.train(vectors[np.sort(rows)].astype(np.float32))
    for start in range(0, count, 65536):
        index.add(vectors[start : start + 65536].astype(np.float32))
    index.nprobe = _PROBES
    for start in range(0, count, 16384):
        cosine, found = index.search(vectors[start : start + 16384].astype(np.float32), _NEIGHBOURS + 1)
        row, rank = np.nonzero(
            (cosine >= least) & (found >= 0) & (found != np.arange(start, start + len(found))[:, None])
        )
        yield row + start, found[row, rank], cosine[row, rank]
