"""Splits by content."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from jobs.demo import real_photos
from picinspector.duplicates import content_groups
from picinspector.errors import UsageError
from training.splits import cut_validation, hash_photos, split_by_content


def test_no_group_is_divided_and_shares_are_met() -> None:
    groups = np.repeat(np.arange(400), np.random.default_rng(1).integers(1, 6, 400))
    splits = np.array(split_by_content(groups, seed=3))
    assert all(len(set(splits[groups == group])) == 1 for group in range(400))
    shares = [float((splits == part).mean()) for part in ("train", "validation", "test")]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.005)


def test_the_seed_alone_decides() -> None:
    groups = np.arange(100)
    assert split_by_content(groups, seed=1) == split_by_content(groups, seed=1)
    assert split_by_content(groups, seed=1) != split_by_content(groups, seed=2)


def test_the_official_split_stays_and_lookalikes_follow_it() -> None:
    groups = np.array([0, 0, 0, 3, 3])
    official = ["train", "test", None, "validation", None]
    assert split_by_content(groups, official) == ["train", "test", "test", "validation", "validation"]


def test_validation_is_cut_from_train_alone_and_by_whole_groups() -> None:
    groups = np.repeat(np.arange(100), 2)
    splits = ["test"] * 40 + ["train"] * 160
    cut = cut_validation(splits, groups, share=0.25, seed=0)
    assert cut[:40] == ["test"] * 40
    assert cut.count("validation") == 40
    assert all(cut[row] == cut[row + 1] for row in range(0, 200, 2))
    assert cut_validation(cut, groups) == cut  # there is one now


def test_a_smaller_and_recompressed_copy_is_the_same_content(tmp_path: Path) -> None:
    photos = real_photos()
    paths = []
    for name, pixels in photos.items():
        image = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        small = cv2.resize(image, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
        for kind, version in (("whole.png", image), ("small.jpg", small)):
            paths.append(str(tmp_path / f"{name}-{kind}"))
            cv2.imwrite(paths[-1], version)
    groups = content_groups(hash_photos(paths))
    assert groups.tolist() == [2 * (row // 2) for row in range(2 * len(photos))]


def test_a_photo_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no photo")
    with pytest.raises(UsageError, match=r"bad\.jpg"):
        hash_photos([str(tmp_path / "bad.jpg")])
