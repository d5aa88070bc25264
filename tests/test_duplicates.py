"""Near-duplicates by perceptual hash, and the groups that they form."""

from __future__ import annotations

import numpy as np

from picinspector.duplicates import content_groups, near_pairs


def bits(*positions: int) -> int:
    return sum(1 << position for position in set(positions))


def test_groups_are_chains_of_near_hashes() -> None:
    far = 2**64 - 1
    hashes = np.array([0, bits(*range(10)), bits(*range(20)), far, far ^ bits(63)], dtype=np.uint64)
    assert near_pairs(hashes, 10).tolist() == [[0, 1], [1, 2], [3, 4]]
    assert content_groups(hashes, max_distance=10).tolist() == [0, 0, 0, 3, 3]
    assert content_groups(hashes, max_distance=9).tolist() == [0, 1, 2, 3, 3]


def test_groups_that_labels_name_stay_together() -> None:
    hashes = np.array([0, 2**64 - 1, 2**32 - 1], dtype=np.uint64)
    assert content_groups(hashes, ["shoot", None, "shoot"]).tolist() == [0, 1, 0]


def test_near_pairs_are_those_of_every_pair_compared() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 5000, dtype=np.uint64)  # more than one block
    hashes[4500:] = hashes[:500] ^ np.array([bits(*rng.integers(0, 64, 6).tolist()) for _ in range(500)], np.uint64)
    found = {(int(a), int(b)) for a, b in near_pairs(hashes, 6)}
    brute = {
        (a, b) for a in range(0, 500) for b in range(a + 1, 5000) if (int(hashes[a]) ^ int(hashes[b])).bit_count() <= 6
    }
    assert {pair for pair in found if pair[0] < 500} == brute
    assert len(brute) >= 500


def test_many_equal_hashes_are_one_group_without_a_pair_each() -> None:
    """60,000 of one hash would be 1.8 billion pairs."""
    hashes = np.zeros(60_000, dtype=np.uint64)
    hashes[1::2] = 2**64 - 1
    assert content_groups(hashes).tolist() == [0, 1] * 30_000


def test_nothing_has_no_groups() -> None:
    assert content_groups(np.array([], dtype=np.uint64)).tolist() == []
