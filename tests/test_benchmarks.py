"""The peers of `benchmarks/`: they still do the same work, and the comparison notices when they do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import peers
from benchmarks.contenders import dataloader, one_by_one
from jobs.demo import real_photos


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    for name, pixels in list(real_photos().items())[:4]:
        Image.fromarray(pixels).resize((640, 480)).save(folder / f"{name}.jpg", quality=90)
    return folder


def test_contenders_without_ray_agree(library: Path, tmp_path: Path) -> None:
    tables = {}
    for module in (one_by_one, dataloader):
        out = tmp_path / module.__name__
        assert module.work(library, out) == 4
        tables[module.__name__] = peers.read_embeddings(out)
    peers.check_same(tables)


def _table(**clip: tuple[float, float]) -> dict[str, dict[str, np.ndarray]]:
    return {"clip_embedding": {name: np.array(values) for name, values in clip.items()}}


def test_other_embeddings_are_noticed() -> None:
    reference = _table(a=(1.0, 0.0), b=(0.0, 1.0))
    peers.check_same({"x": reference, "y": _table(a=(1.0, 0.0))})  # a part of the photos is enough
    with pytest.raises(RuntimeError, match=r"clip_embedding of x and y: cosine 0\.6"):
        peers.check_same({"x": reference, "y": _table(a=(0.6, 0.8), b=(0.0, 1.0))})
    with pytest.raises(RuntimeError, match="other photos"):
        peers.check_same({"x": reference, "y": _table(a=(1.0, 0.0), c=(0.0, 1.0))})


def test_a_closer_photo_is_noticed_where_all_are_close() -> None:
    a, b = (1.0, 0.0), (0.99, np.sqrt(1 - 0.99**2))
    with pytest.raises(RuntimeError, match=r"closer by 0\.010"):
        peers.check_same({"x": _table(a=a, b=b), "y": _table(a=b, b=a)})


def _outcome(small_s: float, large_s: float, peak_bytes: int = 1) -> peers.Outcome:
    return peers.Outcome(10, 50, small_s, large_s, peak_bytes)


def test_the_slope_leaves_start_up_out() -> None:
    """Forty photos more in 20 s and in 40 s more than the small library's median, 15 s."""
    rounds = [_outcome(15, 35), _outcome(90, 55), _outcome(15, 35)]
    assert peers.steady_rates(rounds) == [2.0, 1.0, 2.0]
    assert [outcome.rate for outcome in rounds] == [50 / 35, 50 / 55, 50 / 35]
    with pytest.raises(RuntimeError, match="quieter machine"):
        peers.steady_rates([_outcome(15, 15)])


def test_ratios_are_taken_within_a_round() -> None:
    ours, ray = [_outcome(0, 25, 1), _outcome(0, 5, 1)], [_outcome(0, 50, 2), _outcome(0, 50, 4)]
    found = {row.what: list(row.ratios) for row in peers.rows({"ours": ours, "plain_ray": ray})}
    assert list(found.values()) == [[2.0, 10.0], [2.0, 10.0], [0.5, 0.25]]
