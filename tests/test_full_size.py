"""The full bundle at full size, end to end: CLIP ViT-L/14 and DINOv2-base, random weights, from local folders."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from picinspector.bundle import fetch_full
from picinspector.cli import main
from tests.test_pipeline import make_library


@pytest.mark.usefixtures("local_ray")
def test_64_photos_through_vit_l_14_and_dinov2_base(
    full_size: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = fetch_full(tmp_path / "full", clip=full_size / "clip", dinov2=full_size / "dinov2", captions=False)
    library, dest = tmp_path / "library", tmp_path / "dest"
    make_library(library, 64)
    assert main(["score", str(library), "--out", str(dest), "--bundle", str(bundle.folder), "--json", "-q"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["counts"]["scored"] == 64
    assert record["bundle"]["scorer_kind"] == "zero_shot"

    table = pq.read_table(dest / "embeddings", columns=["clip_embedding", "dinov2_embedding"])
    assert table.num_rows == 64
    for name in ("clip_embedding", "dinov2_embedding"):
        column = table.column(name).combine_chunks()
        assert column.type.list_size == 768
        vectors = np.asarray(column.flatten()).reshape(64, 768).astype(np.float32)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=2e-3)
        assert len(np.unique(vectors, axis=0)) == 64
    rows = duckdb.sql(
        f"SELECT count(*), count(quality_score), count(predicted_mos), min(quality_score), max(quality_score) "
        f"FROM '{dest}/scores/**/*.parquet' WHERE scorer_kind = 'zero_shot'"
    ).fetchall()
    assert rows[0][:3] == (64, 64, 0)
    assert 1 <= rows[0][3] <= rows[0][4] <= 10
