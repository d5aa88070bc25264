"""The peers of `benchmarks/`: they still do the same work, and the comparison notices when they do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import peers
from benchmarks.contenders import daft_batch, dataloader, one_by_one
from jobs.demo import real_photos


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    for name, pixels in list(real_photos().items())[:4]:
        Image.fromarray(pixels).resize((640, 480)).save(folder / f"{name}.jpg", quality=90)
    return folder


def test_contenders_without_ray_agree(library: Path, tmp_path: Path) -> None:
    tables = {}
    for module in (one_by_one, dataloader, daft_batch):
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


def test_the_slope_leaves_start_up_out() -> None:
    """Ten photos in 15 s and fifty in 35 s: two a second, after ten seconds."""
    outcome = peers.Outcome.of({10: 15.0, 50: 35.0}, peak_bytes=0)
    assert (outcome.rate, outcome.steady_rate, outcome.start_s) == (50 / 35, 2.0, 10.0)


def test_ratios_are_taken_within_a_round() -> None:
    ours = [peers.Outcome(3.0, 4.0, 1.0, 1), peers.Outcome(6.0, 8.0, 1.0, 1)]
    ray = [peers.Outcome(1.0, 2.0, 1.0, 2), peers.Outcome(2.0, 2.0, 1.0, 4)]
    found = {row.what: list(row.ratios) for row in peers.rows({"ours": ours, "plain_ray": ray})}
    assert list(found.values()) == [[2.0, 4.0], [3.0, 3.0], [0.5, 0.25]]
